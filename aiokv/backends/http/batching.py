"""Transparent batching: `get`s that are asked for in one turn of the event loop travel as one batch.

A get that finds no other under way is sent at once, so that a program that reads one key after the other pays nothing. A get
that finds others under way waits until the end of the turn, a few microseconds, and takes with it those that come meanwhile.
"""

import asyncio
import copy
import types
from collections.abc import Generator, Sequence
from typing import Any, Final

from aiokv.backends.base import is_patient
from aiokv.backends.capabilities import MAX_BATCH_KEYS, OMITTED
from aiokv.backends.http.batches import Batches, Outcome
from aiokv.errors import CallError, StoreClosedError

_Place = tuple[str, bool]


class _Failure:
    """What a batch failed with that is no outcome of a key."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error: Final = error


_Told = Outcome | _Failure


class Group:
    """The gets of one turn, and the task that answers them."""

    __slots__ = ("db_name", "started", "task", "users", "waiting")

    def __init__(self, db_name: str, started: float) -> None:
        self.db_name = db_name
        self.started = started
        self.task: asyncio.Task[None] | None = None
        self.users = 0
        self.waiting: dict[str, list[asyncio.Future[_Told]]] = {}

    def join(self, key: str, future: "asyncio.Future[_Told]") -> None:
        """Add a get."""
        self.users += 1
        others = self.waiting.get(key)
        if others is None:
            self.waiting[key] = [future]
        else:
            others.append(future)

    def leave(self) -> None:
        """Note that a get has its outcome or was cancelled; the last one that was cancelled ends the request."""
        self.users -= 1
        if not self.users and self.task is not None:
            self.task.cancel()

    def tell(self, db_name: str, key: str, told: _Told) -> None:
        """Give the gets of a key their outcome."""
        for future in self.waiting[key]:
            if isinstance(told, CallError):
                # Each get has an error of its own.
                error = told
                told = copy.copy(error)
                told.__cause__ = error.__cause__
                told.verb, told.db_name, told.key = "get", db_name, key
            if not future.done():
                # An error as a result, too: as an exception it would be reported where its get is cancelled in this moment.
                future.set_result(told)


@types.coroutine
def _end_of_turn() -> Generator[Any, Any, None]:
    """Let the other tasks of this turn of the loop go on first."""
    yield


class GetGroups:
    """The gets under way of one backend on a server that takes batches.

    Args:
        running: The groups of several such objects, for `close_groups`.

    Attributes:
        under_way: How many gets are under way, alone or in groups.
    """

    def __init__(self, running: set[Group]) -> None:
        self._loop = asyncio.get_running_loop()
        self._running = running
        self._open: dict[_Place, Group] = {}
        self.under_way = 0

    async def get(self, calls: Batches, db_name: str, key: str) -> str | None:
        """Read a value while others are under way, together with those of this turn of the loop; see `Backend.get`.

        Args:
            calls: The backend.
            db_name: The namespace.
            key: The key.

        Returns:
            As `Backend.get`.

        Raises:
            CallError: As `Backend.get`.
        """
        started = self._loop.time()
        self.under_way += 1
        try:
            place = (db_name, is_patient.get())
            group = self._open.get(place)
            if group is not None:
                future: asyncio.Future[_Told] = self._loop.create_future()
                group.join(key, future)
                if len(group.waiting) == MAX_BATCH_KEYS - 1:
                    # There is room for the first one's key only.
                    del self._open[place]
                return await self._wait(group, future, started)
            group = self._open[place] = Group(db_name, started)
            try:
                await _end_of_turn()
            except BaseException:
                self._start(calls, place, group)
                raise
            if not group.waiting:
                del self._open[place]
                value: str | None = await calls.run(calls.get_call(db_name, key), started)
                return value
            future = self._loop.create_future()
            group.join(key, future)
            self._start(calls, place, group)
            return await self._wait(group, future, started)
        finally:
            self.under_way -= 1

    async def _wait(self, group: Group, future: "asyncio.Future[_Told]", started: float) -> str | None:
        try:
            told = await future
        finally:
            group.leave()
        if told is None or isinstance(told, str):
            return told
        if isinstance(told, CallError):
            told.elapsed = self._loop.time() - started
            raise told
        if isinstance(told, _Failure):
            raise copy.copy(told.error) from told.error
        raise AssertionError(f"a value was asked for until it came, not {told!r}")

    def _start(self, calls: Batches, place: _Place, group: Group) -> None:
        """Let nothing more join a group, and send what has joined, unless all of it is cancelled."""
        if self._open.get(place) is group:
            del self._open[place]
        keys = [key for key, futures in group.waiting.items() if not all(future.done() for future in futures)]
        if keys:
            self._running.add(group)
            group.task = self._loop.create_task(self._run(calls, group, place[0], keys), name="aiokv batch of gets")

    async def _run(self, calls: Batches, group: Group, db_name: str, keys: Sequence[str]) -> None:
        """Ask until each key has an outcome."""
        told: _Told = None
        try:
            while keys:
                outcomes = await calls.read_many(db_name, keys, group.started)
                for key, outcome in zip(keys, outcomes, strict=True):
                    if outcome is not OMITTED:
                        group.tell(db_name, key, outcome)
                keys = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome is OMITTED]
        except asyncio.CancelledError:
            told = _closed()
            raise
        except Exception as error:  # noqa: BLE001 (each get raises it)
            told = error if isinstance(error, CallError) else _Failure(error)
        finally:
            self._running.discard(group)
            for key in keys:
                group.tell(db_name, key, told)


async def close_groups(running: set[Group]) -> None:
    """End the groups under way: their gets fail, since the store is closed.

    Args:
        running: The groups.
    """
    tasks = [group.task for group in running if group.task is not None]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    # A task that is cancelled before its first step has told nobody.
    for group in list(running):
        running.discard(group)
        for key in group.waiting:
            group.tell(group.db_name, key, _closed())


def _closed() -> StoreClosedError:
    return StoreClosedError("the store was closed meanwhile")
