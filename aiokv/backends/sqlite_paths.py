"""Which files belong to a SQLite store: nothing else may be written into them."""

import os
from pathlib import Path
from typing import Final

BALLAST: Final = "-ballast"
"""What the name of the ballast has behind that of the store."""

_BESIDE = ("", "-wal", "-shm", "-journal", BALLAST)


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


def is_file_of_store(path: Path, store: Path) -> bool:
    """Return whether a path leads to the file of a store, or to one that is kept beside it, or would if they were made.

    Args:
        path: Any path.
        store: The SQLite file, or a link to it.
    """
    # SQLite keeps its files beside the file that a link leads to, and the ballast stands beside the link.
    return any(
        is_same_file(path, Path(f"{name}{suffix}")) for name in {str(store), os.path.realpath(store)} for suffix in _BESIDE
    )
