"""Cached plain functions: what a call gives, where it runs, and that a coroutine function would give the same."""

import asyncio
import contextvars
import dataclasses
import gc
import inspect
import logging
import pickle
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest
from caching_under_test import Events, MovedTime, WatchedBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_under_test import ask, begin, wait_until

from aiokv import (
    AsyncKVStore,
    CachedFunction,
    KVStore,
    NearCache,
    PlainCachedFunction,
    StorageError,
    background,
    cache_bypass,
    cache_refresh,
    kv_cached,
    set_default_store,
)

kv = AsyncKVStore("db", url="memory://plain")


@dataclasses.dataclass
class Forecast:
    city: str
    degrees: list[float]


class Service:
    def __init__(self, name: str, store: AsyncKVStore = kv) -> None:
        self.name = name
        self.kv = store
        self.runs: list[str] = []

    @kv_cached(60, store=lambda self: self.kv, key=lambda self, word: (self.name, word))
    def method(self, word: str) -> str:
        """Greet."""
        self.runs.append(word)
        return f"{self.name} {word}"

    @kv_cached(60, store=kv)
    @classmethod
    def of_class(cls, word: str) -> str:
        return f"{cls.__name__} {word}"

    @classmethod
    @kv_cached(60, store=kv)
    def of_class_below(cls, word: str) -> str:
        return f"{cls.__name__} {word}"

    @staticmethod
    @kv_cached(60, store=kv)
    def static(word: str) -> str:
        return f"static {word}"


class Special(Service):
    pass


@kv_cached(60, store=kv)
def greet(word: str, *, times: int = 1) -> str:
    """Greet."""
    return word * times


class Runs:
    """A function that counts, in both kinds of one name and version."""

    def __init__(self) -> None:
        self.count = 0
        self.value: Any = 1
        self.error: Exception | None = None

    def run(self) -> Any:
        self.count += 1
        if self.error is not None:
            raise self.error
        return self.value


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture(params=["plain", "awaited"])
def make(request: pytest.FixtureRequest, store: AsyncKVStore, runs: Runs) -> Callable[..., Any]:
    """Return what decorates the counting function, as a plain one or as a coroutine function."""

    def make_cached(ttl: Any = 60, **options: Any) -> Any:
        given = {"store": store, "key": lambda: "one", "prefix": "runs", "version": 1, "returns": int, "early": 0.0, **options}
        if request.param == "plain":
            return kv_cached(ttl, **given)(runs.run)

        async def run() -> Any:
            return runs.run()

        return kv_cached(ttl, **given)(run)

    return make_cached


def test_call_returns_the_result_and_the_next_one_is_served() -> None:
    before = greet.info()
    assert [greet("a", times=2), greet(word="a", times=2), greet("a", times=2)] == ["aa"] * 3
    assert (greet.info().computations - before.computations, greet.info().hits - before.hits) == (1, 2)


def test_result_has_its_annotated_type_and_every_caller_its_own() -> None:
    @kv_cached(60, store=kv, key=lambda city: city)
    def forecast(city: str) -> Forecast:
        return Forecast(city, [1.5])

    first, second = forecast("Oslo"), forecast("Oslo")
    assert first == second == Forecast("Oslo", [1.5])
    first.degrees.append(2.0)
    assert forecast("Oslo") == second


def test_function_runs_in_the_thread_that_calls_with_its_context_and_its_thread_locals() -> None:
    local = threading.local()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen: list[object] = []

    @kv_cached(60, store=kv, key=lambda name: name)
    def where(name: str) -> str:
        seen.append((threading.get_ident(), local.name, variable.get()))
        variable.set("changed")
        return name

    def call(name: str) -> object:
        local.name = name
        variable.set(name)
        where(name)
        return (threading.get_ident(), variable.get())

    for name in ("a", "b"):
        ident, after = begin(call, name).result(10)  # type: ignore[misc]
        assert seen[-1] == (ident, name, name)
        # As without a cache, what the function sets stays set.
        assert after == "changed"


def test_near_hit_asks_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    @kv_cached(60, store=kv, key=lambda name: name, near=NearCache(60))
    def cached(name: str) -> str:
        return name

    method = kv_cached(60, store=kv, near=NearCache(60), prefix="near")(_module_function)
    assert [cached("a"), method(1)] == ["a", 1]

    def refuse(*_: object) -> None:
        raise AssertionError("a near hit asked the background loop")

    monkeypatch.setattr(background, "run", refuse)
    assert [cached("a"), method(1), method(number=1)] == ["a", 1, 1]


def _module_function(number: int) -> int:
    return number


