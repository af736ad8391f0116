"""AsyncKVStore over an embedded backend: JSON, batches, and what a store says of itself."""

import asyncio
import enum
import gc
import math
import pickle
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import orjson
import pytest

import aiokv.backends.registry
import aiokv.pooling
from aiokv import (
    AsyncKVStore,
    BatchError,
    ConfigurationError,
    CredentialsError,
    DecodeError,
    RetryPolicy,
    StorageError,
    ValueTooLargeError,
)
from aiokv.backends.memory import MemoryBackend


@pytest.fixture
async def store(tmp_path: Path) -> AsyncGenerator[AsyncKVStore]:
    async with AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db") as opened:
        yield opened


@pytest.mark.parametrize("value", [None, True, 0, 1.5, "x", [1, [2]], {"a": {"b": None}}, [], {}, "\0", "😀"])
async def test_json_comes_back_equal(store: AsyncKVStore, value: Any) -> None:
    await store.set_json("k", value)
    assert await store.get_json("k", default="absent") == value


async def test_absent_json_is_the_default_and_so_told_from_null(store: AsyncKVStore) -> None:
    await store.set_json("null", None)
    assert (await store.get_json("null", 7), await store.get_json("absent", 7), await store.get_json("absent")) == (
        None,
        7,
        None,
    )


async def test_value_that_is_not_json_is_a_decode_error_without_the_value(store: AsyncKVStore) -> None:
    await store.set("k", "s3cret is no JSON")
    with pytest.raises(DecodeError, match=r"'k' in db 'db' is not JSON at line 1 column 1") as caught:
        await store.get_json("k")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


async def test_object_that_is_not_json_is_a_type_error_that_names_its_type(store: AsyncKVStore) -> None:
    with pytest.raises(TypeError, match="value of type object cannot be encoded as JSON"):
        await store.set_json("k", object())


