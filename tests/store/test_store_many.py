"""Many keys at once: what goes in which batch, and what is said of each key where some fail."""

import asyncio
import enum
from collections.abc import Sequence
from typing import Any

import pytest

from aiokv import AsyncKVStore, BatchError, Event, KeyInfo, StorageError, TransportError
from aiokv.backends.capabilities import MAX_BATCH_BYTES, MAX_BATCH_KEYS, OMITTED, Entry, capabilities_of
from aiokv.backends.memory import MemoryBackend
from aiokv.errors import CallError, ResponseError
from aiokv.store import set_entries

MEGABYTE = "x" * 1_000_000


class BatchingBackend(MemoryBackend):
    """Note each batch; hold it up, fail it or some of its keys where a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []
        self.under_way = 0
        self.most_under_way = 0
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        self.bad_keys: set[str] = set()

    async def _pass(self, keys: Sequence[str]) -> None:
        self.batches.append(list(keys))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.under_way -= 1
        if self.error is not None:
            raise self.error

    def _spoil(self, keys: Sequence[str], outcomes: Sequence[Any]) -> list[Any]:
        return [
            StorageError("broken", verb="set", key=key, attempts=1) if key in self.bad_keys else outcome
            for key, outcome in zip(keys, outcomes, strict=True)
        ]

    async def get_many(self, db_name: str, keys: Sequence[str]) -> Any:
        await self._pass(keys)
        return self._spoil(keys, await super().get_many(db_name, keys))

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Any:
        keys = [entry.key for entry in entries]
        await self._pass(keys)
        good = [entry for entry in entries if entry.key not in self.bad_keys]
        await super().set_many(db_name, good)
        return self._spoil(keys, [None] * len(keys))

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> Any:
        await self._pass(keys)
        await super().delete_many(db_name, [key for key in keys if key not in self.bad_keys])
        return self._spoil(keys, [None] * len(keys))


@pytest.fixture
def backend() -> BatchingBackend:
    return BatchingBackend()


@pytest.fixture
def store(backend: BatchingBackend) -> AsyncKVStore:
    return AsyncKVStore("db", backend=backend)


def numbered(count: int) -> dict[str, str]:
    return {f"k{i:05}": f"v{i}" for i in range(count)}


@pytest.mark.parametrize("observed", [False, True])
async def test_many_come_back_in_every_store(url: str, *, observed: bool) -> None:
    events: list[Event] = []
    async with AsyncKVStore("db", url=url, observer=events.append if observed else None) as store:
        values = {**numbered(2_500), "ключ": "значение", "leer": ""}
        await store.set_many(values)
        got = await store.get_many([*values, "absent", "leer"])
        assert got == {**values, "absent": None}
        assert list(got) == [*values, "absent"]
        await store.delete_many(["k00001", "absent", *list(values)[100:2_000]])
        assert await store.get_many(["k00000", "k00001", "k00100"]) == {"k00000": "v0", "k00001": None, "k00100": None}
        assert bool(events) is observed


async def test_values_of_more_than_one_answer_all_come(able: AsyncKVStore) -> None:
    values = {f"k{i}": f"{i}{MEGABYTE}" for i in range(20)}
    await able.set_many(values)
    assert await able.get_many(values) == values


async def test_batches_hold_a_thousand_keys_each(store: AsyncKVStore, backend: BatchingBackend) -> None:
    values = numbered(2_001)
    await store.set_many(values)
    await store.get_many(values)
    await store.delete_many(values)
    keys = list(values)
    parts = [keys[:1_000], keys[1_000:2_000], keys[2_000:]]
    assert backend.batches == [*parts, *parts, *parts]


async def test_batches_hold_eight_mebibytes_each(store: AsyncKVStore, backend: BatchingBackend) -> None:
    values = {f"k{i:02}": "ü" * 500_000 if i % 2 else MEGABYTE for i in range(20)}
    await store.set_many(values)
    assert [len(batch) for batch in backend.batches] == [8, 8, 4]
    size = sum(len(key) + len(values[key].encode()) for key in backend.batches[0])
    assert size <= MAX_BATCH_BYTES < size + 1_000_003


async def test_one_key_alone_is_one_call(store: AsyncKVStore, backend: BatchingBackend) -> None:
    await store.set_many({"k": "v"})
    assert await store.get_many(["k", "k"]) == {"k": "v"}
    await store.delete_many(["k"])
    assert backend.batches == []
    assert await store.get("k") is None


async def test_nothing_at_all_is_no_call(store: AsyncKVStore, backend: BatchingBackend) -> None:
    await store.set_many({})
    assert await store.get_many([]) == {}
    await store.delete_many([])
    assert backend.batches == []


async def test_few_batches_are_under_way_at_once(store: AsyncKVStore, backend: BatchingBackend) -> None:
    backend.gate = asyncio.Event()
    reading = asyncio.create_task(store.get_many(numbered(20_000)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert backend.under_way == 4
    backend.gate.set()
    await reading
    assert (backend.most_under_way, len(backend.batches)) == (4, 20)


async def test_batches_keep_to_the_concurrency_of_the_store(backend: BatchingBackend) -> None:
    backend.gate = asyncio.Event()
    reading = asyncio.create_task(AsyncKVStore("db", backend=backend, concurrency=1).get_many(numbered(3_000)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert backend.under_way == 1
    backend.gate.set()
    await reading


@pytest.mark.parametrize("verb", ["get", "set", "delete"])
async def test_failed_key_stops_further_batches_and_each_key_is_told_of(
    store: AsyncKVStore, backend: BatchingBackend, verb: str
) -> None:
    values = numbered(8_000)
    keys = list(values)
    await store.set_many({"k00000": "v0"})
    backend.bad_keys = {"k00003", "k00007"}
    backend.batches.clear()
    backend.gate = asyncio.Event()
    call = {"get": store.get_many, "set": store.set_many, "delete": store.delete_many}[verb]
    calling = asyncio.create_task(call(values))
    for _ in range(20):
        await asyncio.sleep(0)
    backend.gate.set()
    with pytest.raises(BatchError, match=r"2 of 8000 keys failed, 3998 succeeded, 4000 were not attempted") as caught:
        await calling
    error = caught.value
    assert error.errors.keys() == backend.bad_keys
    assert list(error.not_attempted) == keys[4_000:]
    assert error.results.keys() == {*keys[:4_000]} - backend.bad_keys
    assert error.results["k00000"] == ("v0" if verb == "get" else None)
    assert len(backend.batches) == 4


@pytest.mark.parametrize("verb", ["get", "set", "delete"])
async def test_batch_that_fails_as_a_whole_gives_each_of_its_keys_an_error_of_its_own(
    store: AsyncKVStore, backend: BatchingBackend, verb: str
) -> None:
    values = numbered(2_000)
    broken = TransportError("the connection broke", verb=f"{verb}_many", db_name="db", attempts=2, maybe_applied=verb != "get")
    backend.error = broken
    call = {"get": store.get_many, "set": store.set_many, "delete": store.delete_many}[verb]
    with pytest.raises(BatchError) as caught:
        await call(values)
    error = caught.value
    assert list(error.errors) == list(values)[:1_000]
    assert list(error.not_attempted) == list(values)[1_000:]
    for key, its in error.errors.items():
        assert isinstance(its, TransportError)
        assert (its.verb, its.key, its.db_name, its.attempts) == (verb, key, "db", 2)
        assert (its.maybe_applied, its.transient, its.__cause__) == (verb != "get", True, broken)
    assert (broken.verb, broken.key) == (f"{verb}_many", "")


async def test_exception_of_a_backend_of_the_programs_own_comes_as_it_is(store: AsyncKVStore, backend: BatchingBackend) -> None:
    backend.error = LookupError("mine")
    with pytest.raises(LookupError, match="mine"):
        await store.get_many(["a", "b"])


async def test_error_of_one_key_alone_is_a_batch_error(store: AsyncKVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise StorageError("broken", verb="get", key="k", attempts=1)

    monkeypatch.setattr(BatchingBackend, "get", fail)
    with pytest.raises(BatchError) as caught:
        await store.get_many(["k"])
    assert (list(caught.value.errors), caught.value.not_attempted) == (["k"], ())


class AnsweringBackend(BatchingBackend):
    """Answer reads in a way of the test's."""

    answer: Any = None

    async def get_many(self, db_name: str, keys: Sequence[str]) -> Any:  # noqa: ARG002 (a backend's)
        await self._pass(keys)
        return self.answer(keys)


