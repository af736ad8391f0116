"""The resume file of an import: what was acknowledged, of which input, in which store."""

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import orjson

from aiokv.cli.rows import Position

_FORMAT = 1
_KIND = "aiokv import"
_SAMPLE_BYTES = 64 * 1024
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
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._failed_file is not None:
            if not self._failed_file.seek(0, os.SEEK_END):
                self.failed_path.unlink(missing_ok=True)
            self._failed_file.close()
            if not self._rows:
                self.forget()

    def begin(self, *, restart: bool) -> Checkpoint:
        """Read the resume file, and make sure that both files can be written.

        Args:
            restart: Whether to begin at the first row, whatever the resume file says.

        Returns:
            Where to go on.

        Raises:
            ValueError: The resume file is of another input or store, or is none.
            OSError: A file cannot be read or written.
        """
        checkpoint = self._read() or Checkpoint()
        if restart:
            checkpoint = Checkpoint()
        elif checkpoint.position.rows:
            self._check_identity()
        self._failed_file = self.failed_path.open("ab")
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
        if failed:
            self._failed_file.write(failed)
            self._failed_file.flush()
            os.fsync(self._failed_file.fileno())
        checkpoint = checkpoint._replace(failed_bytes=self._failed_file.seek(0, os.SEEK_END))
        self._rows = checkpoint.position.rows
        if self.resume_path is not None:
            content = {"kind": _KIND, "format": _FORMAT, **self._identity, "done": checkpoint._asdict()}
            content["done"]["position"] = checkpoint.position._asdict()
            _replace(self.resume_path, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
        return checkpoint

    def forget(self) -> None:
        """Remove the resume file: the import is through, or has not begun.

        Raises:
            OSError: It cannot be removed.
        """
        if self.resume_path is not None:
            self.resume_path.unlink(missing_ok=True)

    def _read(self) -> Checkpoint | None:
        if self.resume_path is None:
            return None
        try:
            with self.resume_path.open("rb") as file:
                content = orjson.loads(file.read(_MAX_FILE_BYTES))
            if content["kind"] != _KIND or content["format"] != _FORMAT:
                raise ValueError("another kind")  # noqa: TRY301 (all that is no resume file ends below)
            done = content["done"]
            checkpoint = Checkpoint(Position(**done.pop("position")), **done)
            self._found = {name: content[name] for name in self._identity}
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            # Not chained: the decoder's error holds the file.
            pass
        else:
            return checkpoint
        raise ValueError(
            f"{self.resume_path} is no resume file of this version of aiokv; name another by --resume PATH, or remove it"
        )

    def _check_identity(self) -> None:
        for part, meant in (("input", "another input, or it has changed"), ("target", "another store or namespace")):
            was, is_ = self._found[part], self._identity[part]
            if was != is_:
                names = [name for name in is_ if not isinstance(was, dict) or was.get(name) != is_[name]]
                raise ValueError(
                    f"{self.resume_path} is of {meant} ({', '.join(names)}); to import all of this one begin again with "
                    "--restart, or name another resume file by --resume PATH"
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
    return {"input": identity, "target": {"url": url, "db": db_name}}


def is_regular(file: BinaryIO) -> bool:
    """Return whether a file can be read twice and has a size.

    Args:
        file: An open file.
    """
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _replace(path: Path, content: bytes) -> None:
    """Replace a file: after a crash at any moment the old one or the new one is there, whole."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    # Some file systems cannot.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
