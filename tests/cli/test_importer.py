"""An import over stores that are slow, busy, refusing or away: what is stored, noted, and where it goes on."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from aiokv import AsyncKVStore
from aiokv.backends.capabilities import Entry
from aiokv.backends.memory import MemoryBackend
from aiokv.cli import rows as rows_module
from aiokv.cli.importing import _Importer
from aiokv.cli.progress import Progress
from aiokv.cli.resume import Checkpoint, Journal
from aiokv.cli.rows import BadRow, CsvRows, JsonRows, Position
from aiokv.errors import CallError, ConnectError, RejectedError, StorageFullError, ThrottledError

Answer = Callable[[int, Sequence[Entry]], Awaitable[None]]


class ScriptedBackend(MemoryBackend):
    """Memory whose writes do first what a test says; it counts them."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer
        self.calls = 0
        self.under_way = 0
        self.most_under_way = 0

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        await self._begin([Entry(key, value, ttl_seconds)])
        await super().set(db_name, key, value, ttl_seconds)

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Sequence[CallError | None]:
        await self._begin(entries)
        return await super().set_many(db_name, entries)

    async def _begin(self, entries: Sequence[Entry]) -> None:
        self.calls += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.answer(self.calls, entries)
        finally:
            self.under_way -= 1


async def import_rows(
    folder: Path, lines: Sequence[str], answer: Answer
) -> tuple[_Importer, ScriptedBackend, Exception | None, list[int]]:
    """Import lines; return also the error, and the lines that were left out."""
    backend = ScriptedBackend(answer)
    store = AsyncKVStore("db", backend=backend)
    reader = JsonRows(io.BytesIO("".join(lines).encode()), "db", None, digests=False)
    with Journal(folder / "resume", folder / "failed", {"input": {}, "target": {}}) as journal:
        importer = _Importer(store, reader, journal, journal.begin(restart=False), Progress("import", is_quiet=True))
        error = await importer.run()
    noted = (folder / "failed").read_text().splitlines() if (folder / "failed").exists() else []
    return importer, backend, error, [json.loads(line)["line"] for line in noted]


def line_of(key: str, value: str = "v") -> str:
    return json.dumps({"key": key, "value": value}) + "\n"


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_later_of_two_rows_with_one_key_wins_over_a_store_that_answers_in_another_order(tmp_path: Path) -> None:
    async def answer(call: int, _: Sequence[Entry]) -> None:
        await turns(200 if call == 1 else 0)

    lines = [line_of(f"k{number % 1_000}", str(number)) for number in range(3_000)]
    importer, backend, error, _ = await import_rows(tmp_path, lines, answer)
    assert (error, importer.is_done) == (None, True)
    assert [await backend.get("db", f"k{number}") for number in (0, 999)] == ["2000", "2999"]


async def test_no_more_than_four_batches_are_ahead_of_the_resume_file(tmp_path: Path) -> None:
    first = asyncio.Event()

    async def answer(call: int, _: Sequence[Entry]) -> None:
        if call == 1:
            await first.wait()

    lines = [line_of(f"k{number}") for number in range(10_000)]
    running = asyncio.create_task(import_rows(tmp_path, lines, answer))
    resume = tmp_path / "resume"
    async with asyncio.timeout(10):
        while not resume.exists():
            await asyncio.sleep(0.01)
    # Enough for all of them, if nothing held them back.
    await asyncio.sleep(0.3)
    assert json.loads(resume.read_text())["done"]["stored"] == 0
    first.set()
    importer, backend, _, _ = await running
    assert importer.checkpoint.stored == 10_000
    assert backend.most_under_way <= 4
    assert backend.calls == 10


async def test_batches_ahead_of_a_slow_one_wait(tmp_path: Path) -> None:
    calls = 0

    async def answer(call: int, _: Sequence[Entry]) -> None:
        nonlocal calls
        calls = call
        if call == 1:
            await asyncio.sleep(0.3)
            assert calls <= 4

    lines = [line_of(f"k{number}") for number in range(8_000)]
    _, _, error, _ = await import_rows(tmp_path, lines, answer)
    assert (error, calls) == (None, 8)


