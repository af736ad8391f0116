"""Which files a command may write to: none that it reads, none of somebody else, and none that another command writes."""

import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from aiokv.backends.registry import sqlite_path_of
from aiokv.backends.sqlite_paths import is_file_of_store, is_same_file
from aiokv.errors import ConfigurationError


def check_no_store(url: str, path: str | Path, option: str) -> None:
    """Refuse to write to a file of the store.

    Args:
        url: The store's URL.
        path: What is written to.
        option: What names it on the command line.

    Raises:
        ValueError: It is the SQLite file of the store, or one that is kept beside it.
    """
    try:
        store = sqlite_path_of(url)
    except ConfigurationError:
        return
    if is_file_of_store(Path(path), Path(store)):
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


class InUseError(Exception):
    """A file that another import or export has locked."""


def open_locked(path: Path, mode: str, command: str, option: str, opener: Callable[[str, int], int] | None = None) -> BinaryIO:
    """Open a file for this process alone, as far as imports and exports are concerned.

    Args:
        path: The file.
        mode: How it is opened, of bytes.
        command: `"import"` or `"export"`.
        option: What names it on the command line.
        opener: As for `open`.

    Raises:
        InUseError: Another one uses it.
        OSError: It cannot be opened.
    """
    while True:
        file: BinaryIO = open(path, mode, opener=opener)  # type: ignore[assignment]  # noqa: SIM115 (of bytes)
        try:
            lock(file)
            # The other one may have removed or replaced it before its lock was free.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except BlockingIOError:
            file.close()
            raise InUseError(f"another {command} uses {path} now; wait for its end, or name another file by {option}") from None
        except BaseException:
            file.close()
            raise
        file.close()


def lock(file: BinaryIO) -> None:
    """Lock a file for this process alone, where its file system has locks.

    Args:
        file: An open file.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass
