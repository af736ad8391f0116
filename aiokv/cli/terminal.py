"""What commands say and where: messages, standard streams, and what a terminal can show."""

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, TextIO

if TYPE_CHECKING:
    from _typeshed import SupportsWrite
    from rich.console import Console


# Credentials of a URL, also of one that is written wrongly or became a path.
_CREDENTIALS = re.compile(r"((?:[a-z][a-z0-9+.-]*:/|(?:https?|rediss?|valkeys?)(?:\+\w+)?:)/*)[^\s'\"]*@", re.IGNORECASE)
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Parser(argparse.ArgumentParser):
    """A parser whose messages can be shown, and whose help is not lost without a word."""

    def print_help(self, file: "SupportsWrite[str] | None" = None) -> None:
        """Print the help.

        Args:
            file: Where to; None for standard output.

        Raises:
            OSError: It cannot be written, which argparse would not say.
        """
        with naming("standard output"):
            print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and a message."""
        super().error(_showable(message))


def print_message(message: object) -> None:
    """Write a message for the user to standard error; nowhere where that is closed.

    Args:
        message: What to say, without `aiokv: `.
    """
    # `print` would take standard output for one that is closed.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"aiokv: {_showable(describe_error(message))}", file=sys.stderr)


def masked(text: str) -> str:
    """Return a text with `***` for the credentials of URLs in it.

    Args:
        text: A message.
    """
    return _CREDENTIALS.sub(r"\1***@", text) if "@" in text else text


def _showable(message: str) -> str:
    """Return a message without credentials, and without what a terminal would obey, as names of files can hold it."""
    # Two spaces stand behind a line feed of the message itself.
    return "\n  ".join(map(_escape, masked(message).split("\n  ")))


def describe_error(error: object) -> str:
    """Return what a message says of an error: of one of a file its name, the reason, and what to do on a full disk.

    Args:
        error: An error, or any text.
    """
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    reason = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return f"{reason}; make room there, or write to another disk, and run the command again" if is_full(error) else reason


def is_full(error: object) -> bool:
    """Return whether an error is of a disk that is full.

    Args:
        error: An error, or anything else.
    """
    return isinstance(error, OSError) and error.errno in _FULL


@contextlib.contextmanager
def naming(path: Path | str) -> Generator[None]:
    """Give errors of an open file the name that its system calls do not know.

    Args:
        path: The file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def binary_output() -> BinaryIO:
    """Return standard output for bytes: a pipe gets exactly what is stored, whatever the terminal's encoding.

    Raises:
        ValueError: It is closed.
    """
    if sys.stdout is None:
        raise ValueError("standard output is closed; there is nowhere to write to")
    return sys.stdout.buffer


def binary_input() -> BinaryIO:
    """Return standard input for bytes.

    Raises:
        ValueError: It is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed; name a file, or pipe something in")
    return sys.stdin.buffer


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream shows lines that change in their place.

    Args:
        stream: A standard stream; None where it is closed.
    """
    return stream is not None and stream.isatty() and os.environ.get("TERM") not in {None, "", "dumb"}


def live_console(stream: TextIO | None) -> "Console | None":
    """Return rich's console of a stream; None where text is plain: no terminal, or no rich.

    Args:
        stream: A standard stream; None where it is closed.
    """
    if not is_terminal(stream):
        return None
    try:
        from rich.console import Console  # noqa: PLC0415 (an extra, and costly to import)
    except ImportError:
        return None
    # It heeds NO_COLOR by itself.
    return Console(file=stream)


def can_show(text: str, stream: TextIO | None) -> bool:
    """Return whether a stream's encoding has the characters of a text.

    Args:
        text: What is to be shown.
        stream: A standard stream; None where it is closed.
    """
    try:
        text.encode((stream.encoding if stream is not None else None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    r"""Return a text on one line that a terminal shows and does not obey.

    Args:
        text: A key of any content.

    Returns:
        It, with backslashes doubled and `\n`, `\x1b` and the like for what cannot be printed.
    """
    return _escape(text.replace("\\", "\\\\"))


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
