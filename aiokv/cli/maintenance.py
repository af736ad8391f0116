"""`aiokv backup` and `aiokv check`: copy and check the SQLite file of a store, while it is served."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiokv.cli.terminal import print_message, printable

if TYPE_CHECKING:
    from aiokv.backends.sqlite_maintenance import CheckReport

_DAMAGED = 1
_QUIET_SECONDS = 1.0
_STEP_SECONDS = 0.2

_BACKUP_DESCRIPTION = """\
Copy the SQLite file of a store as it is at this moment, while it is served or not. The copy is one file, whole or not there
at all, readable by its owner alone. It is checked as `aiokv check` does, its pages and the checksum of each value, before it
takes its name. Where the store is damaged, no copy is kept, a FILE that exists stays as it is, and the exit status is 1.
To go back to a copy: stop the server, move kv.db, kv.db-wal and kv.db-shm away, and put the copy in the place of kv.db.

  aiokv backup kv-2026-11-25.db
  aiokv backup --store sqlite:////var/lib/aiokv/kv.db --overwrite /backup/kv.db
"""

_CHECK_DESCRIPTION = """\
Look for damage in the SQLite file of a store, or in a copy of it: its pages, the checksum of each value, and what is counted
for each account. Nothing is changed, and a server may use the file meanwhile. Exit status 1 where something is wrong.
Tables of version 1 have no checksums: there the pages alone are looked at.
"""


def add_backup(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `backup`.

    Args:
        parser: That of the command.
    """
    parser.description = _BACKUP_DESCRIPTION
    parser.add_argument("target", metavar="FILE", help="the copy")
    parser.add_argument(
        "--store",
        metavar="URL",
        default=os.environ.get("AIOKV_SERVE_STORE", "sqlite:///kv.db"),
        help="the store, as `aiokv serve --store` has it (default: AIOKV_SERVE_STORE, else sqlite:///kv.db)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    parser.add_argument(
        "--no-check",
        dest="verify",
        action="store_false",
        help="do not check the copy: quicker, and the way to keep what is left of a damaged store",
    )
    parser.set_defaults(run=_backup)


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check`.

    Args:
        parser: That of the command.
    """
    parser.description = _CHECK_DESCRIPTION
    parser.add_argument("file", metavar="FILE", help="the file, such as kv.db")
    parser.set_defaults(run=_check)


def _backup(options: argparse.Namespace) -> int:
    from aiokv.backends.registry import sqlite_path_of  # noqa: PLC0415 (`--help` needs none of it)
    from aiokv.backends.sqlite_maintenance import DamagedFileError, backup  # noqa: PLC0415 (likewise)

    path = sqlite_path_of(options.store)
    try:
        with _Progress() as show:
            report = backup(path, options.target, overwrite=options.overwrite, verify=options.verify, progress=show)
    except DamagedFileError as error:
        print_message(error)
        return _DAMAGED
    print_message(f"{report.path}: {report.size_bytes:,} bytes in {report.seconds:.1f} s")
    return 0


def _check(options: argparse.Namespace) -> int:
    from aiokv.backends.sqlite_maintenance import check  # noqa: PLC0415 (likewise)

    with _Progress() as show:
        report = check(options.file, progress=show)
    print(f"{printable(report.path)}: {'sound' if report.is_sound else 'DAMAGED'}: {_describe(report)}")
    for problem in report.problems:
        print(f"  {problem}")
    for db_name, key in report.examples:
        print(f"  damaged: db {db_name!r}, key {key!r}; set it again or delete it")
    return 0 if report.is_sound else _DAMAGED


def _describe(report: "CheckReport") -> str:
    if not report.schema_version:
        return "nothing in it can be read"
    tables = f"tables of version {report.schema_version}"
    if report.schema_version == 1:
        tables += " (renewed when a store or server opens it)"
    elif report.old_entries:
        tables += f", {report.old_entries:,} entries still in those of version 1 (renewed when a store or server opens it)"
    entries = "1 entry" if report.entries == 1 else f"{report.entries:,} entries"
    return f"{entries}, {report.value_bytes:,} bytes of values, {tables}"


class _Progress:
    """A line that tells how far the work is, once it takes longer than a moment, on a terminal alone."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _QUIET_SECONDS
        self._is_shown = False

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            print(file=sys.stderr)

    def _show(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next or sys.stderr is None or not sys.stderr.isatty():
            return
        self._next, self._is_shown = now + _STEP_SECONDS, True
        share = done / total if total else 1.0
        print(f"\raiokv: {done:,} of {total:,} {what} ({share:.0%})   ", end="", file=sys.stderr, flush=True)
