"""How far an import or an export is: a bar where rich and a terminal are, else a line of text now and then."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from aiokv import clock
from aiokv.cli.terminal import is_terminal, live_console, print_message

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_QUIET_SECONDS = 1.0
_TERMINAL_STEP_SECONDS = 0.2
_TEXT_STEP_SECONDS = 10.0


class Progress:
    """Rows that are through, their rate and how many failed, on standard error; use it as `with Progress("import") as shown:`.

    Args:
        what: What is under way.
        total_bytes: The size of the input; None where it is unknown.
        rows: The rows that an earlier run has put through.
        is_quiet: Whether to show nothing.
    """

    def __init__(self, what: str, total_bytes: int | None = None, rows: int = 0, *, is_quiet: bool = False) -> None:
        self._what = what
        self._total_bytes = total_bytes
        self._rows_before = rows
        self._is_quiet = is_quiet
        self._began = clock.monotonic()
        self._next = self._began + _QUIET_SECONDS
        self._is_open_line = False
        self._bar: tuple[RichProgress, TaskID] | None = None

    def __enter__(self) -> Self:
        console = None if self._is_quiet else live_console(sys.stderr)
        if console is not None:
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415 (an extra)
            from rich.progress import Progress as RichProgress  # noqa: PLC0415 (likewise)

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[counts]}"))
            progress = RichProgress(*columns, TimeRemainingColumn(), console=console)
            progress.start()
            self._bar = (progress, progress.add_task(self._what, total=self._total_bytes, counts=""))
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar[0].stop()
        if self._is_open_line:
            print(file=sys.stderr)

    def show(self, done_bytes: int, rows: int, failed: int = 0) -> None:
        """Show how far it is, unless that was shown a moment ago.

        Args:
            done_bytes: How much of `total_bytes` is through.
            rows: The rows that are through.
            failed: How many of them failed.
        """
        now = clock.monotonic()
        rate = (rows - self._rows_before) / max(now - self._began, 1e-6)
        counts = f"{rows:,} rows, {rate:,.0f} a second" + (f", {failed:,} left out" if failed else "")
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=done_bytes, counts=counts)
            return
        if self._is_quiet or now < self._next or sys.stderr is None:
            return
        share = f" ({done_bytes / self._total_bytes:.0%})" if self._total_bytes else ""
        if is_terminal(sys.stderr):
            self._next, self._is_open_line = now + _TERMINAL_STEP_SECONDS, True
            print(f"\raiokv: {self._what}: {counts}{share}   ", end="", file=sys.stderr, flush=True)
        else:
            self._next = now + _TEXT_STEP_SECONDS
            print_message(f"{self._what}: {counts}{share}")
