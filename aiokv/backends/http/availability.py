"""Whether a host takes connections: one state for each host, shared by all calls of the process.

A host is *up* until a connection is refused or reset. Then it is *suspect*: one call looks whether it takes connections, with
growing waits, and the others wait for what that call finds, each for its own `wait_for_ready` seconds at most. Once these are
over the host is *down* for that call, which fails at once. So "down" is no state of the host: it is how long ago the host was
lost, against how long a call may wait. A look that finds the host lets the calls go on; only an answer to a request that was
sent since ends the time for which the host was lost.

Calls do the looking: the first one that comes when a look is due. So no timer and no task outlives the calls, a forked child or
a closed loop leaves nothing behind, and a program that calls once an hour still looks at each call.
"""

import asyncio
import contextlib
import logging
import math
import os
import random
import ssl
import threading
import time
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable
from socket import SOCK_STREAM, socket

from yarl import URL

from aiokv.backends.http.retry import has_backoff

logger = logging.getLogger("aiokv")

_MAX_CONNECTS_A_SECOND = 3
# After each look that fails, the seconds before the next one at least. The last one repeats, until the host has been away for
# so long that a look a second is enough.
_WAITS_SECONDS = (0.1, 0.4, 0.5)
_SUSPECT_SECONDS = 3.0
_DOWN_WAIT_SECONDS = 1.0
# This long after its look was due, another call may look instead: the event loop of the first may be blocked or dead.
_LEASE_SECONDS = 1.5
_HAPPY_EYEBALLS_SECONDS = 0.25
# A host that comes and goes is not logged as lost more often than this.
_LOG_SECONDS = 5.0


class _CutShortError(Exception):
    """A look ended before its time, since its call did."""