async def test_row_for_which_a_whole_batch_is_refused_is_found(tmp_path: Path) -> None:
    async def answer(_: int, entries: Sequence[Entry]) -> None:
        if any(entry.key == "k1005" for entry in entries):
            raise RejectedError("no such key here", status=400)

    lines = [line_of(f"k{number}") for number in range(1_010)]
    importer, backend, error, noted = await import_rows(tmp_path, lines, answer)
    assert (error, noted) == (None, [1_006])
    assert (importer.checkpoint.stored, importer.checkpoint.failed) == (1_009, 1)
    assert await backend.get("db", "k1009") == "v"


async def test_each_of_several_rows_with_one_key_has_an_outcome_of_its_own(tmp_path: Path) -> None:
    class Choosy(MemoryBackend):
        """Memory that refuses one value."""

        async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
            if value == "bad":
                raise RejectedError("no such value", status=400)
            await super().set(db_name, key, value, ttl_seconds)

        async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Sequence[CallError | None]:
            good = [entry for entry in entries if entry.value != "bad"]
            await super().set_many(db_name, good)
            return [None if entry in good else RejectedError("no such value", status=400) for entry in entries]

    backend = Choosy()
    lines = [
        line_of(*row)
        for row in (("a", "1"), ("k", "2"), ("b", "3"), ("k", "bad"), ("c", "4"), ("j", "5"), ("j", "bad"), ("j", "6"))
    ]
    reader = JsonRows(io.BytesIO("".join(lines).encode()), "db", None, digests=False)
    with Journal(None, tmp_path / "failed", {"input": {}, "target": {}}) as journal:
        store = AsyncKVStore("db", backend=backend)
        importer = _Importer(store, reader, journal, journal.begin(restart=False), Progress("import", is_quiet=True))
        assert await importer.run() is None
    assert (importer.checkpoint.stored, importer.checkpoint.failed) == (6, 2)
    assert [json.loads(line)["line"] for line in (tmp_path / "failed").read_text().splitlines()] == [4, 7]
    assert [await backend.get("db", key) for key in "akbcj"] == ["1", "2", "3", "4", "6"]


async def test_store_that_takes_no_row_at_all_stops_the_import(tmp_path: Path) -> None:
    async def answer(_: int, __: Sequence[Entry]) -> None:
        raise RejectedError("not found", status=404)

    importer, backend, error, noted = await import_rows(tmp_path, [line_of(f"k{number}") for number in range(5_000)], answer)
    assert isinstance(error, RejectedError)
    assert (importer.checkpoint, noted) == (Checkpoint(), [])
    assert backend.calls < 10
    assert not (tmp_path / "resume").exists()


async def test_busy_store_is_waited_for(tmp_path: Path) -> None:
    async def answer(call: int, _: Sequence[Entry]) -> None:
        if call in {1, 2}:
            raise ThrottledError("slow down", retry_after=0.001)

    importer, backend, error, _ = await import_rows(tmp_path, [line_of(f"k{number}") for number in range(10)], answer)
    assert (error, importer.checkpoint.stored, backend.calls) == (None, 10, 3)


async def test_what_a_busy_store_has_taken_is_not_sent_again(tmp_path: Path) -> None:
    sent: list[str] = []

    class Plain:
        """A store without batches."""

        def __init__(self) -> None:
            memory = MemoryBackend()
            self.get, self.delete, self.aclose = memory.get, memory.delete, memory.aclose
            self.memory = memory

        async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
            sent.append(key)
            if key == "k7" and sent.count("k7") == 1:
                raise ThrottledError("slow down", retry_after=0.001)
            await self.memory.set(db_name, key, value, ttl_seconds)

    reader = JsonRows(io.BytesIO("".join(line_of(f"k{number}") for number in range(50)).encode()), "db", None, digests=False)
    with Journal(None, tmp_path / "failed", {"input": {}, "target": {}}) as journal:
        store = AsyncKVStore("db", backend=Plain())
        importer = _Importer(store, reader, journal, journal.begin(restart=False), Progress("import", is_quiet=True))
        assert await importer.run() is None
    assert (importer.checkpoint.stored, sorted(sent)) == (50, sorted([*(f"k{number}" for number in range(50)), "k7"]))


