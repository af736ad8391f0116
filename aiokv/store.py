"""`AsyncKVStore`: the store that users await, whatever holds its values."""

from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import orjson

from aiokv.backends.capabilities import BatchBackend, ClaimBackend, Entry, KeyInfo, Omitted, ScanBackend
from aiokv.backends.watching import Watch
from aiokv.batch import batches_of, batches_of_entries, call_each, send_batches
from aiokv.changes import Changes
from aiokv.claiming import DEFAULT_CLAIM_SECONDS, Claim, check_claim_seconds
from aiokv.configured import ConfiguredStore
from aiokv.errors import CallError, DecodeError, truncated
from aiokv.limits import check_entries, check_entry, check_mapping, check_prefix, check_ttl, check_value, check_values
from aiokv.listing import clear_keys, list_keys


class AsyncKVStore(ConfiguredStore):
    """A key-value store of strings, every entry of which expires.

    Nothing is opened before the first call. One store may be used by many tasks, in several event loops and threads, and
    after a fork. Connections belong to the loop and the process that opened them; all stores of one configuration share them.
    `async with` and `aclose` close them, as does the end of the loop in `asyncio.run`; a later call opens them anew.
    A store that is dropped without either leaves them to the next one of its configuration, until the loop ends.
    A store can be pickled: its configuration travels, its connections do not. Credentials, an observer and a backend that
    were passed to it travel too, and must be such as can be pickled.

    Args:
        db_name: The namespace: any non-empty text without `/` and NUL; each is isolated from every other.
        url: Where values live: `https://host`, `sqlite:///kv.db`, `memory://`. None takes the environment's `AIOKV_URL`,
            else fal's service, at the first call.
        backend: Any object with the four methods of `Backend`, in place of a URL. Whoever made it closes it: `aclose` of the
            store does not. The store works in every event loop and process that the backend works in.
        credentials: For `http(s)` URLs and Redis: `"<id>:<secret>"`, or an object with `async def authorization(self) -> str`.
            None takes fal's own credentials for fal's hosts, and the environment's `AIOKV_KEY` for any other.
        retry: For `http(s)` URLs and Redis: attempts, timeouts and waits.
        http: For `http(s)` URLs: the connection pool.
        hedge: For `http(s)` URLs: whether a `get` that is late is sent a second time, and when; `True` takes the defaults.
        redis: For stores on Redis and Valkey: durability and connections.
        observer: Any function of one argument, called with each event of each call, such as
            `aiokv.otel.OpenTelemetryObserver()`.
        concurrency: How many calls a `*_many` method makes at once, 1 or more; of batches 4 at most.

    Raises:
        TypeError: An argument is of another type, or `backend` comes with an argument that is for URLs alone.
        ValueError: `db_name` or `concurrency` is not acceptable.
        ConfigurationError: `url` is not acceptable, or `credentials` is a text of another form.
    """

    async def get(self, key: str) -> str | None:
        """Read a value.

        Args:
            key: Any non-empty text without NUL that fits a request line, other than `.` and `..`.

        Returns:
            The value, or None where the key is absent or has expired.

        Raises:
            TypeError: The key is not a string.
            ValueError: The key is not acceptable; nothing was sent.
            CallError: The call failed; the subclass and the fields say how.
        """
        check_entry(self._db_name, key)
        backend = self._backend_here() or await self._open()
        return await backend.get(self._db_name, key)

    async def set(self, key: str, value: str, ttl: int | timedelta | None = None) -> None:
        """Store a value; replace the present one. The last write wins.

        Args:
            key: As for `get`.
            value: Any text of at most 1,900,000 bytes of UTF-8.
            ttl: Whole seconds from 60 to 2,592,000 (30 days), or a `timedelta`; None means 30 days.

        Raises:
            TypeError: The key or the value is not a string; `set_json` takes other values.
            ValueError: The key, the value or the ttl is not acceptable; nothing was sent.
            ValueTooLargeError: The value is over the limit; nothing was stored.
            CallError: The call failed; `maybe_applied` is true where the value may be stored all the same.
        """
        check_entry(self._db_name, key)
        check_value(value)
        ttl_seconds = check_ttl(ttl)
        if type(value) is not str:
            # Only the text of a subclass is stored, so that every store returns the same.
            value = str.__str__(value)
        backend = self._backend_here() or await self._open()
        await backend.set(self._db_name, key, value, ttl_seconds)

    async def delete(self, key: str) -> None:
        """Delete an entry; succeed where there is none.

        Args:
            key: As for `get`.

        Raises:
            TypeError: The key is not a string.
            ValueError: The key is not acceptable; nothing was sent.
            CallError: The call failed; `maybe_applied` is true where the entry may be gone all the same.
        """
        check_entry(self._db_name, key)
        backend = self._backend_here() or await self._open()
        await backend.delete(self._db_name, key)

    async def get_json(self, key: str, default: Any = None) -> Any:
        """Read a value and decode it as JSON.

        Args:
            key: As for `get`.
            default: The result where the key is absent; tells it from a stored `null`.

        Returns:
            The decoded value, or `default`.

        Raises:
            DecodeError: The value is not JSON.
            CallError: As for `get`.
        """
        text = await self.get(key)
        if text is None:
            return default
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError as error:
            # Not chained: the decoder's error holds the whole value.
            place = f"line {error.lineno} column {error.colno}"
        raise DecodeError(
            f"the value of {truncated(key)} in db {truncated(self._db_name)} is not JSON at {place}; read it with get"
        )

    async def set_json(self, key: str, value: Any, ttl: int | timedelta | None = None) -> None:
        """Encode a value as JSON and store it.

        Args:
            key: As for `get`.
            value: What orjson encodes: dict, list, str, int, float, bool, None, dataclass, datetime, UUID.
                A tuple comes back as a list, NaN as None.
            ttl: As for `set`.

        Raises:
            TypeError: The value cannot be encoded.
            ValueTooLargeError: The JSON is over 1,900,000 bytes; nothing was stored.
            CallError: As for `set`.
        """
        check_entry(self._db_name, key)
        try:
            text = orjson.dumps(value).decode()
        except orjson.JSONEncodeError as error:
            reason = str(error)
        except UnicodeDecodeError:
            # From an orjson.Fragment; the error holds the value.
            reason = "it is not UTF-8"
        else:
            return await self.set(key, text, ttl)
        raise TypeError(f"value of type {type(value).__name__} cannot be encoded as JSON: {reason}")

    async def get_many(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Read several values at once, in batches where the store takes them; a repeated key is read once.

        Args:
            keys: Keys as for `get`.

        Returns:
            Each key with its value, or None where it is absent, in the order of first appearance.

        Raises:
            TypeError: A key is not a string, or `keys` is one or no iterable of them.
            ValueError: A key is not acceptable; nothing was sent.
            BatchError: A key could not be read; it holds the values of the others that were read.
        """
        names = check_entries(self._db_name, keys)
        batch = await self._batch("get", names)
        if batch is None:
            return await call_each(names, self.get, self._concurrency)
        return await send_batches("get", batches_of(names), lambda part: batch.get_many(self._db_name, part), self._concurrency)

    async def set_many(self, values: Mapping[str, str], ttl: int | timedelta | None = None) -> None:
        """Store several values at once, in batches where the store takes them.

        There is no transaction over all of them: up to 1,000 keys and 8 MiB travel as one batch.

        Args:
            values: Keys and values as for `set`.
            ttl: As for `set`, the same for all.

        Raises:
            TypeError: A key or a value is not a string, or `values` is no mapping.
            ValueError: A key, a value or the ttl is not acceptable; the message names the key, and nothing was sent.
            BatchError: A value could not be stored; it lists the keys that were stored, that failed and that were not
                attempted.
        """
        ttl_seconds = check_ttl(ttl)
        await set_entries(self, [Entry(key, value, ttl_seconds) for key, value in check_mapping(values).items()])

    async def delete_many(self, keys: Iterable[str]) -> None:
        """Delete several entries at once, in batches where the store takes them; a repeated key is deleted once.

        Args:
            keys: Keys as for `get`.

        Raises:
            TypeError: A key is not a string, or `keys` is one or no iterable of them.
            ValueError: A key is not acceptable; nothing was sent.
            BatchError: A key could not be deleted; it lists the keys that were deleted, that failed and that were not
                attempted.
        """
        names = check_entries(self._db_name, keys)
        batch = await self._batch("delete", names)
        if batch is None:
            await call_each(names, self.delete, self._concurrency)
        else:
            await send_batches(
                "delete", batches_of(names), lambda part: batch.delete_many(self._db_name, part), self._concurrency
            )

    def keys(self, prefix: str = "") -> AsyncGenerator[KeyInfo]:
        """List the keys of this namespace: `async for info in store.keys():`.

        What is there from the first step to the last comes exactly once; what is written meanwhile may come or not. In memory
        nothing comes that was set after the beginning. Elsewhere the listing lasts while others set keys behind its place
        faster than they are read.

        Args:
            prefix: What the keys begin with: any text without NUL; "" for all.

        Returns:
            A `KeyInfo` for each entry, in the order of the keys where the store has one. To read it raises `UnsupportedError`
            where the store cannot list, and `CallError` where it fails.

        Raises:
            TypeError: The prefix is not a string.
            ValueError: The prefix is not acceptable; nothing was sent.
        """
        check_prefix(self._db_name, prefix)
        return list_keys(self._open_scan, self._db_name, prefix)

    async def count(self, prefix: str = "") -> int:
        """Count the entries of this namespace.

        Args:
            prefix: As for `keys`.

        Returns:
            How many there are; while others write, about so many. Over Redis it takes about a second for a million keys of the
            whole server, and through `aiokv serve` at most 8 seconds: then list the keys instead.

        Raises:
            TypeError: The prefix is not a string.
            ValueError: The prefix is not acceptable; nothing was sent.
            UnsupportedError: The store cannot list its keys.
            CallError: They could not be counted.
        """
        check_prefix(self._db_name, prefix)
        return await (await self._open_scan()).count(self._db_name, prefix)

    async def clear(self, prefix: str = "") -> int:
        """Delete all entries that are in this namespace when it begins, in steps.

        What others set meanwhile may go or stay: a store is gone through once, and what is behind is not looked at again. So it
        ends however fast others write; over Redis, whose tables grow with what they set, it may last long beside them.

        Args:
            prefix: As for `keys`; "" deletes every entry.

        Returns:
            How many were deleted; some of them may have expired before.

        Raises:
            TypeError: The prefix is not a string.
            ValueError: The prefix is not acceptable; nothing was sent.
            UnsupportedError: The store cannot list its keys; nothing was deleted.
            CallError: A step failed; `maybe_applied` is true where some entries are gone, or may be.
        """
        check_prefix(self._db_name, prefix)
        return await clear_keys(await self._open_scan(), self._db_name, prefix)

    def watch(self) -> Changes:
        """Watch this namespace: `async for change in store.watch():`.

        First comes `Lost()`, once changes are being told of; then `Changed(key, is_delete)` for each set and delete, in the
        order of the writes of a key, one's own too; and `Lost()` again wherever changes may be missing. Expiry is no change.
        It ends when it or the store is closed; it raises `UnsupportedError` where the store cannot watch, and another
        `CallError` where it cannot go on.

        Returns:
            The changes. `async with store.watch() as changes:` begins at once, and ends with the block.
        """
        return Changes(self, self._begin_watch)

    def claim(self, key: str, seconds: float | timedelta = DEFAULT_CLAIM_SECONDS) -> Claim:
        """Claim a key, so that at most one holder works on it: `async with store.claim("report") as claim:`.

        The block runs in any case: look at `claim.is_held` first, and again before what only the holder may do. The claim is
        renewed while the block runs and the store is open, and released behind it. Claims are apart from values: nothing is
        stored under the key.
        To enter the block raises `UnsupportedError` where the store knows no claims, and `CallError` where it fails.

        Args:
            key: As for `get`.
            seconds: From 1 to 3,600: how long others wait where the holder dies.

        Returns:
            The claim, for `async with`.

        Raises:
            TypeError: An argument is of another type.
            ValueError: An argument is not acceptable.
        """
        check_entry(self._db_name, key)
        return Claim(self, self._open_claims, self._db_name, key, check_claim_seconds(seconds))

    async def _batch(self, verb: str, keys: Sequence[str]) -> BatchBackend | None:
        """Return the backend where keys go in batches: one alone does not, nor does a subclass that has its own calls."""
        if len(keys) <= 1 or getattr(type(self), verb) is not getattr(AsyncKVStore, verb):
            return None
        return (await self._abilities()).batch

    async def _open_scan(self) -> ScanBackend:
        backend = (await self._abilities()).scan
        if backend is None:
            raise self._unsupported("list its keys")
        return backend

    async def _open_claims(self) -> ClaimBackend:
        backend = (await self._abilities()).claim
        if backend is None:
            raise self._unsupported("hold claims")
        return backend

    async def _begin_watch(self) -> Watch:
        backend = (await self._abilities()).watch
        if backend is None:
            raise self._unsupported("tell of changes")
        return backend.watch(self._db_name)


async def get_into(store: AsyncKVStore, keys: Sequence[str], found: dict[str, str | None]) -> None:
    """Read several values as `get_many` does, and leave what was read before an error or a cancellation.

    Args:
        store: The store.
        keys: The keys.
        found: Gets each key with its value, or None; of a store without batches one after the other.

    Raises:
        TypeError: As for `get_many`.
        ValueError: As for `get_many`.
        BatchError: As for `get_many`.
    """
    if type(store).get_many is not AsyncKVStore.get_many:
        found.update(await store.get_many(keys))
        return
    names = check_entries(store.db_name, keys)
    batch = await store._batch("get", names)  # noqa: SLF001 (of the class above)
    if batch is None:
        await call_each(names, store.get, store._concurrency, found)  # noqa: SLF001 (likewise)
        return

    def send(part: Sequence[str]) -> Awaitable[Sequence[str | Omitted | CallError | None]]:
        return batch.get_many(store.db_name, part)

    found.update(await send_batches("get", batches_of(names), send, store._concurrency))  # noqa: SLF001 (likewise)


async def set_entries(store: AsyncKVStore, entries: Iterable[Entry]) -> None:
    """Store entries, each with a time to live of its own; as `set_many` otherwise.

    Args:
        store: The store.
        entries: The entries. Of two with one key the last one counts.

    Raises:
        TypeError: As for `set_many`.
        ValueError: As for `set_many`.
        BatchError: As for `set_many`.
    """
    by_key = {entry.key: entry for entry in entries}
    for ttl_seconds in {entry.ttl_seconds for entry in by_key.values()}:
        check_ttl(ttl_seconds)
    keys = check_entries(store.db_name, by_key)
    check_values({key: entry.value for key, entry in by_key.items()})
    batch = await store._batch("set", keys)  # noqa: SLF001 (of the class above)
    if batch is None:
        await call_each(keys, lambda key: store.set(*by_key[key]), store._concurrency)  # noqa: SLF001 (likewise)
        return
    for key, entry in by_key.items():
        if type(entry.value) is not str:
            # As for `set`.
            by_key[key] = entry._replace(value=str.__str__(entry.value))

    def send(part: Sequence[str]) -> Awaitable[Sequence[CallError | None]]:
        return batch.set_many(store.db_name, [by_key[key] for key in part])

    await send_batches("set", batches_of_entries(by_key.values()), send, store._concurrency)  # noqa: SLF001 (likewise)
