"""Stores of py-key-value as backends: the contract, what an entry is there, and what names and errors become."""

import errno
import string
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from key_value.aio import errors as kv_errors
from key_value.aio.stores.disk import DiskStore
from key_value.aio.stores.memory import MemoryStore
from key_value.aio.wrappers.read_only import ReadOnlyWrapper

from aiokv import AsyncKVStore, kv_cached
from aiokv.adapters.py_key_value import MAX_COLLECTION_CHARS, MAX_KEY_CHARS, from_key_value
from aiokv.backends.base import Backend
from aiokv.backends.capabilities import MAX_BATCH_BYTES, OMITTED, Entry, capabilities_of
from aiokv.errors import (
    CallError,
    CallTimeoutError,
    ConnectError,
    CorruptValueError,
    RejectedError,
    ResponseError,
    StorageFullError,
    TransportError,
    UnavailableError,
    ValueTooLargeError,
)
from aiokv.limits import MAX_TTL_SECONDS, MAX_VALUE_BYTES
from aiokv.testing import movable_clock
from aiokv.testing.contract import BackendContract, BatchContract


class TestMemoryStore(BackendContract, BatchContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return from_key_value(MemoryStore())


class TestMemoryStoreWithPlainNames(BackendContract, BatchContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return from_key_value(MemoryStore(), portable_names=False)


class TestDiskStore(BackendContract, BatchContract):
    @pytest.fixture
    async def backend(self, tmp_path: Path) -> AsyncGenerator[Backend]:
        backend = from_key_value(DiskStore(directory=tmp_path), close_store=True)
        yield backend
        await backend.aclose()


SECRET = "the value that no message may hold"


class Recorded(MemoryStore):
    """A memory store that notes what it is asked, and raises what it is told to."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__()
        self.failure = failure
        self.calls: list[tuple[str, Any, str | None, Any]] = []

    async def get(self, key: str, *, collection: str | None = None) -> dict[str, Any] | None:
        self._note("get", key, collection)
        return await super().get(key, collection=collection)

    async def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[dict[str, Any] | None]:
        self._note("get_many", list(keys), collection)
        return await super().get_many(keys, collection=collection)

    async def put(self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: Any = None) -> None:
        self._note("put", key, collection, ttl)
        await super().put(key, value, collection=collection, ttl=ttl)

    async def put_many(
        self, keys: Sequence[str], values: Sequence[Mapping[str, Any]], *, collection: str | None = None, ttl: Any = None
    ) -> None:
        self._note("put_many", list(keys), collection, ttl)
        await super().put_many(keys, values, collection=collection, ttl=ttl)

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        self._note("delete", key, collection)
        return await super().delete(key, collection=collection)

    async def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        self._note("delete_many", list(keys), collection)
        return await super().delete_many(keys, collection=collection)

    def _note(self, verb: str, keys: Any, collection: str | None, ttl: Any = None) -> None:
        self.calls.append((verb, keys, collection, ttl))
        if self.failure is not None:
            raise self.failure


async def test_store_serves_the_store_and_the_decorator() -> None:
    store = AsyncKVStore("weather", backend=from_key_value(MemoryStore()))
    calls = 0

    @kv_cached(ttl=60, store=store, key=lambda city: city)
    async def forecast(city: str) -> list[str]:
        nonlocal calls
        calls += 1
        return [city]

    assert [await forecast("Oslo"), await forecast("Oslo"), calls] == [["Oslo"], ["Oslo"], 1]
    await store.set("k", "v")
    await store.delete("k")
    assert await store.get("k") is None


async def test_entry_is_a_document_that_other_programs_can_read() -> None:
    engine = MemoryStore()
    await from_key_value(engine).set("weather", "oslo", "3 °C", 600)
    document = await engine.get("oslo", collection="weather")
    assert document == {"value": "3 °C", "expires_at": pytest.approx(time.time() + 600, abs=60)}


async def test_document_that_another_program_wrote_is_read() -> None:
    engine = MemoryStore()
    await engine.put("oslo", {"value": "3 °C"}, collection="weather")
    assert await from_key_value(engine).get("weather", "oslo") == "3 °C"


@pytest.mark.parametrize("document", [{}, {"value": 3}, {"temperature": "3"}, {"base64": "?"}, {"base64": "/w=="}], ids=str)
async def test_document_that_holds_no_text_is_an_error_of_its_key_alone(document: dict[str, Any]) -> None:
    engine = MemoryStore()
    backend = from_key_value(engine)
    await engine.put("oslo", document, collection="weather")
    await backend.set("weather", "bergen", "v", 60)
    with pytest.raises(CorruptValueError, match="MemoryStore of py-key-value: the document there holds no text"):
        await backend.get("weather", "oslo")
    outcomes = await backend.get_many("weather", ["oslo", "bergen"])
    assert (type(outcomes[0]), outcomes[1]) == (CorruptValueError, "v")


async def test_value_with_nul_comes_back_though_no_text_of_the_document_has_one() -> None:
    engine = MemoryStore()
    backend = from_key_value(engine)
    await backend.set("db", "k", "a\0é", 60)
    document = await engine.get("k", collection="db")
    assert document is not None
    assert not any("\0" in str(held) for held in document.values())
    assert await backend.get("db", "k") == "a\0é"


async def test_engine_gets_a_second_more_but_never_more_than_thirty_days() -> None:
    engine = Recorded()
    backend = from_key_value(engine)
    await backend.set("db", "k", "v", 60)
    await backend.set("db", "k", "v", MAX_TTL_SECONDS)
    await backend.set_many("db", [Entry("k", "v", MAX_TTL_SECONDS)])
    assert [ttl for *_, ttl in engine.calls] == [61, MAX_TTL_SECONDS, MAX_TTL_SECONDS]


async def test_entry_ends_exactly_at_its_expiry_though_the_engine_keeps_it_longer() -> None:
    backend = from_key_value(MemoryStore())
    with movable_clock() as clock:
        await backend.set("db", "k", "v", 60)
        clock.advance(59.9)
        assert await backend.get("db", "k") == "v"
        clock.advance(0.1)
        assert await backend.get("db", "k") is None
        assert await backend.get_many("db", ["k"]) == [None]


names = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=300)


@given(st.lists(st.tuples(names, names), min_size=2, max_size=8, unique=True))
async def test_portable_names_are_short_plain_and_one_for_each_name(given_names: list[tuple[str, str]]) -> None:
    engine = Recorded()
    backend = from_key_value(engine)
    for db_name, key in given_names:
        await backend.delete(db_name, key)
    seen = [(collection, name) for _, name, collection, _ in engine.calls]
    assert len(set(seen)) == len(given_names)
    assert all(0 < len(str(collection)) <= MAX_COLLECTION_CHARS and 0 < len(name) <= MAX_KEY_CHARS for collection, name in seen)
    plain = set(string.ascii_lowercase + string.digits + "-_")
    assert all(set(f"{collection}{name}") <= plain for collection, name in seen)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("k" * 500, "k" * 501),
        ("k" * 128, "k" * 129),
        ("K", "k"),
        ("_4b", "K"),
        ("é" * 100 + "a", "é" * 100 + "b"),
        ("a:b", "a_3ab"),
    ],
)
async def test_names_that_look_alike_stay_apart(one: str, other: str) -> None:
    backend = from_key_value(MemoryStore())
    await backend.set("db", one, "of one", 60)
    await backend.set("db", other, "of other", 60)
    assert [await backend.get("db", one), await backend.get("db", other)] == ["of one", "of other"]
    await backend.set(one, "k", "of one", 60)
    assert await backend.get(other, "k") is None


async def test_plain_names_stay_as_they_are_but_for_what_joins_them(tmp_path: Path) -> None:
    engine = Recorded()
    backend = from_key_value(engine, portable_names=False)
    await backend.delete("Wetter 100%:x", "Kiel, Förde:1")
    assert engine.calls == [("delete", "Kiel, Förde:1", "Wetter 100%25%3Ax", None)]
    # This store joins collection and key by `::`.
    disk = DiskStore(directory=tmp_path)
    backend = from_key_value(disk, portable_names=False, close_store=True)
    await backend.set("a::b", "c", "v", 60)
    assert await backend.get("a", "b::c") is None
    await backend.aclose()


async def test_equal_keys_of_a_batch_are_set_in_their_order_and_each_with_its_own_ttl() -> None:
    engine = Recorded()
    backend = from_key_value(engine)
    with movable_clock() as clock:
        entries = [Entry("a", "first", 60), Entry("b", "b", 3600), Entry("a", "last", 3600), Entry("c", "c", 60)]
        assert await backend.set_many("db", entries) == [None] * 4
        assert [(verb, keys, ttl) for verb, keys, _, ttl in engine.calls] == [
            ("put_many", ["a", "b"], 3601),
            ("put_many", ["c"], 61),
        ]
        clock.advance(60)
        assert await backend.get_many("db", ["a", "b", "c", "a"]) == ["last", "b", None, "last"]


async def test_delete_of_many_answers_for_each_key() -> None:
    backend = from_key_value(MemoryStore())
    await backend.set_many("db", [Entry("a", "v", 60), Entry("b", "v", 60)])
    assert await backend.delete_many("db", ["a", "absent", "a"]) == [None] * 3
    assert await backend.get_many("db", ["a", "b"]) == [None, "v"]


async def test_answer_that_is_full_omits_what_the_store_was_never_asked() -> None:
    engine = Recorded()
    backend = from_key_value(engine)
    large = "x" * MAX_VALUE_BYTES
    keys = [f"k{number}" for number in range(200)]
    for key in keys[:40]:
        await backend.set("db", key, large, 60)
    engine.calls.clear()
    outcomes = await backend.get_many("db", keys)
    fit = MAX_BATCH_BYTES // MAX_VALUE_BYTES
    assert ([type(one) for one in outcomes], outcomes[fit]) == ([str] * fit + [type(OMITTED)] * (200 - fit), OMITTED)
    assert sum(len(asked) for _, asked, *_ in engine.calls) == 32
    rest = await backend.get_many("db", keys[40:])
    assert rest == [None] * 160


async def test_a_thousand_small_values_take_two_calls() -> None:
    engine = Recorded()
    backend = from_key_value(engine)
    keys = [f"k{number}" for number in range(1000)]
    await backend.set_many("db", [Entry(key, "v", 60) for key in keys])
    engine.calls.clear()
    assert await backend.get_many("db", keys) == ["v"] * 1000
    assert len(engine.calls) == 2


async def test_store_that_answers_fewer_keys_than_asked_is_an_error() -> None:
    class Short(Recorded):
        async def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[dict[str, Any] | None]:
            return await super().get_many(keys[1:], collection=collection)

    with pytest.raises(ResponseError, match="the store answered 1 of 2 keys"):
        await from_key_value(Short()).get_many("db", ["a", "b"])


class EngineConnectionError(Exception):
    """As drivers have them: no OSError."""


class ReadTimeout(Exception):  # noqa: N818 (a name of such drivers)
    """Likewise."""


@pytest.mark.parametrize(
    ("failure", "kind", "set_may_be_there", "transient"),
    [
        (kv_errors.ValueTooLargeError(5, 4), ValueTooLargeError, False, False),
        (kv_errors.EntryTooLargeError(5, 4), ValueTooLargeError, False, False),
        (kv_errors.ReadOnlyError("put"), RejectedError, False, False),
        (kv_errors.InvalidKeyError(SECRET), RejectedError, False, False),
        (kv_errors.SerializationError(SECRET), RejectedError, False, False),
        (kv_errors.StoreSetupError(SECRET), ConnectError, False, True),
        (kv_errors.StoreConnectionError(SECRET), TransportError, True, True),
        (kv_errors.DeserializationError(SECRET), CorruptValueError, False, False),
        (kv_errors.DecryptionError(SECRET), CorruptValueError, False, False),
        (ConnectionResetError(SECRET), TransportError, True, True),
        (EngineConnectionError(SECRET), TransportError, True, True),
        (TimeoutError(SECRET), CallTimeoutError, True, True),
        (ReadTimeout(SECRET), CallTimeoutError, True, True),
        (OSError(errno.ENOSPC, SECRET), StorageFullError, False, False),
        (kv_errors.BaseKeyValueError(SECRET), UnavailableError, True, False),
        (RuntimeError(SECRET), UnavailableError, True, False),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Exception) else "",
)
async def test_failure_of_the_store_becomes_an_error_of_the_call(
    failure: Exception, kind: type[CallError], *, set_may_be_there: bool, transient: bool
) -> None:
    backend = from_key_value(Recorded(failure))
    with pytest.raises(CallError) as read:
        await backend.get("db", "k")
    with pytest.raises(CallError) as written:
        await backend.set("db", "k", SECRET, 60)
    assert [(type(one.value), one.value.transient) for one in (read, written)] == [(kind, transient)] * 2
    assert (read.value.maybe_applied, written.value.maybe_applied) == (False, set_may_be_there)
    for raised in (read, written):
        assert (raised.value.db_name, raised.value.key, raised.value.attempts) == ("db", "k", 1)
        assert SECRET not in str(raised.value)
        # Nor in what a traceback prints.
        assert (raised.value.__cause__, raised.value.__context__) == (None, None)


async def test_batch_that_fails_is_an_error_for_each_of_its_keys() -> None:
    backend = from_key_value(Recorded(ConnectionResetError(SECRET)))
    outcomes = [
        *await backend.set_many("db", [Entry("a", SECRET, 60), Entry("b", SECRET, 60)]),
        *await backend.delete_many("db", ["c", "d"]),
    ]
    assert [(type(one), one and one.key, one and one.maybe_applied) for one in outcomes] == [
        (TransportError, key, True) for key in "abcd"
    ]
    with pytest.raises(TransportError):
        await backend.get_many("db", ["a"])


async def test_part_of_a_batch_may_be_there_even_where_the_store_refused_one() -> None:
    backend = from_key_value(Recorded(kv_errors.ValueTooLargeError(5, 4)))
    outcomes = await backend.set_many("db", [Entry("a", "v", 60)])
    assert [(type(one), one and one.maybe_applied) for one in outcomes] == [(ValueTooLargeError, True)]


async def test_wrapper_that_only_reads_refuses_writes() -> None:
    engine = MemoryStore()
    await from_key_value(engine).set("db", "k", "v", 60)
    backend = from_key_value(ReadOnlyWrapper(engine, raise_on_write=True))
    assert await backend.get("db", "k") == "v"
    with pytest.raises(RejectedError, match="the store is read-only"):
        await backend.delete("db", "k")


async def test_store_is_closed_only_where_that_was_asked_for() -> None:
    class Closable(MemoryStore):
        closed = 0

        async def close(self) -> None:
            self.closed += 1

    engine = Closable()
    await from_key_value(engine).aclose()
    assert engine.closed == 0
    await from_key_value(engine, close_store=True).aclose()
    assert engine.closed == 1
    # One without a `close` has nothing to close.
    await from_key_value(MemoryStore(), close_store=True).aclose()


async def test_only_batches_are_there_beside_the_four_calls() -> None:
    backend = from_key_value(MemoryStore())
    found = capabilities_of(backend)
    assert (found.batch, found.scan, found.claim, found.watch) == (backend, None, None, None)
    assert found.batch is not None
    assert not found.batch.batches_are_atomic


@pytest.mark.parametrize(
    ("given_store", "message"),
    [(MemoryStore, "not the class MemoryStore"), ({}, "not dict, which lacks put, delete, get_many")],
    ids=["class", "dict"],
)
def test_what_is_no_store_is_refused_by_name(given_store: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        from_key_value(given_store)
