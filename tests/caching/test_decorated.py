"""Methods, stores, signatures and pickling: what decoration keeps of a function, and where its results go."""

import asyncio
import copy
import functools
import inspect
import operator
import pickle
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import pytest
from caching_under_test import watched_store

from aiokv import AsyncKVStore, CachedFunction, KVStore, NearCache, kv_cached, set_default_store

kv = AsyncKVStore("db", url="memory://cached-results")


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
    assert "recipe" in inspect.signature(type(greet)).parameters


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


def test_bound_method_passes_the_attributes_of_its_function_on() -> None:
    async def number(self: object) -> Annotated[int, "of a call"]:
        """Count."""
        return id(self)

    number.told = "by the program"  # type: ignore[attr-defined]
    function = kv_cached(60, store=kv, key=id)(number)
    bound = function.bound_to(Service("a"))
    assert (bound.__name__, bound.__module__, bound.__doc__) == ("number", __name__, "Count.")
    assert (bound.__wrapped__, bound.told) == (number, "by the program")  # type: ignore[attr-defined]
    assert bound.__annotations__ is function.__annotations__
    assert functools.wraps(bound)(lambda: None).__module__ == __name__
    assert type(bound).__module__ == type(function).__module__ == "aiokv.caching.functions"
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        bound.nothing_of_that_name  # type: ignore[attr-defined]  # noqa: B018


def test_both_forms_are_of_the_class_that_programs_name() -> None:
    assert isinstance(greet, CachedFunction)
    assert isinstance(Service("a").method, CachedFunction)
    assert inspect.getdoc(type(Service("a").method)) == inspect.getdoc(CachedFunction)


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


def test_default_store_of_blocking_code_names_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"not KVStore; pass store\.async_store"):
        set_default_store(KVStore("db", url="memory://blocking"))  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("choose", "chosen"),
    [
        (lambda tenant: tenant, "b"),
        (lambda anything: anything, "a"),
        (lambda tenant, word: tenant + word, "ba"),
        (lambda *, tenant: tenant, "b"),
        (lambda tenant, /, times=7: tenant * (times == 7), "b"),
        (lambda: "none", "none"),
    ],
)
async def test_store_function_gets_the_arguments_that_it_names_else_the_first(choose: Callable[..., str], chosen: str) -> None:
    stores = {name: watched_store()[1] for name in ("a", "b", "ba", "none")}
    asked = functools.wraps(choose)(lambda *args, **kwargs: stores[choose(*args, **kwargs)])

    @kv_cached(60, store=asked, key=lambda word, tenant, times: (word, tenant, times))
    async def compute(word: str, tenant: str = "b", *, times: int = 1) -> str:
        return word * times + tenant

    for call in (compute("a"), compute(word="a"), compute("a", "b", times=1)):
        assert await call == "ab"
    assert await stores[chosen].get(compute.key("a")) is not None
    assert compute.info().computations == 1


@pytest.mark.parametrize(
    "choose",
    [lambda word, other: (word, other), lambda *, other: other, lambda a, b: (a, b)],
    ids=["another", "by name", "two"],
)
def test_store_function_that_asks_for_what_there_is_not_is_refused_at_decoration(choose: Any) -> None:
    async def compute(word: str) -> str:
        return word

    with pytest.raises(
        TypeError, match=r"compute: the function that store= names takes .*named as those of the function: \['word'\]"
    ):
        kv_cached(60, store=choose, key=lambda word: word)(compute)

    async def nothing() -> int:
        return 1

    with pytest.raises(TypeError, match="store= names takes"):
        kv_cached(60, store=lambda self: self.kv, key=lambda: 1)(nothing)


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
