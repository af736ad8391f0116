"""One store as one event loop sees it: is it well, how long to wait for it, in which order writes land.

All cached functions of a loop that use one target share a `StoreAccess`. What belongs to a function is not here.
"""

import asyncio
import contextlib
import os
import threading
import weakref
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Final

from aiokv.backends.base import is_patient
from aiokv.backends.capabilities import Entry
from aiokv.caching.breaker import Breaker, Verb, first_of, is_cancelled
from aiokv.caching.failures import SkippedError
from aiokv.caching.writes import Write
from aiokv.deadlines import Alarm, SharedDeadline, go_on
from aiokv.errors import BatchError, ValueTooLargeError
from aiokv.limits import MIN_TTL_SECONDS
from aiokv.store import AsyncKVStore, get_into, set_entries
from aiokv.target import Target

_PROBE_KEY = "aiokv-probe"
_NONE: Final[AbstractSet[str]] = frozenset()


class StoreAccess:
    """The ways of one event loop to the store of one target.

    Args:
        target: Which values.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.loop = get_running_loop()
        self.breaker = Breaker(self._probe)
        # The last write of each key. A read is answered by it, so that nobody waits behind a write that hangs.
        self.pending: dict[str, Write] = {}
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        self._deadlines: dict[float, SharedDeadline] = {}
        # Weakly: a store that nobody uses any more is not probed, and not held.
        self._last_failed: weakref.ref[AsyncKVStore] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether to forget this access would lose nothing."""
        return not self.pending and self.breaker.is_idle

    def deadline(self, wait_seconds: float) -> SharedDeadline:
        """Return the shared deadline of all waits of one length in seconds."""
        deadline = self._deadlines.get(wait_seconds)
        if deadline is None:
            deadline = self._deadlines[wait_seconds] = SharedDeadline(wait_seconds)
        return deadline

    async def read(  # noqa: C901, PLR0912 (one read from top to bottom)
        self,
        store: AsyncKVStore,
        keys: Sequence[str],
        wait_seconds: float,
        on_wait: Callable[..., None] | None = None,
        args: tuple[Any, ...] = (),
    ) -> tuple[Mapping[str, str | None], BaseException | None]:
        """Read several entries, in a time that all share.

        Args:
            store: The caller's own store of this target.
            keys: Their keys.
            wait_seconds: Seconds to wait at most.
            on_wait: Called where the store does not answer at once, before anything else of this event loop can run.
            args: Its arguments.

        Returns:
            What was read, and what the store failed with: a `SkippedError` where it was not asked. After a failure some keys
            may be missing.
        """
        reads = self.breaker.reads
        if reads.open_for_seconds and reads.is_open(wait_seconds):
            return {}, SkippedError(reads.error)
        texts: dict[str, str | None] = self._pending_texts(keys) if self.pending else {}
        if texts:
            keys = [key for key in keys if key not in texts]
            if not keys:
                return texts, None
        is_late = False
        # To compute is quicker than to wait for a host that restarts.
        is_patient.set(False)
        try:
            work: Coroutine[Any, Any, Any] = store.get(keys[0]) if len(keys) == 1 else get_into(store, keys, texts)
            answer: Any
            try:
                suspended = work.send(None)
            except StopIteration as done:
                answer = done.value
            else:
                if on_wait is not None:
                    on_wait(*args)
                deadline = self.deadline(wait_seconds)
                task = deadline.begin()
                try:
                    answer = await go_on(work, suspended)
                finally:
                    is_late = deadline.end(task)
            if len(keys) == 1:
                texts[keys[0]] = answer
        except BatchError as batch:
            texts.update(batch.results)
            failure: BaseException = next(iter(batch.errors.values()))
        except (Exception, asyncio.CancelledError) as error:
            if not is_late and is_cancelled(error):
                raise
            failure = TimeoutError() if is_late else first_of(error)
        else:
            if reads.run:
                reads.succeeded()
            return texts, None
        finally:
            is_patient.set(True)
        # A store that has answered for some of many keys is well; there were too many for the time.
        if not (is_late and len(keys) > 1 and not texts.keys().isdisjoint(keys)):
            self._failed("read", store, failure, wait_seconds)
        return texts, failure

    async def write(
        self,
        store: AsyncKVStore,
        writes: Sequence[Write],
        wait_seconds: float,
        on_late: Callable[..., None] | None = None,
        args: tuple[Any, ...] = (),
    ) -> tuple[dict[str, BaseException], AbstractSet[str]]:
        """Apply sets or deletes, each after the earlier ones of its key, and take back what must not stay.

        Args:
            store: The caller's own store of this target.
            writes: All sets, or all deletes.
            wait_seconds: Seconds after which the store counts as failing. The writes go on.
            on_late: Called at that moment.
            args: Its arguments.

        Returns:
            What each key that is not known to be written failed with, and the keys at which another loop of the process is
            still setting something older, which is deleted once it has landed.
        """
        earlier = self._enqueue(writes)
        alarm: Alarm | None = None
        errors: dict[str, BaseException]
        overtaken: AbstractSet[str]
        is_patient.set(False)
        try:
            work = self._land(store, writes, earlier, wait_seconds)
            try:
                suspended = work.send(None)
            except StopIteration as done:
                errors, overtaken = done.value
            else:
                alarm = Alarm(self.deadline(wait_seconds), partial(self._late, store, wait_seconds, on_late, args))
                errors, overtaken = await go_on(work, suspended)
        except (Exception, asyncio.CancelledError) as error:
            if is_cancelled(error):
                raise
            errors, overtaken = dict.fromkeys([write.key for write in writes], first_of(error)), _NONE
        finally:
            is_patient.set(True)
            if alarm is not None:
                alarm.stop()
            self._dequeue(writes)
        if errors:
            failed = [error for error in errors.values() if not isinstance(error, ValueTooLargeError)]
            if failed:
                self._failed("write", store, failed[0], wait_seconds)
                return errors, overtaken
        if alarm is None or not alarm.has_rung:
            self.breaker.writes.succeeded()
        return errors, overtaken

    def _pending_texts(self, keys: Sequence[str]) -> dict[str, str | None]:
        writes = [write for key in keys if (write := self.pending.get(key)) is not None]
        return {write.key: write.text if write.may_stay() else None for write in writes}

    def _late(
        self, store: AsyncKVStore, wait_seconds: float, on_late: Callable[..., None] | None, args: tuple[Any, ...]
    ) -> None:
        self._failed("write", store, TimeoutError(), wait_seconds)
        if on_late is not None:
            on_late(*args)

    def _failed(self, verb: Verb, store: AsyncKVStore, error: BaseException, wait_seconds: float) -> None:
        self._last_failed = weakref.ref(store)
        self.breaker.failed(verb, error, wait_seconds)

    async def _probe(self, verb: Verb) -> None:
        store = None if self._last_failed is None else self._last_failed()
        if store is not None and "target" not in vars(store):
            # Closed since: a probe would open it again, and nobody would close it.
            store = None
        if store is not None and verb == "read":
            await store.get(_PROBE_KEY)
        elif store is not None:
            await store.set(_PROBE_KEY, "", MIN_TTL_SECONDS)

    def _enqueue(self, writes: Iterable[Write]) -> "list[asyncio.Future[None]]":
        earlier = []
        for write in writes:
            previous = self.pending.get(write.key)
            if previous is not None:
                write.previous = previous
                earlier.append(previous.landed())
            self.pending[write.key] = write
        return earlier

    def _dequeue(self, writes: Iterable[Write]) -> None:
        for write in writes:
            write.end()
            if self.pending.get(write.key) is write:
                del self.pending[write.key]

    async def _land(  # noqa: C901, PLR0912 (the steps of a write, from top to bottom)
        self, store: AsyncKVStore, writes: Sequence[Write], earlier: "list[asyncio.Future[None]]", wait_seconds: float
    ) -> tuple[dict[str, BaseException], AbstractSet[str]]:
        """Apply what is still to be applied, and take back what must not stay."""
        if earlier:
            await asyncio.wait(earlier)
        applied = []
        for write in writes:
            if write.begin():
                applied.append(write)  # noqa: PERF401 (one at the most, mostly)
        errors: dict[str, BaseException] = {}
        overtaken: AbstractSet[str] = _NONE
        try:
            if len(_loops) > 1:
                overtaken = await self._wait_for_other_loops(applied, wait_seconds)
                applied = [write for write in applied if write.may_stay()]
            try:
                if len(applied) == 1 and applied[0].text is not None:
                    await store.set(applied[0].key, applied[0].text, applied[0].ttl_seconds)
                elif applied:
                    await _apply(store, applied)
            except BatchError as batch:
                errors = _errors_of(batch)
            except Exception as error:  # noqa: BLE001 (returned)
                errors = dict.fromkeys([write.key for write in applied], first_of(error))
            # A set may have landed after what superseded it.
            superseded = []
            for write in applied:
                if write.text is not None and not write.may_stay():
                    superseded.append(write.key)  # noqa: PERF401 (none, mostly)
            if superseded:
                await _delete(store, superseded)
                applied = []
        finally:
            for write in writes:
                if not write.may_stay() and (write.is_decisive or write in applied):
                    write.distrust()
        return errors, overtaken

    async def _wait_for_other_loops(self, writes: Iterable[Write], wait_seconds: float) -> set[str]:
        """Wait for older sets of other loops; return the keys of those that take too long."""
        older = {write.key: self._unfinished_elsewhere(write) for write in writes if write.is_decisive}
        futures = [future for of_key in older.values() for future in of_key]
        late = (await asyncio.wait(futures, timeout=wait_seconds))[1] if futures else set()
        return {key for key, of_key in older.items() if not late.isdisjoint(of_key)}

    def _unfinished_elsewhere(self, newer: Write) -> "list[asyncio.Future[None]]":
        futures = []
        for loop in list(_loops):
            other = _accesses.get((loop, self.target))
            if other is None or other is self or loop.is_closed():
                continue
            write = other.pending.get(newer.key)
            while write is not None:
                # Not deletes, which do no harm.
                if write.text is not None and write.generation < newer.generation and not write.is_done:
                    futures.append(_landing_elsewhere(loop, write))
                write = write.previous
        return futures


