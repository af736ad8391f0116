"""What a server says of itself to its operator."""

import socket
import sys
from importlib.util import find_spec

from aiokv.backends.registry import redacted_url
from aiokv.server.options import ServerOptions


def say(text: str) -> None:
    """Write a line for the operator.

    Args:
        text: The line.
    """
    # The operator's end may be closed; the service goes on.
    if sys.stderr is not None:
        try:
            print(f"aiokv: {text}", file=sys.stderr, flush=True)  # noqa: T201
        except OSError:
            return


def start_line(options: ServerOptions, address: str) -> str:
    """Return the line that says where and how a server serves.

    Args:
        options: The server's options.
        address: Its address.

    Returns:
        The line; the address ends at a comma or at the line's end.
    """
    facts = [f"serving {redacted_url(options.store)} at {address}"]
    if options.workers > 1:
        facts.append(f"{options.workers} workers")
    if find_spec("uvloop") is not None:
        facts.append("uvloop")
    if options.access_file is None:
        facts.append("any credentials taken (no access file)")
    return ", ".join(facts)


def reload_line(options: ServerOptions) -> str:
    """Return the line that says what a server has read again at SIGHUP.

    Args:
        options: The server's options.

    Returns:
        The line; it names only what the server has.
    """
    files = {
        "access file": options.access_file,
        "certificate": options.tls_cert,
        # Standard output is not opened again.
        "log file": None if options.access_log == "-" else options.access_log,
    }
    *first, last = [name for name, path in files.items() if path is not None] or ["nothing"]
    names = f"{', '.join(first)} and {last}" if first else last
    return f"reloaded {names}" if names != "nothing" else "nothing to reload: there is no access file, certificate or log file"


def address_of(listener: socket.socket, *, is_tls: bool) -> str:
    """Return the address of a listening socket, for people and clients.

    Args:
        listener: The socket.
        is_tls: Whether it speaks TLS.

    Returns:
        Such as `http://127.0.0.1:8787` or `unix:/run/aiokv.sock`.
    """
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name if isinstance(name, str) else '@' + name[1:].decode()}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{'https' if is_tls else 'http'}://{host}:{name[1]}"
