"""What callers of a cached function get, what may be decorated, and what decoration keeps of it."""

import asyncio
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import inspect
import math
import operator
import pickle
import sys
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator
from typing import Any, NamedTuple

import pydantic
import pytest
from caching_under_test import watched_store
from typing_extensions import TypedDict

from aiokv import AsyncKVStore, CachedFunction, NearCache, kv_cached, set_default_store

kv = AsyncKVStore("db", url="memory://cached-results")


@pytest.fixture
def store() -> AsyncKVStore:
    return watched_store()[1]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    tags: list[str]


@dataclasses.dataclass(frozen=True)
class Line:
    ends: tuple[Point, Point]


class Pair(NamedTuple):
    left: int
    right: str


class Record(TypedDict):
    name: str
    size: int


class Model(pydantic.BaseModel):
    at: dt.datetime
    price: decimal.Decimal


RESULTS = [
    (Any, None),
    (None, None),
    (int, 2**63),
    (bool, True),
    (float, 0.1),
    (str, "Grüße 😀 \0"),
    (list[int], [1, 2]),
    (dict[str, list[int]], {"a": [1], "": []}),
    (Any, {"deep": [{"er": [None, True, 1, 1.0, "1"]}]}),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], ()),
    (dict[int, str], {1: "a"}),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (bytes, b"\x00\xff"),
    (dt.datetime, dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC)),
    (dt.timedelta, dt.timedelta(days=1, microseconds=1)),
    (decimal.Decimal, decimal.Decimal("1.10")),
    (uuid.UUID, uuid.UUID(int=7)),
    (Colour, Colour.RED),
    (Point, Point(1.5, ["a"])),
    (Line, Line((Point(0.0, []), Point(1.0, ["b"])))),
    (Pair, Pair(1, "a")),
    (Record, {"name": "a", "size": 1}),
    (Model, Model(at=dt.datetime(2024, 1, 1, tzinfo=dt.UTC), price=decimal.Decimal("1.10"))),
    (list[Point] | None, [Point(1.0, [])]),
    (list[Point] | None, None),
]


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (type(value), [_types(item) for item in value])
    return type(value)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(("returns", "result"), RESULTS, ids=lambda value: str(value)[:40])
async def test_hit_returns_what_the_miss_returned(returns: Any, result: Any, *, near: bool, store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: "one", returns=returns, near=NearCache(30) if near else None)
    async def compute() -> Any:
        return copy.deepcopy(result)

    miss, hit, again = await compute(), await compute(), await compute()
    assert miss == hit == again == result
    assert _types(miss) == _types(hit) == _types(again) == _types(result)
    assert compute.info().computations == 1


