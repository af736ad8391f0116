"""The sockets of a server with several workers, which its supervisor holds: no restart of a worker refuses a connection."""

import contextlib
import errno
import socket
import sys
from collections.abc import Generator, Sequence
from typing import Any

from aiokv.errors import ConfigurationError

_BACKLOG = 1024
_MAX_PORT = 65_535
# Linux shares connections out among sockets of one address. Elsewhere one of them would get all.
CAN_SHARE_OUT = sys.platform == "linux"

_Name = tuple[int, tuple[Any, ...]]


class Listener:
    """The sockets on which one worker accepts.

    Args:
        sockets: The sockets.
        is_own: Whether no other worker accepts on them, so that they can be closed and bound again.
    """

    def __init__(self, sockets: Sequence[socket.socket], *, is_own: bool) -> None:
        self.sockets = list(sockets)
        self._is_own = is_own
        self._names: list[_Name] = [(bound.family, bound.getsockname()) for bound in self.sockets]
        self._listen()

    @property
    def hosts(self) -> list[str]:
        """The addresses that are bound, without those of this machine's file system."""
        return [name[0] for family, name in self._names if family != socket.AF_UNIX]

    def close(self) -> None:
        """Let the other workers have the connections that come while this worker cannot run."""
        if self._is_own:
            for bound in self.sockets:
                bound.close()
            self.sockets.clear()

    def open(self) -> None:
        """Bind again what was closed.

        Raises:
            OSError: It cannot be bound.
        """
        if not self.sockets:
            self.sockets = [_bind(family, name, is_shared_out=True) for family, name in self._names]
            self._listen()

    def _listen(self) -> None:
        for bound in self.sockets:
            bound.listen(_BACKLOG)


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind an address for one process.

    Args:
        host: A name or an address; each address of a name is bound.
        port: The port, 0 for a free one.

    Returns:
        The sockets.

    Raises:
        ConfigurationError: The address cannot be bound, or another server has it.
    """
    with _named(host, port):
        return _bind_all(_names(host, port))


def listen(host: str, port: int, workers: int) -> list[Listener]:
    """Bind an address for several workers.

    Args:
        host: A name or an address; each address of a name is bound.
        port: The port, 0 for a free one.
        workers: How many workers there are.

    Returns:
        A listener for each worker. On Linux each has sockets of its own, so that a worker that starts first does not get all
        clients that come back after a restart.

    Raises:
        ConfigurationError: The address cannot be bound, or another server has it.
    """
    with _named(host, port):
        # Unshared at first: else another server with workers would share its connections with this one.
        bound = _bind_all(_names(host, port))
        if not CAN_SHARE_OUT:
            return [Listener(bound, is_own=False)] * workers
        names = [(one.family, one.getsockname()) for one in bound]
        for one in bound:
            one.close()
        return [Listener([_bind(*name, is_shared_out=True) for name in names], is_own=True) for _ in range(workers)]


def _names(host: str, port: int) -> list[_Name]:
    if not 0 <= port <= _MAX_PORT:
        # The look-up would cut off its higher bits.
        raise ValueError(f"a port is from 0 to {_MAX_PORT}")
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, name) for family, _, _, _, name in found))


@contextlib.contextmanager
def _named(host: str, port: int) -> Generator[None]:
    """Say which address cannot be bound."""
    try:
        yield
    except (OSError, OverflowError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigurationError(f"cannot listen on {host} port {port}: {reason}") from error


def _bind_all(names: Sequence[_Name]) -> list[socket.socket]:
    """Bind each address that this machine has, all at one port."""
    bound: list[socket.socket] = []
    for family, name in names:
        place = (name[0], bound[0].getsockname()[1], *name[2:]) if bound else name
        try:
            bound.append(_bind(family, place, is_shared_out=False))
        except OSError as error:
            # `localhost` may have an address of IPv6 where the machine has none.
            if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT} or (not bound and name == names[-1][1]):
                for one in bound:
                    one.close()
                raise
    return bound


def _bind(family: int, name: tuple[Any, ...], *, is_shared_out: bool) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared_out:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(name)
    except BaseException:
        bound.close()
        raise
    return bound
