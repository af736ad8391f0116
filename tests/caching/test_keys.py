"""The key of a call: equal calls share one, different calls never do, in every process."""

import dataclasses
import inspect
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import golden_values
import numpy as np
import pytest
from golden_values import Colour, Model, Open, Pair, Point, Tenant, Word
from helpers import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from key_values import SMALL, identity

from aiokv.caching.fingerprint import fingerprint
from aiokv.caching.keys import MAX_PREFIX_CHARS, KeyMaker

GOLDEN: dict[str, dict[str, str]] = json.loads((REPOSITORY / "tests" / "caching" / "golden_keys.json").read_text())
SECRET = "s3cr3t-value"
Function = Callable[..., Coroutine[None, None, object]]


async def plain(a: object, b: object = 2) -> object:
    return locals()


async def nothing() -> object:
    return locals()


async def positional_only(a: object, b: object = 2, /) -> object:
    return locals()


async def keyword_only(*, a: object, b: object = 2) -> object:
    return locals()


async def stars(*args: object, **kwargs: object) -> object:
    return locals()


async def star_then_keyword(a: object, *args: object, b: object = 2) -> object:
    return locals()


async def every_kind(a: object, b: object = 2, /, c: object = 3, *args: object, d: object = 4, **kwargs: object) -> object:
    return locals()


async def positional_and_keyword_only(a: object, /, *, b: object = 2) -> object:
    return locals()


async def object_defaults(a: object = Point(1), b: object = (1, (2,)), *, c: object = Colour.RED) -> object:
    return locals()


async def named_like_internals(_default_1: object, values: object = 5, _default_0: object = 6, lambda_: object = 7) -> object:
    return locals()


async def named_like_builtins(encode: object, tuple: object = 1, *, signature: object = 2) -> object:  # noqa: A002
    return locals()


async def named_like_types(type: object, types: object = 1, map: object = 2) -> object:  # noqa: A002
    return locals()


async def beyond_ascii(ñ: object, naïve: object = 1) -> object:  # noqa: PLC2401
    return locals()


@dataclasses.dataclass
class Mutable:
    items: list[Any]


class Service:
    async def method(self, a: object, b: object = 2) -> object:
        return locals()

    async def mangled(self, __a: object, *, __b: object = 2) -> object:  # noqa: PYI063 (a mangled name, not a positional-only one)
        return locals()

    async def itself(self, *, values: object = 1) -> object:
        return locals()


