"""Who computes, among processes: claims of the store, renewed for as long as the computation runs.

A store without claims gets hints in their place: entries that say who computes. Two processes that come at once may both go
ahead then, which costs one computation.
"""

import asyncio
import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import Self

from aiokv import clock
from aiokv.backends.base import is_patient
from aiokv.batch import call_each
from aiokv.claiming import Claim
from aiokv.errors import UnsupportedError
from aiokv.limits import MIN_TTL_SECONDS
from aiokv.store import AsyncKVStore

_CLAIM_SUFFIX = ":refreshing"
_MIN_LEASE_SECONDS = 1.0
_MAX_LEASE_SECONDS = 15.0
_CLAIMS_AT_ONCE = 32


class RefreshClaim:
    """What one process computes, told to the others while a block runs; nobody waits for it longer than for a read.

    Args:
        store: The caller's own store.
        compute_seconds: Each key, and how long its last computation took: a claim that is not renewed counts twice as long.
        wait_seconds: Seconds to wait for the store at most; where it fails, every key is claimed.
    """

    def __init__(self, store: AsyncKVStore, compute_seconds: Mapping[str, float], wait_seconds: float) -> None:
        self.leases: Mapping[str, float] = {
            key: min(max(_MIN_LEASE_SECONDS, 2 * seconds), _MAX_LEASE_SECONDS) for key, seconds in compute_seconds.items()
        }
        """The keys that are this process's to compute."""
        self.is_exact = False
        """Whether the store held another process off; what it stored may be newer than what was read before."""
        self._store = store
        self._wait_seconds = wait_seconds
        self._owner = f"{random.getrandbits(64):x}"
        self._held: dict[str, Claim] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        wanted = self.leases
        is_patient.set(False)
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._acquire()
        except Exception:  # noqa: BLE001 (whatever it is, the store is no help)
            self.leases = wanted
        except BaseException:
            await self._end()
            raise
        finally:
            is_patient.set(True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def _acquire(self) -> None:
        if not self.leases:
            return
        first, *others = self.leases
        try:
            await self._take(first)
        except UnsupportedError:
            await self._hint()
            return
        self.is_exact = True
        await call_each(others, self._take, _CLAIMS_AT_ONCE)
        self.leases = {key: lease for key, lease in self.leases.items() if key in self._held}

    async def _take(self, key: str) -> None:
        claim = self._store.claim(key + _CLAIM_SUFFIX, self.leases[key])
        await claim.__aenter__()
        if claim.is_held:
            self._held[key] = claim

    async def _hint(self) -> None:
        """Keep the keys that nobody else has claimed."""
        held = await _get(self._store, [key + _CLAIM_SUFFIX for key in self.leases])
        free = {key: lease for key, lease in self.leases.items() if not _is_live(held[key + _CLAIM_SUFFIX])}
        if free:
            self.leases = free
            await self._write()
            # Of several that came at once, the last to write goes ahead.
            held = await _get(self._store, [key + _CLAIM_SUFFIX for key in free])
        self.leases = {
            key: lease for key, lease in free.items() if (held[key + _CLAIM_SUFFIX] or self._owner).startswith(self._owner)
        }
        if self.leases:
            self._renewing = asyncio.create_task(self._renew(), name="aiokv claim")

    async def _end(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        if self._held:
            await asyncio.gather(*(claim.__aexit__() for claim in self._held.values()))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(min(self.leases.values()) / 3)
            with contextlib.suppress(Exception):
                await self._write()

    async def _write(self) -> None:
        now = clock.now()
        texts = {key + _CLAIM_SUFFIX: f"{self._owner} {now} {lease}" for key, lease in self.leases.items()}
        if len(texts) == 1:
            ((name, text),) = texts.items()
            await self._store.set(name, text, MIN_TTL_SECONDS)
        else:
            await self._store.set_many(texts, MIN_TTL_SECONDS)


def _is_live(text: str | None) -> bool:
    if text is None:
        return False
    try:
        _, renewed_at, lease = text.split(" ")
        return 0 <= float(lease) <= _MAX_LEASE_SECONDS and clock.now() - float(renewed_at) < float(lease)
    except ValueError:
        return False


async def _get(store: AsyncKVStore, keys: Sequence[str]) -> Mapping[str, str | None]:
    return {keys[0]: await store.get(keys[0])} if len(keys) == 1 else await store.get_many(keys)
