"""What cannot be decorated, options that cannot work, and annotations that are resolved late."""

import dataclasses
import datetime as dt
import functools
import math
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from typing import Any

import pytest
from helpers import stable_id

from aiokv import AsyncKVStore, CachedFunction, kv_cached, kv_cached_many

kv = AsyncKVStore("db", url="memory://cached-results")


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
        (_generator, "_generator is a generator"),
        (_async_generator, "_async_generator is a generator.*list"),
        (_Callable(), r"a _Callable is not a function.*call it in a def"),
        (_Callable, "the class _Callable is not a function"),
        (functools.partial(_plain), r"a partial is not a function.*call it in a def"),
        (len, "len is a builtin_function_or_method.*call it in a def"),
        (staticmethod(_coroutine_function), "below @staticmethod"),
        (property(_plain), "a property is not a function"),
        (None, "NoneType is not a function"),
        (3, r"^write @kv_cached\(60\) with its parentheses.*int is not a function"),
    ],
    ids=stable_id,
)
def test_what_is_no_function_of_one_result_is_refused(decorated: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kv_cached(60, store=kv)(decorated)


def test_partial_of_a_coroutine_function_is_refused_with_a_reason_or_cached() -> None:
    try:
        kv_cached(60, store=kv, key=lambda: "one")(functools.partial(_coroutine_function, "a"))
    except TypeError as error:
        assert "partial" in str(error)  # noqa: PT017 (either is right)


class _Scale:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def scaled(self, number: int) -> int:
        return self.factor * number

    async def scaled_later(self, number: int) -> int:
        return self.factor * number

    def scaled_many(self, ids: list[int]) -> dict[int, int]:
        return {number: self.factor * number for number in ids}

    @classmethod
    def name(cls, _number: int) -> str:
        return cls.__name__

    @kv_cached(60, store=kv)
    def cached(self, number: int) -> int:
        return self.factor * number


class _OtherScale(_Scale):
    pass


@pytest.mark.parametrize("decorate", [kv_cached, kv_cached_many], ids=["one", "many"])
@pytest.mark.parametrize("name", ["scaled", "scaled_later", "scaled_many", "cached"])
def test_method_of_an_instance_is_refused_without_a_key(decorate: Any, name: str) -> None:
    method = getattr(_Scale(2), name)
    with pytest.raises(TypeError, match=rf"_Scale\.{name} is bound to a _Scale.*in its class.*that calls it.*key="):
        decorate(60, store=kv, prefix="scale", version=1)(method)


def test_method_of_an_instance_is_cached_by_a_key_that_says_what_differs() -> None:
    def cached(scale: _Scale) -> Any:
        return kv_cached(60, store=kv, key=lambda number: (scale.factor, number))(scale.scaled)

    assert [cached(_Scale(factor))(3) for factor in (2, 5)] == [6, 15]


def test_method_of_a_class_counts_the_class_or_is_refused() -> None:
    assert [kv_cached(60, store=kv)(kind.name)(1) for kind in (_Scale, _OtherScale)] == ["_Scale", "_OtherScale"]
    with pytest.raises(TypeError, match="is bound to the class _Scale, which would not count"):
        kv_cached(60, store=kv, version=1)(_Scale.name)


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
    """Return what is defined below."""
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
