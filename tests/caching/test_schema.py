"""The mark of a result's type: another structure has another mark, the same one the same mark in every process."""

import collections
import dataclasses
import enum
import pathlib
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypeVar

import pydantic
import pydantic.dataclasses
import pytest
import result_types
import typing_extensions
from helpers import stable_id

import aiokv
from aiokv.caching.results import ResultCodec
from aiokv.caching.schema import describe

T = TypeVar("T")


def mark(returns: Any) -> str:
    async def function() -> None: ...

    function.__annotations__ = {"return": returns}
    codec = ResultCodec(function)
    codec.resolve()
    assert describe(returns).mark == codec.schema
    return codec.schema


def named(kind: Any, name: str = "Result") -> Any:
    """Rename a class as if it stood in a module, which it does not: a later version of the program has the same names."""
    kind.__name__ = kind.__qualname__ = name
    kind.__module__ = "program"
    return kind


def model(fields: dict[str, Any], **config: Any) -> Any:
    return pydantic.create_model("Result", __config__=config or None, __module__="program", **fields)  # type: ignore[call-overload]


def data(*fields: Any) -> Any:
    return named(dataclasses.make_dataclass("Result", fields))


def pydantic_data(*fields: Any) -> Any:
    return pydantic.dataclasses.dataclass(data(*fields))


def typed_dict(fields: dict[str, Any], **options: Any) -> Any:
    return named(typing_extensions.TypedDict("Result", fields, **options))  # type: ignore[operator]


def named_tuple(*fields: Any) -> Any:
    return named(NamedTuple("Result", fields))


def enumeration(**members: Any) -> Any:
    return enum.Enum("Result", members, module="program")


def plain_function(value: Any) -> Any:
    return value


def other_function(value: Any) -> Any:
    return value


def field(**options: Any) -> Any:
    return pydantic.Field(**options)


