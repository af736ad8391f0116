"""A screen that changes in its place where rich and a terminal are, else lines of text."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from aiokv.cli.terminal import live_console, print_message

if TYPE_CHECKING:
    from rich.live import Live

Row = tuple[str, ...]


class Screen:
    """A table on standard error, shown anew at each `show`; use it as `with Screen(...) as screen:`.

    Args:
        title: What it shows.
        columns: The heads of its columns.
    """

    def __init__(self, title: str, columns: Row) -> None:
        self._title = title
        self._columns = columns
        self._live: Live | None = None

    def __enter__(self) -> Self:
        console = live_console(sys.stderr)
        if console is not None:
            from rich.live import Live  # noqa: PLC0415 (an extra)

            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, rows: list[Row], line: str) -> None:
        """Show the present figures.

        Args:
            rows: The rows of the table.
            line: The same in one line, where there is no table.
        """
        if self._live is None:
            print_message(line)
            return
        from rich.table import Table  # noqa: PLC0415 (an extra)

        table = Table(title=self._title, title_justify="left")
        for index, column in enumerate(self._columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        self._live.update(table, refresh=True)
