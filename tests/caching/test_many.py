"""kv_cached_many: stored ids are fetched together, the function is called once with the rest."""

import asyncio
import collections
import inspect
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, NewType, Optional, TypedDict, TypeVar

import pytest
from caching_under_test import MovedTime, WatchedBackend, settle, watched_store
from typing_extensions import TypeAliasType

from aiokv import (
    AsyncKVStore,
    BatchError,
    NearCache,
    RetryPolicy,
    StorageError,
    cache_bypass,
    cache_refresh,
    kv_cached_many,
)
from aiokv.backends.capabilities import Entry
from aiokv.backends.memory import MemoryBackend
from aiokv.caching.many import value_type

store = AsyncKVStore("many", url="memory://cached-many")
asked: list[list[int]] = []


@dataclass(frozen=True)
class User:
    id_: int
    name: str


@pytest.fixture(autouse=True)
async def empty() -> None:
    asked.clear()
    await users.invalidate(range(10))
    await lists.invalidate(range(10))


@kv_cached_many(ttl=60, store=store, stale_while_revalidate=30, stale_if_error=100)
async def users(ids: list[int], locale: str = "en") -> dict[int, User]:
    asked.append(ids)
    if 9 in ids:
        raise LookupError("no such user")
    return {id_: User(id_, f"{locale}-{id_}") for id_ in ids if id_ != 7}


@kv_cached_many(ttl=60, store=store, near=NearCache(30), when=lambda result: result != [3])
async def lists(ids: list[int]) -> Mapping[int, list[int]]:
    asked.append(ids)
    return {id_: [id_] for id_ in ids}


async def test_function_is_called_once_with_the_ids_that_are_not_stored() -> None:
    assert await users([1, 2]) == {1: User(1, "en-1"), 2: User(2, "en-2")}
    assert list(await users([3, 2, 1, 4, 3])) == [3, 2, 1, 4]
    assert asked == [[1, 2], [3, 4]]


async def test_no_ids_call_nothing() -> None:
    assert await users([]) == {}
    assert asked == []


async def test_each_id_has_a_key_of_its_own_that_other_arguments_count_in() -> None:
    assert users.key(1) == users.key(1, "en") == users.key(1, locale="en")
    assert len({users.key(1), users.key(2), users.key(1, "no")}) == 3
    await users([1])
    assert await users([1], locale="no") == {1: User(1, "no-1")}


async def test_id_without_a_result_is_left_out_and_asked_again() -> None:
    assert await users([6, 7]) == {6: User(6, "en-6")}
    assert await users([6, 7]) == {6: User(6, "en-6")}
    assert asked == [[6, 7], [7]]


async def test_invalidated_ids_are_computed_anew() -> None:
    await users([1, 2, 3])
    await users.invalidate([2])
    await users([1, 2, 3])
    assert asked == [[1, 2, 3], [2]]


async def test_nobody_can_change_what_others_get() -> None:
    first = await lists([1])
    first[1].append(99)
    assert await lists([1]) == {1: [1]}
    (await lists([1]))[1].append(99)
    assert await lists([1]) == {1: [1]}
    assert lists.info().near_hits >= 2


async def test_result_that_is_not_to_be_stored_is_computed_each_time() -> None:
    assert await lists([3, 4]) == {3: [3], 4: [4]}
    assert await lists([3, 4]) == {3: [3], 4: [4]}
    assert asked == [[3, 4], [3]]


async def test_stale_ids_are_served_and_computed_once_behind(moved_time: MovedTime) -> None:
    await users([1, 2])
    moved_time.advance(70)
    assert await users([1, 2]) == {1: User(1, "en-1"), 2: User(2, "en-2")}
    await users.aclose()
    await users([1, 2])
    assert asked == [[1, 2], [1, 2]]


async def test_failing_function_is_answered_with_the_last_good_results(moved_time: MovedTime) -> None:
    await users([1])
    with pytest.raises(LookupError):
        await users([1, 9])
    moved_time.advance(100)
    failing = asyncio.create_task(users([1, 9]))
    with pytest.raises(LookupError):
        await failing