def test_methods_of_every_kind_are_cached(store: AsyncKVStore) -> None:
    ann, bob = Service("Ann", store), Service("Bob", store)
    assert [ann.method("x"), bob.method("x"), ann.method("x"), Service.method(ann, "x")] == ["Ann x", "Bob x", "Ann x", "Ann x"]
    assert (ann.runs, bob.runs) == (["x"], ["x"])
    assert [Service.of_class("x"), Special.of_class("x"), Special("a").of_class("x")] == ["Service x", "Special x", "Special x"]
    assert [Service.of_class_below("x"), Special("a").of_class_below("x")] == ["Service x", "Special x"]
    assert [Service.static("x"), Special("a").static("x")] == ["static x", "static x"]
    ann.method.invalidate("x")
    assert ann.method.peek("x") is None
    Special.of_class.invalidate("x")
    assert Special.of_class.peek("x") is None
    assert Service.of_class.peek("x") is not None


def test_function_is_known_as_a_plain_one_and_keeps_its_name() -> None:
    for cached in (greet, Service.method, Service("a").method, Service.static, Service.of_class):
        assert isinstance(cached, PlainCachedFunction)
        assert not isinstance(cached, CachedFunction)
        assert not inspect.iscoroutinefunction(cached)
        assert not asyncio.iscoroutinefunction(cached)
    assert (greet.__name__, greet.__doc__) == ("greet", "Greet.")
    assert str(inspect.signature(greet)) == "(word: str, *, times: int = 1) -> str"
    assert list(inspect.signature(Service("a").method).parameters) == ["word"]
    assert not hasattr(greet, "aclose")


@pytest.mark.parametrize("cached", [greet, Service.method, Service.static], ids=repr)
def test_function_is_pickled_by_name(cached: object) -> None:
    assert pickle.loads(pickle.dumps(cached)) is cached


def test_what_manages_results_blocks(store: AsyncKVStore, runs: Runs) -> None:
    cached: PlainCachedFunction[[], int] = kv_cached(60, store=store, key=lambda: "one", returns=int)(runs.run)
    assert cached.peek() is None
    assert cached() == 1
    peeked = cached.peek()
    assert peeked is not None
    assert (peeked.value, peeked.fresh) == (1, True)
    runs.value = 2
    assert [cached(), cached.refresh(), cached()] == [1, 2, 2]
    cached.prime(7)
    assert cached() == 7
    cached.invalidate()
    assert (cached.peek(), cached(), runs.count) == (None, 2, 3)
    assert asyncio.run(store.get(cached.key())) is not None
    cached.close()
    assert cached() == 2


def test_lambda_is_cached_by_its_own_code(store: AsyncKVStore) -> None:
    one = kv_cached(60, store=store, key=lambda n: n, returns=int)(lambda n: n + 1)
    two = kv_cached(60, store=store, key=lambda n: n, returns=int)(lambda n: n + 2)
    assert [one(1), two(1), one(1), two(1)] == [2, 3, 2, 3]


def test_awaitable_result_is_a_type_error_that_says_so() -> None:
    async def fetch() -> int:
        return 1

    @kv_cached(60, store=kv, key=lambda: "one")
    def wrapper() -> Any:
        return fetch()

    with pytest.raises(TypeError, match=r"wrapper is a plain function, and returned an awaitable \(coroutine\)"):
        wrapper()


def test_wrong_arguments_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="word"):
        greet()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Service\.with_self|leave it out"):
        greet(object())  # type: ignore[arg-type]