@pytest.mark.parametrize(
    ("returns", "result"),
    [
        (Any, (1, 2)),
        (Any, {1: "a"}),
        (Any, math.nan),
        (float, math.inf),
        (Any, 2**64),
        (Any, b"bytes"),
        (Any, object()),
        (Any, [Point(1.0, [])]),
        (list[int], [1, (2, 3)]),
        (tuple[int, int], [1, 2]),
        (str, "\ud800"),
        (Point, {"x": 1.0, "tags": []}),
        (tuple[int, int], (True, 2)),
        (tuple[int, ...], (enum.IntEnum("Small", "ONE").ONE,)),  # type: ignore[attr-defined]
        (dict[str, tuple[bool, str]], {"a": (1, "b")}),
        (frozenset[int], frozenset({True})),
        (Pair, Pair(True, "a")),
        (Point, Point(1.0, [enum.StrEnum("Tag", "RED").RED])),  # type: ignore[attr-defined]
    ],
    ids=str,
)
async def test_result_that_would_come_back_changed_is_refused_and_not_stored(
    returns: Any, result: Any, store: AsyncKVStore
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", returns=returns)
    async def compute() -> Any:
        return result

    for _ in range(2):
        with pytest.raises(TypeError, match=r"returns=|return type"):
            await compute()
    assert await store.get(compute.key()) is None


@pytest.mark.parametrize("near", [False, True])
async def test_callers_cannot_change_what_others_get(*, near: bool, store: AsyncKVStore) -> None:
    original: list[dict[str, int]] = [{"a": 1}]

    @kv_cached(60, store=store, key=lambda: "one", near=NearCache(30) if near else None)
    async def compute() -> list[dict[str, int]]:
        await asyncio.sleep(0)
        return original

    for _ in range(4):
        one, other = await asyncio.gather(compute(), compute())
        assert one == other == [{"a": 1}]
        one[0]["a"] = 99
        other.clear()
    original.clear()
    assert await compute() == [{"a": 1}]


async def test_what_the_function_still_holds_cannot_change_what_is_stored(store: AsyncKVStore) -> None:
    held: list[Point] = []

    @kv_cached(60, store=store, key=lambda: "one")
    async def compute() -> Point:
        held.append(Point(1.0, ["a"]))
        return held[0]

    first = await compute()
    held[0].tags.append("b")
    assert (first, await compute()) == (Point(1.0, ["a"]), Point(1.0, ["a"]))


async def test_none_is_a_result(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    async def compute() -> None:
        return None

    assert [await compute(), await compute(), compute.info().computations] == [None, None, 1]


async def test_exceptions_are_raised_anew_and_do_not_grow(store: AsyncKVStore) -> None:
    error = LookupError("the same one each time")
    runs = 0

    @kv_cached(60, store=store, key=lambda: "one")
    async def compute() -> int:
        nonlocal runs
        runs += 1
        error.__traceback__ = None
        raise error

    depths = []
    for _ in range(5):
        results = await asyncio.gather(*(compute() for _ in range(20)), return_exceptions=True)
        assert all(result is error for result in results)
        depths.append(len(traceback.extract_tb(error.__traceback__)))
    assert (runs, max(depths) - min(depths) <= 1, await store.get(compute.key())) == (5, True, None)


class Service:
    """A client whose connection says nothing of its results."""

    def __init__(self, name: str, store: AsyncKVStore = kv) -> None:
        self.name = name
        self.kv = store
        self.runs: list[str] = []

    @kv_cached(60, store=lambda self: self.kv, ignore=("self",))
    async def method(self, word: str, *, times: int = 1) -> str:
        """Greet."""
        self.runs.append(word)
        return word * times

    @kv_cached(60, store=lambda self: self.kv, key=lambda self, word: (self.name, word))
    async def by_name(self, word: str) -> str:
        self.runs.append(word)
        return f"{self.name} {word}"

    @kv_cached(60, store=kv)
    async def with_self(self, word: str) -> str:
        return word

    @classmethod
    @kv_cached(60, store=kv)
    async def of_class(cls, word: str) -> str:
        return f"{cls.__name__} {word}"

    @classmethod
    @kv_cached(60, store=kv)
    async def by_default(cls, word: str = "x") -> str:
        return f"{cls.__name__} {word}"

    @kv_cached(60, store=kv)
    @classmethod
    async def of_class_above(cls, word: str) -> str:
        return f"{cls.__name__} {word}"

    @staticmethod
    @kv_cached(60, store=kv)
    async def static(word: str) -> str:
        return f"static {word}"


class Special(Service):
    pass


async def test_method_takes_its_store_from_its_instance(store: AsyncKVStore) -> None:
    service = Service("a", store)
    assert [await service.method("x"), await service.method("x", times=1), await Service.method(service, "x")] == ["x"] * 3
    assert (service.runs, await store.get(service.method.key("x")) is not None) == (["x"], True)
    await service.method.invalidate("x")
    assert await service.method.peek("x") is None
    assert service.method.key("x") == Service.method.key(service, "x")


async def test_instances_are_told_apart_by_what_the_key_says(store: AsyncKVStore) -> None:
    ann, bob = Service("Ann", store), Service("Bob", store)
    assert [await ann.by_name("x"), await bob.by_name("x"), await Service("Ann", store).by_name("x")] == [
        "Ann x",
        "Bob x",
        "Ann x",
    ]
    assert (ann.runs, bob.runs) == (["x"], ["x"])


async def test_instance_that_cannot_be_part_of_a_key_is_named_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"Service\.with_self: the argument self .* ignore=\('self',\)"):
        await Service("a").with_self("x")


@pytest.mark.parametrize("name", ["of_class", "of_class_above"])
async def test_class_method_is_of_the_class_that_it_is_called_on(name: str) -> None:
    assert await getattr(Service, name)("x") == await getattr(Service("a"), name)("x") == "Service x"
    assert await getattr(Special, name)("x") == await getattr(Special("a"), name)("x") == "Special x"
    if name == "of_class" and sys.version_info >= (3, 13):
        # See test_class_method_that_hides_its_class_is_not_mistaken_for_another_call.
        return
    peeked = await getattr(Special, name).peek("x")
    assert peeked is not None
    assert peeked.value == "Special x"
    await getattr(Special, name).invalidate("x")
    assert await getattr(Special("a"), name).peek("x") is None
    assert await getattr(Service, name).peek("x") is not None


async def test_class_method_that_hides_its_class_is_not_mistaken_for_another_call() -> None:
    # As Python 3.13 asks what stands below @classmethod.
    hidden = Service.__dict__["by_default"].__func__
    for ask in (hidden.key, hidden.peek, hidden.invalidate, hidden.refresh):
        with pytest.raises(TypeError, match=r"put @kv_cached above @classmethod at Service\.by_default"):
            await ask("x")
    assert await hidden(Service, "x") == "Service x"


async def test_bound_method_stays_bound_wherever_it_is_put(store: AsyncKVStore) -> None:
    class Holder:
        method = Service("a", store).method

    assert await Holder().method("x") == "x"


@pytest.mark.parametrize(
    ("of", "parameters"),
    [
        (Service.method, ["self", "word", "times"]),
        (Service("a").method, ["word", "times"]),
        (Service.of_class, ["word"]),
        (Service("a").of_class, ["word"]),
        (Service.of_class_above, ["word"]),
        (Service("a").of_class_above, ["word"]),
        (Service.static, ["word"]),
        (Service("a").static, ["word"]),
    ],
    ids=repr,
)
def test_signature_is_that_of_the_call(of: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(of).parameters) == parameters


def test_class_itself_has_the_signature_of_a_class() -> None:
    assert "cache" in inspect.signature(CachedFunction).parameters


async def test_static_method_has_no_instance() -> None:
    assert await Service.static("x") == await Service("a").static("x") == "static x"
    assert await Service("a").static.peek("x") is not None


@kv_cached(60, store=kv)
async def greet(word: str, *, times: int = 1) -> str:
    """Greet."""
    return word * times


greet.__dict__["told"] = True


async def test_calls_that_mean_the_same_share_a_result() -> None:
    await greet("same")
    before = greet.info().computations
    for call in (greet("same", times=1), greet(word="same"), greet(times=1, word="same")):
        assert await call == "same"
    assert greet.info().computations == before


async def test_wrong_arguments_are_a_type_error_before_anything_is_asked(store: AsyncKVStore) -> None:
    with pytest.raises(TypeError, match="word"):
        await greet()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="wrod"):
        await Service("a", store).method("x", wrod=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("of", [greet, Service.method, Service.static], ids=repr)
def test_function_is_pickled_and_copied_by_name(of: CachedFunction[..., Any]) -> None:
    assert pickle.loads(pickle.dumps(of)) is of
    assert copy.copy(of) is copy.deepcopy(of) is of


@pytest.mark.parametrize("name", ["of_class", "of_class_above"])
def test_bound_class_method_is_pickled_by_name(name: str) -> None:
    again = pickle.loads(pickle.dumps(getattr(Special, name)))
    # From Python 3.13 on it is the language's own method.
    assert (again._bound[0] if isinstance(again, CachedFunction) else again.__self__) is Special


def test_bound_method_is_pickled_with_its_instance() -> None:
    again = pickle.loads(pickle.dumps(Service("a").by_name))
    assert again.key("x") == Service("a").by_name.key("x") != Service("b").by_name.key("x")


def test_function_keeps_its_name_documentation_and_signature() -> None:
    assert (greet.__name__, greet.__qualname__, greet.__module__, greet.__doc__) == ("greet", "greet", __name__, "Greet.")
    assert inspect.signature(greet) == inspect.signature(greet.__wrapped__)
    assert Service.method.__qualname__ == "Service.method"
    assert "greet" in repr(greet)


@pytest.mark.parametrize("of", [greet, Service.method, Service("a").method, Service.of_class, Service.static])
def test_function_is_known_as_a_coroutine_function(of: Callable[..., Any]) -> None:
    assert asyncio.iscoroutinefunction(of)
    assert inspect.iscoroutinefunction(of)


def test_call_gives_a_coroutine() -> None:
    call = greet("x")
    assert isinstance(call, Coroutine)
    call.close()


async def test_attributes_of_the_function_do_not_get_in_the_way(store: AsyncKVStore) -> None:
    async def compute() -> int:
        return 1

    compute._cache = compute._get = compute._bound = "the program's own"  # type: ignore[attr-defined]
    cached = kv_cached(60, store=store, key=lambda: "one")(compute)
    assert [await cached(), await cached(), cached.info().computations] == [1, 1, 1]


async def test_parameters_may_have_any_name(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda **named: named)
    async def compute(*, value: int, args: int, cache: int, key: int) -> int:
        return value + args + cache + key

    named = {"value": 1, "args": 2, "cache": 3, "key": 4}
    await compute.prime(99, **named)
    peeked = await compute.peek(**named)
    assert peeked is not None
    assert (peeked.value, await compute(**named), await compute.refresh(**named)) == (99, 99, 10)
    await compute.invalidate(**named)
    assert await compute.peek(**named) is None


async def test_default_store_serves_where_none_is_named(store: AsyncKVStore) -> None:
    @kv_cached(60, key=lambda: "one")
    async def compute() -> int:
        return 1

    set_default_store(store)
    try:
        await compute()
        assert await store.get(compute.key()) is not None
    finally:
        set_default_store(None)


async def test_near_results_do_not_outlive_their_default_store(store: AsyncKVStore) -> None:
    other = watched_store()[1]
    runs = 0

    @kv_cached(60, key=lambda name: name, near=NearCache(30))
    async def by_key(name: str) -> int:
        return runs if name else 0

    for cached in (by_key, near_number):
        try:
            for number, default in enumerate([store, other], start=runs + 1):
                set_default_store(default)
                runs = near_numbers[0] = number
                assert [await cached("a"), await cached("a"), await cached("a")] == [number] * 3
            assert cached.info().near_hits == 4
        finally:
            set_default_store(None)


near_numbers = [0]


@kv_cached(60, near=NearCache(30))
async def near_number(name: str) -> int:
    return near_numbers[0] if name else 0


async def test_result_that_was_under_way_when_the_default_store_changed_stays_with_it(store: AsyncKVStore) -> None:
    other = watched_store()[1]
    near = NearCache(30)
    gate = asyncio.Event()

    @kv_cached(60, key=lambda: "one", near=near)
    async def compute() -> str:
        if not gate.is_set():
            await gate.wait()
            return "old"
        return "new"

    try:
        set_default_store(store)
        computing = asyncio.create_task(compute())
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        set_default_store(other)
        gate.set()
        assert await computing == "old"
        assert [await compute(), await compute()] == ["new", "new"]
    finally:
        set_default_store(None)


async def test_namespace_of_the_default_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOKV_URL", "memory://cached-results-by-db-name")

    @kv_cached(60, db_name="forecasts", key=lambda: "one")
    async def compute() -> int:
        return 1

    await compute()
    assert await AsyncKVStore("forecasts").get(compute.key()) is not None


async def test_store_of_a_plain_function_may_be_had_from_a_function_without_arguments(store: AsyncKVStore) -> None:
    @kv_cached(60, store=lambda: store, key=lambda name: name)
    async def compute(name: str) -> str:
        return name

    assert [await compute("a"), await compute(name="a"), compute.info().computations] == ["a", "a", 1]


@pytest.mark.parametrize("how", ["default", "partial", "keyword", "any"])
async def test_store_function_that_needs_no_instance_is_called_without(how: str, store: AsyncKVStore) -> None:
    def choose(wanted: AsyncKVStore = store) -> AsyncKVStore:
        return wanted

    def choose_by_name(*, wanted: AsyncKVStore) -> AsyncKVStore:
        return wanted

    functions: dict[str, Callable[..., AsyncKVStore]] = {
        "default": choose,
        "partial": functools.partial(choose, store),
        "keyword": functools.partial(choose_by_name, wanted=store),
        "any": lambda *_: store,
    }

    @kv_cached(60, store=functions[how], key=lambda name: name)
    async def compute(name: str) -> str:
        return name

    assert [await compute("a"), await compute("a"), compute.info().hits] == ["a", "a", 1]


class Getter:
    def __init__(self, store: AsyncKVStore) -> None:
        self.kv = store

    @kv_cached(60, store=operator.attrgetter("kv"), ignore=("self",))
    async def double(self, number: int) -> int:
        return 2 * number


async def test_store_may_be_had_by_an_attribute_getter(store: AsyncKVStore) -> None:
    getter = Getter(store)
    assert await getter.double(1) == 2
    assert await store.get(getter.double.key(1)) is not None


async def test_store_of_a_method_is_found_where_self_is_bound(store: AsyncKVStore) -> None:
    service = Service("a", store)
    assert await Service.method(self=service, word="x") == await service.method(word="x") == "x"  # type: ignore[call-arg]


def _plain() -> int:
    return 1


def _generator() -> Generator[int]:
    yield 1


async def _async_generator() -> AsyncGenerator[int]:
    yield 1


class _Callable:
    async def __call__(self) -> int:
        return 1


async def _coroutine_function(name: str) -> str:
    return name


@pytest.mark.parametrize(
    ("decorated", "message"),
    [
        (_plain, r"_plain is not a coroutine function .*asyncio\.to_thread"),
        (_generator, "_generator is a generator"),
        (_async_generator, "_async_generator is a generator.*list"),
        (_Callable(), "not a coroutine function"),
        (_Callable, "not a coroutine function"),
        (functools.partial(_plain), "not a coroutine function"),
        (staticmethod(_coroutine_function), "below @staticmethod"),
        (property(_plain), "not a coroutine function"),
        (None, "not a coroutine function"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_has_no_one_result_to_await_is_refused(decorated: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kv_cached(60, store=kv)(decorated)


def test_partial_of_a_coroutine_function_is_refused_with_a_reason_or_cached() -> None:
    try:
        kv_cached(60, store=kv, key=lambda: "one")(functools.partial(_coroutine_function, "a"))
    except TypeError as error:
        assert "partial" in str(error)  # noqa: PT017 (either is right)


def test_local_function_without_a_key_is_refused() -> None:
    async def local() -> int:
        return 1

    with pytest.raises(ValueError, match=r"<locals>.*defined inside a function.*key="):
        kv_cached(60, store=kv)(local)
    kv_cached(60, store=kv, key=lambda: "one")(local)


@pytest.mark.parametrize("ignore", ["nmae", ["name", "nmae"]])
def test_unknown_parameter_to_ignore_is_refused(ignore: Any) -> None:
    with pytest.raises(TypeError, match=r"ignore names \['nmae'\].*_coroutine_function.*name"):
        kv_cached(60, store=kv, ignore=ignore)(_coroutine_function)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ttl": 2_592_001}, "ttl must be from 1 to 2,592,000 seconds"),
        ({"ttl": dt.timedelta(days=31)}, "30 days"),
        ({"ttl": 0.99}, "ttl must be from 1"),
        ({"ttl": 0}, "ttl must be from 1"),
        ({"ttl": -60}, "ttl must be from 1"),
        ({"ttl": math.nan}, "ttl must be from 1"),
        ({"ttl": math.inf}, "ttl must be from 1"),
        ({"ttl": True}, "ttl must be seconds or a timedelta, not bool"),
        ({"ttl": "60"}, "not str"),
        ({"ttl": None}, "ttl must be seconds"),
        ({"none_ttl": 0}, "none_ttl must be"),
        ({"none_ttl": True}, "none_ttl must be"),
        ({"jitter": 1.1}, "jitter must be"),
        ({"jitter": -0.1}, "jitter must be"),
        ({"jitter": math.nan}, "jitter must be"),
        ({"early": -1}, "early must be"),
        ({"early": math.inf}, "early must be"),
        ({"stale_while_revalidate": -1}, "stale_while_revalidate must be"),
        ({"stale_if_error": 2_592_001}, "stale_if_error must be"),
        ({"stale_if_error": math.nan}, "stale_if_error must be"),
        ({"read_timeout": 0}, "read_timeout must be"),
        ({"read_timeout": math.nan}, "read_timeout must be"),
        ({"write": "later"}, "write must be one of"),
        ({"on_store_error": "ignore"}, "on_store_error must be one of"),
        ({"on_oversize": "split"}, "on_oversize must be one of"),
        ({"store": "memory://"}, "store must be an AsyncKVStore"),
        ({"db_name": "db"}, "db_name names a namespace"),
        ({"store": None, "db_name": "a/b"}, "db_name"),
        ({"near": 30}, "near must be a NearCache"),
        ({"observer": "print"}, "observer"),
        ({"when": True}, "when"),
        ({"error_types": ("OSError",)}, "error_types"),
        ({"prefix": ""}, "prefix must be"),
        ({"prefix": "a\0b"}, "prefix"),
    ],
    ids=str,
)
def test_option_that_cannot_work_is_refused_at_decoration(options: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        kv_cached(**{"ttl": 60, "store": kv, **options})(_coroutine_function)


@pytest.mark.parametrize("ttl", [1, 1.5, 2_592_000, dt.timedelta(days=30), dt.timedelta(seconds=1)])
def test_ttl_within_its_bounds_is_taken(ttl: Any) -> None:
    kv_cached(ttl, store=kv)(_coroutine_function)


async def test_annotation_that_cannot_be_resolved_is_told_before_anything_is_computed(store: AsyncKVStore) -> None:
    runs = 0

    async def compute() -> "Missing":  # type: ignore[name-defined]  # noqa: F821
        nonlocal runs
        runs += 1
        return 1

    cached = kv_cached(60, store=store, key=lambda: "one", stale_if_error=60)(compute)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"return annotation cannot be resolved.*returns="):
            await cached()
    assert runs == 0


async def test_result_may_be_of_a_class_that_is_defined_later(store: AsyncKVStore) -> None:
    cached = kv_cached(60, store=store, key=lambda: "one")(later)
    assert [await cached(), await cached()] == [Later(Latest(1)), Later(Latest(1))]


async def later() -> "Later":
    """Give what is defined below."""
    return Later(Latest(1))


early_later = kv_cached(60, store=kv)(later)


@dataclasses.dataclass
class Later:
    latest: "Latest"


early_later_field = kv_cached(60, store=kv, returns=Later, key=lambda: "field")(later)


@dataclasses.dataclass
class Latest:
    size: int


@pytest.mark.parametrize("of", [early_later, early_later_field], ids=["annotation", "field"])
async def test_function_may_be_decorated_before_its_result_is_defined(of: CachedFunction[[], Later]) -> None:
    await of.invalidate()
    assert [await of(), await of(), of.info().hits] == [Later(Latest(1)), Later(Latest(1)), 1]


class Opaque:
    """What pydantic knows nothing of."""


def test_annotation_that_nothing_can_be_decoded_to_is_refused_at_decoration() -> None:
    with pytest.raises(TypeError, match=r"results of type Opaque cannot be decoded"):
        kv_cached(60, store=kv, returns=Opaque)(_coroutine_function)


async def numbers_of(count: int) -> AsyncIterator[int]:
    """Yield numbers."""
    for number in range(count):
        yield number


def test_async_iterator_is_refused_too() -> None:
    with pytest.raises(TypeError, match="numbers_of is a generator"):
        kv_cached(60, store=kv)(numbers_of)
