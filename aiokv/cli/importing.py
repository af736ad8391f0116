"""`aiokv import`: rows of a file into a namespace, in batches, several under way, and on again where it was interrupted."""

import argparse
import asyncio
import contextlib
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from aiokv import clock
from aiokv.backends.registry import canonical_url
from aiokv.cli.entries import add_url
from aiokv.cli.paths import check_apart, check_no_store
from aiokv.cli.progress import Progress
from aiokv.cli.resume import Checkpoint, Journal, identity_of, is_regular
from aiokv.cli.rows import FORMATS, BadRow, Batch, Row, RowReader, count_rows, open_input
from aiokv.cli.terminal import binary_input, describe_error, print_message
from aiokv.errors import (
    AioKVError,
    BatchError,
    CallError,
    ConfigurationError,
    RejectedError,
    ThrottledError,
    ValueTooLargeError,
)
from aiokv.limits import check_ttl
from aiokv.store import AsyncKVStore, set_entries

T = TypeVar("T")

_BATCH_ROWS = 1_000
# Small enough that the batches under way and their encoded forms stay far below 100 MB.
_BATCH_BYTES = 2 * 1024 * 1024
_BATCHES_UNDER_WAY = 4
_THROTTLED_WAIT_SECONDS = 1.0
_FAILED, _LEFT_OUT, _INTERRUPTED = 3, 1, 130
_STDIN = "-"

_EPILOG = """\
examples: aiokv import rows.jsonl --db settings
          zcat rows.csv.gz | aiokv import - --format csv --db settings

A row of JSON lines is {"key": "k", "value": "v", "ttl": 3600}; ttl, in seconds, may be left out. CSV begins with a line that
names these columns. Rows that cannot be stored are left out, and written to FILE.failed.jsonl with line number and reason.

Run the same command again after an interrupt, a crash or a failure of the store: it goes on where it stopped, by
FILE.aiokv-resume, which is removed at the end. At most the last 4 batches of 1,000 rows are then written twice.
Exit status: 0 all rows are stored, 1 some were left out, 2 wrong usage, 3 stopped by the store or a file, 130 interrupted.
"""


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `import`.

    Args:
        parser: That of the command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("file", metavar="FILE", help="JSON lines, or CSV where the name ends in .csv; - is standard input")
    parser.add_argument("--db", dest="db_name", metavar="DB", required=True, help="the namespace")
    parser.add_argument("--format", choices=tuple(FORMATS), help="the format, whatever the file is called")
    parser.add_argument("--ttl", type=int, metavar="SECONDS", help="for rows that name none (default: 30 days)")
    parser.add_argument(
        "--resume",
        metavar="PATH",
        help="the resume file (default: FILE.aiokv-resume); of standard input there is none without this option, and the next "
        "run must get the same rows: it passes over those that are through",
    )
    parser.add_argument("--failed", metavar="PATH", help="where rows that were left out are noted (default: FILE.failed.jsonl)")
    parser.add_argument("--restart", action="store_true", help="begin at the first row, whatever the resume file says")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_url(parser)
    parser.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> int:
    name = "aiokv-import" if options.file == _STDIN else options.file
    format_ = options.format or ("csv" if options.file.lower().endswith(".csv") else "jsonl")
    check_ttl(options.ttl)
    store = AsyncKVStore(options.db_name, url=options.url)
    importer: _Importer | None = None
    if options.file == _STDIN:
        # It refuses one that is closed.
        binary_input()
    file = open_input(options.file)
    try:
        can_seek = is_regular(file) and options.file != _STDIN
        resume_path = options.resume or (f"{name}.aiokv-resume" if can_seek else None)
        resume = Path(resume_path) if resume_path else None
        if resume is not None and not resume.name:
            raise ValueError(f"{resume} is a folder; name a file by --resume PATH, such as rows.aiokv-resume")
        failed = Path(options.failed or f"{name}.failed.jsonl")
        url = canonical_url(store.url)
        for path, option in ((resume, "--resume PATH"), (failed, "--failed PATH")):
            if path is not None:
                check_no_store(url, path, option)
                check_apart(path, option, (file.fileno(),))
        check_apart(failed, "--failed PATH", (resume, resume and resume.with_name(f"{resume.name}.new")))
        journal = Journal(resume, failed, identity_of(file, format_, url, options.db_name))
        with journal:
            checkpoint = journal.begin(restart=options.restart)
            # Of an input that could not go back only the digest says that its rows are the same.
            is_seeking = can_seek and not checkpoint.position.digest
            reader = FORMATS[format_](file, options.db_name, options.ttl, digests=not is_seeking)
            if checkpoint.position.rows:
                print_message(f"going on behind row {checkpoint.position.rows:,} (line {checkpoint.position.line:,})")
                (reader.seek if is_seeking else reader.skip)(checkpoint.position)
            total_bytes = os.fstat(file.fileno()).st_size if can_seek else None
            with Progress("import", total_bytes, checkpoint.position.rows, is_quiet=options.quiet) as progress:
                importer = _Importer(store, reader, journal, checkpoint, progress)
                error = asyncio.run(importer.run())
            if importer.is_done:
                journal.forget()
        return _report(importer, journal, error)
    finally:
        if importer is None or not importer.is_reading:
            # Else it would wait for the thread that waits for standard input.
            file.close()


