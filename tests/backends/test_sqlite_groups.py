"""Sets that are queued without being awaited, and what of them the thread that writes commits together."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiokv import StoreClosedError
from aiokv.backends import sqlite_commit, sqlite_writer
from aiokv.backends.base import QueueingBackend, WouldWaitError
from aiokv.backends.sqlite import SqliteBackend


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncGenerator[SqliteBackend]:
    backend = SqliteBackend(path)
    await backend.get("db", "opens the file")
    try:
        yield backend
    finally:
        await backend.aclose()


class Ends:
    """What queued sets were told, in its order."""

    def __init__(self, expected: int) -> None:
        self.errors: list[Exception | None] = []
        self.all_told = asyncio.Event()
        self._expected = expected

    def __call__(self, error: Exception | None) -> None:
        self.errors.append(error)
        if len(self.errors) == self._expected:
            self.all_told.set()


async def test_queued_set_is_told_of_once_another_connection_can_read_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv.db") as backend, opened(tmp_path / "kv.db") as other:
        assert isinstance(backend, QueueingBackend)
        ends = Ends(1)
        backend.set_soon("db", "k", "v", 60, ends)
        assert not ends.errors
        await ends.all_told.wait()
        assert ends.errors == [None]
        assert await other.get("db", "k") == "v"


async def test_writes_of_one_turn_of_the_loop_are_committed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    commit = sqlite_commit.Committer.commit

    def count(self: sqlite_commit.Committer, batch: list[sqlite_commit.Write]) -> object:
        batches.append(len(batch))
        return commit(self, batch)

    monkeypatch.setattr(sqlite_commit.Committer, "commit", count)
    async with opened(tmp_path / "kv.db") as backend:
        await asyncio.gather(*(backend.set("db", f"k{number}", "v", 60) for number in range(64)))
    assert batches == [64]


async def test_set_that_is_queued_right_before_the_end_is_stored(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv.db") as backend:
        ends = Ends(1)
        backend.set_soon("db", "k", "v", 60, ends)
    assert ends.errors == [None]
    async with opened(tmp_path / "kv.db") as backend:
        assert await backend.get("db", "k") == "v"


async def test_nothing_is_queued_before_the_file_is_open_and_after_its_end(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    ends = Ends(1)
    with pytest.raises(WouldWaitError):
        backend.set_soon("db", "k", "v", 60, ends)
    await backend.set("db", "k", "v", 60)
    await backend.aclose()
    with pytest.raises((WouldWaitError, StoreClosedError)):
        backend.set_soon("db", "k", "v", 60, ends)
    with pytest.raises(StoreClosedError):
        await backend.set("db", "k", "v", 60)
    assert not ends.errors


async def test_one_that_fails_to_take_its_outcome_keeps_no_other_waiting(tmp_path: Path) -> None:
    unforeseen: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unforeseen.append(context["exception"]))

    def fail(_: Exception | None) -> None:
        raise ZeroDivisionError

    async with opened(tmp_path / "kv.db") as backend:
        ends = Ends(1)
        backend.set_soon("db", "a", "v", 60, fail)
        backend.set_soon("db", "b", "v", 60, ends)
        await ends.all_told.wait()
    assert ends.errors == [None]
    assert [type(error) for error in unforeseen] == [ZeroDivisionError]


async def test_every_set_of_a_group_is_stored_however_many_there_are(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv.db") as backend:
        for count in range(40):
            await asyncio.gather(*(backend.set(f"db-{count}", f"k{number}", f"{number}", 60) for number in range(count)))
            stored = [await backend.get(f"db-{count}", f"k{number}") for number in range(count)]
            assert stored == [f"{number}" for number in range(count)]


KEYS = st.sampled_from("abc")
SIZES = st.sampled_from([1, 4096, 5000])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(writes=st.lists(st.tuples(KEYS, st.none() | SIZES), max_size=70))
def test_group_of_any_sizes_and_deletes_keeps_its_order(tmp_path: Path, writes: list[tuple[str, int | None]]) -> None:
    async def check() -> None:
        async with opened(tmp_path / "kv.db") as backend:
            expected: dict[str, str] = {}
            calls = [backend.delete("db", key) for key in "abc"]
            for number, (key, size) in enumerate(writes):
                if size is None:
                    calls.append(backend.delete("db", key))
                    expected.pop(key, None)
                else:
                    expected[key] = f"{number}".ljust(size, "x")
                    calls.append(backend.set("db", key, expected[key], 60))
            await asyncio.gather(*calls)
            assert {key: await backend.get("db", key) for key in "abc"} == {key: expected.get(key) for key in "abc"}
            usage = backend.usage("")
            assert (usage.entries, usage.value_bytes) == (len(expected), sum(map(len, expected.values())))

    asyncio.run(check())


async def test_writes_of_those_who_were_just_told_join_those_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    commit = sqlite_commit.Committer.commit

    def count(self: sqlite_commit.Committer, batch: list[Any]) -> object:
        sizes.append(len(batch))
        return commit(self, batch)

    monkeypatch.setattr(sqlite_commit.Committer, "commit", count)
    async with opened(tmp_path / "kv.db") as backend:
        rounds = 30

        async def write_again_and_again(number: int) -> None:
            for _ in range(rounds):
                await backend.set("db", f"k{number}", "v", 60)

        # Two groups that took turns would make commits of half of the tasks.
        await asyncio.gather(*(write_again_and_again(number) for number in range(64)))
        assert sum(sizes) == 64 * rounds
        lingered: list[float] = []
        monkeypatch.setattr(sqlite_writer.time, "sleep", lingered.append)
        for _ in range(5):
            await backend.set("db", "alone", "v", 60)
        # The first one cannot know that the others are gone.
        assert len(lingered) <= 1


async def test_writer_lingers_for_as_many_writes_as_there_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path / "kv.db") as backend:
        writer = backend._writer
        assert writer is not None
        lingered: list[float] = []

        def sleep(seconds: float) -> None:
            lingered.append(seconds)

        monkeypatch.setattr(sqlite_writer.time, "sleep", sleep)
        for at_once, lingers in ((0, False), (1, False), (15, False), (16, True), (1000, True)):
            writer._writers_at_once = at_once
            lingered.clear()
            await backend.set("db", "k", "v", 60)
            assert bool(lingered) is lingers, at_once
            assert all(0 < seconds < 0.001 for seconds in lingered)
