"""The resume file of an import: what was acknowledged, of which input, in which store."""

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import orjson

from aiokv.backends.registry import redacted_url, sqlite_path_of
from aiokv.cli.paths import InUseError, lock, open_locked
from aiokv.cli.rows import Position
from aiokv.cli.terminal import naming

_FORMAT = 1
_KIND = "aiokv import"
_SAMPLE_BYTES = 64 * 1024
_HEAD_BYTES = 200
_NOTE_START = b'{"line":'
_MAX_FILE_BYTES = 1024 * 1024


class Checkpoint(NamedTuple):
    """How far an import is: all rows before the position are stored, or written down as failed."""

    position: Position = Position()
    stored: int = 0
    failed: int = 0
    failed_bytes: int = 0
    """The size of the file of failed rows."""


class Journal:
    """The resume file and the file of failed rows.

    Args:
        resume_path: The resume file; None where there is none.
        failed_path: The file of failed rows; it is not there in the end where no row failed.
        identity: Input and target, as `identity_of` gives them.
    """

    def __init__(self, resume_path: Path | None, failed_path: Path, identity: dict[str, Any]) -> None:
        self.resume_path = resume_path
        self.failed_path = failed_path
        self._identity = identity
        self._failed_file: BinaryIO | None = None
        self._resume_file: BinaryIO | None = None
        self._keeps_notes = True
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._failed_file is not None:
            if self._keeps_notes and not os.fstat(self._failed_file.fileno()).st_size:
                self.failed_path.unlink(missing_ok=True)
            # It would try again to write what a full disk has refused.
            with contextlib.suppress(OSError):
                self._failed_file.close()
            if not self._rows:
                self.forget()
        if self._resume_file is not None:
            self._resume_file.close()

    def begin(self, *, restart: bool) -> Checkpoint:
        """Read the resume file, and make sure that both files can be written.

        Args:
            restart: Whether to begin at the first row, whatever the resume file says.

        Returns:
            Where to go on.

        Raises:
            ValueError: The resume file is of another input or store, or is none; the other file is no file of failed rows; or
                another import uses one of them now.
            OSError: A file cannot be read or written.
        """
        checkpoint = self._read(restart=restart) or Checkpoint()
        if restart:
            checkpoint = Checkpoint()
        elif checkpoint.position.rows:
            self._check_identity()
        self._failed_file = _open_notes(self.failed_path)
        self._keeps_notes = is_regular(self._failed_file)
        if self._keeps_notes:
            # What is behind it was written down after the resume file, and comes again.
            self._failed_file.truncate(min(checkpoint.failed_bytes, self._failed_file.seek(0, os.SEEK_END)))
        return self.record(checkpoint, b"")

    def record(self, checkpoint: Checkpoint, failed: bytes) -> Checkpoint:
        """Write down how far the import is; what was written stays, whatever becomes of this process or the machine.

        Args:
            checkpoint: How far it is; its `failed_bytes` is ignored.
            failed: The lines of rows that failed since the last time.

        Returns:
            The checkpoint with its `failed_bytes`.

        Raises:
            OSError: A file cannot be written.
        """
        if self._failed_file is None:
            raise RuntimeError("begin comes first")
        with naming(self.failed_path):
            if failed:
                self._failed_file.write(failed)
                self._failed_file.flush()
                if self._keeps_notes:
                    os.fsync(self._failed_file.fileno())
            end = self._failed_file.seek(0, os.SEEK_END) if self._keeps_notes else 0
        checkpoint = checkpoint._replace(failed_bytes=end)
        self._rows = checkpoint.position.rows
        if self.resume_path is not None:
            content = {"kind": _KIND, "format": _FORMAT, **self._identity, "done": checkpoint._asdict()}
            content["done"]["position"] = checkpoint.position._asdict()
            with naming(self.resume_path):
                new = _replace(self.resume_path, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
            if self._resume_file is not None:
                self._resume_file.close()
            # It holds the lock.
            self._resume_file = new
        return checkpoint

    def forget(self) -> None:
        """Remove the resume file: the import is through, or has not begun.

        Raises:
            OSError: It cannot be removed.
        """
        if self.resume_path is not None:
            self.resume_path.unlink(missing_ok=True)

    def _read(self, *, restart: bool) -> Checkpoint | None:
        if self.resume_path is None:
            return None
        data = b""
        try:
            if not stat.S_ISREG(self.resume_path.stat().st_mode):
                raise ValueError("no file")  # noqa: TRY301 (all that is no resume file ends below)
            self._resume_file = open_locked(self.resume_path, "rb", "import", "--resume PATH")
            data = self._resume_file.read(_MAX_FILE_BYTES)
            content = orjson.loads(data)
            if content["kind"] != _KIND or content["format"] != _FORMAT:
                raise ValueError("another kind")  # noqa: TRY301 (likewise)
            done = content["done"]
            checkpoint = Checkpoint(Position(**done.pop("position")), **done)
            self._found = {name: content[name] for name in self._identity}
        except FileNotFoundError:
            return None
        except InUseError as error:
            raise ValueError(str(error)) from None
        except (ValueError, TypeError, KeyError):
            # Not chained: the decoder's error holds the file.
            pass
        else:
            return checkpoint
        is_damaged = self._resume_file is not None and self._is_ours(data)
        if is_damaged and restart:
            return None
        way_out = "begin again with --restart" if is_damaged else "remove it"
        raise ValueError(
            f"{self.resume_path} is no resume file of this version of aiokv; name another by --resume PATH, or {way_out}"
        )

    def _is_ours(self, data: bytes) -> bool:
        """Return whether what cannot be read was a resume file once, or is nobody's."""
        is_named_so = self.resume_path is not None and self.resume_path.name.endswith(".aiokv-resume")
        return is_named_so or not data.strip(b"\0") or f'"{_KIND}"'.encode() in data[:_HEAD_BYTES]

    def _check_identity(self) -> None:
        for part, meant in (("input", "another input, or it has changed"), ("target", "another store, namespace or account")):
            was, is_ = self._found[part], self._identity[part]
            if not isinstance(was, dict):
                was = {}
            # Of an input that cannot be read twice less is known.
            names = [name for name in is_ if was.get(name) != is_[name] and (name in was or part == "target")]
            if names:
                raise ValueError(
                    f"{self.resume_path} is of {meant} ({', '.join(names)}); to import all of this one begin again with "
                    "--restart, or name another resume file by --resume PATH"
                )
        url = self._identity["target"].get("url", "")
        if url.startswith("sqlite:") and not Path(store := sqlite_path_of(url)).exists():
            raise ValueError(
                f"{self.resume_path} is of rows that went into {store}, which is gone; put that file back, or import all rows "
                "again with --restart"
            )


def identity_of(file: BinaryIO, format_: str, url: str, db_name: str) -> dict[str, Any]:
    """Return what an import must have in common with the run that it goes on with.

    Args:
        file: The input, at its beginning.
        format_: Its format.
        url: The canonical URL of the store.
        db_name: The namespace.

    Returns:
        What fits JSON: of a file that can be read twice its size, its time, and a digest of its beginning and end.

    Raises:
        OSError: The input cannot be read.
    """
    identity: dict[str, Any] = {"format": format_}
    if is_regular(file):
        status = os.fstat(file.fileno())
        samples = (
            os.pread(file.fileno(), _SAMPLE_BYTES, 0),
            os.pread(file.fileno(), _SAMPLE_BYTES, max(0, status.st_size - _SAMPLE_BYTES)),
        )
        digest = hashlib.blake2b(b"".join(samples), digest_size=16).hexdigest()
        identity |= {"size": status.st_size, "modified": status.st_mtime_ns, "digest": digest}
    # A path may hold an "@" that is no end of credentials.
    shown = url if url.startswith("sqlite:") else redacted_url(url)
    return {"input": identity, "target": {"url": shown, "db": db_name, "account": _account_of(url)}}


def _account_of(url: str) -> str | None:
    """Return a digest of the id of the key that a server gets: stores of other accounts are other ones."""
    if not url.startswith(("http:", "https:")):
        return None
    from yarl import URL  # noqa: PLC0415 (comes with aiohttp, which other stores do not need)

    from aiokv.backends.http import credentials  # noqa: PLC0415 (likewise)

    chosen = credentials.choose_credentials(URL(url), None)
    if isinstance(chosen, credentials.FalCredentials):
        chosen = credentials.find_fal_key()
    if not isinstance(chosen, credentials.KeyCredentials):
        return None
    return hashlib.blake2b(chosen.key.partition(":")[0].encode(), digest_size=16).hexdigest()


def is_regular(file: BinaryIO) -> bool:
    """Return whether a file can be read twice and has a size.

    Args:
        file: An open file.
    """
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _open_notes(path: Path) -> BinaryIO:
    """Open the file of failed rows, which may be a device; refuse what may hold anything else."""
    option = "--failed PATH"
    try:
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        if stat.S_ISCHR(mode):
            return path.open("wb", buffering=0)
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is no file that rows can be noted in; name another file by {option}")
        file = open_locked(path, "a+b", "import", option)
    except InUseError as error:
        raise ValueError(str(error)) from None
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; name another file for rows that are left out by {option}", str(path)
        ) from None
    if not _holds_notes(file):
        file.close()
        raise ValueError(
            f"{path} exists, and is no file of rows that an import left out; name another file by {option}, or move it away"
        )
    return file


