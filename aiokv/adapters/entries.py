"""Bytes under any name, each until an exact moment, in a store of texts: what the adapters to other packages share.

A store keeps an entry from 60 seconds to 30 days. Other packages ask for less, for more, or for ever. So each text begins with
the moment at which its entry ends, which every read compares with the clock: an entry never outlives what was asked for. One
that should live longer than 30 days, or for ever, ends after 30 days.

A text is `1;<expires at>;<kind>;<key>;<body>`. `expires at` is in seconds since the epoch, or empty where no time was asked
for. `kind` is `t` for a body that is the bytes as UTF-8, and `b` for base64. `key` is there where the store has another name
for the entry.
"""

import asyncio
import base64
import binascii
import logging
import math
import random
import re
from asyncio import get_running_loop
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from hashlib import blake2b
from typing import Final, NamedTuple
from urllib.parse import quote, unquote
from weakref import WeakValueDictionary

from aiokv import clock
from aiokv.claiming import Claim
from aiokv.errors import CallTimeoutError, UnsupportedError, truncated
from aiokv.limits import MAX_TTL_SECONDS, MIN_TTL_SECONDS
from aiokv.store import AsyncKVStore
from aiokv.target import Target

logger = logging.getLogger("aiokv")

MAX_NAME_CHARS: Final = 500
"""Longest key that is stored under its own name."""

_HEAD_CHARS: Final = 64
_PAGE_KEYS: Final = 100
_DIGEST_BYTES: Final = 20
_IS_DERIVED: Final = re.compile(r".*~[0-9a-f]{40}", re.DOTALL).fullmatch
# NUL and lone surrogates, which no store takes.
_REFUSED: Final = re.compile("[\0\ud800-\udfff]")
# The engine's clock may differ from this process's.
_SLACK_SECONDS: Final = 60
_CLAIM_SECONDS: Final = 5.0
_MAX_WAIT_SECONDS: Final = 15.0
# By loop, store and key, for all objects of this process. One that nobody holds or waits for is dropped.
_locks: "WeakValueDictionary[tuple[int, Target, str], asyncio.Lock]" = WeakValueDictionary()


class ClaimedElsewhereError(CallTimeoutError):
    """Another process has held a key for longer than a call waits; the store works."""


class Held(NamedTuple):
    """What an entry holds."""

    data: bytes
    expires_at: float | None
    """Seconds since the epoch; None where no time was asked for."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until it expires, more than 0; None where no time was asked for."""
        return None if self.expires_at is None else max(self.expires_at - clock.now(), 1e-6)


