"""Which files a command may write to: none that it reads, and none of somebody else."""

import os
from collections.abc import Iterable
from pathlib import Path

from aiokv.backends.registry import sqlite_path_of
from aiokv.errors import ConfigurationError


def is_same_file(path: Path, other: Path) -> bool:
    """Return whether two paths lead to one file, or would if they were made.

    Args:
        path: One path.
        other: The other path.
    """
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    try:
        return path.samefile(other)
    except OSError:
        return False


def check_no_store(url: str, path: str | Path, option: str) -> None:
    """Refuse to write to a file of the store.

    Args:
        url: The store's URL.
        path: What is written to.
        option: What names it on the command line.

    Raises:
        ValueError: It is the SQLite file of the store, or one that SQLite keeps beside it.
    """
    try:
        store = sqlite_path_of(url)
    except ConfigurationError:
        return
    if any(is_same_file(Path(path), Path(f"{store}{suffix}")) for suffix in ("", "-wal", "-shm", "-journal")):
        raise ValueError(f"{path} is a file of the store itself; name another file by {option}")


def check_apart(path: Path, option: str, others: Iterable[Path | int | None]) -> None:
    """Refuse to write to another file of the same command.

    Args:
        path: What is written to.
        option: What names it on the command line.
        others: The other files: paths, or descriptors of open files.

    Raises:
        ValueError: It is one of them.
    """
    for other in others:
        if isinstance(other, int):
            is_one = path.exists() and os.path.samestat(path.stat(), os.fstat(other))
        else:
            is_one = other is not None and is_same_file(path, other)
        if is_one:
            raise ValueError(f"{path} has another part in this import already; name another file by {option}")
