"""Many keys at once: as batches where the server takes them, else call by call."""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Literal, cast

from yarl import URL

from aiokv.backends.capabilities import Entry, Omitted
from aiokv.backends.http.calls import Call, Calls
from aiokv.backends.http.transport import Answer
from aiokv.batch_wire import cut_entries, cut_keys, parse_outcomes, parse_values
from aiokv.errors import CallError, UnsupportedError
from aiokv.extension_wire import MAX_EXTENSION_ANSWER_BYTES, batch_path
from aiokv.wire import Verb

Outcome = str | Omitted | CallError | None

MAX_BATCHED_VALUE_BYTES: Final = 256 * 1024
"""A larger value travels alone: it gains nothing from company, which would have to be sent again with it."""

_CONCURRENT_CALLS = 16
_CONCURRENT_BATCHES = 4
# Of a batch as a whole: it holds something that the server does not take, or is too large for a proxy.
_SPLITTING_STATUSES = frozenset({400, 413})
# Answers to a single call that say nothing of other keys.
_KEY_STATUSES = frozenset({400, 404, 413, 500, 507})
_NAMES: dict[Verb, str] = {"get": "get_many", "set": "set_many", "delete": "delete_many"}


class Batches(Calls):
    """The calls of one service, those for many keys at once among them."""

    @property
    def batches_are_atomic(self) -> Literal[False]:
        """Return False; see `BatchBackend`: a batch may travel in parts."""
        return False

    async def get_many(self, db_name: str, keys: Sequence[str]) -> Sequence[Outcome]:
        """Read values; see `BatchBackend.get_many`."""
        unique = list(dict.fromkeys(keys))
        outcomes = await _Many(self, "get", db_name, unique, [], self.loop.time()).run()
        return outcomes if len(unique) == len(keys) else _in_order(keys, unique, outcomes)

    async def read_many(self, db_name: str, keys: Sequence[str], started: float) -> Sequence[Outcome]:
        """Read the values of different keys like `get_many`, as part of calls that have begun before.

        Args:
            db_name: The namespace.
            keys: The keys.
            started: The loop's time at which the calls began.

        Returns:
            An outcome for each key.

        Raises:
            CallError: No key could be read.
        """
        return await _Many(self, "get", db_name, list(keys), [], started).run()

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Sequence[CallError | None]:
        """Store values; see `BatchBackend.set_many`."""
        # The last one of a key wins, so the others need not travel.
        last = {entry.key: entry for entry in entries}
        return await self._write_many("set", db_name, [entry.key for entry in entries], list(last), list(last.values()))

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> Sequence[CallError | None]:
        """Delete entries; see `BatchBackend.delete_many`."""
        return await self._write_many("delete", db_name, keys, list(dict.fromkeys(keys)), [])

    async def _write_many(
        self, verb: Verb, db_name: str, keys: Sequence[str], unique: list[str], entries: list[Entry]
    ) -> Sequence[CallError | None]:
        """Write once the earlier writes of these keys have ended; later ones wait for all of it."""
        started = self.loop.time()
        turn = self._writes.enter_all(db_name, unique)
        try:
            if turn.previous:
                await self.wait_for_turn(turn, _NAMES[verb], db_name, "", started)
            outcomes = await _Many(self, verb, db_name, unique, entries, started).run()
        finally:
            self._writes.leave(turn)
        return cast("Sequence[CallError | None]", _in_order(keys, unique, outcomes))


