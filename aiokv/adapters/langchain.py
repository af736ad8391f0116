"""A store of bytes for LangChain: for `CacheBackedEmbeddings`, `ParentDocumentRetriever` and others that take a `ByteStore`.

```python
from langchain_classic.embeddings import CacheBackedEmbeddings
from aiokv import AsyncKVStore
from aiokv.adapters.langchain import KVByteStore

cache = KVByteStore(AsyncKVStore("embeddings"))
embeddings = CacheBackedEmbeddings.from_bytes_store(model, cache, namespace="text-embedding-3", key_encoder="sha256")
```
"""

from collections.abc import AsyncGenerator, Generator, Sequence
from datetime import timedelta

from aiokv.adapters.entries import Entries, seconds_of
from aiokv.background import run
from aiokv.store import AsyncKVStore

try:
    from langchain_core.stores import BaseStore
except ImportError as missing:
    raise ImportError("aiokv.adapters.langchain needs the package langchain-core: pip install 'aiokv[langchain]'") from missing

_PAGE_KEYS = 100


class KVByteStore(BaseStore[str, bytes]):
    """A `ByteStore` of LangChain over an `AsyncKVStore`; see `aiokv.adapters.entries` for the form.

    Its async methods run in the running loop, its blocking ones in aiokv's background loop, from any thread. Batches travel
    as batches. Every value ends after `ttl`, at the latest after 30 days. Keys may be any text; to list them, the store must
    be able to. Errors are aiokv's own.

    Args:
        store: Where values live, in a namespace of their own.
        ttl: How long each value lives from when it was set, in seconds or as a `timedelta`; None for 30 days.

    Raises:
        TypeError: An argument is of another type.
        ValueError: `ttl` is not more than 0.
    """

    def __init__(self, store: AsyncKVStore, *, ttl: float | timedelta | None = None) -> None:
        self._entries = Entries(store)
        self._ttl = seconds_of(ttl)
        if self._ttl is not None and self._ttl <= 0:
            raise ValueError(f"ttl must be more than 0 seconds or None for 30 days, not {ttl!r}")

    async def amget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Read values.

        Args:
            keys: The keys; a repeated one is read once.

        Returns:
            The value of each key, or None where it is absent.

        Raises:
            CallError: The one key could not be read.
            BatchError: Some could not be read.
        """
        return [None if held is None else held.data for held in await self._entries.get_many(keys)]

    async def amset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Store values; of two of one key the last one.

        Args:
            key_value_pairs: Each key with its value, of at most about 1.4 MB.

        Raises:
            TypeError: A key is no text or a value no bytes; nothing was stored.
            ValueTooLargeError: A value is too large; nothing was stored.
            CallError: The one value could not be stored.
            BatchError: Some could not be stored.
        """
        for _, value in key_value_pairs:
            if not isinstance(value, bytes):
                raise TypeError(
                    f"values must be bytes, not {type(value).__name__}; wrap the store in LangChain's EncoderBackedStore"
                )
        await self._entries.set_many(dict(key_value_pairs), self._ttl)

    async def amdelete(self, keys: Sequence[str]) -> None:
        """Delete values; succeed where there are none.

        Args:
            keys: The keys.

        Raises:
            CallError: The one value could not be deleted.
            BatchError: Some could not be deleted.
        """
        await self._entries.delete_many(keys)

    async def ayield_keys(  # pyright: ignore[reportIncompatibleMethodOverride] (as LangChain means it)
        self, *, prefix: str | None = None
    ) -> AsyncGenerator[str]:
        """List the keys.

        Args:
            prefix: What they begin with; None for all.

        Yields:
            Each key.

        Raises:
            UnsupportedError: The store cannot list its keys, as fal's service cannot.
            CallError: They could not be listed.
        """
        async for key in self._entries.keys(prefix or ""):
            yield key

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Read values; see `amget`."""
        return run(lambda: self.amget(keys))

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Store values; see `amset`."""
        run(lambda: self.amset(key_value_pairs))

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete values; see `amdelete`."""
        run(lambda: self.amdelete(keys))

    def yield_keys(self, *, prefix: str | None = None) -> Generator[str]:
        """List the keys; see `ayield_keys`."""
        listing = self._entries.keys(prefix or "")

        async def take() -> list[str]:
            keys: list[str] = []
            async for key in listing:
                keys.append(key)
                if len(keys) == _PAGE_KEYS:
                    break
            return keys

        async def close() -> None:
            await listing.aclose()

        try:
            # A page at a time: one change of threads for each key would cost more than the listing.
            while page := run(take):
                yield from page
        finally:
            run(close)