async def test_bypass_and_refresh_call_the_function() -> None:
    await users([1])
    with cache_bypass():
        await users([1])
    with cache_refresh():
        await users([1])
    await users([1])
    assert asked == [[1], [1], [1]]


async def test_store_that_is_dead_costs_no_result() -> None:
    dead = AsyncKVStore("many", url="http://127.0.0.1:1", retry=RetryPolicy.none())
    without_store = kv_cached_many(60, store=dead, prefix="dead")(users.__wrapped__)
    for _ in range(5):
        assert await without_store([1, 2]) == {1: User(1, "en-1"), 2: User(2, "en-2")}
    assert without_store.info().store_errors >= 3
    await without_store.aclose()


class HalfDead(WatchedBackend):
    """A backend that deletes only some keys."""

    dead: frozenset[str] = frozenset()

    async def delete(self, db_name: str, key: str) -> None:
        if key in self.dead:
            raise self.error
        await super().delete(db_name, key)


@pytest.mark.parametrize("stores", [1, 2])
async def test_failed_invalidation_names_each_id_that_failed_and_each_that_did_not(stores: int) -> None:
    backends = [HalfDead() for _ in range(stores)]
    choices = [AsyncKVStore("db", backend=backend) for backend in backends]

    @kv_cached_many(60, store=lambda id_: choices[id_ % stores], key=lambda id_: id_)
    async def doubled(ids: list[int]) -> dict[int, int]:
        return {id_: 2 * id_ for id_ in ids}

    await doubled(range(6))
    for backend in backends:
        backend.dead = frozenset({doubled.key(1), doubled.key(2), doubled.key(5)})
    with pytest.raises(BatchError, match="of 6 keys failed") as caught:
        await doubled.invalidate(range(6))
    left = [id_ for id_ in range(6) if await choices[id_ % stores].get(doubled.key(id_)) is not None]
    assert list(caught.value.errors) == left
    assert {1, 2, 5} <= set(left) < set(range(6))
    assert caught.value.results == {id_: None for id_ in range(6) if id_ not in left}
    assert all(isinstance(error, StorageError) for error in caught.value.errors.values())
    backends[-1].error = LookupError("the backend's own")
    with pytest.raises(LookupError):
        await doubled.invalidate([1, 2, 3])


async def test_method_is_bound_to_its_instance() -> None:
    class App:
        def __init__(self, name: str) -> None:
            self.name = name

        def __cache_key__(self) -> str:
            return self.name

        @kv_cached_many(ttl=60, store=store, key=lambda self, id_: (self.name, id_))
        async def titles(self, ids: list[int]) -> dict[int, str]:
            asked.append(ids)
            return {id_: f"{self.name} {id_}" for id_ in ids}

    one, other = App("one"), App("other")
    assert await one.titles([1, 2]) == {1: "one 1", 2: "one 2"}
    assert await other.titles([1]) == {1: "other 1"}
    assert await one.titles([2, 1]) == {2: "one 2", 1: "one 1"}
    await one.titles.invalidate([1, 2])
    await other.titles.invalidate([1])
    assert asked == [[1, 2], [1]]


class Processes:
    """Two processes that share stored ids 1 to 4, which are not fresh any more."""

    def __init__(self, backend: WatchedBackend, store: AsyncKVStore, twin: AsyncKVStore) -> None:
        self.backend = backend
        self.store = store
        self.gate: asyncio.Event | None = None
        options: dict[str, Any] = {
            "stale_while_revalidate": 600,
            "prefix": "shared",
            "version": 1,
            "key": lambda id_: id_,
            "early": 0,
        }
        self.here = kv_cached_many(10, store=store, **options)(self._numbers)
        self.elsewhere = kv_cached_many(10, store=twin, **options)(self._ones)

    async def _numbers(self, ids: list[int]) -> dict[int, int]:
        asked.append(ids)
        if self.gate is not None:
            await self.gate.wait()
        return {id_: id_ * 10 + len(asked) for id_ in ids}

    async def _ones(self, ids: list[int]) -> dict[int, int]:
        return dict.fromkeys(ids, -1)


@pytest.fixture
async def stale(backend: WatchedBackend, store: AsyncKVStore, twin: AsyncKVStore, moved_time: MovedTime) -> Processes:
    processes = Processes(backend, store, twin)
    await processes.here([1, 2, 3, 4])
    moved_time.advance(15)
    asked.clear()
    return processes