VERSIONS: dict[str, list[Callable[[], Any]]] = {
    "model": [
        lambda: model({"a": (int, ...)}),
        lambda: model({"a": (int, 1)}),
        lambda: model({"a": (int, 2)}),
        lambda: model({"a": (str, ...)}),
        lambda: model({"a": (int | None, ...)}),
        lambda: model({"a": (int, ...), "b": (int, 1)}),
        lambda: model({"b": (int, 1), "a": (int, ...)}),
        lambda: model({"a": (int, ...), "b": (int, -1)}),
        lambda: model({"a": (int, ...), "b": (float, 0.0)}),
        lambda: model({"a": (int, ...), "b": (float, -0.0)}),
        lambda: model({"a": (int, ...), "b": (bool, True)}),
        lambda: model({"a": (int, ...), "b": (list[int], [])}),
        lambda: model({"a": (int, ...), "b": (list[int], [1])}),
        lambda: model({"a": (int, ...), "b": (list[int], field(default_factory=list))}),
        lambda: model({"a": (int, ...), "b": (int, field(default_factory=lambda: 1))}),
        lambda: model({"a": (int, field(alias="b"))}),
        lambda: model({"a": (int, field(alias="c"))}),
        lambda: model({"a": (int, field(validation_alias="b"))}),
        lambda: model({"a": (int, field(serialization_alias="b"))}),
        lambda: model({"a": (int, field(validation_alias=pydantic.AliasPath("b", 0)))}),
        lambda: model({"a": (int, field(validation_alias=pydantic.AliasPath("b", 1)))}),
        lambda: model({"a": (int, field(validation_alias=pydantic.AliasChoices("b", "c")))}),
        lambda: model({"a": (int, field(gt=0))}),
        lambda: model({"a": (int, field(gt=1))}),
        lambda: model({"a": (int, field(strict=True))}),
        lambda: model({"a": (int, field(default=0, exclude=True))}),
        lambda: model({"a": (Annotated[int, pydantic.AfterValidator(plain_function)], ...)}),
        lambda: model({"a": (Annotated[int, pydantic.AfterValidator(other_function)], ...)}),
        lambda: model({"a": (int, ...)}, extra="forbid"),
        lambda: model({"a": (int, ...)}, ser_json_bytes="base64"),
        lambda: model({"a": (int, ...)}, alias_generator=str.upper),
        lambda: model({"a": (data(("x", int)), ...)}),
        lambda: model({"a": (data(("x", int), ("y", int, 0)), ...)}),
        lambda: model({"a": (list[model({"x": (int, ...)})], ...)}),
        lambda: model({"a": (list[model({"x": (int, ...), "y": (int, 0)})], ...)}),
        lambda: model({"a": (dict[str, model({"x": (int, ...), "y": (int, 0)})], ...)}),
    ],
    "dataclass": [
        lambda: data(("a", int)),
        lambda: data(("a", int, 1)),
        lambda: data(("a", int), ("b", int, 1)),
        lambda: data(("a", int), ("b", int, 2)),
        lambda: data(("a", int), ("b", list, dataclasses.field(default_factory=list))),
        lambda: data(("a", int), ("b", dict, dataclasses.field(default_factory=dict))),
        lambda: data(("a", int), ("b", int, dataclasses.field(default=1, init=False))),
        lambda: data(("a", "int | None")),
        lambda: data(("a", Annotated[int, field(alias="A")])),
        lambda: data(("a", data(("x", int)))),
        lambda: data(("a", data(("x", str)))),
        lambda: pydantic_data(("a", int), ("c", int)),
        lambda: pydantic_data(("a", int), ("c", int, 1)),
    ],
    "TypedDict": [
        lambda: typed_dict({"a": int}),
        lambda: typed_dict({"a": str}),
        lambda: typed_dict({"a": int, "b": int}),
        lambda: typed_dict({"b": int, "a": int}),
        lambda: typed_dict({"a": int}, total=False),
        lambda: typed_dict({"a": int, "b": typing_extensions.NotRequired[int]}),
        lambda: typed_dict({"a": typed_dict({"x": int})}),
        lambda: typed_dict({"a": typed_dict({"x": int, "y": typing_extensions.NotRequired[int]})}),
    ],
    "named tuple": [
        lambda: named_tuple(("a", int)),
        lambda: named_tuple(("a", str)),
        lambda: named_tuple(("a", int), ("b", int)),
        lambda: named_tuple(("b", int), ("a", int)),
    ],
    "enum": [
        lambda: enumeration(RED=1),
        lambda: enumeration(RED="1"),
        lambda: enumeration(RED=1, BLUE=2),
        lambda: enumeration(BLUE=2, RED=1),
        lambda: enumeration(RED=1, BLUE=3),
        lambda: enumeration(RED=1, BLUE=1),
    ],
    "annotation": [
        lambda: int,
        lambda: float,
        lambda: bool,
        lambda: None,
        lambda: object,
        lambda: list,
        lambda: list[int],
        lambda: list[str],
        lambda: list[list[int]],
        lambda: dict[str, int],
        lambda: dict[str, Any],
        lambda: dict[int, str],
        lambda: tuple[int, str],
        lambda: tuple[str, int],
        lambda: tuple[int, ...],
        lambda: tuple[()],
        lambda: tuple,
        lambda: set[int],
        lambda: frozenset[int],
        lambda: collections.deque[int],
        lambda: int | None,
        lambda: int | str,
        lambda: str | int,
        lambda: Literal[1],
        lambda: Literal["1"],
        lambda: Literal[True],
        lambda: Literal[1, 2],
        lambda: Annotated[int, field(gt=0)],
        lambda: Annotated[int, field(gt=1)],
        lambda: Annotated[int, "note"],
        lambda: Annotated[int, pydantic.AfterValidator(plain_function)],
        lambda: Annotated[int, pydantic.AfterValidator(other_function)],
        lambda: NewType("Number", int),
        lambda: NewType("Other", int),
        lambda: NewType("Number", str),
        lambda: result_types.Model,
        lambda: result_types.Wider,
        lambda: result_types.Box[int],
        lambda: result_types.Box[str],
        lambda: result_types.Box[result_types.Model],
        lambda: result_types.Envelope[int],
        lambda: result_types.Envelope[result_types.Model],
        lambda: list[result_types.Model],
        lambda: result_types.Model | None,
        lambda: typing_extensions.TypeAliasType("Alias", list[int]),
        lambda: typing_extensions.TypeAliasType("Alias", list[str]),
    ],
}


