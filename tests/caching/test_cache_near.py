"""The cache in this process: its bound, what it keeps, and that callers cannot change what others get."""

import pickle
import random
import sys
import threading
from datetime import timedelta
from typing import Any

import pytest
from caching_under_test import watched_store
from hypothesis import given, settings
from hypothesis import strategies as st

from aiokv import NearCache, kv_cached

ROOMY = 1_000_000


def filled(near: NearCache, *keys: str, payload: str = "[1]") -> None:
    for key in keys:
        near.put(key, payload, [1], 100.0)


def kept(near: NearCache) -> set[str]:
    return set(near.slots)


def cost_of(key: str, payload: str = "[1]") -> int:
    near = NearCache(1, ROOMY)
    filled(near, key, payload=payload)
    return near.size_bytes


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
    near = NearCache(1, max_bytes)
    for key, length, step in steps:
        if step == "put":
            near.put(key, "x" * length, [length], 100.0)
        elif step == "drop":
            near.drop(key)
            assert key not in near.slots
        elif (slot := near.slots.get(key)) is not None:
            slot.visited = True
        assert near.size_bytes == sum(slot.size_bytes for slot in near.slots.values()) <= max_bytes
        assert sum(len(slot.payload or "") for slot in near.slots.values()) <= max_bytes


@pytest.mark.parametrize("character", ["x", "é", "漢", "😀"])
@pytest.mark.parametrize("immutable", [True, False], ids=["shared", "decoded"])
def test_memory_that_results_take_is_counted_whatever_their_characters(character: str, *, immutable: bool) -> None:
    near = NearCache(1, 100_000)
    for number in range(50):
        text = f'"{number}{character * 5_000}"'
        near.put(f"key-{number}", text, text[1:-1] if immutable else [text], 100.0)
    taken = sum(sys.getsizeof(slot.payload if slot.payload is not None else slot.value) for slot in near.slots.values())
    assert near.slots
    assert taken <= near.max_bytes


def test_putting_again_replaces_and_counts_once() -> None:
    near = NearCache(1, ROOMY)
    near.put("k", "1", 1, 10.0)
    near.put("k", "[1,2]", [1, 2], 20.0)
    assert near.size_bytes == cost_of("k", "[1,2]")
    slot = near.slots["k"]
    assert (slot.payload, slot.value, slot.until, slot.visited) == ("[1,2]", None, 20.0, False)


def test_result_past_the_whole_bound_is_not_kept_and_drives_nothing_out() -> None:
    near = NearCache(1, 4 * cost_of("a"))
    filled(near, "a", "b")
    near.put("large", "x" * 10_000, [1], 100.0)
    assert kept(near) == {"a", "b"}


def test_result_that_has_grown_past_the_bound_is_forgotten() -> None:
    near = NearCache(1, 2 * cost_of("a"))
    filled(near, "a")
    near.put("a", "x" * 10_000, [1], 100.0)
    assert not near.slots
    assert near.size_bytes == 0


def test_result_that_just_fits_is_kept() -> None:
    near = NearCache(1, cost_of("a"))
    filled(near, "a")
    assert kept(near) == {"a"}
    filled(near, "b")
    assert kept(near) == {"b"}


def test_oldest_that_was_not_used_goes_first() -> None:
    near = NearCache(1, 3 * cost_of("a"))
    filled(near, "a", "b", "c")
    near.slots["a"].visited = True
    filled(near, "d")
    assert kept(near) == {"a", "c", "d"}
    filled(near, "e")
    assert kept(near) == {"a", "d", "e"}


def test_second_chance_is_given_once() -> None:
    near = NearCache(1, 2 * cost_of("a"))
    filled(near, "a", "b")
    near.slots["a"].visited = True
    filled(near, "c", "d", "e", "f")
    assert "a" not in near.slots


def test_what_is_used_between_puts_stays_for_good() -> None:
    near = NearCache(1, 4 * cost_of("hot"))
    filled(near, "hot")
    for number in range(100):
        filled(near, f"{number:03d}")
        near.slots["hot"].visited = True
    assert "hot" in near.slots