def bound(function: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Return what Python binds to each parameter, by calling a function that returns its own."""
    with pytest.raises(StopIteration) as stopped:
        function(*args, **kwargs).send(None)
    return stopped.value.value


def key_of(function: Function, /, *args: object, **kwargs: object) -> str:
    return KeyMaker(function)(args, kwargs)


@pytest.mark.parametrize("name", golden_values.WHOLE_KEYS)
def test_key_is_what_it_has_always_been(name: str) -> None:
    assert golden_values.computed()["keys"][name] == GOLDEN["keys"][name]


class OwnStr(str):  # noqa: SLOT000 (a subclass of a builtin is the point)
    pass


CALLS: list[tuple[Function, list[tuple[tuple[object, ...], dict[str, object]]]]] = [
    (plain, [((1,), {}), ((), {"a": 1}), ((1, 2), {}), ((1,), {"b": 2}), ((), {"b": 2, "a": 1})]),
    (positional_only, [((1,), {}), ((1, 2), {})]),
    (keyword_only, [((), {"a": 1}), ((), {"a": 1, "b": 2}), ((), {"b": 2, "a": 1})]),
    (stars, [((1,), {"x": 1, "y": 2}), ((1,), {"x": 1, "y": 2})]),
    (star_then_keyword, [((1,), {}), ((1,), {"b": 2}), ((), {"a": 1})]),
    (every_kind, [((1,), {}), ((1, 2), {"c": 3}), ((1, 2, 3), {"d": 4}), ((1,), {"d": 4, "c": 3})]),
    (positional_and_keyword_only, [((1,), {}), ((1,), {"b": 2})]),
    (object_defaults, [((), {}), ((Point(1),), {}), ((), {"c": Colour.RED, "b": (1, (2,))})]),
    (named_like_internals, [((1,), {}), ((1, 5, 6, 7), {}), ((), {"_default_1": 1, "_default_0": 6, "values": 5})]),
    (named_like_builtins, [((1,), {}), ((1, 1), {"signature": 2}), ((), {"encode": 1, "tuple": 1})]),
    (named_like_types, [((1,), {}), ((1, 1), {"map": 2}), ((), {"map": 2, "type": 1, "types": 1})]),
    (beyond_ascii, [((1,), {}), ((), {"ñ": 1}), ((1,), {"naïve": 1})]),
    (Service.method, [((None, 1), {}), ((None,), {"a": 1}), ((), {"self": None, "a": 1, "b": 2})]),
    (Service.mangled, [((None, 1), {}), ((None,), {"_Service__a": 1}), ((None, 1), {"_Service__b": 2})]),
    (Service.itself, [((None,), {}), ((), {"self": None}), ((None,), {"values": 1})]),
    (nothing, [((), {})]),
]


@pytest.mark.parametrize(("function", "calls"), CALLS, ids=[function.__qualname__ for function, _ in CALLS])
def test_equal_calls_give_one_key(function: Function, calls: list[tuple[tuple[object, ...], dict[str, object]]]) -> None:
    maker = KeyMaker(function)
    assert len({maker(args, kwargs) for args, kwargs in calls}) == 1
    assert len({KeyMaker(function)(args, kwargs) for args, kwargs in calls}) == 1


@given(
    function=st.sampled_from([function for function, _ in CALLS]),
    calls=st.lists(
        st.tuples(
            st.lists(SMALL, max_size=4),
            st.dictionaries(st.sampled_from(["a", "b", "c", "d", "x", "y", "self", "values", "_default_0", "encode"]), SMALL),
        ),
        min_size=2,
        max_size=6,
    ),
)
@settings(max_examples=200)
@example(function=stars, calls=[(["1:b:2", 3], {}), ([1, "2:b:3"], {})])
@example(function=plain, calls=[([None], {"b": ""}), ([""], {"b": None})])
@example(function=stars, calls=[([1, ()], {}), ([1], {}), ([(1,)], {})])
@example(function=stars, calls=[([("x", 1)], {}), ([], {"x": 1})])
def test_calls_share_a_key_exactly_where_python_binds_the_same(
    function: Function, calls: list[tuple[list[object], dict[str, object]]]
) -> None:
    maker = KeyMaker(function)
    key_by_call: dict[object, str] = {}
    for args, kwargs in calls:
        try:
            arguments = bound(function, tuple(args), kwargs)
        except TypeError:
            with pytest.raises(TypeError, match=function.__name__):
                maker(tuple(args), kwargs)
            continue
        key = maker(tuple(args), kwargs)
        assert key_by_call.setdefault(identity(arguments), key) == key
    assert len(set(key_by_call.values())) == len(key_by_call)


def test_key_is_prefix_version_and_digest_of_128_bits() -> None:
    prefix, version, digest = key_of(plain, 1).rsplit(":", 2)
    assert prefix == f"{__name__}.plain" == KeyMaker(plain).prefix
    assert version == KeyMaker(plain).version == fingerprint(plain)
    assert len(bytes.fromhex(digest)) == 16


def test_prefix_of_a_method_names_its_class() -> None:
    assert KeyMaker(Service.method).prefix == f"{__name__}.Service.method"


def test_functions_of_one_signature_have_keys_of_their_own() -> None:
    digests = [key_of(function, 1).rpartition(":")[2] for function in (plain, positional_only)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (plain, (), {}),
        (plain, (1, 2, 3), {}),
        (plain, (1,), {"a": 1}),
        (plain, (1,), {"c": 1}),
        (nothing, (1,), {}),
        (positional_only, (), {"a": 1}),
        (keyword_only, (1,), {}),
        (Service.method, (), {}),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_call_that_does_not_fit_is_a_type_error_that_names_the_function(
    function: Function, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    with pytest.raises(TypeError, match=function.__qualname__) as caught:
        KeyMaker(function)(args, kwargs)
    assert "_default" not in str(caught.value)
    with pytest.raises(TypeError):
        # Whatever is asked of the key beside it.
        KeyMaker(function, key=lambda *_args, **_kwargs: 1)(args, kwargs)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "place"),
    [
        (plain, (1, object()), {}, "b"),
        (plain, ([1, {SECRET: object()}],), {}, "a"),
        (plain, ({object(): SECRET},), {}, "a"),
        (stars, (SECRET, object()), {}, "args"),
        (stars, (), {SECRET: object()}, "kwargs"),
        (plain, (Model.model_construct(name=object()),), {}, "a"),
        (plain, (Tenant(object()),), {}, "a"),  # type: ignore[arg-type]
        (plain, (OwnStr(SECRET),), {}, "a"),
    ],
    ids=["itself", "in a list", "a dictionary's key", "of many", "of many by name", "field", "own key", "text"],
)
def test_unencodable_argument_is_named_with_ways_out_and_never_shown(
    function: Function, args: tuple[object, ...], kwargs: dict[str, object], place: str
) -> None:
    with pytest.raises(TypeError) as caught:
        KeyMaker(function)(args, kwargs)
    message = str(caught.value)
    assert f"{function.__qualname__}: the argument {place}" in message
    assert f"ignore=({place!r},)" in message
    assert "key=" in message
    assert "__cache_key__" in message
    assert SECRET not in message
    assert "object at 0x" not in message


@pytest.mark.parametrize("option", ["key", "vary"])
def test_unencodable_key_or_vary_is_named_without_advice_to_ignore_it(option: str) -> None:
    options: dict[str, Any] = {option: lambda *_args, **_kwargs: object()}
    with pytest.raises(TypeError, match=rf"plain.*{option}=") as caught:
        KeyMaker(plain, **options)((1,), {})
    assert "ignore=" not in str(caught.value)


def test_surrogate_in_a_path_is_no_error_of_another_kind() -> None:
    assert key_of(plain, pathlib.PurePosixPath("a\ud800"))


@dataclasses.dataclass
class Unset:
    a: int
    b: int = dataclasses.field(init=False)


def test_dataclass_with_an_unset_field_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="plain: the argument a"):
        key_of(plain, Unset(1))


def self_containing_list() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


def self_containing_dict() -> dict[str, object]:
    value: dict[str, object] = {}
    value["x"] = (value,)
    return value


class SelfKeyed:
    def __cache_key__(self) -> object:
        return self


@pytest.mark.parametrize("make", [self_containing_list, self_containing_dict, SelfKeyed], ids=lambda make: make.__name__)
def test_value_that_holds_itself_is_a_type_error_that_names_the_parameter(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="plain: the argument b") as caught:
        key_of(plain, 1, make())
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("ignore", ["b", ("b",), ["b"], {"b"}], ids=repr)
def test_ignored_parameter_does_not_count_and_need_not_be_encodable(ignore: Any) -> None:
    maker = KeyMaker(plain, ignore=ignore)
    assert maker((1,), {}) == maker((1, object()), {}) == maker((1,), {"b": self_containing_list()})
    assert maker((1,), {}) != maker((2,), {})


def test_every_star_can_be_ignored() -> None:
    maker = KeyMaker(every_kind, ignore=("args", "kwargs"))
    assert maker((1,), {}) == maker((1, 2, 3, object()), {"x": object()})
    assert maker((1,), {}) != maker((1,), {"d": 5})


@pytest.mark.parametrize("ignore", ["c", ("a", "c"), ["kwargs"]], ids=repr)
def test_ignoring_an_unknown_parameter_is_a_type_error_that_names_it_and_the_known_ones(ignore: Any) -> None:
    with pytest.raises(TypeError, match=r"(?s)c|kwargs") as caught:
        KeyMaker(plain, ignore=ignore)
    assert "plain" in str(caught.value)
    assert "['a', 'b']" in str(caught.value)


def test_local_function_is_refused_without_a_key() -> None:
    async def local(a: int) -> object:
        return a

    with pytest.raises(ValueError, match=r"local.*key="):
        KeyMaker(local)
    assert KeyMaker(local, key=lambda a: a)((1,), {}) != KeyMaker(local, key=lambda a: a)((2,), {})


def test_key_takes_the_place_of_the_arguments() -> None:
    maker = KeyMaker(plain, key=lambda a, b=2: a.number)  # noqa: ARG005 (takes what the function takes)
    assert maker((Tenant(7),), {}) == maker((Tenant(7, "other"), object()), {})
    assert maker((Tenant(7),), {}) != maker((Tenant(8),), {})


def test_vary_comes_on_top_of_the_arguments() -> None:
    tenants = iter(["x", "x", "y", "x"])
    maker = KeyMaker(plain, vary=lambda *_args, **_kwargs: next(tenants))
    first, again, other_tenant, other_argument = maker((1,), {}), maker((1,), {}), maker((1,), {}), maker((2,), {})
    assert first == again
    assert len({first, other_tenant, other_argument}) == 3


def test_vary_comes_on_top_of_a_key() -> None:
    keys = {KeyMaker(plain, key=lambda *_: "k", vary=lambda *_, v=vary: v)((1,), {}) for vary in ("x", "y", None)}
    assert len(keys) == 3


@pytest.mark.parametrize("versions", [(0, 1), (1, "1"), ("1", "2"), (0, "0")], ids=repr)
def test_versions_are_told_apart(versions: tuple[int | str, int | str]) -> None:
    assert KeyMaker(plain, version=versions[0])((1,), {}) != KeyMaker(plain, version=versions[1])((1,), {})


def test_version_and_prefix_of_subclasses_of_text_are_what_they_say() -> None:
    maker = KeyMaker(plain, prefix=OwnStr("p"), version=Word.LOW)
    assert maker((1,), {}) == KeyMaker(plain, prefix="p", version="low")((1,), {})


def test_version_of_another_type_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="version"):
        KeyMaker(plain, version=object())  # type: ignore[arg-type]


def test_prefix_that_looks_like_a_version_meets_nothing() -> None:
    first, second = KeyMaker(plain, prefix="a:1", version=0), KeyMaker(plain, prefix="a", version="1:0")
    assert first.prefix == "a:1"
    keys = first((1,), {}), second((1,), {})
    assert all(key.startswith("a:1:0:") for key in keys)
    assert keys[0] != keys[1]


def test_prefix_and_version_let_two_functions_share() -> None:
    first, second = (KeyMaker(function, prefix="p", version=1) for function in (plain, positional_only))
    assert first((1,), {}) == second((1,), {})
    assert KeyMaker(plain, prefix="p")((1,), {}) != KeyMaker(positional_only, prefix="p")((1,), {})


def test_version_pins_what_a_fingerprint_was() -> None:
    pinned = KeyMaker(plain, version=fingerprint(plain))
    assert pinned((1,), {}) == KeyMaker(plain)((1,), {})


@pytest.mark.parametrize("prefix", ["", "x" * (MAX_PREFIX_CHARS + 1)], ids=len)
def test_prefix_of_unusable_length_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        KeyMaker(plain, prefix=prefix)


SCRIPT = """
from aiokv.caching.keys import KeyMaker

async def work(a: int) -> None: ...

print(KeyMaker(work)((1,), {}))
"""


def output_of(folder: pathlib.Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    answer = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def test_script_is_named_by_its_file_however_it_is_run(tmp_path: pathlib.Path) -> None:
    for name in ("first.py", "second.py", "package/__main__.py", "package/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name.endswith("__init__.py") else SCRIPT)
    first, second = output_of(tmp_path, "first.py"), output_of(tmp_path, str(tmp_path / "second.py"))
    assert first.startswith("first.work:")
    assert second.startswith("second.work:")
    assert first.rpartition(":")[2] != second.rpartition(":")[2]
    assert output_of(tmp_path, "-c", "import first") == first
    assert output_of(tmp_path, "-m", "first") == first
    assert output_of(tmp_path, "-m", "package").startswith("package.work:")


def test_remembered_calls_are_never_mixed() -> None:
    calls: list[tuple[object, ...]] = [
        (1,), (True,), (1.0,), ("1",), (b"1",), (1, True), (True, 1), (0,), (False,), (0.0,), (-0.0,), ("",), (None,)
    ]  # fmt: skip
    maker = KeyMaker(plain)
    alone = [KeyMaker(plain)(args, {}) for args in calls]
    assert len(set(alone)) == len(calls)
    for _ in range(3):
        assert [maker(args, {}) for args in calls] == alone
        assert [maker(args, {}) for args in reversed(calls)] == alone[::-1]


@given(
    function=st.sampled_from([plain, keyword_only, stars, named_like_types, nothing]),
    calls=st.lists(
        st.tuples(st.lists(SMALL, max_size=3), st.dictionaries(st.sampled_from(["a", "b", "type"]), SMALL)), max_size=6
    ),
)
@settings(max_examples=200)
@example(function=plain, calls=[([1], {}), ([True], {}), ([1.0], {}), ([0.0], {}), ([-0.0], {})])
def test_calls_that_are_looked_up_without_a_key_are_told_apart_as_keys_are(
    function: Function, calls: list[tuple[list[object], dict[str, object]]]
) -> None:
    maker = KeyMaker(function)
    key_by_call: dict[object, str] = {}
    for args, kwargs in calls:
        try:
            key = maker(tuple(args), kwargs)
        except TypeError:
            with pytest.raises(TypeError, match=function.__name__):
                maker.plain_call(tuple(args), kwargs)
            continue
        call = maker.plain_call(tuple(args), kwargs)
        if call is not None:
            assert key_by_call.setdefault(call, key) == key
    assert len(set(key_by_call.values())) == len(key_by_call)


def test_call_that_depends_on_more_than_its_arguments_is_never_looked_up_without_a_key() -> None:
    assert KeyMaker(plain, vary=lambda *_args: 1).plain_call((1,), {}) is None
    assert KeyMaker(plain, key=lambda *_args: 1).plain_call((1,), {}) is None


def test_keys_stay_the_same_after_many_calls() -> None:
    maker = KeyMaker(plain)
    first = [maker((number,), {}) for number in range(100)]
    for number in range(10_000):
        maker((number,), {"b": str(number)})
    assert [maker((number,), {}) for number in range(100)] == first
    assert len(set(first)) == 100


def test_memory_of_remembered_calls_is_bounded() -> None:
    maker = KeyMaker(plain)
    for number in range(10_000):
        maker((number,), {})
    maker(("x" * 100_000,), {})
    remembered = {**maker._young, **maker._old}
    assert 1_000 < len(remembered) <= 2_048
    assert not any("x" * 1_000 in str(values) for values in remembered)


def test_call_is_remembered_however_many_others_come_after_a_full_generation() -> None:
    # A memory that is cleared when full would forget at once what came right before.
    maker = KeyMaker(plain)
    for number in range(5_000):
        maker((number,), {})
        if number >= 500:
            assert any((number - 500, 2, int, int) in generation for generation in (maker._young, maker._old))


def test_remembered_call_still_asks_key_and_vary() -> None:
    tenants = iter("xyx")
    maker = KeyMaker(plain, vary=lambda *_: next(tenants))
    first, second, third = maker((1,), {}), maker((1,), {}), maker((1,), {})
    assert first == third != second


def test_default_that_is_changed_in_place_counts_as_it_is() -> None:
    before = key_of(changing_default)
    CHANGING.append(1)
    try:
        assert key_of(changing_default) == key_of(changing_default, [1]) != before
    finally:
        CHANGING.clear()


CHANGING: list[int] = []


async def changing_default(a: object = CHANGING) -> object:
    return a


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "settled"),
    [
        (plain, (1,), {}, True),
        (plain, (1.5, ("x", frozenset({b"y"}))), {}, True),
        (plain, (Colour.RED, Point), {}, True),
        (plain, ([],), {}, False),
        (plain, (1, {}), {}, False),
        (plain, (Point(1),), {}, False),
        (plain, (([],),), {}, False),
        (object_defaults, (), {}, False),
        (stars, (1, "x"), {"x": 1.5}, True),
        (stars, (1, "x"), {"x": [1]}, False),
        (stars, (1, [1]), {}, False),
        (nothing, (), {}, True),
    ],
)
def test_key_is_settled_where_no_argument_can_change(
    function: Function, args: tuple[object, ...], kwargs: dict[str, object], *, settled: bool
) -> None:
    maker = KeyMaker(function)
    assert maker.make(args, kwargs) == (maker(args, kwargs), settled)


@pytest.mark.parametrize("option", ["key", "vary"])
def test_key_that_a_function_makes_is_never_settled(option: str) -> None:
    options: dict[str, Any] = {option: lambda *_args, **_kwargs: 1}
    maker = KeyMaker(plain, **options)
    assert maker.make((1,), {}) == (maker((1,), {}), False)


def test_ignored_argument_that_may_change_leaves_a_key_settled() -> None:
    assert KeyMaker(plain, ignore="b").make((1, []), {})[1]


@pytest.mark.parametrize(
    ("options", "leaves_out"),
    [
        ({}, False),
        ({"vary": lambda *_: 1}, False),
        ({"ignore": "b"}, True),
        ({"ignore": ()}, False),
        ({"key": lambda *_: 1}, True),
    ],
)
def test_maker_knows_whether_it_leaves_an_argument_out(options: dict[str, Any], *, leaves_out: bool) -> None:
    assert KeyMaker(plain, **options).leaves_out is leaves_out


class Session:
    def __deepcopy__(self, memo: object) -> "Session":
        raise AssertionError


@pytest.mark.parametrize(
    "value",
    [
        [1, [2]],
        {"a": {"b": []}},
        {1, 2},
        bytearray(b"x"),
        ([1],),
        Mutable([1]),
        Model(name="m"),
        Pair(1, "x")._replace(first=[1]),  # type: ignore[arg-type]
        np.arange(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_copy_of_a_call_shares_its_key_and_nothing_that_can_change(value: Any) -> None:
    for maker, args, kwargs in (
        (KeyMaker(plain), (value,), {}),
        (KeyMaker(plain), (), {"a": value}),
        (KeyMaker(stars), (1, value), {"x": value}),
        (KeyMaker(keyword_only), (), {"a": 1, "b": value}),
        (KeyMaker(every_kind), (value, 2, 3, value), {"d": value, "x": value}),
        (KeyMaker(Service.method), (None, value), {}),
    ):
        copied = maker.copies(args, kwargs)
        assert copied is not None
        assert maker(*copied) == maker(args, kwargs)
        copies = [each for each in (*copied[0], *copied[1].values()) if not isinstance(each, int | None)]
        assert copies
        for each in copies:
            assert type(each) is type(value)
            assert each is not value


def test_change_of_an_argument_does_not_reach_the_copy() -> None:
    maker, value = KeyMaker(plain), {"a": [Mutable([1])]}
    key, copied = maker((value,), {}), maker.copies((value,), {})
    value["a"][0].items.append(2)
    assert copied is not None
    assert maker(*copied) == key != maker((value,), {})


def test_copies_leave_out_what_does_not_count_and_what_has_a_key_of_its_own() -> None:
    session, tenant, frozen = Session(), Tenant(1), (1, "x")
    copied = KeyMaker(stars, ignore="kwargs").copies(([tenant], tenant, frozen), {"session": session})
    assert copied is not None
    (inside, itself, same), kwargs = copied
    assert inside == [tenant]
    assert inside[0] is itself is tenant
    assert same is frozen
    assert kwargs["session"] is session


def test_copies_keep_what_a_model_or_dataclass_holds_with_a_key_of_its_own() -> None:
    tenant = Tenant(1)
    copied = KeyMaker(stars).copies((Mutable([tenant]), Open.model_construct({"name"}, name=tenant, more={"x": tenant})), {})
    assert copied is not None
    assert copied[0][0].items[0] is copied[0][1].name is copied[0][1].more["x"] is tenant


def test_copies_with_a_key_function_leave_what_has_no_encoding_as_it_is() -> None:
    session, counted = Session(), [1]
    copied = KeyMaker(plain, key=lambda _session, b: b).copies((session, counted), {})
    assert copied is not None
    assert copied[0][0] is session
    assert copied[0][1] == counted
    assert copied[0][1] is not counted


def test_defaults_are_not_copied() -> None:
    copied = KeyMaker(object_defaults).copies((), {})
    assert copied == ((), {})


class Uncopied(Mutable):
    def __deepcopy__(self, memo: object) -> "Uncopied":
        raise ValueError


class Forgetful(Mutable):
    def __deepcopy__(self, memo: object) -> "Forgetful":
        return Forgetful([])


@pytest.mark.parametrize("value", [Uncopied([1]), Forgetful([1]), [Uncopied([1])]], ids=["fails", "differs", "inside"])
def test_call_that_cannot_be_copied_has_no_copy(value: object) -> None:
    assert KeyMaker(plain).copies((value,), {}) is None


def test_call_that_has_no_key_has_no_copy_either() -> None:
    with pytest.raises(TypeError, match="plain: the argument a"):
        KeyMaker(plain).copies((object(),), {})


async def shaped(one: int, two: int = 2, /, three: int = 3, *more: int, four: int = 4, **named: int) -> None: ...


async def simple(one: int, two: int = 2, *, three: int = 3) -> None: ...


def _with_secret(one: int, two: int, three: int, secret: str = "s3cr3t", *, other: int) -> object:
    return one, two, three, secret, other


class Taking:
    """A function of the program's that keeps what it is called with."""

    def __init__(self, target: Callable[..., object]) -> None:
        self.taken: list[object] = []
        self.__signature__ = inspect.signature(target)

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.taken.append((args, kwargs))
        return repr((args, kwargs))


@pytest.mark.parametrize("option", ["key", "vary"])
@pytest.mark.parametrize(
    ("function", "target", "call", "taken"),
    [
        (simple, lambda one, two, *, three: (one, two, three), ((1,), {}), ((1, 2), {"three": 3})),
        (simple, lambda a, b, **rest: (a, b, rest), ((), {"two": 5, "one": 1}), ((1, 5), {"three": 3})),
        (simple, lambda one, **rest: (one, rest), ((1,), {"three": 9}), ((1,), {"two": 2, "three": 9})),
        (simple, lambda *, three, two, one: (one, two, three), ((1,), {}), ((), {"one": 1, "two": 2, "three": 3})),
        (simple, lambda *args, **kwargs: (args, kwargs), ((1, 7), {}), ((1, 7), {"three": 3})),
        (shaped, lambda *args, **kwargs: (args, kwargs), ((1,), {}), ((1, 2, 3), {"four": 4})),
        (shaped, lambda *a, four, **k: (a, four, k), ((1, 2, 3, 4), {"x": 5}), ((1, 2, 3, 4), {"four": 4, "x": 5})),
    ],
)
def test_key_and_vary_get_every_argument_however_the_call_spells_it(
    option: str, function: Any, target: Callable[..., object], call: Any, taken: Any
) -> None:
    taking = Taking(target)
    maker = KeyMaker(function, **{option: taking})  # type: ignore[arg-type]
    args, kwargs = call
    maker(args, kwargs)
    assert taking.taken == [taken]


def test_calls_that_mean_the_same_have_one_key_through_key_and_vary_too() -> None:
    maker = KeyMaker(simple, key=lambda one, two, three: (one, two, three), vary=lambda *args, **kwargs: [args, kwargs])
    assert len({maker((1,), {}), maker((1, 2), {}), maker((), {"three": 3, "two": 2, "one": 1})}) == 1


@pytest.mark.parametrize("option", ["key", "vary"])
@pytest.mark.parametrize(
    ("function", "target", "message"),
    [
        (simple, lambda: 1, r"as \(one=one, two=two, three=three\); what is given takes \(\)"),
        (simple, lambda one: one, r"as \(one, two=two, three=three\); what is given takes \(one\)"),
        (simple, lambda one, two, four: (one, two, four), r"takes \(one, two, four\)"),
        (simple, _with_secret, r"takes \(one, two, three, secret, other\)"),
        (
            shaped,
            lambda one, two, three, **rest: (one, two, three, rest),
            r"as \(one, two, three, \*more, four=four, \*\*named\)",
        ),
        (shaped, lambda *args: args, r"\*\*named"),
        (simple, "one", "must be a plain function, not str"),
        (simple, simple, "must be a plain function, not a coroutine function"),
    ],
)
def test_key_or_vary_that_cannot_take_the_arguments_is_refused_at_once(
    option: str, function: Any, target: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=rf"{option}.*{message}") as caught:
        KeyMaker(function, **{option: target})
    assert "s3cr3t" not in str(caught.value)


def test_key_that_says_nothing_of_what_it_takes_is_called_by_position() -> None:
    async def two(one: object, two: object) -> None: ...

    with pytest.raises(ValueError, match="signature"):
        inspect.signature(max)
    assert KeyMaker(two, key=max)((1, 2), {}) == KeyMaker(two, key=max)((), {"two": 0, "one": 2})