@pytest.mark.parametrize("kind", VERSIONS)
def test_each_structure_has_a_mark_of_its_own_that_does_not_change(kind: str) -> None:
    marks = [mark(make()) for make in VERSIONS[kind]]
    again = [mark(make()) for make in VERSIONS[kind]]
    assert marks == again
    repeated = [number for number, one in enumerate(marks) if marks.count(one) > 1]
    assert not repeated, "these have one mark"
    assert all(len(one) == 12 for one in marks)


def test_what_documents_a_field_does_not_count() -> None:
    plain = mark(model({"a": (int, 1)}))
    assert plain == mark(model({"a": (int, field(default=1, description="d", title="t", examples=[1], repr=False))}))
    assert plain == mark(model({"a": (int, 1)}, title="t"))


def test_nothing_annotated_has_no_mark() -> None:
    async def function(): ...  # type: ignore[no-untyped-def]  # noqa: ANN202 (the point)

    assert ResultCodec(function).schema == mark(Any) == describe(Any).mark == ""


class Opaque:
    __slots__ = ("number",)


@pytest.mark.parametrize(
    ("default", "is_plain"),
    [(1, True), ([1, {"a": (None,)}], True), (Opaque(), False), ([1, Opaque()], False), ({"a": {"b": Opaque()}}, False)],
    ids=stable_id,
)
def test_unset_fields_are_left_out_only_where_the_mark_holds_all_of_each_default(default: Any, is_plain: object) -> None:
    assert describe(model({"a": (Any, default)})).may_omit_unset is is_plain
    assert describe(list[result_types.Box[model({"a": (Any, default)})]]).may_omit_unset is is_plain  # type: ignore[misc]


def test_old_and_new_spellings_are_one_type() -> None:
    pairs: list[tuple[Any, Any]] = [
        (typing.List[int], list[int]),  # noqa: UP006 (the point)
        (typing.Dict[str, int], dict[str, int]),  # noqa: UP006 (likewise)
        (typing.Optional[int], int | None),  # noqa: UP045 (likewise)
        (typing.Union[int, str], int | str),  # noqa: UP007 (likewise)
    ]
    for old, new in pairs:
        assert mark(old) == mark(new)


def generic_of(inner: Any) -> Any:
    @dataclasses.dataclass
    class Page(Generic[T]):
        items: list[T]
        number: int = 0

    return named(Page, "Page")[inner]


def test_field_added_deep_inside_is_seen_through_every_container() -> None:
    old, new = data(("x", int)), data(("x", int), ("y", int, 0))
    around: list[Callable[[Any], Any]] = [
        lambda kind: list[kind],
        lambda kind: dict[str, kind | None],
        lambda kind: tuple[int, kind],
        lambda kind: Annotated[kind, "note"],
        lambda kind: result_types.Box[kind],
        lambda kind: result_types.Envelope[kind],
        generic_of,
        lambda kind: typed_dict({"a": kind}),
        lambda kind: named_tuple(("a", kind)),
        lambda kind: NewType("Renamed", kind),  # type: ignore[valid-newtype]
        lambda kind: typing_extensions.TypeAliasType("Alias", list[kind]),
    ]
    for wrap in around:
        assert mark(wrap(old)) != mark(wrap(new))
        assert mark(wrap(old)) == mark(wrap(data(("x", int))))