async def test_ids_that_another_process_has_computed_meanwhile_are_not_computed_again(stale: Processes) -> None:
    reads = 0

    async def get(db_name: str, key: str) -> str | None:
        nonlocal reads
        reads += key == stale.here.key(2)
        if key == stale.here.key(2) and reads == 2:
            # Between the look of this process and its refresh.
            await stale.elsewhere.refresh([2])
        return await WatchedBackend.get(stale.backend, db_name, key)

    stale.backend.get = get  # type: ignore[method-assign]
    assert await stale.here([1, 2, 3]) == {1: 11, 2: 21, 3: 31}
    await stale.here.aclose()
    assert asked == [[1, 3]]
    assert await stale.here([1, 2, 3]) == {1: 11, 2: -1, 3: 31}


async def test_ids_that_another_process_is_at_are_left_to_it(stale: Processes) -> None:
    await stale.backend.claim("db", f"{stale.here.key(3)}:refreshing", "somebody", 1.0)
    assert await stale.here([2, 3, 4]) == {2: 21, 3: 31, 4: 41}
    await stale.here.aclose()
    assert asked == [[2, 4]]


async def test_ids_that_are_invalidated_while_computed_behind_are_not_stored(stale: Processes) -> None:
    stale.gate = asyncio.Event()
    assert await stale.here([1, 2]) == {1: 11, 2: 21}
    await settle()
    assert asked == [[1, 2]]
    await stale.here.invalidate([1])
    stale.gate.set()
    await stale.here.aclose()
    assert (await stale.store.get(stale.here.key(1)), await stale.here([2])) == (None, {2: 21})
    assert asked == [[1, 2]]


async def test_read_that_was_under_way_at_an_invalidation_leaves_nothing_in_the_near_cache() -> None:
    backend, watched = watched_store()
    version = 1

    @kv_cached_many(ttl=60, store=watched, near=NearCache(30), key=lambda id_: id_)
    async def many(ids: list[int]) -> dict[int, int]:
        return dict.fromkeys(ids, version)

    await many([1])
    many._cache.options.near.clear()  # type: ignore[union-attr]
    gate = backend.hold("get")
    reading = asyncio.create_task(many([1]))
    for _ in range(10):
        await asyncio.sleep(0)
    version = 2
    await many.invalidate([1])
    gate.set()
    assert await reading == {1: 1}
    assert await many([1]) == {1: 2}


async def test_ids_with_stores_of_their_own_are_read_from_those() -> None:
    stores = {id_: watched_store()[1] for id_ in (1, 2)}

    @kv_cached_many(ttl=60, store=lambda id_: stores[id_], key=lambda id_: id_)
    async def many(ids: list[int]) -> dict[int, int]:
        asked.append(ids)
        return {id_: id_ for id_ in ids}

    assert await many([1, 2]) == await many([2, 1]) == {1: 1, 2: 2}
    assert asked == [[1], [2]]


async def test_result_of_none_is_a_result_of_no_id() -> None:
    @kv_cached_many(ttl=60, store=store, key=lambda id_: id_)
    async def nothing(ids: list[int]) -> dict[int, int] | None:
        asked.append(ids)
        return None

    assert await nothing([1]) == await nothing([1]) == {}
    with cache_bypass():
        assert await nothing([1]) == {}
    assert asked == [[1], [1], [1]]


class Shop:
    """A client whose connection says nothing of its results."""

    @kv_cached_many(ttl=60, store=store, ignore=("self",))
    async def prices(self, ids: list[int], *, currency: str = "CHF") -> dict[int, str]:
        asked.append(ids)
        return {id_: f"{id_} {currency}" for id_ in ids}

    @kv_cached_many(ttl=60, store=store)
    @classmethod
    async def names(cls, ids: list[int]) -> dict[int, str]:
        return {id_: f"{cls.__name__} {id_}" for id_ in ids}

    @classmethod
    @kv_cached_many(ttl=60, store=store)
    async def names_below(cls, ids: list[int]) -> dict[int, str]:
        return {id_: f"{cls.__name__} {id_}" for id_ in ids}

    @staticmethod
    @kv_cached_many(ttl=60, store=store)
    async def labels(ids: list[int]) -> dict[int, str]:
        return {id_: f"label {id_}" for id_ in ids}


