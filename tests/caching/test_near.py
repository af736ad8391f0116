"""The cache in this process: its bound, what it keeps, and that callers cannot change what others get."""

import functools
import pickle
import random
import sys
import threading
from datetime import timedelta
from typing import Any

import pytest
from caching_under_test import MovedTime, watched_store
from hypothesis import given, settings
from hypothesis import strategies as st

from aiokv import AsyncKVStore, NearCache, kv_cached
from aiokv.caching.events import Events
from aiokv.caching.near import NearView, Slot
from aiokv.caching.results import ResultCodec

ROOMY = 1_000_000
STORE = AsyncKVStore("db", url="memory://near")


async def _anything() -> Any: ...


class Room:
    """A near cache, and what one function keeps in it."""

    def __init__(self, max_bytes: int = ROOMY, ttl: float = 1) -> None:
        self.near = NearCache(ttl, max_bytes)
        self.view = NearView(self.near, lambda: (), ResultCodec(_anything, Any, None), Events(None))

    def put(self, key: str, json: str, value: object, fresh_seconds: float = 100.0, *, is_current: bool = True) -> None:
        self.view.put(STORE, (STORE.target, key), None, json, value, fresh_seconds, lambda: is_current)

    def fill(self, *keys: str, json: str = "[1]") -> None:
        for key in keys:
            self.put(key, json, [1])

    def drop(self, key: str) -> None:
        self.view.drop((STORE.target, key))

    def slot(self, key: str) -> Slot | None:
        return self.near.slots.get((self.view._number, (STORE.target, key)))

    def visit(self, key: str) -> None:
        assert self.view.get((STORE.target, key)) == [1]

    def kept(self) -> set[str]:
        return {slot.key for slot in self.near.slots.values()}


def cost_of(json: str = "[1]") -> int:
    room = Room()
    room.fill("a", json=json)
    return room.near.size_bytes


PUTS = st.lists(
    st.tuples(
        st.sampled_from([f"key-{number}" for number in range(12)]),
        st.integers(0, 3_000),
        st.sampled_from(["put", "put", "put", "visit", "drop"]),
    ),
    max_size=60,
)


@given(steps=PUTS, max_bytes=st.integers(1, 8_000))
@settings(max_examples=200)
def test_bound_holds_whatever_is_put_visited_and_dropped(steps: list[tuple[str, int, str]], max_bytes: int) -> None:
    room = Room(max_bytes)
    for key, length, step in steps:
        if step == "put":
            room.put(key, "x" * length, [length])
        elif step == "drop":
            room.drop(key)
            assert room.slot(key) is None
        elif (slot := room.slot(key)) is not None:
            slot.visited = True
        slots = list(room.near.slots.values())
        assert room.near.size_bytes == sum(slot.size_bytes for slot in slots) <= max_bytes
        assert sum(len(slot.json or "") for slot in slots) <= max_bytes


@pytest.mark.parametrize("character", ["x", "é", "漢", "😀"])
@pytest.mark.parametrize("immutable", [True, False], ids=["shared", "decoded"])
def test_memory_that_results_take_is_counted_whatever_their_characters(character: str, *, immutable: bool) -> None:
    room = Room(100_000)
    for number in range(50):
        text = f'"{number}{character * 5_000}"'
        room.put(f"key-{number}", text, text[1:-1] if immutable else [text])
    slots = list(room.near.slots.values())
    assert slots
    assert sum(sys.getsizeof(slot.json if slot.json is not None else slot.value) for slot in slots) <= room.near.max_bytes


def test_putting_again_replaces_and_counts_once(moved_time: MovedTime) -> None:
    room = Room(ttl=100)
    room.put("k", "1", 1, 10.0)
    room.put("k", "[1,2]", [1, 2], 20.0)
    assert room.near.size_bytes == cost_of("[1,2]")
    slot = room.slot("k")
    assert slot is not None
    assert (slot.json, slot.value, slot.until, slot.visited) == ("[1,2]", None, moved_time.monotonic() + 20.0, False)


def test_result_past_the_whole_bound_is_not_kept_and_drives_nothing_out() -> None:
    room = Room(4 * cost_of())
    room.fill("a", "b")
    room.put("large", "x" * 10_000, [1])
    assert room.kept() == {"a", "b"}


def test_result_that_has_grown_past_the_bound_is_forgotten() -> None:
    room = Room(2 * cost_of())
    room.fill("a")
    room.put("a", "x" * 10_000, [1])
    assert not room.near.slots
    assert room.near.size_bytes == 0


def test_result_that_just_fits_is_kept() -> None:
    room = Room(cost_of())
    room.fill("a")
    assert room.kept() == {"a"}
    room.fill("b")
    assert room.kept() == {"b"}