class Tree(pydantic.BaseModel):
    children: list["Tree"] = []
    parent: "Tree | None" = None


@dataclasses.dataclass
class Chain:
    following: "Chain | None" = None
    other: "list[Link]" = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Link:
    chain: Chain | None = None


Nested = typing_extensions.TypeAliasType("Nested", "list[Nested] | int")


@pytest.mark.parametrize("returns", [Tree, Chain, Link, Nested, list[Tree], dict[str, Chain | Link]], ids=str)
def test_type_that_holds_itself_has_a_mark(returns: Any) -> None:
    assert mark(returns) == mark(returns) != ""


def test_type_in_another_module_that_grew_is_seen() -> None:
    marks = []
    for body in ("x: int", "x: int\n    y: int = 0", "x: int"):
        module = types.ModuleType("elsewhere")
        sys.modules["elsewhere"] = module
        try:
            source = "from __future__ import annotations\nimport dataclasses\n"
            source += f"@dataclasses.dataclass\nclass Inner:\n    {body}\n"
            source += "@dataclasses.dataclass\nclass Outer:\n    inner: list[Inner]\n"
            exec(source, module.__dict__)
            marks.append(mark(module.Outer))
        finally:
            del sys.modules["elsewhere"]
    assert marks[0] == marks[2] != marks[1]


def test_field_whose_name_is_only_known_to_type_checkers_does_not_hide_the_others() -> None:
    @dataclasses.dataclass
    class Outer:
        unknown: "Missing"  # type: ignore[name-defined]  # noqa: F821 (the point)
        inner: "Tree"

    @dataclasses.dataclass
    class Other:
        unknown: "Missing"  # type: ignore[name-defined]  # noqa: F821 (the point)
        inner: "Chain"

    marks = [describe(named(kind)).mark for kind in (Outer, Other)]
    assert marks[0] != marks[1]


PROGRAM = """
import dataclasses, enum, functools, sys, typing
import pydantic
from aiokv.caching.schema import describe

class Colour(enum.Enum):
    RED = 1

@dataclasses.dataclass(frozen=True)
class Setting:
    names: frozenset = frozenset("abcdef")

def check(value):
    return value

class Inner(pydantic.BaseModel):
    colour: Colour = Colour.RED
    names: set[str] = {"a", "b", "c", "d"}
    made: typing.Any = pydantic.Field(default_factory=lambda: 1)
    setting: Setting = Setting()
    number: typing.Annotated[int, pydantic.AfterValidator(check), pydantic.BeforeValidator(functools.partial(check))] = 1
    opaque: typing.Any = object()
    kind: typing.Any = Colour

@dataclasses.dataclass
class Outer:
    inner: list[Inner]
    checked: typing.Annotated[int, pydantic.AfterValidator(lambda value: value), Setting()] = 1
    function: typing.Any = check

if __name__ == "__main__" or sys.argv[-1] == "imported":
    print(describe(Outer | dict[str, Outer]).mark)
"""


def test_mark_is_the_same_in_every_process_and_for_a_module_that_is_run_or_imported(tmp_path: pathlib.Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    ways = [["program.py"], ["-m", "program"], ["-c", "import program", "imported"]]
    # Flipping the seed reorders sets; objects get other addresses anyway.
    marks = [
        subprocess.run(
            [sys.executable, *way],
            cwd=tmp_path,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": f"{pathlib.Path(aiokv.__file__).parents[1]}:{tmp_path}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for way, seed in zip(ways, "123", strict=True)
    ]
    assert len(set(marks)) == 1
    assert len(marks[0]) == 13


def test_mark_of_a_known_type_never_changes() -> None:
    assert mark(result_types.Nested) == "e88fc8cc88d2"
    assert mark(dict[str, list[int | None]]) == "12e08d8df5e8"