def test_error_of_the_function_is_raised_with_its_traceback(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    def fail() -> int:
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there") as caught:
        fail()
    assert caught.traceback[-1].name == "fail"
    with pytest.raises(LookupError):
        fail()


def test_stop_iteration_of_the_function_is_a_runtime_error(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    def first() -> int:
        return next(iter([]))

    with pytest.raises(RuntimeError, match="first raised StopIteration"):
        first()


def test_stores_of_both_kinds_are_taken() -> None:
    blocking = KVStore("db", url="memory://plain-kv-store")
    fixed = kv_cached(60, store=blocking, key=lambda: "one", returns=int)(lambda: 1)
    chosen = kv_cached(60, store=lambda: blocking, key=lambda: "two", returns=int)(lambda: 2)
    assert [fixed(), chosen()] == [1, 2]
    assert blocking.get(fixed.key()) is not None
    assert blocking.get(chosen.key()) is not None


def test_default_store_serves_where_none_is_named(store: AsyncKVStore) -> None:
    cached = kv_cached(60, key=lambda: "one", returns=int)(lambda: 1)
    set_default_store(store)
    try:
        assert cached() == 1
        assert asyncio.run(store.get(cached.key())) is not None
    finally:
        set_default_store(None)


def test_modes_of_the_context_hold(store: AsyncKVStore, runs: Runs) -> None:
    cached = kv_cached(60, store=store, key=lambda: "one", returns=int)(runs.run)
    assert cached() == 1
    runs.value = 2
    with cache_bypass():
        assert cached() == 2
    assert cached() == 1
    with cache_refresh():
        assert cached() == 2
    assert (cached(), runs.count) == (2, 3)


def test_recursion_and_calls_of_the_same_key_run_in_line(store: AsyncKVStore) -> None:
    runs: list[int] = []

    @kv_cached(60, store=store, key=lambda n: n)
    def fib(n: int) -> int:
        runs.append(n)
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    @kv_cached(60, store=store, key=lambda: "one")
    def again() -> int:
        runs.append(0)
        return len(runs) if len(runs) > 2 else again()

    assert fib(60) == 1548008755920
    assert sorted(runs) == list(range(61))
    runs.clear()
    assert (again(), again(), runs) == (3, 3, [0, 0, 0])


def test_recursion_without_an_end_is_the_error_that_it_is_without_a_cache(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda n: n)
    def count(n: int) -> int:
        return count(n + 1)

    with pytest.raises(RecursionError):
        count(0)


# What either kind does alike. Each test runs with both.


def test_ttl_of_the_result_decides(make: Callable[..., Any], runs: Runs) -> None:
    cached = make(ttl=lambda value: 0 if value == 1 else 60)
    assert [ask(cached()), ask(cached())] == [1, 1]
    runs.value = 2
    assert [ask(cached()), ask(cached()), runs.count] == [2, 2, 3]


def test_expired_result_is_computed_anew(make: Callable[..., Any], runs: Runs, moved_time: MovedTime) -> None:
    cached = make(60)
    assert ask(cached()) == 1
    runs.value = 2
    moved_time.advance(59)
    assert ask(cached()) == 1
    moved_time.advance(2)
    assert ask(cached()) == 2


@pytest.mark.parametrize("option", ["ttl", "when"])
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_exit_that_a_function_of_the_result_raises_ends_its_call_alone(
    kind: type[BaseException], option: str, store: AsyncKVStore, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(_: object) -> Any:
        raise kind

    @kv_cached(**{"ttl": 60, option: leave}, store=store, key=lambda: "one")
    def read() -> int:
        return 1

    thread = _thread_of_the_loop()
    for _ in range(2):
        with pytest.raises(kind):
            read()
    assert KVStore("another", url="memory://another").get("k") is None
    assert _thread_of_the_loop() is thread
    del read
    gc.collect()
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def _thread_of_the_loop() -> threading.Thread:
    async def current() -> threading.Thread:
        return threading.current_thread()

    return background.run(current)


def test_result_that_is_not_wanted_is_not_stored(make: Callable[..., Any], runs: Runs) -> None:
    cached = make(when=lambda value: value > 1)
    assert [ask(cached()), ask(cached()), runs.count] == [1, 1, 2]


def test_failing_function_is_covered_by_what_is_stored(make: Callable[..., Any], runs: Runs, moved_time: MovedTime) -> None:
    seen = Events()
    cached = make(60, stale_if_error=600, observer=seen)
    assert ask(cached()) == 1
    moved_time.advance(61)
    runs.error = OSError("down")
    assert [ask(cached()), ask(cached()), runs.count] == [1, 1, 2]
    assert seen.count("stale_on_error") == 2
    moved_time.advance(601)
    with pytest.raises(OSError, match="down"):
        ask(cached())


@pytest.mark.parametrize("verb", ["get", "set"])
def test_failing_store_is_passed_by_or_raised(verb: str, make: Callable[..., Any], runs: Runs, backend: WatchedBackend) -> None:
    backend.failing = {verb}
    assert [ask(make()()), runs.count] == [1, 1]
    with pytest.raises(StorageError):
        ask(make(on_store_error="raise")())


def test_none_has_a_ttl_of_its_own(make: Callable[..., Any], runs: Runs) -> None:
    runs.value = None
    cached = make(none_ttl=None, returns=int | None)
    assert [ask(cached()), ask(cached()), runs.count] == [None, None, 2]


def test_argument_that_changes_while_the_function_runs_is_not_stored(store: AsyncKVStore) -> None:
    runs = []

    @kv_cached(60, store=store, key=lambda items: items)
    def total(items: list[int]) -> int:
        runs.append(list(items))
        items.append(1)
        return sum(items)

    assert [total([1]), total([1]), len(runs)] == [2, 2, 2]


def test_both_kinds_of_one_name_share_entries(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, prefix="shared", version=1, key=lambda n: n)
    def plain(n: int) -> int:
        return n

    @kv_cached(60, store=store, prefix="shared", version=1, key=lambda n: n)
    async def awaited(n: int) -> int:
        return -n

    assert plain.key(1) == awaited.key(1)
    assert [plain(1), asyncio.run(awaited(1))] == [1, 1]
    assert [asyncio.run(awaited(2)), plain(2)] == [-2, -2]
    awaited_again = asyncio.run(awaited.refresh(1))
    assert [awaited_again, plain(1)] == [-1, -1]
    plain.invalidate(1)
    assert asyncio.run(awaited.peek(1)) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(arguments=st.lists(VALUES, max_size=3), named=st.dictionaries(st.sampled_from("abc"), VALUES), value=VALUES)
def test_kinds_agree_on_keys_entries_and_results(arguments: list[Any], named: dict[str, Any], value: Any) -> None:
    texts: list[str | None] = []
    answers: list[Any] = []
    keys: list[str] = []

    async def awaited(*_: Any, **__: Any) -> Any:
        return value

    def plain(*_: Any, **__: Any) -> Any:
        return value

    for function in (plain, awaited):
        store = AsyncKVStore("db", backend=WatchedBackend())
        cached: Any = kv_cached(60, store=store, prefix="agree", version=1, key=lambda *args, **more: (args, more))(function)
        answers += [_outcome(cached, arguments, named), _outcome(cached, arguments, named)]
        keys.append(cached.key(*arguments, **named))
        text = asyncio.run(store.get(keys[-1]))
        # The head holds times.
        texts.append(None if text is None else text.partition("\n")[2])
    assert keys[0] == keys[1]
    assert texts[0] == texts[1]
    assert answers[:2] == answers[2:]


def _outcome(cached: Any, arguments: list[Any], named: dict[str, Any]) -> object:
    try:
        return ask(cached(*arguments, **named))
    except (TypeError, ValueError) as error:
        return type(error)


# Where it is called.


async def test_call_in_a_running_loop_blocks_it_and_works(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda n: n)
    def square(n: int) -> int:
        return n * n

    assert [square(3), square(3), square.refresh(3)] == [9, 9, 9]
    assert await store.get(square.key(3)) is not None


def test_coroutine_function_that_calls_a_plain_one_that_runs_a_loop(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda n: n, prefix="inner")
    async def inner(n: int) -> int:
        return n + 1

    @kv_cached(60, store=store, key=lambda n: n, prefix="middle")
    def middle(n: int) -> int:
        return begin(lambda: asyncio.run(inner(n))).result(10) * 10

    @kv_cached(60, store=store, key=lambda n: n, prefix="outer")
    async def outer(n: int) -> int:
        return middle(n) + 1

    assert asyncio.run(outer(1)) == 21
    assert middle(1) == 20


def test_call_in_the_thread_of_the_background_loop_is_refused(store: AsyncKVStore) -> None:
    errors: list[BaseException] = []

    @kv_cached(60, store=store, key=lambda: "inner")
    def inner() -> int:
        return 1

    def wanted(_: int) -> bool:
        try:
            inner()
        except RuntimeError as error:
            errors.append(error)
        return True

    @kv_cached(60, store=store, key=lambda: "outer", when=wanted)
    def outer() -> int:
        return 1

    assert outer() == 1
    assert "would wait for itself" in str(errors[0])


@pytest.fixture
def stale(store: AsyncKVStore, moved_time: MovedTime) -> Generator[Callable[..., Any]]:
    """Return what makes a function whose result has just become stale."""
    made: list[PlainCachedFunction[..., Any]] = []

    def make_stale(function: Callable[..., Any], *args: Any, **options: Any) -> PlainCachedFunction[..., Any]:
        given: dict[str, Any] = {"store": store, "stale_while_revalidate": 600, "early": 0.0, "returns": str}
        cached: Any = kv_cached(60, **{**given, **options})(function)
        cached(*args)
        moved_time.advance(61)
        made.append(cached)
        return cached

    yield make_stale
    for cached in made:
        cached.close()


def test_refresh_behind_a_caller_runs_in_another_thread_in_its_context(stale: Callable[..., Any]) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[tuple[int, str]] = []

    def where(name: str) -> str:
        seen.append((threading.get_ident(), variable.get()))
        return f"{name} {len(seen)}"

    cached = stale(where, "a", key=lambda name: name)
    token = variable.set("the caller's")
    try:
        assert cached("a") == "a 1"
    finally:
        variable.reset(token)
    wait_until(lambda: cached.info().computations == 2)
    assert seen[0] == (threading.get_ident(), "none")
    assert seen[1][0] != threading.get_ident()
    assert seen[1][1] == "the caller's"
    wait_until(lambda: cached("a") == "a 2")


def test_failure_of_a_refresh_behind_a_caller_is_counted(stale: Callable[..., Any], runs: Runs) -> None:
    runs.value = "first"
    cached = stale(runs.run, key=lambda: "one")
    runs.error = OSError("down")
    assert cached() == "first"
    wait_until(lambda: cached.info().background_errors == 1)
    assert cached() == "first"