class Bakery(Shop):
    pass


async def test_method_is_called_through_its_class_too() -> None:
    shop = Shop()
    await shop.prices.invalidate([1])
    assert await Shop.prices(shop, [1]) == await shop.prices([1]) == {1: "1 CHF"}  # type: ignore[arg-type, call-arg]
    assert Shop.prices.key(shop, 1) == shop.prices.key(1)  # type: ignore[arg-type, call-arg]
    await Shop.prices.invalidate(shop, [1])  # type: ignore[arg-type, call-arg]
    assert await store.get(shop.prices.key(1)) is None
    assert asked == [[1]]


@pytest.mark.parametrize("name", ["names", "names_below"])
async def test_class_method_is_of_the_class_that_it_is_called_on(name: str) -> None:
    for owner in (Shop, Bakery):
        assert await getattr(owner, name)([1]) == await getattr(owner(), name)([1]) == {1: f"{owner.__name__} 1"}
    if name == "names_below" and sys.version_info >= (3, 13):
        # See test_class_method_that_hides_its_class_is_called_and_not_managed.
        return
    await getattr(Bakery, name).invalidate([1])
    assert await store.get(getattr(Bakery, name).key(1)) is None
    assert await store.get(getattr(Shop, name).key(1)) is not None


async def test_class_method_that_hides_its_class_is_called_and_not_managed() -> None:
    # As Python 3.13 asks what stands below @classmethod.
    hidden = Shop.__dict__["names_below"].__func__
    assert await hidden(Bakery, [1]) == {1: "Bakery 1"}
    for ask in (hidden.key, hidden.invalidate):
        with pytest.raises(TypeError, match="put @kv_cached_many above @classmethod"):
            await ask([1])


async def test_static_method_has_no_instance() -> None:
    assert await Shop.labels([1]) == await Shop().labels([1]) == {1: "label 1"}


def test_static_method_is_refused_below_with_the_way_out() -> None:
    with pytest.raises(TypeError, match="below @staticmethod"):
        kv_cached_many(ttl=60)(staticmethod(Shop.labels.__wrapped__))  # type: ignore[arg-type]


@pytest.mark.parametrize("of", [users, Shop.prices, Shop.labels, Shop().prices, Bakery.names], ids=repr)
def test_function_looks_like_what_was_decorated(of: Any) -> None:
    again = pickle.loads(pickle.dumps(of))
    assert again is of or again.key(1) == of.key(1)
    assert asyncio.iscoroutinefunction(of)
    assert inspect.iscoroutinefunction(of)
    assert next(iter(inspect.signature(of).parameters)) == ("self" if of is Shop.prices else "ids")
    assert repr(of).startswith(f"<kv_cached_many {__name__}.")


X, Y = TypeVar("X"), TypeVar("Y")


class Pages(dict[int, User]):
    pass


class Table(Mapping[X, Y]):
    pass


class Users(Table[Y, User], Generic[Y]):
    pass


class Named(TypedDict):
    name: str


UserIds = NewType("UserIds", dict[int, User])
Aliased = TypeAliasType("Aliased", dict[int, X], type_params=(X,))


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        (dict[int, User], User),
        (dict[int, User] | None, User),
        (Optional[Mapping[int, User]], User),  # noqa: UP045 (another type at run time)
        (Annotated[dict[int, User], "users"], User),
        (Annotated[dict[int, User] | None, "users"] | None, User),
        (dict[int, User | None], User | None),
        (dict[int, User] | dict[str, str], User | str),
        (collections.defaultdict[int, list[User]], list[User]),
        (collections.Counter[int], int),
        (Pages, User),
        (Users[int], User),
        (Table[int, User], User),
        (UserIds, User),
        (Aliased[User], User),  # type: ignore[valid-type]
        (dict, Any),
        (Mapping, Any),
        (Any, Any),
        (object, Any),
    ],
    ids=str,
)
def test_type_of_one_result_is_that_of_the_mappings_values(returns: Any, expected: Any) -> None:
    assert value_type(returns) == expected