class Availability:
    """What this process knows of one host.

    Args:
        host: The host's name or address.
        port: Its port.
        clock: Returns a monotonic time in seconds.
        is_tls: Whether it is found only once it has also shaken hands by TLS.

    Attributes:
        is_well: Whether nothing is wrong: the host has answered a request that was sent after it was last lost.
        is_open: Whether calls may go on: the host is well, or was found again and has yet to answer.
        generation: How often the host was found again; a request remembers in which one it was sent.
    """

    def __init__(self, host: str, port: int, clock: Callable[[], float] = time.monotonic, *, is_tls: bool = False) -> None:
        self.is_well = True
        self.is_open = True
        self.generation = 0
        self._host = host
        self._port = port
        self._clock = clock
        self._is_tls = is_tls
        self._lock = threading.Lock()
        self._is_refused = False
        self._reason = ""
        self._lost_at = 0.0
        # When the log said that the host was lost, and since when it was; None once it said that the host is back.
        self._logged_at = -math.inf
        self._logged_lost_at: float | None = None
        self._looks = 0
        self._look_at = 0.0
        self._refusals: deque[float] = deque(maxlen=_MAX_CONNECTS_A_SECOND)
        # The call that looks, by a mark of its own, and until when it is trusted to do so.
        self._looker: object = None
        self._looker_until = 0.0
        self._waiters: dict[asyncio.Future[None], AbstractEventLoop] = {}

    def blocks(self, wait_seconds: float) -> bool:
        """Return whether a call has to wait, or fails at once.

        Args:
            wait_seconds: How long it would wait. A call that would not goes on while nothing was refused: a reset alone may
                be of one connection of many.
        """
        return not self.is_open and (self._is_refused or wait_seconds > 0)

    def away(self) -> str:
        """Return how long the host has been away, and why, for a message."""
        return f"no connection for {max(0.0, self._clock() - self._lost_at):.1f} s ({self._reason or 'the last ones broke'})"

    def answered(self, generation: int) -> None:
        """Note that the host has answered.

        Args:
            generation: The generation in which the request was sent. After a refusal, only an answer to a later request shows
                that the host is well: a server that stops still answers those that it has.
        """
        with self._lock:
            if not self.is_open:
                if self._is_refused:
                    # On a connection of before: a look finds out when it takes new ones.
                    return
                self._open()
            elif generation != self.generation:
                return
            self.is_well = True
            if self._logged_lost_at is not None:
                away_seconds = self._clock() - self._logged_lost_at
                logger.warning("%s:%d answers again, after %.1f s", self._host, self._port, away_seconds)
                self._logged_lost_at = None

    def reset(self) -> None:
        """Forget every failure."""
        with self._lock:
            if not self.is_open:
                self._open()
            self.is_well = True
            self._logged_at, self._logged_lost_at = -math.inf, None

    def broke(self, generation: int) -> bool:
        """Note that the connection of a request broke.

        Args:
            generation: The generation in which it was sent.

        Returns:
            Whether the request went down with the host, so that it can be sent again at no cost to the retry quota. False
            where the host takes connections and breaks them.
        """
        with self._lock:
            if generation != self.generation or not self.is_open:
                return True
            if not self.is_well:
                return False
            self._lose()
            return True

    def refused(self, reason: str) -> None:
        """Note that no connection could be made.

        Args:
            reason: Why, for messages.
        """
        with self._lock:
            if self.is_open:
                if self.is_well:
                    self._lose()
                self.is_well = self.is_open = False
                self._note(reason)
                self._postpone()
            else:
                self._note(reason)
                self._look_at = max(self._look_at, self._least_look_at())

    def wake(self) -> None:
        """Let every waiting call check again whether it may wait longer."""
        with self._lock:
            self._wake_all()

    async def wait(
        self, wait_seconds: float, allowed_seconds: float, connect_seconds: float, is_over: Callable[[], bool]
    ) -> bool:
        """Wait until the host takes connections; look whether it does, where no other call does so.

        Args:
            wait_seconds: How long this call waits for a host, from when that was lost.
            allowed_seconds: How long this call can wait for anything.
            connect_seconds: How long a connection may take.
            is_over: Return whether the call is to wait no longer; asked after each `wake`.

        Returns:
            Whether the call may go on.
        """
        me, has_looked = object(), False
        deadline = self._clock() + allowed_seconds
        changed: asyncio.Future[None] | None = None
        try:
            while not is_over():
                with self._lock:
                    if not self.blocks(wait_seconds):
                        return True
                    now = self._clock()
                    until = min(self._lost_at + wait_seconds, deadline)
                    look_at = max(now, self._look_at) if has_backoff() else now
                    # A call that may wait no longer looks once, where a look is due.
                    is_in_time = look_at <= until or (look_at <= now < deadline and not has_looked)
                    looks = is_in_time and (self._looker in {None, me} or now >= self._looker_until)
                    if looks:
                        self._looker, self._looker_until = me, look_at + _LEASE_SECONDS
                    elif now >= until:
                        return False
                    changed = self._await_change()
                    # Where another call looks, see whether it still does so once its time is over.
                    wake_at = look_at if looks else until if self._looker in {None, me} else min(until, self._looker_until)
                pause = wake_at - now
                if pause > 0:
                    await asyncio.wait([changed], timeout=pause)
                # Others may have been refused meanwhile, which puts the look off, or have taken it over.
                is_due = self._clock() >= self._look_at or not has_backoff()
                if looks and is_due and self._looker is me and not changed.done():
                    has_looked = True
                    with contextlib.suppress(_CutShortError):
                        self._looked(await self._reach(connect_seconds, deadline - self._clock()))
                self._waiters.pop(changed, None)
            return False
        finally:
            self._leave(me, changed)

    def _await_change(self) -> "asyncio.Future[None]":
        loop = asyncio.get_running_loop()
        changed: asyncio.Future[None] = loop.create_future()
        self._waiters[changed] = loop
        return changed

    def _leave(self, me: object, changed: "asyncio.Future[None] | None") -> None:
        """End a wait; where nobody looks any more, the next waiting call does."""
        with self._lock:
            if changed is not None:
                self._waiters.pop(changed, None)
            if self._looker is me:
                self._looker = None
            if self._looker is None and self._waiters:
                self._wake_one()

    async def _reach(self, connect_seconds: float, allowed_seconds: float) -> str | None:
        """Make a connection and close it unused; return why there is none."""
        # As aiohttp connects: one address family that leads nowhere must not make a host seem lost.
        import aiohappyeyeballs  # noqa: PLC0415 (a program that meets no failure need not load it)

        try:
            async with asyncio.timeout(min(connect_seconds, allowed_seconds)):
                loop = asyncio.get_running_loop()
                addresses = await loop.getaddrinfo(self._host, self._port, type=SOCK_STREAM)
                connection = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=_HAPPY_EYEBALLS_SECONDS)
                if self._is_tls:
                    await self._shake_hands(connection)
        except TimeoutError:
            if allowed_seconds < connect_seconds:
                # The call had no time left, which says nothing of the host.
                raise _CutShortError from None
            return f"no connection within {connect_seconds:g} s"
        except ssl.SSLError as error:
            return f"the TLS handshake failed ({error.reason or type(error).__name__})"
        except OSError as error:
            return os.strerror(error.errno) if error.errno and error.errno > 0 else type(error).__name__
        connection.close()
        return None

    async def _shake_hands(self, connection: socket) -> None:
        """Make a TLS handshake and close the connection."""
        # Whether the certificate is trusted is for the request to find out, by its store's options. Nothing is sent here.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        transport, _ = await asyncio.get_running_loop().create_connection(
            asyncio.Protocol, sock=connection, ssl=context, server_hostname=self._host
        )
        transport.abort()

    def _looked(self, reason: str | None) -> None:
        with self._lock:
            if self.is_open:
                return
            if reason is None:
                self._open()
            else:
                self._note(reason)
                self._postpone()

    def _note(self, reason: str) -> None:
        now = self._clock()
        if self._logged_lost_at is None and now - self._logged_at >= _LOG_SECONDS:
            logger.warning("%s:%d takes no connections (%s); calls wait for it a little", self._host, self._port, reason)
            self._logged_at, self._logged_lost_at = now, self._lost_at
        self._is_refused, self._reason = True, reason
        self._refusals.append(now)

    def _least_look_at(self) -> float:
        """Return the moment from which one more connection is not the fourth within a second."""
        return self._refusals[0] + 1.0 if len(self._refusals) == _MAX_CONNECTS_A_SECOND else 0.0

    def _lose(self) -> None:
        self.is_well = self.is_open = self._is_refused = False
        self._reason = ""
        self._looks = 0
        self._lost_at = self._look_at = self._clock()

    def _open(self) -> None:
        self.is_open = True
        self.generation += 1
        self._is_refused = False
        self._wake_all()

    def _postpone(self) -> None:
        """Choose when to look next; a little at random, or all processes would come at once."""
        now = self._clock()
        wait = _WAITS_SECONDS[min(self._looks, len(_WAITS_SECONDS) - 1)]
        if now - self._lost_at > _SUSPECT_SECONDS:
            # Less than a second, not more: the host's return is to be noticed within about one.
            wait = _DOWN_WAIT_SECONDS * random.uniform(0.9, 1.0)  # noqa: S311 (spreads load, guards nothing)
        self._looks += 1
        self._look_at = max(now + wait, self._least_look_at())

    def _wake_all(self) -> None:
        while self._waiters:
            self._wake_one()

    def _wake_one(self) -> None:
        changed = next(iter(self._waiters))
        loop = self._waiters.pop(changed)
        # Its loop may be another thread's, and may have ended.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_end, changed)


def _end(changed: "asyncio.Future[None]") -> None:
    if not changed.done():
        changed.set_result(None)


_hosts: dict[tuple[str, int, bool], Availability] = {}


def availability_of(url: URL) -> Availability:
    """Return what this process knows of the host of a URL.

    Args:
        url: An `http(s)` URL.

    Returns:
        The state that all calls to this host share.
    """
    host, port, is_tls = url.host or "", url.port or 0, url.scheme == "https"
    return _hosts.setdefault((host, port, is_tls), Availability(host, port, is_tls=is_tls))


def reset_hosts() -> None:
    """Forget every failure of every host, as in a new process; hosts in use are included."""
    for host in list(_hosts.values()):
        host.reset()


# A thread of the parent may hold the lock of a host, and does not exist in the child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hosts.clear)
