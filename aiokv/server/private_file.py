"""Small private text files: how they are read, and edits that are written whole or not at all, one after the other."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Generator
from pathlib import Path

logger = logging.getLogger("aiokv.server")

_LOCK_TIMEOUT_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.02
_PRIVATE_MODE = 0o600
_MAX_BYTES = 16 * 1024 * 1024
# A pipe without a writer would block the opening, and a terminal would become this process's own.
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def read_small_file(path: Path) -> bytes:
    """Read a file whole, without waiting for other programs.

    Args:
        path: A regular file of at most 16 MiB, or a link to one.

    Returns:
        What it holds.

    Raises:
        OSError: It cannot be read, is no regular file or is larger.
    """
    descriptor = os.open(path, _READ_FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it must be a regular file, not a folder, a pipe or a device")
        size, content = status.st_size, b""
        if size <= _MAX_BYTES:
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                content = file.read(_MAX_BYTES + 1)
            # It may have grown meanwhile.
            size = len(content)
    finally:
        os.close(descriptor)
    if size > _MAX_BYTES:
        raise OSError(errno.EFBIG, f"it must have at most {_MAX_BYTES:,} bytes, not {size:,}")
    return content


def edit_private_file(path: Path, change: Callable[[bytes | None], bytes]) -> None:
    """Replace what a file holds; readers see the old file or the new one, and a failure leaves the old one.

    The new file has the owner and group of the old one. Its mode is that of the old one without the rights of others.

    Args:
        path: The file, or a link to it.
        change: Returns the new content for the present one, which is None where there is no file. An error that it raises is
            the caller's, and leaves the file as it is.

    Raises:
        OSError: The file cannot be read or written, or another program held its lock for 10 seconds.
    """
    # A link stays a link: the file that it leads to is replaced.
    path = Path(os.path.realpath(path))
    with _locked(path):
        try:
            content, status = read_small_file(path), path.stat()
        except FileNotFoundError:
            content, status = None, None
        _replace(path, change(content), status)
    if status is not None and status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        logger.warning("%s was open to others (mode %o); only its owner may read it now", path, mode)


def _replace(path: Path, content: bytes, status: os.stat_result | None) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _PRIVATE_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if status is not None:
                _keep_owner(file.fileno(), status)
                os.fchmod(file.fileno(), status.st_mode & _PRIVATE_MODE)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise OSError(errno.EBUSY, "it is a mount point; mount the folder that holds it instead") from error


def _keep_owner(descriptor: int, status: os.stat_result) -> None:
    mine = os.fstat(descriptor)
    if (mine.st_uid, mine.st_gid) == (status.st_uid, status.st_gid):
        return
    try:
        os.fchown(descriptor, status.st_uid, status.st_gid)
    except PermissionError as error:
        # Its group has no rights to the file, so another group changes nothing.
        if mine.st_uid != status.st_uid:
            raise PermissionError(errno.EPERM, f"user {status.st_uid} owns it; run this as that user") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Hold a lock file beside a file, and remove it at the end."""
    lock_path = path.with_name(f"{path.name}.lock")
    deadline = time.monotonic() + _LOCK_TIMEOUT_SECONDS
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _PRIVATE_MODE)
        try:
            _wait_for_lock(descriptor, lock_path, deadline)
            # The holder before us has removed its lock file: a lock on that one keeps nobody out.
            if not _is_in_place(descriptor, lock_path):
                continue
            try:
                yield
            finally:
                lock_path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _wait_for_lock(descriptor: int, lock_path: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"another program has held {lock_path} for too long") from None
            time.sleep(_LOCK_POLL_SECONDS)
        else:
            return


def _is_in_place(descriptor: int, lock_path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), lock_path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