def _report(importer: "_Importer", journal: Journal, error: Exception | None) -> int:
    done = importer.checkpoint
    left_out = f", {done.failed:,} left out: see {journal.failed_path}" if done.failed else ""
    counts = f"{count_rows(done.stored)} imported{left_out}"
    if importer.is_done:
        print_message(f"{counts} ({importer.seconds:.1f} s)")
        return _LEFT_OUT if done.failed else 0
    way_on = "without --resume PATH the next run begins at the first row"
    if journal.resume_path is not None:
        way_on = f"run the same command again to {'go on' if done.position.rows else 'begin at the first row'}"
    if error is None:
        print_message(f"interrupted; {counts}; {way_on}")
        return _INTERRUPTED
    if isinstance(error, ConfigurationError) or not isinstance(error, AioKVError | OSError | ValueError):
        raise error
    print_message(f"stopped: {describe_error(error)}; {counts}; {way_on}")
    return _FAILED


class _UnderWay(NamedTuple):
    """A batch on its way."""

    batch: Batch
    task: "asyncio.Task[list[BadRow]]"
    keys: frozenset[str]


class _Importer:
    """One run of an import."""

    def __init__(
        self, store: AsyncKVStore, reader: RowReader, journal: Journal, checkpoint: Checkpoint, progress: Progress
    ) -> None:
        self.checkpoint = checkpoint
        self.is_done = False
        self.seconds = 0.0
        self._store = store
        self._reader = reader
        self._journal = journal
        self._progress = progress
        self._stop = asyncio.Event()
        self._under_way: deque[_UnderWay] = deque()
        self._reading: asyncio.Future[Batch] | None = None

    @property
    def is_reading(self) -> bool:
        """Whether a thread still reads rows that nobody waits for."""
        return self._reading is not None and not self._reading.done()

    async def run(self) -> Exception | None:
        """Import until the end, an interrupt or an error that the next rows would meet, too; return that error."""
        began, loop = clock.monotonic(), asyncio.get_running_loop()
        this = asyncio.current_task()

        def interrupt() -> None:
            if self._stop.is_set() and this is not None:
                # Asked twice: the batches under way are not waited for.
                this.cancel()
            self._stop.set()

        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            async with self._store:
                await self._run()
        except asyncio.CancelledError:
            if not self._stop.is_set():
                raise
        except Exception as error:  # noqa: BLE001 (reported with the counts)
            return error
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            self.seconds = clock.monotonic() - began
        return None

    async def _run(self) -> None:
        stopping = asyncio.ensure_future(self._stop.wait())
        is_over = False
        try:
            while True:
                may_read = not is_over and not self._stop.is_set() and len(self._under_way) < _BATCHES_UNDER_WAY
                if self._reading is None and may_read:
                    self._reading = _in_thread(lambda: self._reader.read_batch(_BATCH_ROWS, _BATCH_BYTES))
                waited: set[asyncio.Future[Any]] = {self._under_way[0].task} if self._under_way else set()
                if not self._stop.is_set():
                    waited |= {stopping} if self._reading is None else {stopping, self._reading}
                    if is_over and not self._under_way:
                        break
                elif not waited:
                    break
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if self._under_way and self._under_way[0].task.done():
                    await self._settle()
                if self._reading is not None and self._reading.done() and not self._stop.is_set():
                    batch, self._reading = self._reading.result(), None
                    is_over = batch.is_last
                    await self._send(batch)
            self.is_done = is_over
        finally:
            stopping.cancel()
            for under_way in self._under_way:
                under_way.task.cancel()
            if self._under_way:
                await asyncio.wait([under_way.task for under_way in self._under_way])

    async def _send(self, batch: Batch) -> None:
        keys = frozenset(row.entry.key for row in batch.rows)
        while any(not keys.isdisjoint(other.keys) for other in self._under_way):
            # Of two rows with one key the later one wins, so the earlier one must have landed.
            await asyncio.wait([self._under_way[0].task])
            await self._settle()
        self._under_way.append(_UnderWay(batch, asyncio.create_task(self._store_rows(batch)), keys))

    async def _settle(self) -> None:
        """Write down the batches that are through, in their order."""
        failed: list[BadRow] = []
        done, error = self.checkpoint, None
        while self._under_way and self._under_way[0].task.done():
            batch, task, _ = self._under_way[0]
            if task.cancelled() or (error := task.exception()):
                break
            self._under_way.popleft()
            bad = sorted((*batch.bad, *task.result()), key=lambda row: row.line)
            failed += bad
            count = len(batch.rows) + len(batch.bad)
            done = done._replace(position=batch.end, stored=done.stored + count - len(bad), failed=done.failed + len(bad))
        if done is not self.checkpoint:
            lines = b"".join(row.as_line() for row in failed)
            self.checkpoint = await asyncio.to_thread(self._journal.record, done, lines)
            self._progress.show(done.position.offset, done.position.rows, done.failed)
        if error is not None:
            raise error

    async def _store_rows(self, batch: Batch) -> list[BadRow]:
        """Store the rows of a batch; return those that the store refused, each for a fault of its own."""
        refused: list[BadRow] = []
        sent = 0
        for rows in _steps_of(batch.rows):
            refused += await self._store_together(rows, has_stored=self.checkpoint.stored > 0 or sent > len(refused))
            sent += len(rows)
        return refused

    async def _store_together(self, rows: list[Row], *, has_stored: bool) -> list[BadRow]:
        refused: list[BadRow] = []
        while rows:
            try:
                await set_entries(self._store, [row.entry for row in rows])
            except BatchError as error:
                faults = dict(error.errors)
                if waits := [fault for fault in faults.values() if isinstance(fault, ThrottledError)]:
                    await asyncio.sleep(max(fault.retry_after or _THROTTLED_WAIT_SECONDS for fault in waits))
                    rows = [row for row in rows if row.entry.key not in error.results]
                elif other := next((fault for fault in faults.values() if not _is_of_row(fault)), None):
                    raise other from None
                elif len(faults) == len(rows) > 1:
                    # The whole batch was refused; is it one row's fault?
                    return refused + await self._store_singly(rows, has_stored=has_stored)
                else:
                    refused += _bad_rows(rows, faults)
                    rows = [row for row in rows if row.entry.key in error.not_attempted]
            else:
                break
        return refused

    async def _store_singly(self, rows: Iterable[Row], *, has_stored: bool) -> list[BadRow]:
        refused: list[BadRow] = []
        for row in rows:
            try:
                await self._store.set(*row.entry)
            except CallError as error:
                if not _is_of_row(error) or not has_stored:
                    # A store that has taken no row yet is likely to take none.
                    raise
                refused += _bad_rows([row], {row.entry.key: error})
            else:
                has_stored = True
        return refused


def _is_of_row(error: Exception) -> bool:
    """Return whether an error is of one row, so that the others can be stored."""
    return isinstance(error, ValueTooLargeError | RejectedError)


def _bad_rows(rows: Iterable[Row], faults: dict[str, Exception]) -> list[BadRow]:
    lines = {row.entry.key: row.line for row in rows}
    return [BadRow(lines[key], key, str(fault)) for key, fault in faults.items()]


def _steps_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Part rows so that those with one key go one after the other: what becomes of each is known by its key."""
    steps: list[list[Row]] = []
    times = Counter[str]()
    for row in rows:
        step = times[row.entry.key]
        times[row.entry.key] += 1
        if step == len(steps):
            steps.append([])
        steps[step].append(row)
    return steps


def _in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Call a function in a thread that the end of the process does not wait for, as one that waits for a pipe."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # of the function
        else:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:  # noqa: BLE001 (raised again where it is awaited)
            error = raised
        # The loop may be gone.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    # It may be given up.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    threading.Thread(target=work, daemon=True, name="aiokv reads rows").start()
    return future