def test_newcomers_get_in_even_where_everything_was_used() -> None:
    near = NearCache(1, 2 * cost_of("a"))
    filled(near, "a", "b")
    for slot in near.slots.values():
        slot.visited = True
    filled(near, "c", "d")
    assert "d" in near.slots
    assert len(near.slots) == 2


def test_drop_and_clear_give_the_memory_back() -> None:
    near = NearCache(1, ROOMY)
    filled(near, "a", "b", "c")
    near.drop("b")
    near.drop("b")
    near.drop("never")
    assert kept(near) == {"a", "c"}
    assert near.size_bytes == 2 * cost_of("a")
    near.clear()
    assert not near.slots
    assert near.size_bytes == 0


@pytest.mark.parametrize("value", ["text", 5, 2.5, True, None], ids=repr)
def test_immutable_result_is_kept_itself(value: object) -> None:
    near = NearCache(1)
    near.put("k", "payload", value, 100.0)
    assert near.slots["k"].payload is None
    assert near.slots["k"].value is value


@pytest.mark.parametrize("value", [[1], {"a": 1}, (1, [2]), b"x", type("Text", (str,), {})("x")], ids=repr)
def test_result_that_might_be_changed_is_kept_as_text(value: object) -> None:
    near = NearCache(1)
    near.put("k", "payload", value, 100.0)
    assert near.slots["k"].payload == "payload"
    assert near.slots["k"].value is None


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


async def test_result_is_served_from_here_until_its_time_and_not_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, store = watched_store()
    near = NearCache(timedelta(seconds=10))
    function = kv_cached(3_600, store=store, near=near, early=0)(echo)
    async with store:
        await function([1])
        (slot,) = near.slots.values()
        until = slot.until
        assert near.ttl_seconds == 10
        for now, near_hits, reads in ((until - 0.001, 1, 1), (until, 1, 2), (until + 5, 2, 2)):
            monkeypatch.setattr(function._cache, "clock", lambda now=now: now)
            assert await function([1]) == [1]
            assert (function.info().near_hits, backend.asked("get")) == (near_hits, reads)
        await function.aclose()


async def test_result_is_never_served_from_here_longer_than_it_is_fresh() -> None:
    _, store = watched_store()
    near = NearCache(10_000)
    function = kv_cached(60, store=store, near=near)(echo)
    async with store:
        await function([1])
        (slot,) = near.slots.values()
        assert slot.until - function._cache.clock() <= 60
        await function.aclose()


def test_pickled_cache_has_the_same_options_and_no_results() -> None:
    near = NearCache(timedelta(minutes=1), 5_000)
    filled(near, "a")
    copy = pickle.loads(pickle.dumps(near))
    assert (copy.ttl_seconds, copy.max_bytes, copy.size_bytes) == (60.0, 5_000, 0)
    assert not copy.slots
    filled(copy, "b")
    assert kept(near) == {"a"}


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
    near = NearCache(1.5, 5_000)
    near.put("k", "s3cr3t", ["s3cr3t"], 100.0)
    assert repr(near) == "NearCache(ttl=1.5, max_bytes=5000, <1 results>)"


def test_many_threads_leave_it_whole() -> None:
    near = NearCache(1, 20 * cost_of("00"))
    start, failures = threading.Barrier(8), []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        start.wait()
        try:
            for _ in range(3_000):
                key = f"{generator.randrange(40):02d}"
                chosen = generator.random()
                if chosen < 0.5:
                    near.put(key, key * generator.randrange(1, 60), [key], 100.0)
                elif chosen < 0.9:
                    slot = near.slots.get(key)
                    # As readers do: what is read before the time is looked at is whole.
                    payload = None if slot is None else slot.payload
                    if slot is not None and slot.until > 0:
                        slot.visited = True
                        assert payload is not None
                        assert payload.startswith(key)
                elif chosen < 0.999:
                    near.drop(key)
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
