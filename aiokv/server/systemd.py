"""What systemd and a service tell each other: readiness, the watchdog, and sockets that systemd has bound.

Without systemd nothing is sent and nothing is given. The protocols are those of sd_notify(3) and sd_listen_fds(3).
"""

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

from aiokv.errors import ConfigurationError

_FIRST_DESCRIPTOR = 3
_MICROSECONDS = 1_000_000


class Notifier:
    """The socket on which systemd hears how the service is.

    Args:
        environment: The environment, from which what systemd put there is removed: child processes do not see it.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        # An address that begins with `@` is abstract: it begins with NUL on the wire.
        self._address = ("\0" + address[1:]) if address.startswith("@") else address
        microseconds = int(watchdog) if watched and self._address and watchdog.isascii() and watchdog.isdigit() else 0
        self.watchdog_seconds: float | None = microseconds / _MICROSECONDS if microseconds else None
        """How often systemd must hear `alive` at the least, or None."""

    def ready(self, status: str) -> None:
        """Report that the service works.

        Args:
            status: A line for `systemctl status`.
        """
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """Report that the service reads its configuration again; `ready` ends that."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=reloading")

    def stopping(self, status: str) -> None:
        """Report that the service ends.

        Args:
            status: A line for `systemctl status`.
        """
        self._send(f"STOPPING=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """Report a line for `systemctl status`.

        Args:
            status: The line.
        """
        self._send(f"STATUS={status}")

    def alive(self) -> None:
        """Report that the service is no reason for the watchdog to end it."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # A new socket each time: systemd may have started again. What it does not hear is no reason to fail.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(message.encode(), self._address)


def take_sockets(environment: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the listening sockets that systemd has bound for this process.

    Args:
        environment: The environment, from which their number is removed: child processes do not see it.

    Returns:
        The sockets, which no child process inherits; none without socket activation.

    Raises:
        ConfigurationError: One of them takes no connections.
    """
    process, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    # Meant for another process, from which this one has inherited the environment.
    if process != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        return []
    return [_take_socket(descriptor) for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count))]


def _take_socket(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        given = socket.socket(fileno=descriptor)
        if given.type == socket.SOCK_STREAM and given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return given
    except OSError:
        pass
    raise ConfigurationError(
        f"descriptor {descriptor} from systemd is no listening socket; the socket unit needs ListenStream=, and Accept=no"
    )