async def test_keys_that_are_omitted_are_asked_for_again_with_no_more_than_are_likely_to_fit() -> None:
    backend = AnsweringBackend()
    backend.answer = lambda keys: [key.upper() if i < 3 else OMITTED for i, key in enumerate(keys)]
    keys = [f"k{i}" for i in range(10)]
    values = await AsyncKVStore("db", backend=backend).get_many(keys)
    assert list(values.items()) == [(key, key.upper()) for key in keys]
    assert [len(batch) for batch in backend.batches] == [10, 6, 4, 1]


async def test_keys_that_are_omitted_in_between_come_in_their_places() -> None:
    backend = AnsweringBackend()
    backend.answer = lambda keys: [OMITTED if key == "b" and len(keys) > 1 else key for key in keys]
    values = await AsyncKVStore("db", backend=backend).get_many(["a", "b", "c"])
    assert list(values.items()) == [("a", "a"), ("b", "b"), ("c", "c")]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda keys: ["v"] * (len(keys) - 1), "a batch of 2 keys with 1 outcomes"),
        (lambda keys: ["v"] * (len(keys) + 1), "a batch of 2 keys with 3 outcomes"),
        (lambda keys: [OMITTED] * len(keys), "omitted the first of 2 keys"),
    ],
)
async def test_answer_that_no_backend_may_give_is_an_error(answer: Any, words: str) -> None:
    backend = AnsweringBackend()
    backend.answer = answer
    with pytest.raises(BatchError, match=words) as caught:
        await AsyncKVStore("db", backend=backend).get_many(["a", "b"])
    assert {type(error) for error in caught.value.errors.values()} == {ResponseError}


