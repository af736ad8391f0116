"""The disk under a SQLite file: who may read the file, the room that is left, and the ballast that deletes can have."""

import contextlib
import logging
import os
import secrets
import sqlite3
import stat
from pathlib import Path
from typing import Final

from aiokv.backends.base import HostingOptions
from aiokv.backends.sqlite_paths import BALLAST

logger = logging.getLogger("aiokv")

PRIVATE_MODE: Final = 0o600
PAGE_BYTES: Final = 4096
CHECKPOINT_PAGES: Final = 4_000
# With less than this, what fails to grow a file fails for want of room, whatever SQLite calls it.
_FULL_BELOW_BYTES = 128 * 1024
_BALLAST_HEADROOM_BYTES = 1024 * 1024
_WRITE_BYTES = 1024 * 1024


class Disk:
    """The room for a file and the files beside it. Its methods may block for as long as the file system does.

    Args:
        path: The SQLite file, absolute.
        hosting: The floor of free space and the size of the ballast.
    """

    def __init__(self, path: Path, hosting: HostingOptions) -> None:
        self._path = path
        self._ballast = path.with_name(f"{path.name}{BALLAST}")
        self._ballast_bytes = hosting.ballast_bytes
        self._min_free_bytes = hosting.min_free_bytes

    def free_bytes(self) -> int | None:
        """Return the free space for this process's user, None where the file system does not say."""
        try:
            status = os.statvfs(self._path.parent)
        except OSError:
            return None
        return status.f_bavail * status.f_frsize

    def room_bytes(self) -> int | None:
        """Return the free space above the floor, negative below it, None where there is no floor or nothing is known."""
        floor_bytes = self._min_free_bytes
        if self.lacks_ballast():
            floor_bytes += self._ballast_bytes
        if not floor_bytes:
            return None
        free = self.free_bytes()
        return None if free is None else free - floor_bytes

    def checkpoint_pages(self) -> int:
        """Return after how many pages in the log SQLite writes them into the database, 0 for never by itself.

        The database may grow at a checkpoint, so the ballast must have room for what is in the log. Where the ballast is gone,
        the room that is left is for the log of deletes.
        """
        if self.lacks_ballast():
            return 0
        return min(CHECKPOINT_PAGES, self._ballast_bytes * 3 // 4 // PAGE_BYTES) or CHECKPOINT_PAGES

    def lack_of_room(self) -> str:
        """Return what to do about a set that was refused."""
        if not self._min_free_bytes:
            return f"the disk of {self._path} has no room left; free some space on it"
        return (
            f"the disk of {self._path} has no room left above its floor of {self._min_free_bytes:,} free bytes; "
            "free some space on it, or delete entries"
        )

    def is_full(self, code: int) -> bool:
        """Return whether a statement failed for want of room.

        Args:
            code: SQLite's primary result code.

        Returns:
            True for a full disk.
        """
        if code == sqlite3.SQLITE_FULL:
            return True
        # The shared index of the log cannot grow either, but SQLite calls that an I/O error.
        if code not in {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}:
            return False
        free = self.free_bytes()
        return free is not None and free < _FULL_BELOW_BYTES

    def lacks_ballast(self) -> bool:
        """Return whether the ballast is wanted and not there."""
        return self._ballast_bytes > 0 and not self._ballast.exists()

    def release_ballast(self) -> bool:
        """Delete the ballast.

        Returns:
            True where it was there, and its room is free now.
        """
        if not self._ballast_bytes:
            return False
        try:
            self._ballast.unlink()
        except OSError:
            return False
        logger.warning("the disk of %s is full: its ballast was deleted, so that entries can be deleted", self._path)
        return True

    def restore_ballast(self) -> bool:
        """Make the ballast where it is missing and there is room for it.

        Returns:
            True where it is there, or not wanted.
        """
        if not self.lacks_ballast():
            return True
        free = self.free_bytes()
        if free is None or free < self._ballast_bytes + _BALLAST_HEADROOM_BYTES:
            return False
        # Under another name at first: a ballast of half the size would pass for a whole one.
        unfinished = self._ballast.with_name(f"{self._ballast.name}.new")
        try:
            _allocate(unfinished, self._ballast_bytes)
            unfinished.replace(self._ballast)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            return False
        return True

    def create_private(self) -> None:
        """Make the file where it is absent, for its owner alone; SQLite gives the files beside it the same mode."""
        if not self._path.exists():
            _create_private(self._path)

    def tighten(self) -> None:
        """Take the file from other users that may read it, and say so.

        One that others may write is left as it is, with a warning: several users share it on purpose.
        """
        # Never opened here: closing it would drop the locks that SQLite holds on it in this process (POSIX).
        try:
            mode = self._path.stat().st_mode
        except OSError:
            return
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            logger.warning("%s may be written by other users; if that is not meant, run chmod 600 on it", self._path)
        elif mode & (stat.S_IRWXG | stat.S_IRWXO):
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    self._path.with_name(self._path.name + suffix).chmod(PRIVATE_MODE)
            logger.warning("%s could be read by other users; it is its owner's alone now", self._path)


def _create_private(path: Path) -> None:
    """Make an empty file that no other thread can open before it is closed here."""
    unlinked = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # What cannot be made here, SQLite cannot make either, and says why.
    with contextlib.suppress(OSError):
        os.close(os.open(unlinked, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_MODE))
        try:
            os.link(unlinked, path)
        finally:
            unlinked.unlink()


def _allocate(path: Path, size_bytes: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, PRIVATE_MODE)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size_bytes)
        else:
            # A file with holes would hold no room.
            for offset in range(0, size_bytes, _WRITE_BYTES):
                os.write(descriptor, b"\xff" * min(_WRITE_BYTES, size_bytes - offset))
    finally:
        os.close(descriptor)
