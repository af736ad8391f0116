"""`Claim`: at most one holder at a time, in all processes, for as long as a block runs."""

import asyncio
import logging
import os
import weakref
from collections.abc import Awaitable, Callable, Container
from datetime import timedelta
from typing import Final, Self

from aiokv import clock
from aiokv.backends.capabilities import MAX_CLAIM_SECONDS, MIN_CLAIM_SECONDS, ClaimBackend, ClaimOutcome
from aiokv.errors import CallError

logger = logging.getLogger("aiokv")

DEFAULT_CLAIM_SECONDS: Final = 15.0

_LONG: Final = 10**15

# To release is a courtesy: a claim ends by itself, so nobody waits long for a store that hangs.
_MAX_RELEASE_SECONDS = 2.0
# The loop holds its tasks weakly.
_releasing: "set[asyncio.Task[None]]" = set()


class Claim:
    """A claim of a key, as a context manager: taken where nobody holds it, renewed while the block runs, then released.

    Its block runs whether or not it is held. A claim is a lease: where it cannot be renewed in time, `is_held` becomes
    False, and stays so.

    Args:
        store: The store; once it is closed, the claim is not renewed any more.
        open_claims: Return the backend.
        db_name: The namespace.
        key: What is claimed.
        seconds: How long it lasts without renewal.
    """

    def __init__(
        self, store: object, open_claims: Callable[[], Awaitable[ClaimBackend]], db_name: str, key: str, seconds: float
    ) -> None:
        self.store = store
        self._open_claims = open_claims
        self._name = (db_name, key, os.urandom(16).hex())
        self._seconds = seconds
        # Counted from before each request, so that it ends here no later than in the store.
        self._ends_at = 0.0
        self._was_granted = False
        self._claims: ClaimBackend | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_store_closed = False

    @property
    def is_held(self) -> bool:
        """Whether this claim is held: nobody else can hold one of its key."""
        if self._was_granted and clock.monotonic() >= self._ends_at:
            # For good: another may have held it meanwhile, even where it is free again.
            self._was_granted = False
        return self._was_granted

    @property
    def seconds_left(self) -> float:
        """Seconds until the claim, whoever holds it, ends unless it is renewed or released; as far as this process knows."""
        return max(0.0, self._ends_at - clock.monotonic())

    async def __aenter__(self) -> Self:
        if self._claims is not None:
            raise RuntimeError("a claim is entered once; make another one with store.claim")
        claims = self._claims = await self._open_claims()
        self._loop = asyncio.get_running_loop()
        _begun[id(self)] = self
        try:
            self._was_granted = await self._ask(claims.claim)
        except BaseException as error:
            if not isinstance(error, CallError) or error.maybe_applied:
                # It may be held all the same. Not awaited: a task that is cancelled or late waits for nothing more.
                releasing = asyncio.create_task(self._release(claims), name="aiokv release of a claim")
                _releasing.add(releasing)
                releasing.add_done_callback(_releasing.discard)
            raise
        if self._was_granted:
            self._renewing = asyncio.create_task(self._renew(claims), name="aiokv claim")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._renewing is not None and self._claims is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
            self._was_granted = False
            await self._release(self._claims)

    def end_renewal_here(self) -> None:
        """Renew it no more, where it was begun in the running event loop: it ends by itself."""
        if self._loop is asyncio.get_running_loop():
            self._is_store_closed = True
            if self._renewing is not None:
                self._renewing.cancel()

    async def _ask(self, ask: Callable[[str, str, str, float], Awaitable[ClaimOutcome]]) -> bool:
        asked_at = clock.monotonic()
        outcome = await ask(*self._name, self._seconds)
        self._ends_at = asked_at + outcome.seconds_left
        return outcome.is_held

    async def _renew(self, claims: ClaimBackend) -> None:
        wait_seconds = self._seconds / 3
        while not self._is_store_closed:
            await asyncio.sleep(wait_seconds)
            if not self.is_held:
                return
            ends_at, wait_seconds = self._ends_at, self._seconds / 3
            try:
                async with asyncio.timeout(self._seconds / 6):
                    is_held = await self._ask(claims.renew)
            except Exception as error:  # noqa: BLE001 (tried again until the claim has ended)
                logger.debug("a claim could not be renewed: %s", type(error).__name__)
                wait_seconds = self._seconds / 12
            else:
                if not is_held or clock.monotonic() >= ends_at:
                    # It may have been another's between, even where it is this one's again.
                    self._was_granted = False
                    return

    async def _release(self, claims: ClaimBackend) -> None:
        try:
            async with asyncio.timeout(_MAX_RELEASE_SECONDS):
                await claims.release(*self._name)
        except Exception as error:  # noqa: BLE001 (it ends by itself)
            logger.debug("a claim could not be released: %s", type(error).__name__)


# Weakly: those whose blocks have ended are dropped.
_begun: "weakref.WeakValueDictionary[int, Claim]" = weakref.WeakValueDictionary()


def end_renewals(stores: Container[object]) -> None:
    """Renew the claims of some stores no more, in the running event loop.

    Args:
        stores: The stores.
    """
    # The list is made in one step, whatever other threads claim meanwhile.
    for reference in _begun.valuerefs():
        claim = reference()
        if claim is not None and claim.store in stores:
            claim.end_renewal_here()


def check_claim_seconds(seconds: float | timedelta) -> float:
    """Check how long a claim is to last.

    Args:
        seconds: A number from 1 to 3,600, or a `timedelta` of that range.

    Returns:
        It, in seconds.

    Raises:
        TypeError: It is of another type.
        ValueError: It is outside the range.
    """
    if isinstance(seconds, timedelta):
        seconds = seconds.total_seconds()
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"seconds must be a number or a timedelta, not {type(seconds).__name__}")
    if not MIN_CLAIM_SECONDS <= seconds <= MAX_CLAIM_SECONDS:
        # A long int has no float; of more digits than that nobody reads the end.
        shown = f"{seconds:,g}" if abs(seconds) < _LONG or isinstance(seconds, float) else "a longer number"
        raise ValueError(f"seconds must be from {MIN_CLAIM_SECONDS:g} to {MAX_CLAIM_SECONDS:,g}, not {shown}")
    return float(seconds)