async def test_cancelled_call_leaves_no_batch_under_way(store: AsyncKVStore, backend: BatchingBackend) -> None:
    backend.gate = asyncio.Event()
    reading = asyncio.create_task(store.get_many(numbered(10_000)))
    for _ in range(20):
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert backend.under_way == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_batches_that_are_answered_at_once_need_no_other_task() -> None:
    class Backend(MemoryBackend):
        async def get_many(self, db_name: str, keys: Sequence[str]) -> Any:
            tasks.add(asyncio.current_task())
            return await super().get_many(db_name, keys)

    tasks: set[Any] = set()
    await AsyncKVStore("db", backend=Backend()).get_many(numbered(5_000))
    assert tasks == {asyncio.current_task()}
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_text_of_a_subclass_is_stored_as_plain_text(able: AsyncKVStore) -> None:
    class Color(str, enum.Enum):  # noqa: UP042 (not StrEnum, whose str() is the value)
        RED = "red"

    await able.set_many({"a": Color.RED, "b": "blue"})
    values = await able.get_many(["a", "b"])
    assert [(type(value), value) for value in values.values()] == [(str, "red"), (str, "blue")]


async def test_entries_are_stored_each_with_a_ttl_of_its_own(able: AsyncKVStore) -> None:
    await set_entries(able, [Entry("a", "1", 60), Entry("b", "2", 3_600), Entry("a", "3", 7_200)])
    listing = able.keys()
    infos: dict[str, KeyInfo] = {info.key: info async for info in listing}
    assert await able.get_many(["a", "b"]) == {"a": "3", "b": "2"}
    assert 3_500 < infos["a"].expires_at - infos["b"].expires_at < 3_700


class Shouting(MemoryBackend):
    """A backend that overrides a call of another, but not the batches that go past it."""

    async def get(self, db_name: str, key: str) -> str | None:
        value = await super().get(db_name, key)
        return value and value.upper()


class BatchesAlone:
    """Batches for any backend."""

    batches_are_atomic = False

    async def get_many(self, _: str, keys: Sequence[str]) -> list[str]:
        return ["batch"] * len(keys)

    async def set_many(self, _: str, entries: Sequence[Entry]) -> list[None]:
        return [None] * len(entries)

    async def delete_many(self, _: str, keys: Sequence[str]) -> list[None]:
        return [None] * len(keys)


class Mixed(BatchesAlone, MemoryBackend):
    """A backend whose batches are of another class."""


async def test_backend_that_overrides_a_call_is_not_asked_by_batches_that_go_past_it() -> None:
    store = AsyncKVStore("db", backend=Shouting())
    await store.set_many({"a": "x", "b": "y"})
    assert await store.get_many(["a", "b"]) == {"a": "X", "b": "Y"}
    assert capabilities_of(Shouting()).scan is not None


async def test_batches_of_a_class_of_its_own_are_used() -> None:
    assert await AsyncKVStore("db", backend=Mixed()).get_many(["a", "b"]) == {"a": "batch", "b": "batch"}


async def test_store_of_a_subclass_that_overrides_a_call_goes_call_by_call() -> None:
    class Prefixed(AsyncKVStore):
        async def get(self, key: str) -> str | None:
            return await super().get(f"p-{key}")

    backend = MemoryBackend()
    await AsyncKVStore("db", backend=backend).set_many({"p-a": "1", "p-b": "2"})
    assert await Prefixed("db", backend=backend).get_many(["a", "b"]) == {"a": "1", "b": "2"}


async def test_store_without_batches_goes_call_by_call(unable: AsyncKVStore) -> None:
    values = numbered(MAX_BATCH_KEYS + 1)
    await unable.set_many(values)
    assert await unable.get_many(values) == values
    await unable.delete_many(values)
    assert set((await unable.get_many(values)).values()) == {None}


async def test_derived_store_sends_batches_too(able: AsyncKVStore) -> None:
    events: list[Event] = []
    derived = able.with_options(observer=events.append)
    await derived.set_many(numbered(10))
    assert await derived.get_many(numbered(10)) == numbered(10)
    assert len(events) <= 2 * (2 + 2), "a batch is one call, but for what finds out whether the server takes batches"


def test_error_of_a_class_that_cannot_be_copied_is_shared_by_the_keys(backend: BatchingBackend) -> None:
    class OddError(CallError):
        def __init__(self) -> None:
            super().__init__("odd")

        def __reduce__(self) -> Any:
            raise TypeError("not to be copied")

    backend.error = OddError()
    with pytest.raises(BatchError) as caught:
        asyncio.run(AsyncKVStore("db", backend=backend).get_many(["a", "b"]))
    assert set(map(id, caught.value.errors.values())) == {id(backend.error)}


def test_message_of_an_error_that_knows_no_namespace_names_none(backend: BatchingBackend) -> None:
    backend.error = StorageError("the file cannot be opened")
    with pytest.raises(BatchError) as caught:
        asyncio.run(AsyncKVStore("db", backend=backend).get_many(["a", "b"]))
    assert str(caught.value.errors["a"]) == "get 'a': the file cannot be opened"