def _holds_notes(file: BinaryIO) -> bool:
    """Return whether each line of a file is the note of a row that was left out; a crash leaves the last one unfinished."""
    file.seek(0)
    return all(
        _is_note(line) if line.endswith(b"\n") else _is_begun_note(line, is_first=number == 0)
        for number, line in enumerate(iter(lambda: file.readline(_MAX_FILE_BYTES), b""))
    )


def _is_begun_note(line: bytes, *, is_first: bool) -> bool:
    # A disk that lost its power may have room for the rest, of zeros. A file of a few such bytes alone may be anybody's.
    begun = line.rstrip(b"\0")
    is_begun = begun.startswith(_NOTE_START) or (not is_first and _NOTE_START.startswith(begun))
    return is_begun and len(line) < _MAX_FILE_BYTES


def _is_note(line: bytes) -> bool:
    try:
        return set(orjson.loads(line)) == {"line", "key", "reason"}
    except (ValueError, TypeError):
        return False


def _replace(path: Path, content: bytes) -> BinaryIO:
    """Replace a file, and return it, locked: after a crash at any moment the old one or the new one is there, whole."""
    new = path.with_name(f"{path.name}.new")
    file = new.open("wb")
    try:
        lock(file)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        # Closing would try again to write what a full disk has refused.
        with contextlib.suppress(OSError):
            file.close()
        raise
    # Some file systems cannot.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return file
