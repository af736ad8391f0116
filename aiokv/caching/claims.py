"""Who computes, among processes: hints in the store, which are renewed for as long as the computation runs."""

import asyncio
import contextlib
import random
from collections.abc import Mapping, Sequence

from aiokv import clock
from aiokv.limits import MIN_TTL_SECONDS
from aiokv.store import AsyncKVStore

_CLAIM_SUFFIX = ":refreshing"
_MIN_LEASE_SECONDS = 1.0
_MAX_LEASE_SECONDS = 15.0


class Claim:
    """What one process has said that it computes; as a context manager it says so again until the computation is done.

    Args:
        store: Where it says so.
        compute_seconds: Each key, and how long its last computation took: a claim that is not renewed counts twice as long.
    """

    def __init__(self, store: AsyncKVStore, compute_seconds: Mapping[str, float]) -> None:
        self._wanted = {
            key: min(max(_MIN_LEASE_SECONDS, 2 * seconds), _MAX_LEASE_SECONDS) for key, seconds in compute_seconds.items()
        }
        self.leases: Mapping[str, float] = self._wanted
        self._store = store
        self._owner = f"{random.getrandbits(64):x}"
        self._renewing: asyncio.Task[None] | None = None

    async def acquire(self) -> None:
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

    def hold_all(self) -> None:
        """Go ahead with every key."""
        self.leases = self._wanted

    async def __aenter__(self) -> None:
        if self.leases:
            self._renewing = asyncio.create_task(self._renew(), name="aiokv claim")

    async def __aexit__(self, *_: object) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])

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
