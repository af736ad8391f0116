"""Storages of the package hishel over a store: HTTP responses of httpx (`AsyncKVStorage`) and requests (`KVStorage`).

```python
from hishel.httpx import AsyncCacheClient
from aiokv import AsyncKVStore
from aiokv.adapters.hishel import AsyncKVStorage

async with AsyncKVStore("http") as store, AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client:
    response = await client.get("https://api.example.com/rates")
```

`docs/http-responses.md` tells what is stored. For aiohttp there is `aiokv.adapters.aiohttp_client`.
"""

import contextlib
import logging
import math
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar, cast

from aiokv import clock
from aiokv.errors import AioKVError
from aiokv.limits import MAX_VALUE_BYTES
from aiokv.store import AsyncKVStore

try:
    from hishel import AsyncBaseStorage, BaseStorage, Entry, Headers, Request, Response
except ImportError as missing:
    raise ImportError("aiokv.adapters.hishel needs the package hishel: pip install 'aiokv[http-cache]'") from missing

from aiokv.adapters import _http_entries as entries
from aiokv.adapters._hishel_texts import (
    ENTRY_PREFIX,
    Row,
    correct_dates,
    decode,
    decode_rows,
    depend_on_host,
    encode,
    encode_rows,
    index_key,
    ttl_of,
)

__all__ = ["DEFAULT_MAX_STREAM_BYTES", "AsyncKVStorage", "BlockingStore", "KVStorage"]

DEFAULT_MAX_STREAM_BYTES: Final = 1_400_000
"""As base64, which takes a third more, with 30,000 bytes of headers, this fits a value of 1.9 MB."""

# Where a response depends on one of these, their values would have to be stored.
_SECRETS: Final = frozenset({"authorization", "cookie", "proxy-authorization"})
_MAX_REMEMBERED: Final = 10_000

logger = logging.getLogger("aiokv")

_T = TypeVar("_T")
# Steps: each is a method of the store with its arguments; the plan is sent what that returns.
_Plan = Generator[tuple[Any, ...], Any, _T]


class BlockingStore(Protocol):
    """What `KVStorage` needs of a store: that of `aiokv.KVStore`."""

    def get(self, key: str) -> str | None:
        """Read a value."""
        ...

    def set(self, key: str, value: str, ttl: int | None = None) -> None:
        """Store a value for so many seconds."""
        ...

    def delete(self, key: str) -> None:
        """Delete an entry."""
        ...


class _Plans:
    """What both storages do with a store, as steps that one of them awaits."""

    def __init__(self) -> None:
        self.has_failed = False
        # Entries that could not be deleted, and lists in which something was perhaps to be deleted.
        self._dead: dict[str, None] = {}
        self._unread: dict[str, None] = {}

    def read(self, key: str) -> _Plan[list[Entry]]:
        """Find the entries of a key that have not expired."""
        index = index_key(key)
        try:
            return (yield from self._read(index))
        except GeneratorExit:
            # The store has failed. Perhaps the entries were to be deleted.
            _note(self._unread, index)
            raise

    def _read(self, index: str) -> _Plan[list[Entry]]:
        now = clock.now()
        rows = decode_rows((yield "get", index))
        for row in rows:
            if row.id in self._dead:
                yield from self.remove(uuid.UUID(hex=row.id))
        if index in self._unread:
            yield "delete", index
            self._unread.pop(index, None)
            rows = []
        found: list[Entry] = []
        is_touched = False
        for number, row in enumerate(rows):
            if now >= row.expires():
                continue
            text = yield "get", ENTRY_PREFIX + row.id
            decoded = None if text is None else decode(text)
            if decoded is None:
                continue
            request, response, body, _, _ = decoded
            shown = replace(response, headers=depend_on_host(response.headers), stream=cast("Any", body))
            found.append(Entry(uuid.UUID(hex=row.id), request, shown))
            # Half of the time is exact enough, and most reads then write nothing.
            if row.idle_seconds is not None and now - row.touched >= row.idle_seconds / 2:
                rows[number] = row._replace(touched=now)
                is_touched = True
        if is_touched:
            yield from self._write_rows(index, [row for row in rows if now < row.expires()], now)
        return found

    def publish(self, key: str, row: Row, text: str) -> _Plan[None]:
        """Store an entry, then name it in the list of its key."""
        now = clock.now()
        index = index_key(key)
        seconds = math.inf if row.ends is None else row.ends - now
        if seconds <= 0:
            return
        yield "set", ENTRY_PREFIX + row.id, text, ttl_of(seconds)
        others = decode_rows((yield "get", index))
        rows = [] if index in self._unread else [other for other in others if now < other.expires()]
        yield from self._write_rows(index, [*rows, row], now)
        self._unread.pop(index, None)

    def update(self, entry_id: uuid.UUID, headers: Headers) -> _Plan[None]:
        """Replace the headers of an entry; delete it where they depend on more of the request than was stored."""
        key = ENTRY_PREFIX + entry_id.hex
        text = yield "get", key
        decoded = None if text is None else decode(text)
        if decoded is None:
            return
        request, response, body, names, ends = decoded
        if _forbids(headers) and not _forbids(response.headers):
            # What was for all is for one user now, or for nobody.
            yield from self.remove(entry_id)
            return
        now_chosen_by = entries.names_of(headers.get("vary", ""))
        if now_chosen_by is None or not set(now_chosen_by) <= set(names):
            yield from self.remove(entry_id)
            return
        fresh = encode(request, replace(response, headers=correct_dates(headers, clock.now())), body, names, ends)
        if fresh is not None and len(fresh) <= MAX_VALUE_BYTES:
            yield "set", key, fresh, ttl_of(math.inf if ends is None else ends - clock.now())

    def remove(self, entry_id: uuid.UUID) -> _Plan[None]:
        """Delete an entry: a list that names it is no matter. Until that succeeds, it is not served."""
        _note(self._dead, entry_id.hex)
        yield "delete", ENTRY_PREFIX + entry_id.hex
        self._dead.pop(entry_id.hex, None)

    @staticmethod
    def _write_rows(index: str, rows: Iterable[Row], now: float) -> _Plan[None]:
        kept = list(rows)
        last = max([math.inf if row.ends is None else row.ends for row in kept], default=now)
        yield "set", index, encode_rows(kept), ttl_of(last - now)

    def failed(self, error: Exception) -> None:
        """Log a failure of the store, once until it succeeds."""
        if not self.has_failed:
            self.has_failed = True
            reason = error if isinstance(error, AioKVError) else type(error).__name__
            logger.warning("HTTP responses are not stored, or not read: %s", reason)