@pytest.mark.parametrize("fault", [ConnectError("away"), StorageFullError("full")])
async def test_store_that_fails_stops_the_import_behind_what_was_acknowledged(tmp_path: Path, fault: CallError) -> None:
    async def answer(call: int, entries: Sequence[Entry]) -> None:
        if entries[0].key == "k2000":
            raise fault
        await turns(call)

    lines = [line_of(f"k{number}") for number in range(6_000)]
    importer, _, error, _ = await import_rows(tmp_path, lines, answer)
    assert type(error) is type(fault)
    assert (importer.is_done, importer.checkpoint.position.rows) == (False, 2_000)
    done = json.loads((tmp_path / "resume").read_text())["done"]
    assert (done["position"]["rows"], done["stored"]) == (2_000, 2_000)
    assert done["position"]["offset"] == sum(map(len, lines[:2_000]))


def test_rows_noted_behind_the_resume_file_are_noted_once(tmp_path: Path) -> None:
    identity = {"input": {}, "target": {}}
    first, second = (BadRow(line, None, "bad").as_line() for line in (1, 2))
    with Journal(tmp_path / "resume", tmp_path / "failed", identity) as journal:
        journal.begin(restart=False)
        journal.record(Checkpoint(Position(10, 2, 2), 1, 1), first)
    with (tmp_path / "failed").open("ab") as file:
        file.write(BadRow(7, None, "written before a crash").as_line() + b'{"line":8,"ke')
    with Journal(tmp_path / "resume", tmp_path / "failed", identity) as journal:
        assert journal.begin(restart=False).position == Position(10, 2, 2)
        journal.record(Checkpoint(Position(20, 4, 4), 2, 2), second)
    assert (tmp_path / "failed").read_bytes() == first + second
    with Journal(tmp_path / "resume", tmp_path / "failed", identity) as journal:
        assert journal.begin(restart=True) == Checkpoint()
    assert not (tmp_path / "failed").exists()


def test_line_that_is_too_long_is_passed_over_and_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_MAX_LINE_BYTES", 100)
    data = (line_of("long", "x" * 200_000) + line_of("k")).encode()
    batch = JsonRows(io.BytesIO(data), "db", None, digests=False).read_batch(10, 10**9)
    assert [row.line for row in batch.bad] == [1]
    assert [row.entry.key for row in batch.rows] == ["k"]
    assert batch.end == Position(len(data), 2, 2)
    data = b"key,value\nlong," + b"x" * 200_000 + b"\nk,v\n"
    batch = CsvRows(io.BytesIO(data), "db", None, digests=False).read_batch(10, 10**9)
    assert ([row.line for row in batch.bad], [row.entry.key for row in batch.rows]) == ([2], ["k"])


def test_rows_that_are_left_out_for_their_long_keys_are_cut_by_their_bytes_and_noted_without_them() -> None:
    key, number = "k" * 100_000, 20
    for kind, head, line in (
        (JsonRows, "", line_of(key)),
        (CsvRows, "key,value\n", f"{key},v\n"),
        (CsvRows, "key,value,ttl\n", f"{key},v,x\n"),
    ):
        reader = kind(io.BytesIO((head + line * number).encode()), "db", None, digests=False)
        batch = reader.read_batch(1_000, 10 * len(key))
        assert len(batch.bad) == 10
        assert batch.bad[0].key == f"{'k' * 100}... (100,000 characters)"
        assert len(batch.bad[0].as_line()) < 1_000


def test_batch_of_large_rows_is_cut_by_its_bytes() -> None:
    data = "".join(line_of(f"k{number}", "x" * 1_000) for number in range(100)).encode()
    reader = JsonRows(io.BytesIO(data), "db", None, digests=False)
    assert len(reader.read_batch(1_000, 10_000).rows) == 10