@pytest.mark.parametrize("returns", [list[User], User, None, Named, dict[int, User] | list[User]], ids=str)
def test_annotation_that_is_no_mapping_is_refused_at_decoration(returns: Any) -> None:
    async def many(ids: list[int]) -> Any:
        return ids

    many.__annotations__["return"] = returns
    with pytest.raises(TypeError, match=r"the function returns .*mapping from ids to results"):
        kv_cached_many(ttl=60, key=lambda id_: id_)(many)


class BatchCounting(MemoryBackend):
    """Note what is read and stored together."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []
        self.stored: list[set[int]] = []
        self.deleted: list[int] = []

    async def get_many(self, db_name: str, keys: Sequence[str]) -> list[Any]:
        self.read.append(len(keys))
        return await super().get_many(db_name, keys)

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> list[None]:
        self.stored.append({entry.ttl_seconds for entry in entries})
        return await super().set_many(db_name, entries)

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> list[None]:
        self.deleted.append(len(keys))
        return await super().delete_many(db_name, keys)


async def test_ids_of_all_lifetimes_are_read_stored_and_deleted_in_one_batch() -> None:
    backend = BatchCounting()

    @kv_cached_many(ttl=lambda value: value, store=AsyncKVStore("db", backend=backend), key=lambda id_: id_, early=0)
    async def many(ids: list[int]) -> dict[int, int]:
        return {id_: 60 * id_ for id_ in ids}

    assert await many([1, 2, 3]) == {1: 60, 2: 120, 3: 180}
    assert (backend.read, backend.stored) == ([3], [{60, 120, 180}])
    assert await many([1, 2, 3]) == {1: 60, 2: 120, 3: 180}
    await many.invalidate([1, 2])
    assert (backend.read, len(backend.stored), backend.deleted) == ([3, 3], 1, [2])


class SlowForMany(MemoryBackend):
    """A store without batches that answers some reads at once, and others too late."""

    answered = 3

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    async def get(self, db_name: str, key: str) -> str | None:
        self.reads += 1
        value = await super().get(db_name, key)
        if self.reads > self.answered:
            await asyncio.sleep(3600)
        return value


async def test_what_was_read_in_time_is_used_and_leaves_the_circuit_closed() -> None:
    backend = SlowForMany()
    backend.answered = 10_000
    asked: list[list[int]] = []

    @kv_cached_many(60, store=AsyncKVStore("db", backend=backend), read_timeout=0.2, key=str, early=0)
    async def squares(ids: list[int]) -> dict[int, int]:
        asked.append(list(ids))
        return {id_: id_ * id_ for id_ in ids}

    await squares(list(range(8)))
    for _ in range(5):
        asked.clear()
        backend.reads, backend.answered = 0, 3
        assert await squares(list(range(8))) == {id_: id_ * id_ for id_ in range(8)}
        assert backend.reads == 8
        assert asked == [[3, 4, 5, 6, 7]]


async def test_ids_that_want_each_other_while_the_store_is_late_do_not_wait_for_ever() -> None:
    backend, store = watched_store()
    both = asyncio.Barrier(2)
    runs: list[int] = []
    gates: list[asyncio.Event] = []

    @kv_cached_many(60, store=store, key=lambda id_: id_, read_timeout=10.0)
    async def numbers(ids: list[int]) -> dict[int, int]:
        runs.extend(ids)
        if ids[0] > 2 or len(runs) > 2:
            return {id_: id_ for id_ in ids}
        if len(runs) == 2:
            gates.append(backend.hold("get"))
        await both.wait()
        # The other one is under way: it is joined, and the second id read meanwhile.
        other = 3 - ids[0]
        return {ids[0]: (await numbers([other, ids[0] + 10]))[other]}

    async def release() -> None:
        while not gates:
            await asyncio.sleep(0)
        await settle()
        gates[0].set()

    async with asyncio.timeout(10):
        *results, _ = await asyncio.gather(numbers([1]), numbers([2]), release())
    # One of them finds out that it would wait for itself, and computes the other's id.
    assert [list(result) for result in results] == [[1], [2]]
