"""A cache for aiocache that keeps its values in an `AsyncKVStore`: for `@cached`, `@multi_cached`, its locks and plugins.

```python
from aiocache import cached
from aiokv import AsyncKVStore
from aiokv.adapters.aiocache import KVCache

@cached(ttl=60, cache=KVCache, store=AsyncKVStore("weather"))
async def forecast(city: str) -> dict: ...
```
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NoReturn

from aiokv.adapters.entries import Entries, Held
from aiokv.store import AsyncKVStore

try:
    from aiocache.base import BaseCache  # type: ignore[import-untyped]
    from aiocache.plugins import BasePlugin  # type: ignore[import-untyped]
    from aiocache.serializers import BaseSerializer, JsonSerializer, NullSerializer  # type: ignore[import-untyped]
except ImportError as missing:
    raise ImportError("aiokv.adapters.aiocache needs the package aiocache: pip install 'aiokv[aiocache]'") from missing

_Ttl = float | None
# An entry that begins so holds no plain text, but what the next byte says.
_MARK: Final = b"\x01"
_TEXT, _BYTES, _NUMBER = b"t", b"b", b"n"


class KVCache(BaseCache):  # type: ignore[misc]
    """A cache of aiocache over an `AsyncKVStore`, exact in expiry; see `aiokv.adapters.entries` for the form.

    Values without a `ttl`, or with one of more than 30 days, end after 30 days. `add`, `increment`, `expire` and the locks
    read and write as one step among themselves: in every process where the store holds claims, in this one elsewhere.
    `clear` needs a store that can list its keys. `raw` is not there.

    Args:
        store: Where values live, in a namespace of their own. Closing the cache closes it.
        serializer: What makes text or bytes of values and back; None takes `JsonSerializer`.
        plugins: As for aiocache's own caches.
        namespace: What every key begins with.
        key_builder: A function of a key and a namespace that returns the store's key.
        timeout: Seconds that a call may take; None or 0 for no bound but the store's own.
        ttl: Seconds that values live where a call does not say it; None for 30 days.

    Raises:
        TypeError: `store` is no `AsyncKVStore`.
    """

    NAME = "aiokv"

    def __init__(  # noqa: PLR0913 (aiocache's own)
        self,
        store: AsyncKVStore,
        *,
        serializer: BaseSerializer | None = None,
        plugins: Sequence[BasePlugin] | None = None,
        namespace: str | None = None,
        key_builder: Callable[[str, str | None], str] | None = None,
        timeout: float | None = 5,
        ttl: float | None = None,
    ) -> None:
        super().__init__(
            serializer=serializer or JsonSerializer(),
            plugins=plugins,
            namespace=namespace,
            key_builder=key_builder,
            timeout=timeout,  # pyright: ignore[reportArgumentType] (it has no annotations)
            ttl=ttl,
        )
        self._entries = Entries(store)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._entries.store!r})"

    async def _get(self, key: str, encoding: object = None, _conn: object = None) -> Any:  # noqa: ARG002 (aiocache's own)
        return _decode(await self._entries.get(key))

    async def _gets(self, key: str, encoding: object = None, _conn: object = None) -> Any:  # noqa: ARG002 (likewise)
        return _decode(await self._entries.get(key))

    async def _multi_get(self, keys: Iterable[str], encoding: object = None, _conn: object = None) -> list[Any]:  # noqa: ARG002
        return [_decode(held) for held in await self._entries.get_many(keys)]

    async def _set(self, key: str, value: Any, ttl: _Ttl = None, _cas_token: Any = None, _conn: object = None) -> bool | int:
        data = _encode(value)
        if _cas_token is None:
            async with self._entries.writing(key):
                await self._entries.set(key, data, ttl or None)
            return True
        async with self._entries.alone(key):
            held = await self._entries.get(key)
            if held is None or held.data != _encode(_cas_token):
                return 0
            await self._entries.set(key, data, ttl or None)
        return True

    async def _multi_set(self, pairs: Iterable[Sequence[Any]], ttl: _Ttl = None, _conn: object = None) -> bool:
        await self._entries.set_many({key: _encode(value) for key, value in pairs}, ttl or None)
        return True

    async def _add(self, key: str, value: Any, ttl: _Ttl = None, _conn: object = None) -> bool:
        data = _encode(value)
        async with self._entries.alone(key):
            if await self._entries.get(key) is not None:
                raise ValueError(f"Key {key} already exists, use .set to update the value")
            await self._entries.set(key, data, ttl or None)
        return True

    async def _exists(self, key: str, _conn: object = None) -> bool:
        return await self._entries.get(key) is not None

    async def _increment(self, key: str, delta: int, _conn: object = None) -> int:
        async with self._entries.alone(key):
            held = await self._entries.get(key)
            value = _decode(held)
            if value is None:
                # Other serializers read text.
                value = 0 if isinstance(self.serializer, NullSerializer) else "0"
            try:
                number = None if isinstance(value, float) else int(value) + delta
            except ValueError:
                number = None
            if number is None:
                raise TypeError("Value is not an integer")
            data = _encode(number if isinstance(value, int) else str(number))
            await self._entries.set(key, data, None if held is None else held.seconds_left)
        return number

    async def _expire(self, key: str, ttl: float, _conn: object = None) -> bool:
        async with self._entries.alone(key):
            held = await self._entries.get(key)
            if held is not None:
                await self._entries.set(key, held.data, ttl or None)
        return held is not None

    async def _delete(self, key: str, _conn: object = None) -> int:
        async with self._entries.writing(key):
            was_there = await self._entries.get(key) is not None
            await self._entries.delete(key)
        return int(was_there)

    async def _clear(self, namespace: str | None = None, _conn: object = None) -> bool:
        await self._entries.clear(namespace or "")
        return True

    async def _raw(self, command: str, *_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"an aiokv store has no raw command {command!r}; call the AsyncKVStore itself")

    async def _redlock_release(self, key: str, value: Any) -> int:
        async with self._entries.alone(key):
            held = await self._entries.get(key)
            if held is None or held.data != _encode(value):
                return 0
            await self._entries.delete(key)
        return 1

    async def _close(self, *_: object, **__: object) -> None:
        await self._entries.store.aclose()


def _encode(value: Any) -> bytes:
    """Return what a serializer made, as bytes from which `_decode` makes the same; a text as it is, as Redis does."""
    if isinstance(value, str):
        data = value.encode(errors="surrogatepass")
        return _MARK + _TEXT + data if data.startswith(_MARK) else data
    if isinstance(value, bytes):
        return _MARK + _BYTES + value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _MARK + _NUMBER + repr(value).encode()
    raise TypeError(
        f"the serializer returned {type(value).__name__}, and a store takes text, bytes and numbers; "
        "use JsonSerializer or PickleSerializer"
    )


def _decode(held: Held | None) -> str | bytes | float | None:
    """Return what `_encode` made an entry of, with its type; None where that is damaged."""
    if held is None:
        return None
    is_marked, kind, data = held.data[:1] == _MARK, held.data[1:2], held.data[2:]
    if is_marked and kind == _BYTES:
        return data
    try:
        if is_marked and kind == _NUMBER:
            return int(data) if data.strip(b"-").isdigit() else float(data)
        return (data if is_marked else held.data).decode(errors="surrogatepass")
    except ValueError:
        return None