class Entries:
    """Bytes in a store, under keys of any text and with times to live of any length.

    Args:
        store: Where they live. Its namespace should hold nothing else.
    """

    def __init__(self, store: AsyncKVStore) -> None:
        if not isinstance(store, AsyncKVStore):
            raise TypeError(f"store must be an AsyncKVStore, not {type(store).__name__}; make one with AsyncKVStore('db')")
        self.store = store
        self._has_warned = False

    async def get(self, key: str) -> Held | None:
        """Return what an entry holds, or None where it is absent, has expired or was not written by an adapter."""
        text = await self.store.get(name_of(key))
        return None if text is None else self._read(text)

    async def get_many(self, keys: Iterable[str]) -> list[Held | None]:
        """Return what each entry holds, as `get` does, in the order of the keys."""
        names = [name_of(key) for key in keys]
        texts = await self.store.get_many(names)
        return [None if (text := texts[name]) is None else self._read(text) for name in names]

    async def set(self, key: str, data: bytes, ttl: float | timedelta | None = None) -> None:
        """Store bytes. A `ttl` of None means no time of their own, 0 or less that nothing is there."""
        await self.set_many({key: data}, ttl)

    async def set_many(self, values: Mapping[str, bytes], ttl: float | timedelta | None = None) -> None:
        """Store bytes under each key, as `set` does."""
        ttl_seconds = seconds_of(ttl)
        if ttl_seconds is not None and ttl_seconds <= 0:
            await self.delete_many(values)
            return
        expires_at = None if ttl_seconds is None else clock.now() + min(ttl_seconds, MAX_TTL_SECONDS)
        kept_seconds = (
            MAX_TTL_SECONDS if ttl_seconds is None else math.ceil(max(min(ttl_seconds, MAX_TTL_SECONDS), MIN_TTL_SECONDS))
        )
        texts = {name_of(key): _write(key, data, expires_at) for key, data in values.items()}
        if len(texts) == 1:
            ((name, text),) = texts.items()
            await self.store.set(name, text, kept_seconds)
        elif texts:
            await self.store.set_many(texts, kept_seconds)

    async def delete(self, key: str) -> None:
        """Delete an entry; succeed where there is none."""
        await self.store.delete(name_of(key))

    async def delete_many(self, keys: Iterable[str]) -> None:
        """Delete entries, as `delete` does."""
        await self.store.delete_many([name_of(key) for key in keys])

    async def keys(self, prefix: str = "") -> AsyncGenerator[str]:
        """List the keys of the entries that have not expired."""
        unsure: list[str] = []
        async for info in self.store.keys(_head(prefix)):
            # An entry of less than 60 seconds outlives its time in the store; a derived name does not tell its key.
            if not _IS_DERIVED(info.key) and info.expires_at > clock.now() + MIN_TTL_SECONDS + _SLACK_SECONDS:
                if info.key.startswith(prefix):
                    yield info.key
                continue
            unsure.append(info.key)
            if len(unsure) == _PAGE_KEYS:
                for key in await self._keys_of(unsure):
                    if key.startswith(prefix):
                        yield key
                unsure.clear()
        for key in await self._keys_of(unsure):
            if key.startswith(prefix):
                yield key

    async def clear(self, prefix: str = "") -> int:
        """Delete the entries whose keys begin with a text; return about how many there were."""
        if _head(prefix) == prefix:
            return await self.store.clear(prefix)
        keys = [key async for key in self.keys(prefix)]
        await self.delete_many(keys)
        return len(keys)

    @asynccontextmanager
    async def alone(self, key: str) -> AsyncGenerator[None]:
        """Read and write an entry in this block with no other such block of its key at the same time.

        That holds in this process and loop, and for every process where the store holds claims.
        """
        async with self.writing(key):
            claim = await self._claim(key)
            try:
                yield
            finally:
                if claim is not None:
                    await claim.__aexit__(None, None, None)

    def writing(self, key: str) -> asyncio.Lock:
        """Return the lock of a key, for `async with`: no block of `alone` runs meanwhile in this process and loop."""
        name = (id(get_running_loop()), self.store.target, key)
        lock = _locks.get(name)
        if lock is None:
            lock = _locks[name] = asyncio.Lock()
        return lock

    async def _claim(self, key: str) -> Claim | None:
        """Return a claim of a key that is held, or None where the store holds no claims; wait for others."""
        deadline = clock.monotonic() + _MAX_WAIT_SECONDS
        wait_seconds = 0.005
        while True:
            claim = self.store.claim(name_of(key), _CLAIM_SECONDS)
            try:
                await claim.__aenter__()
            except UnsupportedError:
                return None
            if claim.is_held:
                return claim
            await claim.__aexit__(None, None, None)
            if clock.monotonic() >= deadline:
                reason = f"another process has held this key for {_MAX_WAIT_SECONDS:g} seconds"
                raise ClaimedElsewhereError(reason, verb="claim", db_name=self.store.db_name, key=key, attempts=1)
            await asyncio.sleep(wait_seconds * random.uniform(0.5, 1.5))  # noqa: S311 (no secret)
            wait_seconds = min(wait_seconds * 2, 0.1)

    async def _keys_of(self, names: list[str]) -> list[str]:
        """Return the keys of those names whose entries are there and have not expired."""
        if not names:
            return []
        texts = await self.store.get_many(names)
        found = ((name, text) for name, text in texts.items() if text is not None and self._read(text) is not None)
        return [unquote(text.split(";", 4)[3], errors="surrogatepass") if _IS_DERIVED(name) else name for name, text in found]

    def _read(self, text: str) -> Held | None:
        version, _, rest = text.partition(";")
        parts = rest.split(";", 3)
        if version == "1" and len(parts) == 4 and parts[1] in {"t", "b"}:  # noqa: PLR2004 (the form above)
            expires, kind, _, body = parts
            try:
                expires_at = float(expires) if expires else None
                data = body.encode() if kind == "t" else base64.b64decode(body, validate=True)
            except (ValueError, binascii.Error):
                pass
            else:
                return Held(data, expires_at) if expires_at is None or clock.now() < expires_at else None
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "db %s holds a value that no adapter of aiokv wrote; such values count as absent, so give the adapter a "
                "namespace of its own",
                truncated(self.store.db_name),
            )
        return None


def name_of(key: str) -> str:
    """Return the name that the store knows a key by: the key itself where every store takes it, else one derived from it.

    Args:
        key: Any text.

    Returns:
        The key, or its beginning, `~` and 160 bits of its digest. Two keys never have one name.

    Raises:
        TypeError: It is not a string.
    """
    if not isinstance(key, str):
        raise TypeError(f"key must be str, not {type(key).__name__}; encode it to text first")
    is_plain = 0 < len(key) <= MAX_NAME_CHARS and key not in {".", ".."} and not _REFUSED.search(key)
    # One that looks derived could be the name of another key.
    if is_plain and not _IS_DERIVED(key):
        return key
    digest = blake2b(key.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{_head(key)}~{digest}"


def seconds_of(ttl: float | timedelta | None) -> float | None:
    """Return a time to live in seconds.

    Args:
        ttl: Seconds, a `timedelta` or None.

    Returns:
        Seconds, or None.

    Raises:
        TypeError: It is of another type.
        ValueError: It is NaN.
    """
    if ttl is None:
        return None
    if isinstance(ttl, timedelta):
        return ttl.total_seconds()
    if isinstance(ttl, bool) or not isinstance(ttl, int | float):
        raise TypeError(f"ttl must be seconds, a timedelta or None, not {type(ttl).__name__}")
    if math.isnan(ttl):
        raise ValueError("ttl must be a number of seconds, not NaN")
    return float(ttl)


def _head(key: str) -> str:
    refused = _REFUSED.search(key, 0, _HEAD_CHARS)
    return key[: _HEAD_CHARS if refused is None else refused.start()]


def _write(key: str, data: bytes, expires_at: float | None) -> str:
    held_key = "" if name_of(key) == key else quote(key, safe="", errors="surrogatepass")
    expires = "" if expires_at is None else repr(expires_at)
    try:
        return f"1;{expires};t;{held_key};{data.decode()}"
    except UnicodeDecodeError:
        return f"1;{expires};b;{held_key};{base64.b64encode(data).decode()}"