async def _apply(store: AsyncKVStore, writes: Sequence[Write]) -> None:
    if writes[0].text is None:
        await _delete(store, [write.key for write in writes])
    else:
        await set_entries(store, [Entry(write.key, write.text or "", write.ttl_seconds) for write in writes])


async def _delete(store: AsyncKVStore, keys: Sequence[str]) -> None:
    await (store.delete(keys[0]) if len(keys) == 1 else store.delete_many(keys))


def _errors_of(batch: BatchError) -> dict[str, BaseException]:
    first = next(iter(batch.errors.values()))
    return {**dict.fromkeys(batch.not_attempted, first), **batch.errors}


def _landing_elsewhere(loop: AbstractEventLoop, write: Write) -> "asyncio.Future[None]":
    here = get_running_loop()
    landed: asyncio.Future[None] = here.create_future()

    def end() -> None:
        if not landed.done():
            landed.set_result(None)

    def pass_on(_: object) -> None:
        # The loop that waits may have ended.
        with contextlib.suppress(RuntimeError):
            here.call_soon_threadsafe(end)

    try:
        loop.call_soon_threadsafe(lambda: write.landed().add_done_callback(pass_on))
    except RuntimeError:
        # Its loop has ended, and with it the write.
        end()
    return landed


_accesses: "weakref.WeakValueDictionary[tuple[AbstractEventLoop, Target], StoreAccess]" = weakref.WeakValueDictionary()
# Loops that have asked for an access, until they are closed.
_loops: dict[AbstractEventLoop, None] = {}
_lock = threading.Lock()
_of_parent: list[object] = []


def access_of(target: Target) -> StoreAccess:
    """Return the running loop's access to a target; it lives as long as somebody holds it.

    Args:
        target: Which values.
    """
    loop = get_running_loop()
    with _lock:
        access = _accesses.get((loop, target))
        if access is None:
            for closed in [one for one in _loops if one.is_closed()]:
                del _loops[closed]
            _loops[loop] = None
            access = _accesses[loop, target] = StoreAccess(target)
        return access


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 (a thread that held it does not exist in the child)
    _lock = threading.Lock()
    # The loops are the parent's. Held, since a task that is dropped complains.
    _of_parent.append(list(_accesses.values()))
    _accesses.clear()
    _loops.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
