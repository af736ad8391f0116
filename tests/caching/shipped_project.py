"""The sources of a program that is shipped as `fal run` ships it, of the two ends of the way, and a way without processes."""

import pickle
from typing import Any

import pytest

from aiokv.caching import binding


def ship(value: Any) -> Any:
    """Send a value by cloudpickle, and receive it as another process does, which has none of its functions and classes."""
    cloudpickle = pytest.importorskip("cloudpickle", reason="cloudpickle comes with fal: pip install 'aiokv[dev]'")
    pickled = cloudpickle.dumps(value)
    registries: list[Any] = [binding._at_home, cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID]
    held = [dict(registry) for registry in registries]
    for registry in registries:
        registry.clear()
    try:
        return pickle.loads(pickled)
    finally:
        for registry, known in zip(registries, held, strict=True):
            registry.update(known)


LIBRARY = """
from __future__ import annotations

import dataclasses
import datetime as dt

from aiokv import AsyncKVStore, NearCache, kv_cached, kv_cached_many

kv = AsyncKVStore("db", url={url!r})
near = NearCache(30)


@dataclasses.dataclass
class Named:
    at: dt.date


@dataclasses.dataclass
class Place(Named):
    name: str = "x"


@dataclasses.dataclass
class Report:
    place: Place
    lines: list[str]


def make_report(place):
    return Report(place, [place.name])


# Named in an annotation that is text, and nowhere else in the function.
@kv_cached(60, store=kv, near=near)
async def report(place: Place) -> Report:
    return make_report(place)


@kv_cached_many(60, store=kv, near=near)
async def titles(ids: list[int], locale: str = "en") -> dict[int, Report]:
    return {{id_: Report(Place(dt.date(2020, 1, 1), locale), [str(id_)]) for id_ in ids}}
"""

APP = '''
import asyncio, dataclasses, datetime as dt, enum, json, typing

import fal, pydantic

import lib
from aiokv import Zstd, kv_cached, kv_cached_many


class Unit(enum.Enum):
    METRIC = "m"


class Query(pydantic.BaseModel):
    city: str
    unit: Unit = Unit.METRIC


@dataclasses.dataclass
class Forecast:
    query: Query
    days: list[float] = dataclasses.field(default_factory=list)


class Pair(typing.NamedTuple):
    number: int
    text: str


class RunTask(pydantic.BaseModel):
    """The runner's own script has a class of this name."""

    text: str


@kv_cached(60, store=lib.kv)
async def forecast(query: Query) -> Forecast:
    return Forecast(query, [20.5])


@kv_cached(60, store=lib.kv, codec=Zstd(min_bytes=1))
async def factorial(number: int) -> int:
    return 1 if number == 0 else number * await factorial(number - 1)


@kv_cached_many(60, store=lib.kv)
async def squares(ids: list[int]) -> dict[int, int]:
    return {id_: id_ * id_ for id_ in ids}


class Service:
    def __init__(self, name: str) -> None:
        self.name = name

    @kv_cached(60, store=lib.kv, ignore="self")
    async def method(self, task: RunTask) -> "Later":
        return Later(text=task.text)

    @kv_cached(60, store=lib.kv)
    @classmethod
    async def of_class(cls, word: str) -> str:
        return cls.__name__ + word

    @staticmethod
    @kv_cached(60, store=lib.kv)
    async def static(word: str) -> str:
        return word

    @kv_cached_many(60, store=lib.kv, key=lambda self, id_: (self.name, id_))
    async def many(self, ids: list[int]) -> dict[int, Pair]:
        return {id_: Pair(id_, self.name) for id_ in ids}

    @kv_cached_many(60, store=lib.kv)
    @classmethod
    async def many_of_class(cls, ids: list[int]) -> dict[int, Pair]:
        return {id_: Pair(id_, cls.__name__) for id_ in ids}


class Special(Service):
    pass


class Later(pydantic.BaseModel):
    text: str


async def call_all():
    service = Special("a")
    calls = [
        (forecast, Query(city="Oslo")),
        (factorial, 3),
        (lib.report, lib.Place(dt.date(2020, 1, 1), "y")),
        (service.method, RunTask(text="w")),
        (Special.of_class, "w"),
        (service.static, "w"),
        (squares, [1, 2]),
        (lib.titles, [1, 2]),
        (service.many, [1, 2]),
        (Special.many_of_class, [1, 2]),
    ]
    done = {}
    for cached, argument in calls:
        result = await cached(argument)
        key = cached.key(argument[0] if isinstance(argument, list) else argument)
        done[cached.__qualname__] = [repr(result), key, cached.info().computations]
        assert repr(await cached(argument)) == repr(result)
    return done


@fal.function(local_python_modules=["lib"])
def run():
    return asyncio.run(call_all())


class App(fal.App):
    local_python_modules = ["lib"]

    @kv_cached(60, store=lib.kv, ignore="self")
    async def answer(self, word: str) -> Later:
        return Later(text=word)

    @fal.endpoint("/")
    async def root(self) -> dict:
        result = await self.answer("x")
        done = [repr(result), self.answer.key("x"), self.answer.info().computations]
        return {**await call_all(), "App.answer": done}


async def both():
    return {**await App(_allow_init=True).root(), **await call_all()}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(both())))
'''

SEND = """
import pathlib, sys

from fal.api.api import FalServerlessHost, _prepare_partial_func
from fal.utils import load_function_from
from isolate.connections.common import serialize_object

for name in ("run", "App"):
    loaded = load_function_from(FalServerlessHost(), "app.py", name)
    shipped = serialize_object("cloudpickle", _prepare_partial_func(loaded.function.func))
    pathlib.Path(sys.argv[1], name).write_bytes(shipped)
"""

RUN = """
import asyncio, json, pathlib, sys

from isolate.connections.common import load_serialized_object


class RunTask:
    pass


function = load_serialized_object("cloudpickle", pathlib.Path(sys.argv[1]).read_bytes())
# What fal makes of an app serves it; the class is what it serves.
cells = [cell.cell_contents for cell in function.__wrapped__.__closure__ or ()]
apps = [value for value in cells if isinstance(value, type)]
assert "lib" not in sys.modules and "app" not in sys.modules
print(json.dumps(asyncio.run(apps[0](_allow_init=True).root()) if apps else function()))
"""
