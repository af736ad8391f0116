"""A backend for cashews that keeps its values in an `AsyncKVStore`.

```python
from cashews import cache
from aiokv import AsyncKVStore
import aiokv.adapters.cashews  # registers the scheme aiokv://

cache.setup("aiokv://", store=AsyncKVStore("weather"))
```
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Final, TypeVar, cast

import orjson

from aiokv import clock
from aiokv.adapters.entries import ClaimedElsewhereError, Entries, Held
from aiokv.errors import BatchError, CallError, UnsupportedError
from aiokv.store import AsyncKVStore

try:
    from cashews.backends.interface import NOT_EXIST, UNLIMITED, Backend
    from cashews.exceptions import CacheBackendInteractionError
    from cashews.picklers import PicklerType
    from cashews.serialize import DEFAULT_SERIALIZER, Serializer
    from cashews.wrapper.backend_settings import register_backend
except ImportError as missing:
    raise ImportError("aiokv.adapters.cashews needs the package cashews: pip install 'aiokv[cashews]'") from missing

logger = logging.getLogger("aiokv")
F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

_LOG_INTERVAL_SECONDS: Final = 60.0
_MIN_LOCK_INTERVAL_SECONDS: Final = 0.02
_PAGE_KEYS: Final = 100
_ABSENT: Final = object()
# A backend of the user's own may raise what its driver does, such as ConnectionError.
_FAILURES: Final = (CallError, BatchError, OSError)
# The first byte of what an entry holds: a whole number, a serialized value, bits, texts of a set, moments of a window.
_INT, _VALUE, _BITS, _SET, _WINDOW = b"i", b"v", b"b", b"s", b"w"


def _falls_back(answer: object) -> Callable[[F], F]:
    """Let a command return an answer, or what that returns, where the store fails and the backend suppresses that."""

    def decorate(command: F) -> F:
        @wraps(command)
        async def call(self: "KVBackend", *args: Any, **kwargs: Any) -> object:
            try:
                return await command(self, *args, **kwargs)
            except _FAILURES as error:
                if not self.suppress or isinstance(error, UnsupportedError):
                    raise
                self.note_failure(error)
            return answer(*args, **kwargs) if callable(answer) else answer

        return cast("F", call)

    return decorate


class KVBackend(Backend):
    """A backend of cashews over an `AsyncKVStore`, exact in expiry; see `aiokv.adapters.entries` for the form.

    Values without `expire`, or with more than 30 days, end after 30 days. What reads and writes (`incr`, `set` with `exist`,
    locks, sets, bits, windows) is one step among itself: in every process where the store holds claims, in this one
    elsewhere. `scan`, `*_match`, `clear` and `get_keys_count` need a store that can list its keys.

    Args:
        store: Where values live, in a namespace of their own.
        db_name: The namespace of a store that this backend makes and closes, where `store` is not given.
        url: The URL of that store; None takes the environment's `AIOKV_URL`, else fal's service.
        suppress: Whether commands go on as if nothing were there where the store fails, which is logged once a minute; as with
            cashews' own Redis.
        serializer: Makes bytes of values; cashews passes it. None takes cashews' own, which is pickle.

    Raises:
        TypeError: `store` is no `AsyncKVStore`, or neither it nor `db_name` is given.
    """

    def __init__(
        self,
        store: AsyncKVStore | None = None,
        *,
        db_name: str | None = None,
        url: str | None = None,
        suppress: bool = True,
        serializer: Serializer | None = None,
    ) -> None:
        super().__init__(serializer=serializer or DEFAULT_SERIALIZER)
        if store is None:
            if db_name is None:
                raise TypeError("pass store=AsyncKVStore(...) or db_name='...' to cache.setup('aiokv://', ...)")
            self._entries, self._closes = Entries(AsyncKVStore(db_name, url=url)), True
        else:
            self._entries, self._closes = Entries(store), False
        self._is_init = False
        self.suppress = suppress
        self._next_log = 0.0

    def note_failure(self, error: Exception) -> None:
        """Log a failure that is suppressed, once a minute at the most."""
        if clock.monotonic() >= self._next_log:
            self._next_log = clock.monotonic() + _LOG_INTERVAL_SECONDS
            logger.warning("the store of cashews failed, and is passed by: %s", type(error).__qualname__)

    @property
    def is_init(self) -> bool:
        """Whether `init` was called."""
        return self._is_init

    async def init(self) -> None:
        """Begin; the store opens at its first call."""
        self._is_init = True

    async def close(self) -> None:
        """Close the store, if this backend has made it."""
        self._is_init = False
        if self._closes:
            await self._entries.store.aclose()

    @_falls_back(False)
    async def set(self, key: str, value: Any, expire: float | None = None, exist: bool | None = None) -> bool:  # noqa: FBT001
        """Store a value; where `exist` is given, only if the key is there or is not."""
        return await self._set(key, value, expire, exist)

    @_falls_back(True)
    async def set_lock(self, key: str, value: Any, expire: float) -> bool:
        """Take a lock unless somebody has it; where the store fails, everybody takes it."""
        try:
            is_taken = await self._set(key, value, expire, exist=False)
        except ClaimedElsewhereError:
            return False
        if not is_taken:
            # cashews asks again at once, and each try is a call of the store.
            await asyncio.sleep(_MIN_LOCK_INTERVAL_SECONDS)
        return is_taken

    async def _set(self, key: str, value: Any, expire: float | None, exist: bool | None) -> bool:  # noqa: FBT001
        data = await self._encode(key, value, expire)
        if exist is None:
            async with self._entries.writing(key):
                await self._entries.set(key, data, expire or None)
            return True
        async with self._entries.alone(key):
            if (await self._entries.get(key) is not None) is not exist:
                return False
            await self._entries.set(key, data, expire or None)
        return True

    @_falls_back(None)
    async def set_many(self, pairs: Mapping[str, Any], expire: float | None = None) -> None:
        """Store several values."""
        await self._entries.set_many(
            {key: await self._encode(key, value, expire) for key, value in pairs.items()}, expire or None
        )

    async def set_raw(self, key: str, value: Any, **_: object) -> None:
        """Store bytes that the serializer has made."""
        await self._entries.set(key, _VALUE + value)

    @_falls_back(lambda *given, default=None, **_: given[1] if given[1:] else default)
    async def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or `default`."""
        return await self._decode(key, await self._entries.get(key), default)

    async def get_raw(self, key: str) -> Any:
        """Return the bytes that the serializer has made."""
        return None if (held := await self._entries.get(key)) is None else held.data[1:]

    @_falls_back(lambda *keys, default=None: (default,) * len(keys))
    async def get_many(self, *keys: str, default: Any = None) -> tuple[Any, ...]:
        """Return several values, each or `default`."""
        held = await self._entries.get_many(keys)
        return tuple([await self._decode(key, one, default) for key, one in zip(keys, held, strict=True)])

    async def get_match(self, pattern: str, batch_size: int = _PAGE_KEYS) -> AsyncIterator[tuple[str, Any]]:
        """Yield the keys that fit a pattern, each with its value."""
        async for keys in self._pages(pattern, batch_size):
            for key, held in zip(keys, await self._entries.get_many(keys), strict=True):
                value = await self._decode(key, held, _ABSENT)
                if value is not _ABSENT:
                    yield key, value

    @_falls_back(False)
    async def exists(self, key: str) -> bool:
        """Return whether a key is there."""
        return await self._entries.get(key) is not None

    async def scan(self, pattern: str, batch_size: int = _PAGE_KEYS) -> AsyncIterator[str]:
        """Yield the keys that fit a pattern, in which `*` stands for any text."""
        async for keys in self._pages(pattern, batch_size):
            for key in keys:
                yield key

    @_falls_back(0)
    async def incr(self, key: str, value: int = 1, expire: float | None = None) -> int:
        """Add to a whole number; a new one lives for `expire` seconds, one that is there as long as it would have."""

        def add(data: bytes) -> tuple[bytes, int]:
            number = int(data or b"0") + value
            return str(number).encode(), number

        return int(await self._update(key, _INT, add, expire, renews=False))

    @_falls_back(False)
    async def delete(self, key: str) -> bool:
        """Delete an entry; return whether it was there."""
        async with self._entries.writing(key):
            was_there = await self.exists(key)
            await self._entries.delete(key)
        await self._call_on_remove_callbacks(key)
        return was_there

    @_falls_back(None)
    async def delete_many(self, *keys: str) -> None:
        """Delete several entries."""
        await self._entries.delete_many(keys)
        await self._call_on_remove_callbacks(*keys)

    async def delete_match(self, pattern: str) -> None:
        """Delete the entries whose keys fit a pattern."""
        if "*" not in pattern:
            await self.delete_many(pattern)
            return
        async for keys in self._pages(pattern, _PAGE_KEYS):
            await self.delete_many(*keys)

    @_falls_back(None)
    async def expire(self, key: str, timeout: float) -> None:  # noqa: ASYNC109 (cashews' own)
        """Let an entry end `timeout` seconds from now."""
        async with self._entries.alone(key):
            held = await self._entries.get(key)
            if held is not None:
                await self._entries.set(key, held.data, timeout)

    @_falls_back(NOT_EXIST)
    async def get_expire(self, key: str) -> int:
        """Return the seconds that an entry has to live, -1 where it was set without any, -2 where it is absent."""
        held = await self._entries.get(key)
        if held is None:
            return int(NOT_EXIST)
        return int(UNLIMITED) if held.seconds_left is None else round(held.seconds_left)

    @_falls_back(lambda *given, **_: (0,) * len(given[1:]))
    async def get_bits(self, key: str, *indexes: int, size: int = 1) -> tuple[int, ...]:
        """Return numbers of `size` bits at each index."""
        held = await self._entries.get(key)
        bits = 0 if held is None else int.from_bytes(_of_kind(held.data, _BITS), "little")
        return tuple(bits >> index * size & (1 << size) - 1 for index in indexes)

    @_falls_back(lambda *given, **_: (0,) * len(given[1:]))
    async def incr_bits(self, key: str, *indexes: int, size: int = 1, by: int = 1) -> tuple[int, ...]:
        """Add to numbers of `size` bits, from 0 to their largest, and return them."""
        largest = (1 << size) - 1

        def add(data: bytes) -> tuple[bytes, tuple[int, ...]]:
            bits = int.from_bytes(data, "little")
            numbers = []
            for index in indexes:
                number = bits >> index * size & largest
                numbers.append(min(max(number + by, 0), largest))
                bits ^= (number ^ numbers[-1]) << index * size
            return bits.to_bytes(bits.bit_length() // 8 + 1, "little"), tuple(numbers)

        return tuple(await self._update(key, _BITS, add))

    @_falls_back(0)
    async def slice_incr(self, key: str, start: float, end: float, maxvalue: int, expire: float | None = None) -> int:
        """Count the moments from `start` to `end`, and add `end` where there are fewer than `maxvalue`."""

        def count(data: bytes) -> tuple[bytes, int]:
            moments = [moment for moment in orjson.loads(data or b"[]") if start <= moment]
            inside = sum(moment <= end for moment in moments)
            if inside < maxvalue:
                moments.append(end)
                inside += 1
            return orjson.dumps(moments), inside

        return int(await self._update(key, _WINDOW, count, expire))

    @_falls_back(None)
    async def set_add(self, key: str, *values: str, expire: float | None = None) -> None:
        """Add texts to a set."""
        await self._update(key, _SET, lambda data: (orjson.dumps([*{*orjson.loads(data or b"[]"), *values}]), None), expire)

    @_falls_back(None)
    async def set_remove(self, key: str, *values: str) -> None:
        """Take texts out of a set."""
        await self._update(key, _SET, lambda data: (orjson.dumps([*({*orjson.loads(data or b"[]")} - {*values})]), None))

    @_falls_back(())
    async def set_pop(self, key: str, count: int = 100) -> Iterable[str]:
        """Take at most `count` texts out of a set, and return them."""

        def pop(data: bytes) -> tuple[bytes, list[str]]:
            texts = sorted({*orjson.loads(data or b"[]")})
            return orjson.dumps(texts[count:]), texts[:count]

        return list(await self._update(key, _SET, pop))

    async def get_size(self, key: str) -> int:
        """Return how many bytes a value has."""
        return 0 if (held := await self._entries.get(key)) is None else len(held.data)

    async def get_keys_count(self) -> int:
        """Return how many entries there are."""
        return await self._entries.store.count()

    async def ping(self, message: bytes | None = None) -> bytes:
        """Ask the store, and return the message."""
        if message == b"LOCK":
            # cashews asks after each try of a lock; `set_lock` has just seen that the store works.
            return message
        try:
            await self._entries.get("cashews:ping")
        except _FAILURES as error:
            raise CacheBackendInteractionError(type(error).__qualname__) from None
        return b"PONG" if message is None or message == b"PING" else message

    async def clear(self) -> None:
        """Delete every entry of the store's namespace."""
        await self._entries.clear()

    async def is_locked(self, key: str, wait: float | None = None, step: float = 0.1) -> bool:
        """Return whether a lock is held, after waiting for it `wait` seconds at most."""
        while (is_held := await self.exists(key)) and wait is not None and wait > 0:
            wait -= step
            await asyncio.sleep(step)
        return is_held

    @_falls_back(False)
    async def unlock(self, key: str, value: Any) -> bool:
        """Release a lock that was taken with this value."""
        data = await self._encode(key, value, None)
        async with self._entries.alone(key):
            held = await self._entries.get(key)
            if held is None or held.data != data:
                return False
            await self._entries.delete(key)
        return True

    async def _update(
        self,
        key: str,
        kind: bytes,
        change: Callable[[bytes], tuple[bytes, Any]],
        expire: float | None = None,
        *,
        renews: bool = True,
    ) -> Any:
        """Read, change and write an entry of a kind as one step; return what `change` returns beside the new bytes."""
        async with self._entries.alone(key):
            held = await self._entries.get(key)
            data, result = change(b"" if held is None else _of_kind(held.data, kind))
            ttl = (expire or None) if held is None or (renews and expire) else held.seconds_left
            await self._entries.set(key, kind + data, ttl)
        return result

    async def _pages(self, pattern: str, size: int) -> AsyncGenerator[list[str]]:
        """Yield the keys that fit a pattern, in lists."""
        fits = re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL).fullmatch
        keys: list[str] = []
        async for key in self._entries.keys(pattern.partition("*")[0]):
            keys += [key] if fits(key) else []
            if len(keys) >= size:
                yield keys
                keys = []
        if keys:
            yield keys

    async def _encode(self, key: str, value: Any, expire: float | None) -> bytes:
        if isinstance(value, int) and not isinstance(value, bool):
            return _INT + str(value).encode()
        data: bytes = await self._serializer.encode(self, key=key, value=value, expire=expire)  # type: ignore[union-attr]
        return _VALUE + data

    async def _decode(self, key: str, held: Held | None, default: Any) -> Any:
        if held is None:
            return default
        kind, data = held.data[:1], held.data[1:]
        if kind == _INT:
            return int(data)
        if kind == _VALUE:
            return await self._serializer.decode(self, key=key, value=data, default=default)  # type: ignore[union-attr]
        return default


def _of_kind(data: bytes, kind: bytes) -> bytes:
    if data[:1] == kind:
        return data[1:]
    raise TypeError("the entry of this key holds a value of another kind; delete it first")


register_backend("aiokv", KVBackend, pickler=PicklerType.DEFAULT)
