"""Values whose encodings must never change, with the types that they need; imported by processes of their own, too."""

import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import hashlib
import json
import pathlib
import uuid
import zoneinfo
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import pydantic

from aiokv.caching.encoding import encode
from aiokv.caching.keys import KeyMaker

T = TypeVar("T")


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    LOW = "low"


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.5


@dataclasses.dataclass(frozen=True)
class OtherPoint:
    x: int
    y: float = 0.5


class Pair(NamedTuple):
    first: int
    second: str


class Model(pydantic.BaseModel):
    name: str
    size: int = 1


class OtherModel(pydantic.BaseModel):
    name: str
    size: int = 1


class Open(pydantic.BaseModel, extra="allow"):
    name: str


class Page(pydantic.BaseModel, Generic[T]):
    item: T


@dataclasses.dataclass
class Noted:
    x: int

    def __post_init__(self) -> None:
        self.note = "n"


class Tenant:
    def __init__(self, number: int, note: object = None) -> None:
        self.number = number
        self.note = note

    def __cache_key__(self) -> object:
        return ("tenant", self.number)


class OtherTenant(Tenant):
    pass


async def call(value: object = None, /, *more: object, **named: object) -> None: ...


VALUES: dict[str, object] = {
    "none": None,
    "true": True,
    "false": False,
    "int zero": 0,
    "int one": 1,
    "int negative": -255,
    "int huge": 10**40,
    "float one": 1.0,
    "float zero": 0.0,
    "float minus zero": -0.0,
    "float nan": float("nan"),
    "float infinite": float("-inf"),
    "complex": complex(1.0, -0.0),
    "str empty": "",
    "str one": "1",
    "str beyond ASCII": "é漢😀",
    "str lone surrogate": "\ud800",
    "bytes": b"\x00\xff1",
    "bytearray": bytearray(b"\x00\xff1"),
    "list": [1, "1", [None, True]],
    "tuple": (1, "1", (None, True)),
    "set": {"a", "b", "c", 1, 2.5, None},
    "frozenset": frozenset({"a", "b", "c", 1, 2.5, None}),
    "dict": {"b": 1, "a": [2], 3: {"x": None}},
    "enum": Colour.RED,
    "enum of text": Colour.BLUE,
    "flag": Rights.READ,
    "flags together": Rights.READ | Rights.WRITE,
    "flags none": Rights(0),
    "int enum": Level.LOW,
    "str enum": Word.LOW,
    "date": dt.date(2024, 2, 29),
    "time": dt.time(1, 2, 3, 4),
    "datetime": dt.datetime(2024, 2, 29, 1, 2, 3),  # noqa: DTZ001 (naive ones are arguments too)
    "datetime folded": dt.datetime(2024, 2, 29, 1, 2, 3, 4, fold=1),  # noqa: DTZ001 (likewise)
    "datetime utc": dt.datetime(2024, 2, 29, tzinfo=dt.UTC),
    "datetime offset": dt.datetime(2024, 2, 29, tzinfo=dt.timezone(dt.timedelta(hours=-3, minutes=-30))),
    "datetime zone": dt.datetime(2024, 2, 29, tzinfo=zoneinfo.ZoneInfo("UTC")),
    "timedelta": dt.timedelta(days=-1, microseconds=1),
    "decimal": decimal.Decimal("1.10"),
    "decimal exponent": decimal.Decimal("1E+5"),
    "uuid": uuid.UUID(int=5),
    "path posix": pathlib.PurePosixPath("a/b.txt"),
    "path windows": pathlib.PureWindowsPath("a/b.txt"),
    "class": Point,
    "builtin class": int,
    "dataclass": Point(1),
    "named tuple": Pair(1, "x"),
    "model": Model(name="m"),
    "model with extra": Open.model_validate({"name": "m", "more": 1}),
    "own key": Tenant(7),
    "array": np.arange(6, dtype=np.int32).reshape(2, 3),
    "array of no dimension": np.array(1.5),
    "array empty": np.zeros((0, 3), dtype=np.float64),
    "array of records": np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
    "array of text": np.array(["ab", "c"]),
    "array of days": np.array(["2024-02-29"], dtype="datetime64[D]"),
    "numpy scalar": np.float32(1.5),
    "ellipsis": ...,
    "range": range(1, 5, 2),
    "fraction": fractions.Fraction(1, 3),
    "zone": zoneinfo.ZoneInfo("Europe/Oslo"),
    "fixed zone": dt.timezone(dt.timedelta(hours=1), "A"),
    "time of a zone": dt.time(1, tzinfo=dt.UTC),
    "model of which all fields were set": Model(name="m", size=2),
    "generic model": Page[Point](item=Point(1)),
    "dataclass with an attribute": Noted(1),
    "array of padded records": np.zeros(1, dtype=np.dtype([("a", "i1"), ("b", "<i4")], align=True)),
}

WHOLE_KEYS: dict[str, tuple[dict[str, object], tuple[object, ...], dict[str, object]]] = {
    "no argument": ({}, (), {}),
    "arguments": ({}, (1, "x", None), {"b": 2.5, "a": [True]}),
    "prefix and version": ({"prefix": "a:1", "version": "2"}, ("x",), {}),
    "own key": ({"key": lambda value, *_, **__: ("k", value)}, (7,), {}),
    "vary": ({"vary": lambda *_, **__: "tenant"}, (7,), {}),
}


def computed() -> dict[str, dict[str, str]]:
    """Return what the golden file holds, as this process computes it."""
    encodings = {name: hashlib.blake2b(encode(value), digest_size=16).hexdigest() for name, value in VALUES.items()}
    keys = {name: KeyMaker(call, **options)(args, kwargs) for name, (options, args, kwargs) in WHOLE_KEYS.items()}
    return {"encodings": encodings, "keys": keys}


def computed_text() -> str:
    """Return the text of the golden file, as this process computes it."""
    return json.dumps(computed(), indent=2, ensure_ascii=False) + "\n"