def test_superseded_result_is_not_kept_and_leaves_what_is_there() -> None:
    room = Room()
    room.put("a", "[1]", [1])
    room.put("a", "[0]", [0], is_current=False)
    room.put("b", "[0]", [0], is_current=False)
    assert room.kept() == {"a"}
    room.visit("a")


def test_oldest_that_was_not_used_goes_first() -> None:
    room = Room(3 * cost_of())
    room.fill("a", "b", "c")
    room.visit("a")
    room.fill("d")
    assert room.kept() == {"a", "c", "d"}
    room.fill("e")
    assert room.kept() == {"a", "d", "e"}


def test_second_chance_is_given_once() -> None:
    room = Room(2 * cost_of())
    room.fill("a", "b")
    room.visit("a")
    room.fill("c", "d", "e", "f")
    assert "a" not in room.kept()


def test_what_is_used_between_puts_stays_for_good() -> None:
    room = Room(4 * cost_of())
    room.fill("hot")
    for number in range(100):
        room.fill(f"{number:03d}")
        room.visit("hot")


def test_newcomers_get_in_even_where_everything_was_used() -> None:
    room = Room(2 * cost_of())
    room.fill("a", "b")
    room.visit("a")
    room.visit("b")
    room.fill("c", "d")
    assert "d" in room.kept()
    assert len(room.near.slots) == 2


def test_drop_and_clear_give_the_memory_back() -> None:
    room = Room()
    room.fill("a", "b", "c")
    room.drop("b")
    room.drop("b")
    room.drop("never")
    assert room.kept() == {"a", "c"}
    assert room.near.size_bytes == 2 * cost_of()
    room.near.clear()
    assert not room.near.slots
    assert room.near.size_bytes == 0


@pytest.mark.parametrize("value", ["text", 5, 2.5, True, None], ids=repr)
def test_immutable_result_is_kept_itself(value: object) -> None:
    room = Room()
    room.put("k", "json", value)
    slot = room.slot("k")
    assert slot is not None
    assert slot.json is None
    assert slot.value is value


@pytest.mark.parametrize("value", [[1], {"a": 1}, (1, [2]), b"x", type("Text", (str,), {})("x")], ids=repr)
def test_result_that_might_be_changed_is_kept_as_text(value: object) -> None:
    room = Room()
    room.put("k", "json", value)
    slot = room.slot("k")
    assert slot is not None
    assert (slot.json, slot.value) == ("json", None)


computations: list[object] = []


async def echo(value: Any) -> Any:
    computations.append(value)
    return value


async def test_immutable_result_is_shared_between_hits() -> None:
    _, store = watched_store()
    near = NearCache(60)
    function = kv_cached(60, store=store, near=near, key=repr)(echo)
    async with store:
        text = "x" * 1_000
        await function(text)
        first, second = await function(text), await function(text)
        assert first is second
        assert first == text
        assert function.info().near_hits == 2
        await function.aclose()


class Text(str):
    """Equal to a plain text, and another argument."""

    __slots__ = ()

    def __cache_key__(self) -> str:
        return f"Text {self}"


class Held:
    """Calls of several shapes, each of which returns the types of its arguments."""

    async def one(self, value: object) -> str:
        return type(value).__name__

    async def two(self, value: object, other: object = 1) -> str:
        return f"{type(value).__name__} {type(other).__name__}"

    async def named(self, value: object, *, other: object) -> str:
        return f"{type(value).__name__} {type(other).__name__}"

    async def none(self) -> str:
        return "nothing"


CALLS = [
    ("one", [((1,), {}), ((True,), {}), ((1.0,), {}), (("1",), {}), ((Text("1"),), {}), ((b"1",), {}), ((None,), {})]),
    ("two", [((1, 1), {}), ((1, True), {}), ((True, 1), {}), ((1,), {}), ((True,), {}), ((1,), {"other": 1.0})]),
    ("named", [((1,), {"other": 1}), ((1,), {"other": True}), ((True,), {"other": Text("1")}), ((1,), {"other": "1"})]),
    ("none", [((), {})]),
]


@pytest.mark.parametrize("is_bound", [True, False], ids=["method", "function"])
@pytest.mark.parametrize(("name", "calls"), CALLS, ids=[name for name, _ in CALLS])
async def test_equal_arguments_of_other_types_are_other_calls(name: str, calls: list[Any], *, is_bound: bool) -> None:
    cached: Any = kv_cached(60, near=NearCache(60), store=AsyncKVStore("db", url="memory://"), ignore="self")(
        getattr(Held, name)
    )
    call = cached.bound_to(Held()) if is_bound else functools.partial(cached, None)
    expected = [await getattr(Held(), name)(*args, **kwargs) for args, kwargs in calls]
    for _ in range(3):
        for (args, kwargs), result in zip(calls, expected, strict=True):
            assert [await call(*args, **kwargs), await call(*args, **kwargs)] == [result, result]
    info = cached.info()
    assert info.near_hits == 6 * len(calls) - info.computations - info.hits