def _note(names: dict[str, None], name: str) -> None:
    names[name] = None
    if len(names) > _MAX_REMEMBERED:
        # Another thread may do the same.
        with contextlib.suppress(RuntimeError, StopIteration):
            names.pop(next(iter(names)), None)


def _forbids(headers: Headers) -> bool:
    found = entries.directives(headers.get("cache-control", ""))
    return "private" in found or "no-store" in found


class _Saving:
    """An entry whose body is read by its consumer, and stored when it is complete."""

    def __init__(
        self,
        storage: AsyncBaseStorage | BaseStorage,
        request: Request,
        response: Response,
        key: str,
        limits: tuple[float | None, float | None],
    ) -> None:
        now = clock.now()
        self.id = uuid.uuid4()
        self.key = key
        self.row = Row(self.id.hex, *storage._limits(*limits, now), now)  # noqa: SLF001 (hishel's, for storages)
        self._request = request
        self._response = replace(response, headers=correct_dates(response.headers, now))
        self._max_bytes = MAX_VALUE_BYTES if storage.max_stream_size is None else storage.max_stream_size
        self._chunks: list[bytes] = []
        self._size = 0
        names = entries.names_of(response.headers.get("vary", ""))
        self._names = sorted({*(names or ()), "host"})
        # A password in it would be stored.
        has_user = "@" in request.url.partition("//")[2].partition("/")[0]
        self._is_kept = names is not None and _SECRETS.isdisjoint(names) and not has_user

    def feed(self, chunk: bytes) -> None:
        """Note a part of the body, unless there is too much of it."""
        self._size += len(chunk)
        if self._size > self._max_bytes:
            self._is_kept = False
            self._chunks.clear()
        if self._is_kept:
            self._chunks.append(chunk)

    def text(self) -> str | None:
        """Return what is to be stored, or None where nothing is."""
        if not self._is_kept:
            return None
        text = encode(self._request, self._response, b"".join(self._chunks), self._names, self.row.ends)
        return text if text is not None and len(text) <= MAX_VALUE_BYTES else None


