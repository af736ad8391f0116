"""Many keys at once, in batches or call by call, and an error that tells what became of each key."""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from aiokv.backends.capabilities import MAX_BATCH_BYTES, MAX_BATCH_KEYS, Entry, Omitted
from aiokv.errors import AioKVError, BatchError, CallError, ResponseError
from aiokv.limits import size_bytes

T = TypeVar("T")

# Their values and answers are in memory at once: 32 MiB at most, and as much again where they are encoded.
_MAX_BATCHES_UNDER_WAY = 4

Outcome = str | Omitted | Exception | None


async def call_each(
    keys: list[str], call: Callable[[str], Awaitable[T]], concurrency: int, results: dict[str, T] | None = None
) -> dict[str, T]:
    """Make one call for each key; start no further one after a failure.

    Args:
        keys: Different keys.
        call: Make the call for one key.
        concurrency: How many calls are under way at once, 1 or more.
        results: Gets each key's result at once, also where others fail or this call is cancelled.

    Returns:
        Each key with its result, in the order of the keys.

    Raises:
        BatchError: A call failed; it holds the results of the calls that succeeded.
        Exception: What a backend of the program's own failed with, where that is no `AioKVError`.
    """
    remaining = iter(keys)
    if results is None:
        results = {}
    errors: dict[str, Exception] = {}

    async def work() -> None:
        while not errors and (key := next(remaining, None)) is not None:
            try:
                results[key] = await call(key)
            except Exception as error:  # noqa: BLE001 (raised below, after the calls that are under way)
                errors[key] = error

    await _share(work, min(concurrency, len(keys)))
    if errors:
        texts = {key: value if isinstance(value, str) else None for key, value in results.items()}
        raise _failure(errors, texts, list(remaining))
    return {key: results[key] for key in keys}


async def send_batches(
    verb: str,
    batches: Sequence[Sequence[str]],
    send: Callable[[Sequence[str]], Awaitable[Sequence[Outcome]]],
    concurrency: int,
) -> dict[str, str | None]:
    """Send batches of keys, a few at once; start no further one after a failure.

    Args:
        verb: `"get"`, `"set"` or `"delete"`, for errors.
        batches: Different keys, as `batches_of` or `batches_of_entries` cut them.
        send: Send one batch; returns an outcome for each of its keys.
        concurrency: How many batches are under way at once, 1 or more; never more than 4.

    Returns:
        Each key with its value, or None, in the order of the keys.

    Raises:
        BatchError: A key failed; it holds the results of the keys that succeeded.
        Exception: What a backend of the program's own failed with, where that is no `AioKVError`.
    """
    sending = _Sending(verb, batches, send)
    await _share(sending.work, min(concurrency, _MAX_BATCHES_UNDER_WAY, len(batches)))
    results, errors = sending.results, sending.errors
    if errors:
        not_attempted = [key for batch in batches for key in batch if key not in results and key not in errors]
        raise _failure(errors, results, not_attempted)
    return {key: results[key] for batch in batches for key in batch}


class _Sending:
    """Batches on their way, and what has become of their keys."""

    def __init__(
        self, verb: str, batches: Iterable[Sequence[str]], send: Callable[[Sequence[str]], Awaitable[Sequence[Outcome]]]
    ) -> None:
        self.results: dict[str, str | None] = {}
        self.errors: dict[str, Exception] = {}
        self._verb = verb
        self._remaining = iter(batches)
        self._send = send

    async def work(self) -> None:
        """Send one batch after the other until one fails."""
        while not self.errors and (keys := next(self._remaining, None)) is not None:
            most = len(keys)
            while keys and not self.errors:
                asked, keys = keys[:most], keys[most:]
                try:
                    outcomes = await self._send(asked)
                    _check_answer(asked, outcomes)
                except Exception as error:  # noqa: BLE001 (raised after the batches that are under way)
                    self.errors.update({key: _of_key(error, self._verb, key) for key in asked})
                    return
                omitted = self._note(asked, outcomes)
                if omitted:
                    # The answer was full, so the next one is likely to be full with as many.
                    most = max(1, 2 * (len(asked) - len(omitted)))
                    keys = [*omitted, *keys]

    def _note(self, keys: Sequence[str], outcomes: Sequence[Outcome]) -> list[str]:
        """Note what has become of each key; return those that are to be asked for again."""
        omitted = []
        for key, outcome in zip(keys, outcomes, strict=True):
            if isinstance(outcome, Omitted):
                omitted.append(key)
            elif isinstance(outcome, Exception):
                self.errors[key] = outcome
            else:
                self.results[key] = outcome
        return omitted


def batches_of(keys: Sequence[str]) -> Sequence[Sequence[str]]:
    """Cut keys into batches.

    Args:
        keys: Checked keys; a thousand of them never exceed the bytes of a batch.

    Returns:
        The batches, in order.
    """
    if len(keys) <= MAX_BATCH_KEYS:
        return (keys,) if keys else ()
    return [keys[start : start + MAX_BATCH_KEYS] for start in range(0, len(keys), MAX_BATCH_KEYS)]


def batches_of_entries(entries: Iterable[Entry]) -> Sequence[Sequence[str]]:
    """Cut entries into batches.

    Args:
        entries: Checked entries of different keys.

    Returns:
        The keys of each batch, in order.
    """
    batches: list[list[str]] = []
    batch_bytes = MAX_BATCH_BYTES
    for key, value, _ in entries:
        entry_bytes = size_bytes(key) + size_bytes(value)
        batch_bytes += entry_bytes
        if batch_bytes > MAX_BATCH_BYTES or len(batches[-1]) == MAX_BATCH_KEYS:
            batches.append([])
            batch_bytes = entry_bytes
        batches[-1].append(key)
    return batches


async def _share(work: Callable[[], Coroutine[Any, Any, None]], workers: int) -> None:
    """Let so many tasks do the same work."""
    if workers <= 1:
        await work()
        return
    async with asyncio.TaskGroup() as group:

        def share() -> None:
            for _ in range(workers - 1):
                group.create_task(work())

        # Where no call waits for anything, this task makes all of them before the loop goes on, and no other is needed.
        sharing = asyncio.get_running_loop().call_soon(share)
        try:
            await work()
        finally:
            sharing.cancel()


def _failure(errors: dict[str, Exception], results: Mapping[str, str | None], not_attempted: Sequence[str]) -> Exception:
    for error in errors.values():
        if not isinstance(error, AioKVError):
            # Of a backend of the program's own: as it would come from a single call.
            return error
    return BatchError(errors, results, not_attempted)


def _of_key(error: Exception, verb: str, key: str) -> Exception:
    """Return what a batch failed with as an error of one of its keys."""
    if not isinstance(error, CallError):
        return error
    try:
        made = copy.copy(error)
    except Exception:  # noqa: BLE001 (a class of somebody's own)
        return error
    made.verb, made.key = verb, key
    made.__cause__ = error
    return made


def _check_answer(keys: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    if len(outcomes) != len(keys):
        raise ResponseError(f"the backend answered a batch of {len(keys):,} keys with {len(outcomes):,} outcomes")
    if isinstance(outcomes[0], Omitted):
        raise ResponseError(f"the backend omitted the first of {len(keys):,} keys")