async def test_unhashable_argument_and_a_class_that_fails_to_decode_are_the_long_way() -> None:
    cached: Any = kv_cached(60, near=NearCache(60), store=AsyncKVStore("db", url="memory://"))(echo)
    assert [await cached([1]), await cached([1])] == [[1], [1]]
    await cached("x")
    await cached("x")
    assert cached.info().near_hits == 2
    (slot,) = cached._cache.near.by_call.values()
    slot.json, slot.value = b"not JSON", None
    assert [await cached("x"), cached.info().near_hits, cached.info().computations] == ["x", 3, 2]


async def test_mutable_result_is_decoded_for_every_hit() -> None:
    backend, store = watched_store()
    near = NearCache(60)
    function = kv_cached(60, store=store, near=near, key=repr)(echo)
    async with store:
        value: dict[str, list[int]] = {"a": [1]}
        miss = await function(value)
        miss["a"].append(2)
        first = await function({"a": [1]})
        first["a"].append(3)
        assert await function({"a": [1]}) == {"a": [1]}
        assert value == {"a": [1]}
        assert function.info().near_hits == 2
        assert backend.asked("get") == 1
        await function.aclose()


async def test_result_is_served_from_here_until_its_time_and_not_at_it(moved_time: MovedTime) -> None:
    backend, store = watched_store(moved_time.now)
    near = NearCache(timedelta(seconds=10))
    function = kv_cached(3_600, store=store, near=near, early=0)(echo)
    async with store:
        await function([1])
        (slot,) = near.slots.values()
        assert near.ttl_seconds == slot.until - moved_time.monotonic() == 10
        for seconds, near_hits, reads in ((9.999, 1, 1), (0.001, 1, 2), (5, 2, 2)):
            moved_time.advance(seconds)
            assert await function([1]) == [1]
            assert (function.info().near_hits, backend.asked("get")) == (near_hits, reads)
        await function.aclose()


async def test_result_is_never_served_from_here_longer_than_it_is_fresh(moved_time: MovedTime) -> None:
    _, store = watched_store(moved_time.now)
    near = NearCache(10_000)
    function = kv_cached(60, store=store, near=near)(echo)
    async with store:
        await function([1])
        (slot,) = near.slots.values()
        assert slot.until - moved_time.monotonic() == 60
        await function.aclose()


def test_pickled_cache_has_the_same_options_and_no_results() -> None:
    room = Room(5_000, ttl=60)
    room.fill("a")
    copy = pickle.loads(pickle.dumps(room.near))
    assert (copy.ttl_seconds, copy.max_bytes, copy.size_bytes) == (60.0, 5_000, 0)
    assert not copy.slots
    copy.clear()
    assert room.kept() == {"a"}


@pytest.mark.parametrize("ttl", [0, -1, 0.0, float("nan"), float("inf"), timedelta(0), timedelta(seconds=-1)], ids=repr)
def test_unusable_time_is_refused(ttl: float | timedelta) -> None:
    with pytest.raises(ValueError, match="near ttl"):
        NearCache(ttl)


@pytest.mark.parametrize("ttl", ["60", None, True, b"60", [60]], ids=repr)
def test_time_of_another_type_is_refused(ttl: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="ttl"):
        NearCache(ttl)


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, "1000", True, None], ids=repr)
def test_unusable_bound_is_refused(max_bytes: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        NearCache(1, max_bytes)


def test_text_of_a_cache_shows_its_options_and_no_result() -> None:
    room = Room(5_000, ttl=1.5)
    room.put("k", "s3cr3t", ["s3cr3t"])
    assert repr(room.near) == "NearCache(ttl=1.5, max_bytes=5000, <1 results>)"


def test_many_threads_leave_it_whole() -> None:
    room = Room(20 * cost_of(), ttl=3_600)
    near = room.near
    start, failures = threading.Barrier(8), []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        start.wait()
        try:
            for _ in range(3_000):
                key = f"{generator.randrange(40):02d}"
                chosen = generator.random()
                if chosen < 0.5:
                    room.put(key, key * generator.randrange(1, 60), [key])
                elif chosen < 0.9:
                    slot = room.slot(key)
                    # As readers do: what is read before the time is looked at is whole.
                    json = None if slot is None else slot.json
                    if slot is not None and slot.until > 0:
                        slot.visited = True
                        assert isinstance(json, str)
                        assert json.startswith(key)
                elif chosen < 0.999:
                    room.drop(key)
                else:
                    near.clear()
        except Exception as error:  # noqa: BLE001 (told to the thread that checks)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert near.size_bytes == sum(slot.size_bytes for slot in near.slots.values()) <= near.max_bytes