class _Many:
    """The calls for many different keys, and what became of each key."""

    def __init__(  # noqa: PLR0913, PLR0917 (what is to be done)
        self, calls: Calls, verb: Verb, db_name: str, keys: list[str], entries: list[Entry], started: float
    ) -> None:
        self.calls = calls
        self._verb: Verb = verb
        self._db_name = db_name
        self._keys = keys
        self._entries = entries
        self._started = started
        self._outcomes: list[Outcome] = [None] * len(keys)
        # Why nothing more is sent: the host has failed.
        self._failure: CallError | None = None

    async def run(self) -> list[Outcome]:
        """Make the calls; raise where none of the keys has an answer."""
        if not self._keys:
            return []
        extensions, first, count = self.calls.extensions, 0, len(self._keys)
        if count == 1 or not extensions.is_known:
            # The answer to one key tells whether the server takes batches.
            first = 1
            await self._run_first(is_only=count == 1)
        if not extensions.has_batch or count - first <= 1:
            await self._run_singles(range(first, count))
            return self._outcomes
        alone: list[int] = []
        together = list(range(first, count))
        if self._entries:
            alone = [index for index in together if self._is_large(index)]
            together = [index for index in together if not self._is_large(index)] if alone else together
        batches = [(together[start:end], body) for start, end, body in self.cut(together)]
        is_all = len(batches) == 1 and not alone and not first
        await _run_all([partial(self._run_batch, *batch, is_all=is_all) for batch in batches], _CONCURRENT_BATCHES)
        await self._run_singles(alone)
        return self._outcomes

    def _is_large(self, index: int) -> bool:
        value = self._entries[index].value
        return len(value) > MAX_BATCHED_VALUE_BYTES or (
            len(value) * 4 > MAX_BATCHED_VALUE_BYTES and len(value.encode()) > MAX_BATCHED_VALUE_BYTES
        )

    def cut(self, indexes: list[int]) -> list[tuple[int, int, bytes]]:
        if self._entries:
            return list(cut_entries([self._entries[index] for index in indexes]))
        return list(cut_keys(self._verb, [self._keys[index] for index in indexes]))

    async def _run_batch(self, indexes: list[int], body: bytes, *, is_all: bool) -> None:
        """Send a batch; note what became of each key, unless that holds for all keys: then raise it."""
        if self._failure is not None:
            self._note_not_tried(indexes, self._failure)
            return
        batch = _Batch(self, indexes)
        try:
            await self.calls.run(self.batch_call(indexes, body), self._started, batch.attempt)
        except CallError as error:
            if error is batch.rest:
                # Each key has an error of its own already.
                pass
            elif isinstance(error, UnsupportedError) or error.status in _SPLITTING_STATUSES:
                await self._run_singles(batch.pending)
                self.mark_applied(batch.pending if batch.may_be_applied else ())
            elif is_all and not batch.is_partial:
                raise
            else:
                self._failure = error
                for index in batch.pending:
                    self._outcomes[index] = self._own(error, index)
        self._fill_in(indexes, batch.attempts)

    def note(self, index: int, outcome: Outcome, *, may_be_applied: bool) -> bool:
        """Note what became of a key; return whether it may become better."""
        before, self._outcomes[index] = self._outcomes[index], outcome
        if not isinstance(outcome, CallError):
            return False
        if may_be_applied or (isinstance(before, CallError) and before.maybe_applied):
            self.mark_applied([index])
        return outcome.transient

    def failures(self, indexes: Sequence[int]) -> list[CallError]:
        """Return the errors of keys that have failed so far."""
        return [cast("CallError", self._outcomes[index]) for index in indexes]

    def mark_applied(self, indexes: Sequence[int]) -> None:
        """Note of failed writes that an earlier attempt may have been applied."""
        for index in indexes:
            error = self._outcomes[index]
            if isinstance(error, CallError) and not error.maybe_applied:
                error.reason += "; an earlier attempt may have been applied"
                error.maybe_applied = True

    def _fill_in(self, indexes: Sequence[int], attempts: int) -> None:
        """Let each key's error tell of the key."""
        elapsed: float | None = None
        for index in indexes:
            error = self._outcomes[index]
            if isinstance(error, CallError):
                error.verb, error.db_name, error.key, error.host = (
                    self._verb,
                    self._db_name,
                    self._keys[index],
                    self.calls.host,
                )
                if not error.attempts:
                    error.attempts = attempts
                if error.elapsed is None:
                    elapsed = elapsed or self.calls.loop.time() - self._started
                    error.elapsed = elapsed

    def _own(self, error: CallError, index: int) -> CallError:
        """Return the error of all keys as one key's own."""
        own = copy.copy(error)
        own.__cause__ = error.__cause__
        own.verb, own.key = self._verb, self._keys[index]
        return own

    def _note_not_tried(self, indexes: Sequence[int], failure: CallError) -> None:
        for index in indexes:
            error = self._outcomes[index] = self._own(failure, index)
            error.reason = f"not tried, since the call for another key failed: {failure.reason}"
            error.attempts, error.maybe_applied = 0, False

    async def _run_first(self, *, is_only: bool) -> None:
        try:
            self._outcomes[0] = await self._single(0)
        except CallError as error:
            if is_only or error.status not in _KEY_STATUSES:
                raise
            self._outcomes[0] = error

    async def _run_singles(self, indexes: Sequence[int]) -> None:
        """Make a call for each key; begin none after the host has failed one."""
        remaining = iter(indexes)

        async def work() -> None:
            for index in remaining:
                if self._failure is not None:
                    self._note_not_tried([index], self._failure)
                    continue
                try:
                    self._outcomes[index] = await self._single(index)
                except CallError as error:
                    self._outcomes[index] = error
                    if error.status not in _KEY_STATUSES:
                        self._failure = error

        await _run_all([work] * min(_CONCURRENT_CALLS, len(indexes)), _CONCURRENT_CALLS)

    async def _single(self, index: int) -> str | None:
        key = self._keys[index]
        if self._entries:
            _, value, ttl_seconds = self._entries[index]
            call = self.calls.entry_call("set", self._db_name, key, value, ttl_seconds)
        else:
            call = self.calls.entry_call(self._verb, self._db_name, key)
        return cast("str | None", await self.calls.run(call, self._started))

    def batch_call(self, indexes: Sequence[int], body: bytes) -> Call:
        values = tuple({self._entries[index].value for index in indexes}) if self._entries else ()
        url = self.calls.extension_url(batch_path(self._db_name))
        return _BatchCall(self._verb, self._db_name, url, body, values, len(indexes))


