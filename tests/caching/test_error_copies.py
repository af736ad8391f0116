"""Errors of a computation that several callers share: each caller gets its own, and it is the same error."""

import asyncio
import json
import threading
import traceback
from collections.abc import Callable
from typing import Any

import aiohttp
import pydantic
import pytest
from plain_under_test import begin, results, wait_until

from aiokv import AsyncKVStore, BatchError, kv_cached, kv_cached_many
from aiokv.caching.error_copies import copy_error
from aiokv.errors import CallTimeoutError


class Composed(Exception):  # noqa: N818 (no error of a program)
    """Its arguments are not those of its constructor."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class Slotted(ValueError):  # noqa: N818 (likewise)
    __slots__ = ("left", "right")

    def __init__(self, left: int) -> None:
        self.left = left


class Ours(OSError):  # noqa: N818 (likewise)
    def __init__(self, text: str) -> None:
        super().__init__(5, "five", "file.txt")
        self.text = text


class Lying(Exception):  # noqa: N818 (likewise)
    def __reduce__(self) -> Any:
        return ValueError, ("another",)

    def __new__(cls, *args: Any) -> Any:
        made.append(cls)
        return super().__new__(cls, *args)


class Model(pydantic.BaseModel):
    number: int


made: list[type] = []


def raised(work: Callable[[], object]) -> BaseException:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 (the test looks at whatever it is)
        return error
    raise AssertionError("nothing was raised")


def _raise(error: BaseException) -> None:
    try:
        raise KeyError("what was handled")  # noqa: TRY301 (it is what is handled)
    except KeyError as handled:
        raise error from handled


ERRORS: dict[str, Callable[[], BaseException]] = {
    "plain": lambda: ValueError("text", 1),
    "composed": lambda: Composed(3, "three"),
    "slots": lambda: Slotted(1),
    "system": lambda: FileNotFoundError(2, "no file", "a.txt", None, "b.txt"),
    "system without file": lambda: OSError(2, "no file"),
    "own system": lambda: Ours("text"),
    "unicode": lambda: raised(b"\xff".decode),
    "json": lambda: raised(lambda: json.loads("{")),
    "syntax": lambda: raised(lambda: compile("a b", "file", "exec")),
    "import": lambda: raised(lambda: __import__("no_such_module")),
    "attribute": lambda: raised(lambda: None.missing),  # type: ignore[attr-defined]
    "group": lambda: ExceptionGroup("several", [ValueError(1), OSError(2, "x")]),
    "stop": lambda: StopIteration(4),
    "call": lambda: CallTimeoutError("late", verb="get", db_name="db", key="k"),
    "batch": lambda: BatchError({"a": ValueError()}, {"b": "1"}, ("c",)),
    "aiohttp": lambda: aiohttp.InvalidURL("no url"),
    "lying": lambda: Lying("text"),
}


@pytest.mark.parametrize("make", ERRORS.values(), ids=list(ERRORS))
def test_copy_is_the_same_error(make: Callable[[], BaseException]) -> None:
    error = make()
    raised(lambda: _raise(error))
    error.add_note("a note")
    made.clear()
    copied = copy_error(error)
    assert copied is not error
    assert (type(copied), repr(copied.args), str(copied), repr(copied)) == (
        type(error),
        repr(error.args),
        str(error),
        repr(error),
    )
    if not isinstance(error, ExceptionGroup):
        assert copied.args == error.args
    assert vars(copied) == vars(error)
    assert copied.__traceback__ is error.__traceback__
    assert (copied.__cause__, copied.__context__) == (error.__cause__, error.__context__)
    assert traceback.format_exception(copied) == traceback.format_exception(error)
    copied.add_note("another")
    assert error.__notes__ == ["a note"]
    assert not made


class Failures(ExceptionGroup[Exception]):
    """Its arguments are not those of its constructor."""

    def __new__(cls, _count: int, errors: tuple[Exception, ...]) -> Any:
        return super().__new__(cls, "several", errors)


def test_copy_of_a_group_has_copies_of_its_members() -> None:
    inner, first = ExceptionGroup("inner", (OSError(2, "x"),)), ValueError(1)
    for error in (ExceptionGroup("outer", [first, inner]), Failures(2, (first, inner))):
        copied: Any = copy_error(error)
        assert (type(copied), repr(copied), copied.message) == (type(error), repr(error), error.message)
        assert (repr(copied.exceptions), copied.derive([first]).message) == (repr(error.exceptions), error.message)
        copied.exceptions[0].add_note("a note")
        copied.exceptions[1].exceptions[0].add_note("another")
        assert not any(hasattr(one, "__notes__") for one in (first, *inner.exceptions))


def test_copy_has_the_slots_that_are_set() -> None:
    copied: Any = copy_error(Slotted(1))
    assert (copied.left, hasattr(copied, "right")) == (1, False)
    system: Any = copy_error(Ours("text"))
    assert (system.errno, system.strerror, system.filename, system.text) == (5, "five", "file.txt", "text")


def test_error_whose_state_cannot_be_seen_stays_itself() -> None:
    error = raised(lambda: Model(number="x"))  # type: ignore[arg-type]
    assert copy_error(error) is error


def test_threads_that_share_an_error_each_get_their_own(store: AsyncKVStore) -> None:
    gate = threading.Event()

    @kv_cached(60, store=store, key=lambda: "one")
    def load() -> int:
        gate.wait(10)
        raise ValueError("down")

    def call(user: str) -> tuple[int, str, list[str]]:
        try:
            raise KeyError(f"secret of {user}")  # noqa: TRY301 (it is what is handled)
        except KeyError:
            try:
                load()
            except ValueError as error:
                error.add_note(f"note of {user}")
                barrier.wait()
                return id(error), repr(error.__context__), error.__notes__
        raise AssertionError("nothing was raised")

    barrier = threading.Barrier(3, timeout=10)
    users = ["ann", "bob", "cid"]
    calls = [begin(call, user) for user in users]
    wait_until(lambda: load.info().joined == 2)
    gate.set()
    found = results(calls)
    assert len({one[0] for one in found}) == 3
    assert [one[1:] for one in found] == [(f"KeyError('secret of {user}')", [f"note of {user}"]) for user in users]


@pytest.mark.parametrize("is_many", [False, True], ids=["one", "many"])
async def test_tasks_that_share_an_error_each_get_their_own(store: AsyncKVStore, *, is_many: bool) -> None:
    gate = asyncio.Event()

    @kv_cached(60, store=store, key=lambda: "one")
    async def load() -> int:
        await gate.wait()
        raise Composed(3, "down")

    @kv_cached_many(60, store=store, key=lambda ids: ids)
    async def load_many(ids: list[int]) -> dict[int, int]:
        await gate.wait()
        raise Composed(3, f"down{ids[0]}"[:4])

    async def call(user: int) -> BaseException:
        try:
            await (load_many([1, user]) if is_many else load())
        except Composed as error:
            error.add_note(str(user))
            return error
        raise AssertionError("nothing was raised")

    tasks = [asyncio.create_task(call(user)) for user in (1, 1, 1)]
    while (load_many if is_many else load).info().joined < 2:
        await asyncio.sleep(0)
    gate.set()
    errors = await asyncio.gather(*tasks)
    assert len(set(map(id, errors))) == 3
    assert [(str(error), vars(error)["code"], error.__notes__) for error in errors] == [("3: down", 3, ["1"])] * 3


def test_loops_that_share_an_error_each_get_their_own(store: AsyncKVStore) -> None:
    gate = threading.Event()

    @kv_cached(60, store=store, key=lambda: "one")
    async def load() -> int:
        runs.append(1)
        await asyncio.to_thread(gate.wait, 10)
        raise ValueError("down")

    def call() -> BaseException:
        return raised(lambda: asyncio.run(load()))

    runs: list[int] = []
    calls = [begin(call)]
    wait_until(lambda: load.info().misses == 1)
    calls.append(begin(call))
    wait_until(lambda: load.info().misses == 2)
    gate.set()
    first, second = results(calls)
    assert first is not second
    assert [str(first), str(second), len(runs)] == ["down", "down", 1]
