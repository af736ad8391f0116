"""Types of results, each with something that JSON or `==` does not see; imported by processes of their own, too."""

import dataclasses
import datetime as dt
import decimal
import enum
import functools
import threading
import uuid
from typing import Any, Generic, Literal, NamedTuple, NewType, Optional, TypeVar

import pydantic
import pydantic.dataclasses
import typing_extensions

T = TypeVar("T")


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Model(pydantic.BaseModel):
    name: str
    sizes: tuple[int, ...] = ()


class Wider(Model):
    more: int = 3


class Nested(pydantic.BaseModel):
    models: dict[str, Model]
    when: dt.datetime
    price: decimal.Decimal
    colours: set[Colour]
    parent: Optional["Nested"] = None


class Box(pydantic.BaseModel, Generic[T]):
    content: T


@dataclasses.dataclass
class Point:
    x: int
    path: tuple[int, ...] = ()


@dataclasses.dataclass
class WiderPoint(Point):
    z: int = 1


class Pair(NamedTuple):
    first: int
    second: str = "x"


class Row(typing_extensions.TypedDict):
    name: str
    size: typing_extensions.NotRequired[tuple[int, int]]


class Closed(pydantic.BaseModel):
    password: pydantic.SecretStr


class Unshown(pydantic.BaseModel):
    content: Any = pydantic.Field(default=None, repr=False)


class Excluded(pydantic.BaseModel):
    shown: int
    left_out: int = pydantic.Field(default=0, exclude=True, repr=False)


class Private(pydantic.BaseModel):
    shown: int
    _note: int = pydantic.PrivateAttr(default=0)

    def noted(self, note: int) -> "Private":
        self._note = note
        return self


@dataclasses.dataclass
class UnshownField:
    x: int
    content: Any = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(slots=True)
class Slotted:
    content: Any = None


class OwnStr(str):  # noqa: SLOT000 (a subclass of a builtin is the point)
    pass


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    LOW = "low"


class Reading(pydantic.BaseModel):
    value: float


@dataclasses.dataclass
class Measured:
    value: float
    __pydantic_config__ = pydantic.ConfigDict(ser_json_inf_nan="null")


class Blob(pydantic.BaseModel):
    data: bytes


class Same(Excluded):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.shown == other.shown

    __hash__ = None  # type: ignore[assignment]


class Guarded(pydantic.BaseModel):
    size: int = 1
    _lock: Any = pydantic.PrivateAttr(default_factory=threading.Lock)


@dataclasses.dataclass
class WithInit:
    x: int
    hidden: list[int] = dataclasses.field(default_factory=list, compare=False)
    twice: int = dataclasses.field(init=False, compare=False, default=0)

    def __post_init__(self) -> None:
        self.twice = 2 * self.x


@dataclasses.dataclass
class StatefulBase:
    x: int


class Stateful(StatefulBase):
    def __init__(self, x: int) -> None:
        super().__init__(x)
        self.more = x + 1


class Excited(pydantic.BaseModel):
    name: str

    @pydantic.field_validator("name")
    @classmethod
    def excite(cls, name: str) -> str:
        return name + "!"


class Once(pydantic.BaseModel):
    name: str

    @pydantic.field_validator("name")
    @classmethod
    def once(cls, name: str) -> str:
        if name.endswith("!"):
            raise ValueError("already")
        return name + "!"


class Failing(pydantic.BaseModel):
    name: str

    @pydantic.field_validator("name")
    @classmethod
    def fail(cls, name: str) -> str:
        raise KeyError(name)


class Rounded(pydantic.BaseModel):
    number: float

    @pydantic.field_serializer("number")
    def rounded(self, number: float) -> float:
        return round(number, 1)


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"
    name: str


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Stamped(pydantic.BaseModel):
    name: str
    id: str = pydantic.Field(default_factory=lambda: uuid.uuid4().hex)
    number: int = 0


class Stamps(typing_extensions.TypedDict):
    first: Stamped
    second: Stamped


@dataclasses.dataclass
class Holder:
    first: Stamped
    more: list[Stamped]


class Mutated(pydantic.BaseModel):
    name: str
    items: list[int] = []

    def added(self, item: int) -> "Mutated":
        self.items.append(item)
        return self


class Open(pydantic.BaseModel, extra="allow"):
    name: str


class Frozen(pydantic.BaseModel, frozen=True):
    name: str
    size: int = 1


class Root(pydantic.RootModel[list[int]]):
    pass


@pydantic.dataclasses.dataclass
class PydanticPoint:
    x: int
    y: int = 0


class Aliased(pydantic.BaseModel):
    name: str = pydantic.Field(alias="Name")
    path: str = pydantic.Field(default="", validation_alias=pydantic.AliasPath("Deep", "path"))
    choice: int = pydantic.Field(default=1, validation_alias=pydantic.AliasChoices("Choice", "choix"))


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.title, rest))


class Generated(pydantic.BaseModel, alias_generator=camel):
    some_name: str
    other_name: str = "o"


class ByName(Generated, populate_by_name=True, extra="forbid"):
    pass


class OnlyByName(Generated):
    model_config = pydantic.ConfigDict(validate_by_name=True, validate_by_alias=False)


class Serialized(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(serialization_alias="NAME")


class AlwaysAlias(pydantic.BaseModel, serialize_by_alias=True, extra="forbid"):
    name: str = pydantic.Field(alias="Name")


class Swapped(pydantic.BaseModel):
    a: int = pydantic.Field(alias="b")
    b: int = pydantic.Field(alias="a")


class BeforeAlias(pydantic.BaseModel):
    name: str = pydantic.Field(alias="Name")

    @pydantic.model_validator(mode="before")
    @classmethod
    def only_alias(cls, data: Any) -> Any:
        if "Name" not in data:
            raise ValueError("no Name")
        return data


class WithJson(pydantic.BaseModel):
    data: pydantic.Json[list[int]]


class Computed(pydantic.BaseModel, extra="forbid"):
    width: int

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> int:
        return self.width**2


class StrictAliased(pydantic.BaseModel, extra="forbid", strict=True):
    name: str = pydantic.Field(alias="Name", exclude=False)


@pydantic.dataclasses.dataclass
class AliasedData:
    number: int = pydantic.Field(alias="Number")


@dataclasses.dataclass
class Envelope(Generic[T]):
    contents: list[T]


@dataclasses.dataclass
class Remembering:
    size: int

    @functools.cached_property
    def area(self) -> int:
        return self.size**2


class RememberingModel(pydantic.BaseModel):
    size: int

    @functools.cached_property
    def area(self) -> int:
        return self.size**2


Number = NewType("Number", int)
