"""What commands say and where: messages, standard streams, and what a terminal can show."""

import os
import sys
from typing import TYPE_CHECKING, BinaryIO, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def print_message(message: object) -> None:
    """Write a message for the user to standard error.

    Args:
        message: What to say, without `aiokv: `.
    """
    print(f"aiokv: {message}", file=sys.stderr)


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
    if text.isprintable() and "\\" not in text:
        return text
    pieces = (repr(character)[1:-1] if character == "\\" or not character.isprintable() else character for character in text)
    return "".join(pieces)