async def test_many_are_set_read_and_removed_together(store: AsyncKVStore) -> None:
    values = {f"k{i}": f"v{i}" for i in range(100)}
    await store.set_many(values)
    assert await store.get_many([*values, "absent"]) == {**values, "absent": None}
    await store.delete_many(["k0", "k1", "absent"])
    assert await store.get_many(["k1", "k2", "k0"]) == {"k1": None, "k2": "v2", "k0": None}


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (5, TypeError, "value of 'bad' must be str, not int"),
        ("s3cret\ud800", ValueError, r"value of 'bad' \(7 characters\) holds a lone surrogate"),
        ("x" * 1_900_001, ValueTooLargeError, "value of 'bad' is 1,900,001 bytes"),
    ],
)
async def test_value_of_many_that_is_refused_is_named_by_its_key(
    store: AsyncKVStore, value: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        await store.set_many({"fine": "v", "bad": value})
    assert "s3cret" not in str(caught.value)
    assert caught.value.__context__ is None
    assert getattr(caught.value, "key", "bad") == "bad"
    assert await store.get("fine") is None


async def test_nothing_at_all_is_a_batch_too(store: AsyncKVStore) -> None:
    await store.set_many({})
    await store.delete_many([])
    assert await store.get_many(iter(())) == {}


async def test_one_text_is_not_taken_for_many_keys(store: AsyncKVStore) -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        await store.get_many("abc")


async def some_keys() -> AsyncGenerator[str]:
    yield "k"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (b"abc", "keys must be an iterable of str, not one bytes; decode it, and put it in a list"),
        (bytearray(b"abc"), "keys must be an iterable of str, not one bytearray; decode it, and put it in a list"),
        (None, "keys must be an iterable of str, not NoneType; pass a list, an empty one for nothing"),
        (7, "keys must be an iterable of str, not int; pass a list, an empty one for nothing"),
        (some_keys(), "keys must be an iterable of str, not async_generator; collect it in a list first, with `async for`"),
        ([["k"]], "key must be str, not list"),
    ],
    ids=["bytes", "bytearray", "None", "int", "async generator", "lists"],
)
async def test_what_is_no_iterable_of_keys_is_named(store: AsyncKVStore, keys: Any, message: str) -> None:
    for call in (store.get_many, store.delete_many):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            await call(keys)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("a", "values must be a mapping of keys to values, not one str; put it in a dict"),
        (b"a", "values must be a mapping of keys to values, not one bytes; decode it, and put it in a dict"),
        (None, "values must be a mapping of keys to values, not NoneType; pass a dict, an empty one for nothing"),
        (["k"], "values must be a mapping of keys to values, not list; pass a dict, such as {'key': 'value'}"),
        (
            some_keys(),
            "values must be a mapping of keys to values, not async_generator; collect it in a dict first, with `async for`",
        ),
    ],
    ids=["str", "bytes", "None", "keys alone", "async generator"],
)
async def test_what_is_no_mapping_of_values_is_named(store: AsyncKVStore, values: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        await store.set_many(values)


class CountingBackend(MemoryBackend):
    """Counts calls and how many are under way at once; fails for keys that begin with `bad`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.under_way = 0
        self.most_under_way = 0

    async def _count(self, key: str) -> None:
        self.asked.append(key)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0.001)
        self.under_way -= 1
        if key.startswith("bad"):
            raise StorageError("broken", verb="get", key=key, attempts=1, maybe_applied=True)

    async def get(self, db_name: str, key: str) -> str | None:
        await self._count(key)
        return await super().get(db_name, key)

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        await self._count(key)
        await super().set(db_name, key, value, ttl_seconds)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[CountingBackend, str]:
    backend = CountingBackend()
    monkeypatch.setitem(aiokv.backends.registry._memory_backends, request.node.name[:20], backend)
    return backend, f"memory://{request.node.name[:20]}"


async def test_key_that_stands_twice_is_asked_once(counting: tuple[CountingBackend, str]) -> None:
    backend, url = counting
    assert await AsyncKVStore("db", url=url).get_many(["b", "a", "b", "a"]) == {"b": None, "a": None}
    assert sorted(backend.asked) == ["a", "b"]


async def test_batch_keeps_to_its_concurrency(counting: tuple[CountingBackend, str]) -> None:
    backend, url = counting
    await AsyncKVStore("db", url=url, concurrency=3).get_many(f"k{i}" for i in range(20))
    assert backend.most_under_way == 3


async def test_batch_that_is_answered_at_once_needs_no_other_task() -> None:
    class Backend(MemoryBackend):
        async def get(self, db_name: str, key: str) -> str | None:
            tasks.add(asyncio.current_task())
            return await super().get(db_name, key)

    tasks: set[asyncio.Task[Any] | None] = set()
    store = AsyncKVStore("db", backend=Backend())
    keys = [f"k{i}" for i in range(100)]
    assert await store.get_many(keys) == dict.fromkeys(keys)
    assert tasks == {asyncio.current_task()}
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_failed_batch_says_which_keys_were_set_failed_and_not_attempted(counting: tuple[CountingBackend, str]) -> None:
    _, url = counting
    store = AsyncKVStore("db", url=url, concurrency=2)
    with pytest.raises(BatchError, match="1 of 6 keys failed") as caught:
        await store.set_many({"k0": "s3cret", "k1": "s3cret", "bad": "s3cret", "k3": "s3cret", "k4": "s3cret", "k5": "s3cret"})
    error = caught.value
    assert set(error.errors) == {"bad"}
    assert error.errors["bad"].maybe_applied  # type: ignore[attr-defined]
    assert set(error.errors) | set(error.results) | set(error.not_attempted) == {"k0", "k1", "bad", "k3", "k4", "k5"}
    assert len(error.not_attempted) >= 1
    assert (await store.get_many(error.results)) == dict.fromkeys(error.results, "s3cret")
    assert (await store.get_many(error.not_attempted)) == dict.fromkeys(error.not_attempted)


async def test_failed_reads_show_no_value_in_the_error(counting: tuple[CountingBackend, str]) -> None:
    backend, url = counting
    await MemoryBackend.set(backend, "db", "fine", "s3cret", 60)
    with pytest.raises(BatchError) as caught:
        await AsyncKVStore("db", url=url, concurrency=2).get_many(["fine", "bad"])
    assert caught.value.results == {"fine": "s3cret"}
    assert "s3cret" not in f"{caught.value!r} {caught.value}"
    assert pickle.loads(pickle.dumps(caught.value)).results == {"fine": "s3cret"}


@pytest.mark.parametrize("concurrency", [0, -1, True, 1.5, "8"])
def test_concurrency_that_is_no_positive_int_is_refused(concurrency: Any) -> None:
    with pytest.raises(ValueError, match="concurrency must be an int of 1 or more"):
        AsyncKVStore("db", concurrency=concurrency)


def test_credentials_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="credentials must be"):
        AsyncKVStore("db", credentials=b"id:secret")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("disc://h", "unknown scheme 'disc'"),
        ("kv.fal.media", "url 'kv.fal.media' has no scheme, such as sqlite:///kv.db for a file"),
        ("", "url '' has no scheme"),
        ("5e0f-id:s3cret", "url has no scheme"),
        ("kv.db?s3cret", "url has no scheme"),
        ("https://", "names no host"),
        ("http://id:s3cret@h", "must not hold credentials"),
        ("redis://:s3/s3cret@h", "must not hold credentials"),
        ("redis+sentinel://h/name/:s3cret@h", "must not hold credentials"),
        ("https:///u:s3cret@h", "names no host"),
        ("sqlite:/u:s3cret@h", "names no file"),
        ("memory:///u:s3cret@h", "memory://name"),
        ("https://h?x=1", "query or a fragment"),
        ("https://h:99999", "malformed"),
        ("sqlite://kv.db", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "use memory://"),
        ("memory://a/b", "memory://name"),
    ],
)
def test_url_that_names_no_store_is_refused_at_construction(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        AsyncKVStore("db", url=url)
    assert "s3cret" not in str(caught.value)


async def test_url_comes_from_the_environment_at_the_first_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = AsyncKVStore("db")
    assert store.url == "https://kv.fal.media"
    monkeypatch.setenv("AIOKV_URL", f"sqlite:///{tmp_path}/kv.db")
    async with store:
        await store.set("k", "v")
    assert (tmp_path / "kv.db").exists()


async def test_malformed_url_of_the_environment_is_refused_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOKV_URL", "nonsense")
    with pytest.raises(ConfigurationError, match="url 'nonsense' has no scheme"):
        await AsyncKVStore("db").get("k")


async def test_nothing_is_opened_before_the_first_call(tmp_path: Path) -> None:
    store = AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db")
    assert not (tmp_path / "kv.db").exists()
    await store.get("k")
    assert (tmp_path / "kv.db").exists()
    await store.aclose()


async def test_memory_is_shared_by_stores_of_one_url_and_not_of_another() -> None:
    await AsyncKVStore("db", url="memory://shared-1").set("k", "v")
    assert await AsyncKVStore("db", url="memory://shared-1").get("k") == "v"
    assert await AsyncKVStore("db", url="memory://shared-2").get("k") is None


async def test_stores_of_one_configuration_share_one_backend_until_the_last_is_closed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kv.db"
    first, second = AsyncKVStore("one", url=url), AsyncKVStore("two", url=url)
    await asyncio.gather(first.get("k"), second.get("k"))
    assert first._backend_here() is second._backend_here()
    await first.aclose()
    await second.set("k", "v")
    await second.aclose()
    assert not [key for key in aiokv.pooling._shared if url in str(key)]


async def test_closed_store_opens_anew_at_the_next_call(store: AsyncKVStore) -> None:
    await store.set("k", "v")
    await store.aclose()
    await store.aclose()
    assert await store.get("k") == "v"


async def test_store_that_was_dropped_does_not_keep_others_from_closing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kv.db"
    dropped, kept = AsyncKVStore("one", url=url), AsyncKVStore("two", url=url)
    await asyncio.gather(dropped.get("k"), kept.get("k"))
    del dropped
    gc.collect()
    await kept.aclose()
    assert not [key for key in aiokv.pooling._shared if url in str(key)]


def test_pickled_store_carries_its_configuration_and_no_connection(tmp_path: Path) -> None:
    store = AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db", credentials="id:s3cret", concurrency=5)

    async def use(used: AsyncKVStore) -> str | None:
        await used.set("k", "v")
        return await used.get("k")

    async def pickle_while_open() -> bytes:
        await use(store)
        return pickle.dumps(store)

    copy = pickle.loads(asyncio.run(pickle_while_open()))
    assert repr(copy) == repr(store)
    assert asyncio.run(use(copy)) == "v"


def test_repr_masks_credentials() -> None:
    store = AsyncKVStore("db", url="https://kv.example", credentials="id:s3cret")
    assert repr(store) == "AsyncKVStore('db', url='https://kv.example', credentials='***')"


async def test_nan_is_stored_as_null_as_documented(store: AsyncKVStore) -> None:
    await store.set_json("k", math.nan)
    assert await store.get("k") == "null"


async def test_closing_gives_back_what_was_opened_though_the_environment_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AsyncKVStore("db")
    monkeypatch.setenv("AIOKV_URL", f"sqlite:///{tmp_path}/one.db")
    await store.set("k", "v")
    monkeypatch.setenv("AIOKV_URL", f"sqlite:///{tmp_path}/two.db")
    await store.aclose()
    assert not [key for key in aiokv.pooling._shared if str(tmp_path) in str(key)]


# asyncio's own: such a loop is not meant to go on.
@pytest.mark.filterwarnings("ignore:asynchronous generator .* was scheduled after:ResourceWarning")
def test_store_goes_on_in_a_loop_whose_generators_were_finished(tmp_path: Path) -> None:
    store = AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db")
    with asyncio.Runner() as runner:
        runner.run(store.set("k", "v"))
        runner.run(runner.get_loop().shutdown_asyncgens())
        assert runner.run(store.get("k")) == "v"
        runner.run(store.aclose())


async def test_relative_paths_of_different_folders_are_different_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        async with AsyncKVStore("db", url="sqlite:///kv.db") as store:
            assert await store.get("k") is None
            await store.set("k", name)
    assert (tmp_path / "a" / "kv.db").exists()


@pytest.mark.parametrize("url", ["memory://subclass", "sqlite"])
async def test_text_of_a_subclass_comes_back_as_plain_text(tmp_path: Path, url: str) -> None:
    class Color(str, enum.Enum):  # noqa: UP042 (not StrEnum, whose str() is the value)
        RED = "red"

    async with AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db" if url == "sqlite" else url) as store:
        await store.set("k", Color.RED)
        value = await store.get("k")
    assert (type(value), value) == (str, "red")


async def test_json_fragment_that_is_not_utf8_is_refused_without_being_shown(store: AsyncKVStore) -> None:
    with pytest.raises(TypeError, match="it is not UTF-8") as caught:
        await store.set_json("k", orjson.Fragment(b"s3cret\xff"))
    assert caught.value.__context__ is None


@pytest.mark.parametrize("credentials", ["nocolon", "", ":", "id:", ":secret", "i d:secret", "id:sécret"])
def test_credentials_of_another_form_are_refused_at_construction_without_being_shown(credentials: str) -> None:
    with pytest.raises(CredentialsError, match="is not a key of the form '<id>:<secret>'") as caught:
        AsyncKVStore("db", credentials=credentials)
    assert not credentials or credentials == ":" or credentials not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"retry": 0}, {"retry": "x"}, {"http": 3}, {"credentials": RetryPolicy}])
def test_options_of_another_type_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(arguments))} must be"):
        AsyncKVStore("db", **arguments)