class _BatchCall(Call):
    """The request of one batch."""

    content_type = "application/json"
    extension = "batch"
    max_answer_bytes = MAX_EXTENSION_ANSWER_BYTES

    def __init__(  # noqa: PLR0913, PLR0917 (what a batch is)
        self, verb: Verb, db_name: str, url: URL, body: bytes, values: tuple[str, ...], count: int
    ) -> None:
        super().__init__(_NAMES[verb], db_name, "", url, "POST", verb != "get", body, values)
        self._count = count

    def parse(self, answer: Answer, calls: Calls, header: str | None) -> Any:
        """Return an outcome for each key."""
        return (parse_outcomes if self.write else parse_values)(answer.body, self._count, calls.secrets_of_call(self, header))


class _Batch:
    """One batch on its way: attempt by attempt, each with the keys that failed for a while in the one before."""

    def __init__(self, many: _Many, indexes: list[int]) -> None:
        self._many = many
        self.pending = indexes
        self.attempts = 0
        # Whether an answer has told of each key; those that are pending have errors of their own then.
        self.is_partial = False
        self.may_be_applied = False
        # Stands for the errors of the pending keys, so that they are tried again as one call is.
        self.rest: CallError | None = None

    async def attempt(self, call: Call, deadline: float) -> None:
        self.attempts += 1
        many = self._many
        if self.is_partial:
            ((_, _, body),) = many.cut(self.pending)
            call = many.batch_call(self.pending, body)
        try:
            outcomes: list[Outcome] = await many.calls.attempt(call, deadline)
        except CallError as error:
            self.may_be_applied = self.may_be_applied or error.maybe_applied
            raise
        self.is_partial = True
        self.pending = [
            index
            for index, outcome in zip(self.pending, outcomes, strict=True)
            if many.note(index, outcome, may_be_applied=self.may_be_applied)
        ]
        if self.pending:
            errors = many.failures(self.pending)
            self.rest = copy.copy(errors[0])
            self.rest.maybe_applied = any(error.maybe_applied for error in errors)
            raise self.rest


def _in_order(keys: Sequence[str], unique: list[str], outcomes: list[Outcome]) -> list[Outcome]:
    """Return the outcomes of different keys for keys that may come twice."""
    by_key = dict(zip(unique, outcomes, strict=True))
    return [by_key[key] for key in keys]


async def _run_all(works: Sequence[Callable[[], Awaitable[None]]], most: int) -> None:
    """Do several things, at most so many at once."""
    if len(works) <= 1:
        for work in works:
            await work()
        return
    remaining = iter(works)

    async def go() -> None:
        for work in remaining:
            await work()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(most, len(works))):
                group.create_task(go())
    except BaseExceptionGroup as errors:
        # Of the credentials: a failed call is noted by its key.
        raise errors.exceptions[0] from None
