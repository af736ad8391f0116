"""What frameworks and wrappers see of cached functions: signatures, kinds, names, and dependencies of FastAPI."""

import asyncio
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
from shipped_project import ship

from aiokv import AsyncKVStore, kv_cached, kv_cached_many

kv = AsyncKVStore("db", url="memory://introspection")


@kv_cached(60, store=kv)
async def greet(word: str, *, times: int = 1) -> str:
    """Greet."""
    return word * times


@kv_cached_many(60, store=kv)
async def squares(ids: list[int], scale: int = 1) -> dict[int, int]:
    return {id_: id_ * id_ * scale for id_ in ids}


class Service:
    @kv_cached(60, store=kv, ignore="self")
    async def method(self, word: str, times: int = 1) -> str:
        return word * times

    @kv_cached_many(60, store=kv, ignore="self")
    async def many(self, ids: list[int], scale: int = 1) -> dict[int, int]:
        return dict.fromkeys(ids, scale)

    @kv_cached_many(60, store=kv, ignore="self")
    async def numbers(self, user_ids: list[int]) -> dict[int, int]:
        return {id_: id_ for id_ in user_ids}

    @kv_cached(60, store=kv)
    @classmethod
    async def of_class(cls, word: str) -> str:
        return cls.__name__ + word

    @staticmethod
    @kv_cached(60, store=kv)
    async def static(word: str) -> str:
        return word


def pickled(cached: Any) -> Any:
    return pickle.loads(pickle.dumps(cached))


def shipped(cached: Any) -> Any:
    cloudpickle = pytest.importorskip("cloudpickle")
    module = inspect.getmodule(shipped)
    cloudpickle.register_pickle_by_value(module)
    try:
        return ship(cached)
    finally:
        cloudpickle.unregister_pickle_by_value(module)


FORMS: list[tuple[Any, str]] = [
    (greet, "(word: str, *, times: int = 1) -> str"),
    (squares, "(ids: list[int], scale: int = 1) -> dict[int, int]"),
    (Service.method, "(self, word: str, times: int = 1) -> str"),
    (Service().method, "(word: str, times: int = 1) -> str"),
    (Service().many, "(ids: list[int], scale: int = 1) -> dict[int, int]"),
    (Service.of_class, "(word: str) -> str"),
    (Service().of_class, "(word: str) -> str"),
    (Service().static, "(word: str) -> str"),
]


@pytest.mark.parametrize("way", [lambda cached: cached, pickled, shipped], ids=["here", "pickled", "shipped"])
@pytest.mark.parametrize(("cached", "signature"), FORMS, ids=repr)
def test_form_shows_the_signature_and_kind_of_its_calls(cached: Any, signature: str, way: Callable[[Any], Any]) -> None:
    cached = way(cached)
    assert str(inspect.signature(cached)) == signature
    assert asyncio.iscoroutinefunction(cached)
    assert inspect.iscoroutinefunction(cached)
    assert not inspect.isasyncgenfunction(cached)
    assert get_type_hints(cached)["return"] in {str, dict[int, int]}
    assert inspect.unwrap(cached).__name__ == cached.__name__


@pytest.mark.parametrize("cached", [greet, Service().method])
async def test_coroutine_function_that_wraps_a_cached_one_shows_the_same(cached: Any) -> None:
    @functools.wraps(cached)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await cached(*args, **kwargs)

    assert (wrapper.__name__, wrapper.__doc__) == (cached.__name__, cached.__doc__)
    assert inspect.signature(wrapper) == inspect.signature(cached)
    assert await wrapper("x", times=2) == "xx"


def test_plain_function_that_wraps_a_cached_one_is_no_coroutine_function() -> None:
    @functools.wraps(greet)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return asyncio.run(greet(*args, **kwargs))

    assert not inspect.iscoroutinefunction(wrapper)
    assert not asyncio.iscoroutinefunction(wrapper)


async def test_cached_function_may_wrap_a_wrapped_one() -> None:
    async def inner(word: str, times: int = 1) -> str:
        return word * times

    @kv_cached(60, store=kv, key=lambda word, times=1: (word, times))
    @functools.wraps(inner)
    async def outer(*args: Any, **kwargs: Any) -> str:
        return await inner(*args, **kwargs)

    assert str(inspect.signature(outer)) == "(word: str, times: int = 1) -> str"
    assert [await outer("x", times=2), await outer("x", 2), outer.info().computations] == ["xx", "xx", 1]
    assert functools.partial(outer, times=3).func is outer


@kv_cached_many(60, store=kv)
async def titles(user_ids: list[int], locale: str = "en") -> dict[int, str]:
    return dict.fromkeys(user_ids, locale)


async def test_ids_may_be_passed_as_ids_or_by_the_name_of_the_parameter() -> None:
    for passed in ({"ids": [1]}, {"user_ids": [1]}, {"ids": [1], "locale": "en"}):
        assert await titles(**passed) == await titles.refresh(**passed) == {1: "en"}
        assert (await titles.peek(**passed))[1].value == "en"
        await titles.invalidate(**passed)
        assert await titles.peek(**passed) == {}
    assert await Service.numbers(Service(), ids=[1]) == await Service.numbers(Service(), user_ids=[1]) == {1: 1}
    with pytest.raises(TypeError, match="ids"):
        await titles(locale="no")  # type: ignore[call-arg]


def test_type_parameters_are_those_of_the_function() -> None:
    assert getattr(greet, "__type_params__", ()) == getattr(greet.__wrapped__, "__type_params__", ())  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", [lambda cached: cached, shipped], ids=["here", "shipped"])
def test_forms_are_dependencies_and_endpoints_of_fastapi(way: Callable[[Any], Any]) -> None:
    fastapi = pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")
    app = fastapi.FastAPI()

    @app.get("/depends")
    async def depends(
        of_function: str = fastapi.Depends(way(greet)), of_method: str = fastapi.Depends(way(Service().method))
    ) -> list[str]:
        return [of_function, of_method]

    app.get("/method")(way(Service().method))
    app.get("/static")(way(Service.static))
    app.get("/class")(way(Service.of_class))
    with testclient.TestClient(app) as client:
        assert client.get("/depends?word=x&times=2").json() == ["xx", "xx"]
        assert client.get("/method?word=x&times=3").json() == "xxx"
        assert client.get("/static?word=x").json() == "x"
        assert client.get("/class?word=x").json() == "Servicex"
        assert client.get("/method").status_code == 422
    parameters = app.openapi()["paths"]["/method"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["word", "times"]
