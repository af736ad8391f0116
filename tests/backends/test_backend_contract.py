"""What every backend promises, written once and run against each."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from backends_under_test import BACKENDS
from helpers import FakeClock
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from aiokv.backends.base import Backend
from aiokv.limits import MAX_TTL_SECONDS, MAX_VALUE_BYTES, MIN_TTL_SECONDS

NASTY_KEYS = [
    "k",
    "K",
    " ",
    "a b",
    "a/b",
    "/",
    "//",
    "a%2Fb",
    "%",
    "%00",
    "%zz",
    "?",
    "a?ttl=60",
    "#",
    "a#b",
    "+",
    "a+b",
    "&=;",
    "...",
    "../x",
    "\\",
    "'; DROP TABLE entries; --",
    '"',
    "\n",
    "\t",
    "\x01",
    "\x7f",
    "é",
    "e\u0301",
    "😀",
    "\u202eabc",
    "\ufeff",
    "\U0010ffff",
    "x" * 1000,
]
NASTY_VALUES = ["", "\0", "a\0b", "😀" * 100, "\ufeff", "\n", '{"value": "x"}', "a=b&c=%20", "null", "\u2028", "\x7f\x80"]


@pytest.fixture(params=sorted(BACKENDS))
async def backend(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> AsyncGenerator[Backend]:
    async with BACKENDS[request.param](tmp_path, clock) as opened:
        yield opened


async def test_absent_key_is_none(backend: Backend) -> None:
    assert await backend.get("db", "absent") is None


async def test_last_write_wins(backend: Backend) -> None:
    await backend.set("db", "k", "first", 60)
    await backend.set("db", "k", "second", 60)
    assert await backend.get("db", "k") == "second"


async def test_delete_succeeds_twice_and_leaves_nothing(backend: Backend) -> None:
    await backend.set("db", "k", "v", 60)
    await backend.delete("db", "k")
    await backend.delete("db", "k")
    assert await backend.get("db", "k") is None


async def test_entry_is_there_until_its_expiry_and_not_at_it(backend: Backend, clock: FakeClock) -> None:
    await backend.set("db", "k", "v", 60)
    clock.advance(59.999)
    assert await backend.get("db", "k") == "v"
    clock.advance(0.001)
    assert await backend.get("db", "k") is None


async def test_setting_anew_renews_the_time_to_live(backend: Backend, clock: FakeClock) -> None:
    await backend.set("db", "k", "v", 60)
    clock.advance(40)
    await backend.set("db", "k", "w", 60)
    clock.advance(40)
    assert await backend.get("db", "k") == "w"


async def test_setting_anew_may_shorten_the_time_to_live(backend: Backend, clock: FakeClock) -> None:
    await backend.set("db", "k", "v", MAX_TTL_SECONDS)
    await backend.set("db", "k", "w", 60)
    clock.advance(60)
    assert await backend.get("db", "k") is None


async def test_namespaces_do_not_see_each_other(backend: Backend) -> None:
    await backend.set("one", "k", "1", 60)
    await backend.set("two", "k", "2", 60)
    await backend.delete("one", "k")
    assert (await backend.get("one", "k"), await backend.get("two", "k")) == (None, "2")


@pytest.mark.parametrize("key", NASTY_KEYS, ids=ascii)
async def test_every_key_names_its_own_entry(backend: Backend, key: str) -> None:
    await backend.set("db", key, f"value of {key}", 60)
    others = [other for other in NASTY_KEYS if other != key]
    assert await backend.get("db", key) == f"value of {key}"
    assert [other for other in others[:8] if await backend.get("db", other) is not None] == []


@pytest.mark.parametrize("db_name", ["a b", "a%2Fb", "?", "#", "...", "é", "😀", "a'b"], ids=ascii)
async def test_every_namespace_names_its_own_entries(backend: Backend, db_name: str) -> None:
    await backend.set(db_name, "k", "v", 60)
    assert (await backend.get(db_name, "k"), await backend.get("db", "k")) == ("v", None)


@pytest.mark.parametrize("value", NASTY_VALUES, ids=ascii)
async def test_every_value_comes_back_as_it_was(backend: Backend, value: str) -> None:
    await backend.set("db", "k", value, 60)
    assert await backend.get("db", "k") == value


@pytest.mark.parametrize("char", ["x", "é", "€", "😀", '"', "\0"], ids=ascii)
async def test_value_of_the_largest_size_comes_back_whole(backend: Backend, char: str) -> None:
    value = char * (MAX_VALUE_BYTES // len(char.encode()))
    await backend.set("db", "k", value, 60)
    # Compared outside the assertion: pytest would print two megabytes.
    same = await backend.get("db", "k") == value
    assert same


async def test_concurrent_writes_and_reads_of_many_keys_all_land(backend: Backend) -> None:
    await asyncio.gather(*(backend.set("db", f"k{i}", f"v{i}", 60) for i in range(300)))
    values = await asyncio.gather(*(backend.get("db", f"k{i}") for i in range(300)))
    assert values == [f"v{i}" for i in range(300)]


async def test_concurrent_writes_of_one_key_leave_one_of_them(backend: Backend) -> None:
    await asyncio.gather(*(backend.set("db", "k", f"v{i}", 60) for i in range(50)))
    assert await backend.get("db", "k") in {f"v{i}" for i in range(50)}


async def test_write_is_seen_by_the_next_read(backend: Backend) -> None:
    for i in range(50):
        await backend.set("db", "k", str(i), 60)
        assert await backend.get("db", "k") == str(i)


async def test_cancelled_writes_leave_the_backend_usable(backend: Backend) -> None:
    tasks = [asyncio.create_task(backend.set("db", f"k{i}", "v", 60)) for i in range(50)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is None for result in results[1::2])
    assert [await backend.get("db", f"k{i}") for i in range(1, 50, 2)] == ["v"] * 25


async def test_closing_twice_is_harmless(backend: Backend) -> None:
    await backend.aclose()
    await backend.aclose()


names = st.sampled_from(["a", "b", "a b", "é"])
keys = st.sampled_from(["k", "k/1", "%2F", "😀"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
).filter(lambda key: key not in {".", ".."})
values = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
ttls = st.sampled_from([MIN_TTL_SECONDS, MIN_TTL_SECONDS + 1, 3600, MAX_TTL_SECONDS])
times = st.sampled_from([0.5, 1.0, 59.0, 60.0, 61.0, 3600.0, float(MAX_TTL_SECONDS)])


class BackendMachine(RuleBasedStateMachine):
    """Hold a backend against a dictionary with expiry times, step by step."""

    name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.model: dict[tuple[str, str], tuple[str, float]] = {}
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        opening = self.stack.enter_async_context(BACKENDS[self.name](Path(self.folder.name), self.clock))
        self.backend = self.runner.run(_awaited(opening))

    def teardown(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()
        self.folder.cleanup()

    def expected(self, db_name: str, key: str) -> str | None:
        value, expires_at = self.model.get((db_name, key), ("", 0.0))
        return value if self.clock.now < expires_at else None

    @rule(db_name=names, key=keys, value=values, ttl=ttls)
    def set(self, db_name: str, key: str, value: str, ttl: int) -> None:
        self.runner.run(_awaited(self.backend.set(db_name, key, value, ttl)))
        self.model[db_name, key] = (value, self.clock.now + ttl)

    @rule(db_name=names, key=keys)
    def get(self, db_name: str, key: str) -> None:
        assert self.runner.run(_awaited(self.backend.get(db_name, key))) == self.expected(db_name, key)

    @rule(db_name=names, key=keys)
    def delete(self, db_name: str, key: str) -> None:
        self.runner.run(_awaited(self.backend.delete(db_name, key)))
        self.model.pop((db_name, key), None)

    @rule(seconds=times)
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(db_name=names, written=st.dictionaries(keys, values, max_size=8), ttl=ttls)
    def set_together(self, db_name: str, written: dict[str, str], ttl: int) -> None:
        async def run() -> None:
            await asyncio.gather(*(self.backend.set(db_name, key, value, ttl) for key, value in written.items()))

        self.runner.run(run())
        self.model.update({(db_name, key): (value, self.clock.now + ttl) for key, value in written.items()})

    @precondition(lambda self: self.model)
    @rule()
    def every_entry_is_as_the_model_has_it(self) -> None:
        async def run() -> list[str | None]:
            return [await self.backend.get(db_name, key) for db_name, key in self.model]

        assert self.runner.run(run()) == [self.expected(db_name, key) for db_name, key in self.model]


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _machine(name: str) -> Any:
    machine = type(f"{name.title()}Machine", (BackendMachine,), {"name": name})
    case: Any = machine.TestCase
    # A first run loads modules and opens sockets; that is no fault of the data.
    case.settings = settings(max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck))
    return case


for _name in BACKENDS:
    globals()[f"Test{_name.title()}AgainstAModel"] = _machine(_name)
