"""`Readiness`: whether a server can do its work now, and the reason where it cannot."""

import asyncio
import logging

from aiokv import clock
from aiokv.backends.base import Backend, CheckedBackend, HostedBackend
from aiokv.server.access import AccessFile
from aiokv.server.answers import DONE, RETRY_SOON, Answer, refusal
from aiokv.server.log_limit import LogLimit

logger = logging.getLogger("aiokv.server")

READINESS_PROBE = ("aiokv-readiness", "probe")
"""The namespace and key that are read to find out whether a backend that cannot tell its health answers."""

_LIFE_SECONDS = 1.0
_UNCOUNTED = (
    "the access file has quotas of bytes or entries, which hold nobody back: this store cannot count what an account stores; "
    "take them out by `aiokv access limit ID --max-bytes none --max-entries none`"
)


class Readiness:
    """Looks whether sets and gets would succeed.

    Args:
        backend: The store of the values.
        access: The accounts, or None.

    Attributes:
        is_stopping: Whether the server stops.
    """

    def __init__(self, backend: Backend, access: AccessFile | None) -> None:
        self._backend = backend
        self._access = access
        self._probed_until = 0.0
        self._problem: str | None = None
        self._probing = asyncio.Lock()
        self._log_limit = LogLimit()
        self.is_stopping = False

    async def problem(self) -> str | None:
        """Find out whether sets and gets would succeed now; at most once a second, since a probe may write.

        Returns:
            None where they would, else the reason, for a person.
        """
        if self.is_stopping:
            return "the server is stopping"
        # Whoever asks meanwhile waits for what is found: what was found before may be the opposite.
        async with self._probing:
            if clock.monotonic() >= self._probed_until:
                self._problem = await self._probe()
                self._probed_until = clock.monotonic() + _LIFE_SECONDS
            return self._problem

    async def answer(self) -> Answer:
        """Answer `/readyz`."""
        problem = await self.problem()
        return DONE if problem is None else refusal(503, f"not ready: {problem}", RETRY_SOON)

    async def _probe(self) -> str | None:
        try:
            if self._access is not None and (problem := self._access.health()):
                return problem
            if self._access is not None and self._access.has_stored_quotas() and not isinstance(self._backend, HostedBackend):
                self._log_limit.error(logger, "quotas", _UNCOUNTED)
                return _UNCOUNTED
            if isinstance(self._backend, CheckedBackend):
                return await self._backend.health()
            await self._backend.get(*READINESS_PROBE)
        except Exception as error:  # noqa: BLE001 (whatever it is, the server is not ready)
            self._log_limit.error(logger, type(error).__name__, f"the store cannot be reached: {type(error).__name__}")
            return "the store cannot be reached now"
        return None