class AsyncKVStorage(AsyncBaseStorage):
    """A storage for `hishel.httpx.AsyncCacheClient` and whatever else takes an `AsyncBaseStorage`.

    The store stays open when the client is closed. No failure of it reaches a request: it is logged once.

    Args:
        store: Where responses are kept; `store.with_options(timeout=1)` bounds how long a request waits for it.
        default_ttl: For how many seconds an entry is kept; None for as long as the store can, 30 days.
        default_tti: After how many seconds an entry that nobody reads ends; None for no such end.
        max_stream_size: Largest body that is kept, in bytes.

    Raises:
        TypeError: The store is none.
    """

    def __init__(
        self,
        store: AsyncKVStore,
        *,
        default_ttl: float | None = None,
        default_tti: float | None = None,
        max_stream_size: int | None = DEFAULT_MAX_STREAM_BYTES,
    ) -> None:
        if not isinstance(store, AsyncKVStore):
            raise TypeError(f"store must be an AsyncKVStore, not {type(store).__name__}; KVStorage takes an aiokv.KVStore")
        super().__init__(default_ttl=default_ttl, default_tti=default_tti, max_stream_size=max_stream_size)
        self._store = store
        self._plans = _Plans()

    async def create_entry(
        self, request: Request, response: Response, key: str, *, ttl: float | None = None, tti: float | None = None
    ) -> Entry:
        """Return an entry that is stored once its body has been read; see `AsyncBaseStorage.create_entry`."""
        saving = _Saving(self, request, response, key, (ttl, tti))
        return Entry(saving.id, request, replace(response, stream=self._save(saving, cast("Any", response.stream))))

    async def get_entries(self, key: str) -> list[Entry]:
        """Return the entries of a key; see `AsyncBaseStorage.get_entries`."""
        found: list[Entry] = await self._run(self._plans.read(key), [])
        return [replace(entry, response=_with_stream(entry.response, _give_async)) for entry in found]

    async def update_headers(self, id: uuid.UUID, headers: Headers) -> None:  # noqa: A002 (hishel's name)
        """Replace the headers of an entry; see `AsyncBaseStorage.update_headers`."""
        await self._run(self._plans.update(id, headers), None)

    async def remove_entry(self, id: uuid.UUID) -> None:  # noqa: A002 (hishel's name)
        """Delete an entry; see `AsyncBaseStorage.remove_entry`."""
        await self._run(self._plans.remove(id), None)

    async def _save(self, saving: _Saving, source: AsyncIterator[bytes] | None) -> AsyncGenerator[bytes]:
        if source is not None:
            async for chunk in source:
                saving.feed(chunk)
                yield chunk
        text = saving.text()
        if text is not None:
            await self._run(self._plans.publish(saving.key, saving.row, text), None)

    async def _run(self, plan: _Plan[_T], otherwise: _T) -> _T:
        answer: Any = None
        try:
            while True:
                verb, *arguments = plan.send(answer)
                answer = await getattr(self._store, verb)(*arguments)
        except StopIteration as done:
            self._plans.has_failed = False
            return cast("_T", done.value)
        except Exception as error:  # noqa: BLE001 (logged: no request fails by its cache)
            plan.close()
            self._plans.failed(error)
            return otherwise


class KVStorage(BaseStorage):
    """A storage for `hishel.requests.CacheAdapter`, `hishel.httpx.CacheClient` and others that take a `BaseStorage`.

    The store stays open when the client is closed. No failure of it reaches a request: it is logged once.

    Args:
        store: Where responses are kept: an `aiokv.KVStore`.
        default_ttl: As for `AsyncKVStorage`, as all that follow.
        default_tti: See there.
        max_stream_size: See there.

    Raises:
        TypeError: The store is one that is awaited.
    """

    def __init__(
        self,
        store: BlockingStore,
        *,
        default_ttl: float | None = None,
        default_tti: float | None = None,
        max_stream_size: int | None = DEFAULT_MAX_STREAM_BYTES,
    ) -> None:
        if isinstance(cast("object", store), AsyncKVStore):
            raise TypeError("store must be an aiokv.KVStore, not AsyncKVStore; AsyncKVStorage takes that")
        super().__init__(default_ttl=default_ttl, default_tti=default_tti, max_stream_size=max_stream_size)
        self._store = store
        self._plans = _Plans()

    def create_entry(
        self, request: Request, response: Response, key: str, *, ttl: float | None = None, tti: float | None = None
    ) -> Entry:
        """Return an entry that is stored once its body has been read; see `BaseStorage.create_entry`."""
        saving = _Saving(self, request, response, key, (ttl, tti))
        return Entry(saving.id, request, replace(response, stream=self._save(saving, cast("Any", response.stream))))

    def get_entries(self, key: str) -> list[Entry]:
        """Return the entries of a key; see `BaseStorage.get_entries`."""
        found: list[Entry] = self._run(self._plans.read(key), [])
        return [replace(entry, response=_with_stream(entry.response, _give)) for entry in found]

    def update_headers(self, id: uuid.UUID, headers: Headers) -> None:  # noqa: A002 (hishel's name)
        """Replace the headers of an entry; see `BaseStorage.update_headers`."""
        self._run(self._plans.update(id, headers), None)

    def remove_entry(self, id: uuid.UUID) -> None:  # noqa: A002 (hishel's name)
        """Delete an entry; see `BaseStorage.remove_entry`."""
        self._run(self._plans.remove(id), None)

    def _save(self, saving: _Saving, source: Iterator[bytes] | None) -> Generator[bytes]:
        for chunk in source or ():
            saving.feed(chunk)
            yield chunk
        text = saving.text()
        if text is not None:
            self._run(self._plans.publish(saving.key, saving.row, text), None)

    def _run(self, plan: _Plan[_T], otherwise: _T) -> _T:
        answer: Any = None
        try:
            while True:
                verb, *arguments = plan.send(answer)
                answer = getattr(self._store, verb)(*arguments)
        except StopIteration as done:
            self._plans.has_failed = False
            return cast("_T", done.value)
        except Exception as error:  # noqa: BLE001 (logged: no request fails by its cache)
            plan.close()
            self._plans.failed(error)
            return otherwise


async def _give_async(body: bytes) -> AsyncGenerator[bytes]:
    yield body


def _give(body: bytes) -> Generator[bytes]:
    yield body


def _with_stream(response: Response, give: Callable[[bytes], Any]) -> Response:
    return replace(response, stream=give(cast("Any", response.stream)))
