"""Every operation of every capability, in any order, against plain dictionaries."""

import asyncio
import contextlib
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, ClassVar

import pytest
from backends_under_test import Opener, open_http_memory, open_http_sqlite, open_memory, open_sqlite
from helpers import FakeClock
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from redis_servers import ExpiryClock, RedisCluster, RedisServer, may_start_cluster, needs_server

from aiokv.backends.base import Backend
from aiokv.backends.capabilities import Entry, KeyInfo, capabilities_of
from aiokv.backends.redis.backend import RedisBackend
from aiokv.backends.redis.urls import parse_url
from aiokv.backends.watching import Alive, Changed, Lost, Watch
from aiokv.limits import MAX_TTL_SECONDS, MIN_TTL_SECONDS

# Few, so that steps meet; the contract's suites have the odd ones.
names = st.sampled_from(["a", "é"])
keys = st.sampled_from(["k", "k/1", "%", "%1", "_", "[k]", "😀", "😀1"])
prefixes = st.sampled_from(["", "", "k", "%", "_", "😀", "[k]", "*"])
values = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ttls = st.sampled_from([MIN_TTL_SECONDS, MIN_TTL_SECONDS + 1, 3600, MAX_TTL_SECONDS])
times = st.sampled_from([0.5, 1.0, 1.0, 59.0, 60.0, 61.0, 3600.0])
limits = st.sampled_from([1, 2, 3, 1000])
owners = st.sampled_from(["me", "you"])


class Listing:
    """A listing under way, and what it must and may still show."""

    def __init__(self, db_name: str, prefix: str, staying: set[str]) -> None:
        self.db_name, self.prefix = db_name, prefix
        self.cursor: str | None = None
        self.shown: Counter[str] = Counter()
        self.staying = staying
        self.set_anew: set[str] = set()
        self.gone: set[str] = set()


class BackendMachine(RuleBasedStateMachine):
    """Hold a backend against dictionaries with expiry times, step by step."""

    opener: ClassVar[Opener]
    # Over a network the word that changes may be missing is always allowed.
    may_lose: ClassVar[bool] = False
    # Whether a listing may show a key again that stays.
    may_repeat: ClassVar[bool] = False
    # What counts time by itself is as exact as that, and no entry or claim ends so soon that it is unclear when.
    tolerance_seconds: ClassVar[float] = 0.01
    margin_seconds: ClassVar[float] = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.clock = self.new_clock()
        self.model: dict[tuple[str, str], tuple[str, float]] = {}
        self.claimed: dict[tuple[str, str], tuple[str, float]] = {}
        self.listing: Listing | None = None
        # Each change that a watch of the namespace must tell of, or may.
        self.changes: dict[str, list[tuple[Changed, bool]]] = defaultdict(list)
        self.compared: dict[str, list[tuple[Changed, bool]]] = defaultdict(list)
        self.comparisons = 0
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        opening = self.stack.enter_async_context(type(self).opener(Path(self.folder.name), self.clock))
        self.backend = self.runner.run(_run(opening))
        self.can = capabilities_of(self.backend)
        # Over HTTP a client learns from the first answer what its server has.
        self.run(self.backend.get("a", "absent"))
        self.can = capabilities_of(self.backend)
        assert None not in self.can
        self.watched = "a"
        self.watch: Watch = self.run(self.begun_watch(self.watched))

    def new_clock(self) -> Any:
        return FakeClock()

    def expected_expiry(self, expires_at: float) -> float:
        return expires_at

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.compare_what_is_told()
        finally:
            self.run(self.watch.aclose())
            self.run(self.stack.aclose())
            self.runner.close()
            self.folder.cleanup()

    def run(self, awaitable: Awaitable[Any]) -> Any:
        return self.runner.run(_run(awaitable))

    def live(self, db_name: str, prefix: str = "") -> dict[str, tuple[str, float]]:
        return {
            key: entry
            for (of, key), entry in self.model.items()
            if of == db_name and key.startswith(prefix) and self.clock.now < entry[1]
        }

    def expected(self, db_name: str, key: str) -> str | None:
        value, expires_at = self.model.get((db_name, key), ("", 0.0))
        return value if self.clock.now < expires_at else None

    def note_set(self, db_name: str, key: str, value: str, ttl: int) -> None:
        listing = self.listing
        if listing is not None and listing.db_name == db_name and key in listing.gone:
            listing.set_anew.add(key)
        self.model[db_name, key] = (value, self.clock.now + ttl)
        self.changes[db_name].append((Changed(key), db_name == self.watched))

    def note_delete(self, db_name: str, key: str) -> None:
        was_live = self.expected(db_name, key) is not None
        self.model.pop((db_name, key), None)
        self.changes[db_name].append((Changed(key, is_delete=True), was_live and db_name == self.watched))
        self.note_gone(db_name, key)

    def note_gone(self, db_name: str, key: str) -> None:
        if self.listing is not None and self.listing.db_name == db_name:
            self.listing.staying.discard(key)
            self.listing.gone.add(key)

    @rule(db_name=names, key=keys, value=values, ttl=ttls)
    def set(self, db_name: str, key: str, value: str, ttl: int) -> None:
        self.run(self.backend.set(db_name, key, value, ttl))
        self.note_set(db_name, key, value, ttl)

    @rule(db_name=names, key=keys)
    def get(self, db_name: str, key: str) -> None:
        assert self.run(self.backend.get(db_name, key)) == self.expected(db_name, key)

    @rule(db_name=names, key=keys)
    def delete(self, db_name: str, key: str) -> None:
        self.run(self.backend.delete(db_name, key))
        self.note_delete(db_name, key)

    @rule(seconds=times)
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        while any(
            0 < ends_at - self.clock.now < self.margin_seconds for _, ends_at in (*self.model.values(), *self.claimed.values())
        ):
            self.clock.advance(self.margin_seconds)
        for (db_name, key), (_, expires_at) in self.model.items():
            if expires_at <= self.clock.now:
                self.note_gone(db_name, key)

    @rule(db_name=names, written=st.dictionaries(keys, values, max_size=8), ttl=ttls)
    def set_together(self, db_name: str, written: dict[str, str], ttl: int) -> None:
        async def run() -> None:
            await asyncio.gather(*(self.backend.set(db_name, key, value, ttl) for key, value in written.items()))

        self.run(run())
        for key, value in written.items():
            self.note_set(db_name, key, value, ttl)

    @precondition(lambda self: self.model)
    @rule()
    def every_entry_is_as_the_model_has_it(self) -> None:
        async def run() -> list[str | None]:
            return [await self.backend.get(db_name, key) for db_name, key in self.model]

        assert self.run(run()) == [self.expected(db_name, key) for db_name, key in self.model]

    @rule(db_name=names, entries=st.lists(st.builds(Entry, keys, values, ttls), min_size=1, max_size=8))
    def set_many(self, db_name: str, entries: list[Entry]) -> None:
        assert list(self.run(self.can.batch.set_many(db_name, entries))) == [None] * len(entries)
        last = {entry.key: entry for entry in entries}
        for key, value, ttl in last.values():
            self.note_set(db_name, key, value, ttl)
        # One that comes twice may be told of twice.
        self.changes[db_name] += [(Changed(entry.key), False) for entry in entries if entry is not last[entry.key]]

    @rule(db_name=names, wanted=st.lists(keys, min_size=1, max_size=8))
    def get_many(self, db_name: str, wanted: list[str]) -> None:
        assert list(self.run(self.can.batch.get_many(db_name, wanted))) == [self.expected(db_name, key) for key in wanted]

    @rule(db_name=names, gone=st.lists(keys, min_size=1, max_size=8))
    def delete_many(self, db_name: str, gone: list[str]) -> None:
        assert list(self.run(self.can.batch.delete_many(db_name, gone))) == [None] * len(gone)
        for key in dict.fromkeys(gone):
            self.note_delete(db_name, key)

    @rule(db_name=names, prefix=prefixes, limit=limits)
    def list_and_count(self, db_name: str, prefix: str, limit: int) -> None:
        infos = self.run(self.listed(db_name, prefix, limit))
        live = self.live(db_name, prefix)
        assert sorted((info.key, info.value_bytes) for info in infos) == sorted(
            (key, len(value.encode())) for key, (value, _) in live.items()
        )
        for info in infos:
            expires_at = self.expected_expiry(live[info.key][1])
            assert info.expires_at == pytest.approx(expires_at, abs=self.tolerance_seconds)
        if self.can.scan.scans_in_order:
            assert [info.key for info in infos] == sorted(live)
        assert self.run(self.can.scan.count(db_name, prefix)) == len(live)

    async def listed(self, db_name: str, prefix: str, limit: int) -> list[KeyInfo]:
        infos: list[KeyInfo] = []
        cursor: str | None = None
        while True:
            page = await self.can.scan.scan(db_name, prefix, cursor, limit)
            assert len(page.infos) <= limit
            infos += page.infos
            if (cursor := page.cursor) is None:
                return infos

    @rule(db_name=names, prefix=prefixes)
    def begin_listing(self, db_name: str, prefix: str) -> None:
        self.listing = Listing(db_name, prefix, {*self.live(db_name, prefix)})
        self.go_on_listing(1)

    @precondition(lambda self: self.listing is not None)
    @rule(limit=limits)
    def go_on_listing(self, limit: int) -> None:
        listing = self.listing
        assert listing is not None
        page = self.run(self.can.scan.scan(listing.db_name, listing.prefix, listing.cursor, limit))
        live = self.live(listing.db_name, listing.prefix)
        listing.shown.update(info.key for info in page.infos)
        assert {info.key for info in page.infos} <= {*live}
        repeated = {key for key, count in listing.shown.items() if count > 1}
        assert self.may_repeat or repeated <= listing.set_anew
        listing.cursor = page.cursor
        if page.cursor is None:
            assert listing.staying <= {*listing.shown}
            self.listing = None

    @rule(db_name=names, prefix=prefixes, limit=limits)
    def clear(self, db_name: str, prefix: str, limit: int) -> None:
        deleted, cursor = self.run(self.can.scan.clear(db_name, prefix, None, limit))
        before = self.live(db_name, prefix)
        left = {info.key for info in self.run(self.listed(db_name, prefix, 1000))}
        assert left <= {*before}
        assert len(before) - len(left) <= deleted <= limit
        assert deleted == limit or cursor is None
        assert cursor is not None or not left
        self.note_cleared(db_name, prefix, left)

    @rule(db_name=names, prefix=prefixes, limit=limits)
    def clear_in_steps(self, db_name: str, prefix: str, limit: int) -> None:
        before = self.live(db_name, prefix)
        deleted, cursor = self.run(self.can.scan.clear(db_name, prefix, None, limit))
        while cursor is not None:
            step, cursor = self.run(self.can.scan.clear(db_name, prefix, cursor, limit))
            assert step <= limit
            deleted += step
        assert deleted >= len(before)
        assert self.run(self.listed(db_name, prefix, 1000)) == []
        self.note_cleared(db_name, prefix, frozenset())

    def note_cleared(self, db_name: str, prefix: str, left: AbstractSet[str]) -> None:
        for of, key in list(self.model):
            if of == db_name and key.startswith(prefix) and key not in left:
                self.note_delete(db_name, key)

    # One rule, since claims, time and releases must meet to tell anything.
    @rule(
        db_name=names,
        key=st.sampled_from(["k", "%"]),
        steps=st.lists(
            st.tuples(st.sampled_from(["claim", "renew", "release", "advance"]), owners, st.sampled_from([1.0, 1.5, 60.0])),
            min_size=1,
            max_size=8,
        ),
    )
    def claim_and_release(self, db_name: str, key: str, steps: list[tuple[str, str, float]]) -> None:
        for step, owner, seconds in steps:
            if step == "claim":
                self.claim(db_name, key, owner, max(seconds, 3 * self.margin_seconds))
            elif step == "renew":
                self.renew(db_name, key, owner, max(seconds, 3 * self.margin_seconds))
            elif step == "release":
                self.release(db_name, key, owner)
            else:
                self.advance(seconds)

    def claim(self, db_name: str, key: str, owner: str, seconds: float) -> None:
        outcome = self.run(self.can.claim.claim(db_name, key, owner, seconds))
        holder, until = self.claimed.get((db_name, key), ("", 0.0))
        if holder != owner and self.clock.now < until:
            assert not outcome.is_held
        else:
            assert outcome.is_held
            until = self.clock.now + seconds
            self.claimed[db_name, key] = (owner, until)
        assert outcome.seconds_left == pytest.approx(until - self.clock.now, abs=self.tolerance_seconds)

    def renew(self, db_name: str, key: str, owner: str, seconds: float) -> None:
        outcome = self.run(self.can.claim.renew(db_name, key, owner, seconds))
        holder, until = self.claimed.get((db_name, key), ("", 0.0))
        assert outcome.is_held == (holder == owner and self.clock.now < until)
        if outcome.is_held:
            until = self.clock.now + seconds
            self.claimed[db_name, key] = (owner, until)
        left = max(0.0, until - self.clock.now)
        assert outcome.seconds_left == pytest.approx(left, abs=self.tolerance_seconds)

    def release(self, db_name: str, key: str, owner: str) -> None:
        holder, until = self.claimed.get((db_name, key), ("", 0.0))
        is_held = holder == owner and self.clock.now < until
        assert self.run(self.can.claim.release(db_name, key, owner)) == is_held
        if is_held:
            del self.claimed[db_name, key]

    async def begun_watch(self, db_name: str) -> Watch:
        watch: Watch = self.can.watch.watch(db_name)
        async with asyncio.timeout(10):
            assert await anext(watch) == Lost()
        return watch

    @rule(db_name=names)
    def watch_another(self, db_name: str) -> None:
        self.run(self.watch.aclose())
        self.watch, self.watched = self.run(self.begun_watch(db_name)), db_name
        # Changes from right before a watch may come after its first word.
        self.changes[db_name] = [(change, False) for change, _ in self.compared[db_name] + self.changes[db_name]]

    @rule()
    def compare_what_is_told(self) -> None:
        async def told_until_end(watch: Watch) -> list[Changed | Lost]:
            events: list[Changed | Lost] = []
            async with asyncio.timeout(10):
                async for event in watch:
                    if event == Changed(end):
                        break
                    if not isinstance(event, Alive):
                        events.append(event)
            return events

        # Another one each time, since changes from right before a watch may come after its first word.
        self.comparisons += 1
        end = f"end of comparison {self.comparisons}"
        self.settle()
        self.set(self.watched, end, "", MIN_TTL_SECONDS)
        told = self.run(told_until_end(self.watch))
        changes = self.changes.pop(self.watched)
        self.compared[self.watched] += changes
        if self.may_lose and Lost() in told:
            return
        self.compare(told, changes[:-1])
        assert Lost() not in told

    def settle(self) -> None:
        """Wait until what was changed before must be told of before what is changed next."""

    def compare(self, told: list[Changed | Lost], changes: list[tuple[Changed, bool]]) -> None:
        for key in {change.key for change, _ in changes} | {event.key for event in told if isinstance(event, Changed)}:
            of_key = [event for event in told if isinstance(event, Changed) and event.key == key]
            expected = [(change, must_come) for change, must_come in changes if change.key == key]
            assert could_be(of_key, expected), f"of {key!r} came {of_key}, not {expected}"


class ServerClock:
    """The time of servers whose entries expire by themselves: it goes on, and can be moved."""

    def __init__(self, *servers: RedisServer) -> None:
        self.moved = 0.0
        self._expiries = ExpiryClock(*servers)

    @property
    def now(self) -> float:
        return time.time() + self.moved

    def advance(self, seconds: float) -> None:
        self._expiries.advance(seconds)
        self.moved += seconds


class RedisMachine(BackendMachine):
    """What Redis relaxes: the order and number of what is told, and that a key may be listed again where a table shrinks."""

    servers: ClassVar[list[RedisServer]] = []
    may_repeat = True
    tolerance_seconds = 2.0
    margin_seconds = 10.0
    clock: ServerClock

    def new_clock(self) -> ServerClock:
        for server in self.servers:
            server.ask("FLUSHALL")
        return ServerClock(*self.servers)

    def expected_expiry(self, expires_at: float) -> float:
        return expires_at - self.clock.moved

    def settle(self) -> None:
        time.sleep(0.1)

    def compare(self, told: list[Changed | Lost], changes: list[tuple[Changed, bool]]) -> None:
        # To move an expiry is a change to the server, too.
        last = {event.key: event for event in told if isinstance(event, Changed)}
        assert {change.key for change, must_come in changes if must_come} <= {*last}
        # A server may not have noticed yet that an entry has expired.
        assert [key for key, event in last.items() if event.is_delete and self.expected(self.watched, key) is not None] == []
        changed = {change.key: change for change, _ in changes}
        assert [key for key, event in last.items() if key in changed and event.is_delete < changed[key].is_delete] == []


def could_be(came: list[Changed], expected: list[tuple[Changed, bool]]) -> bool:
    """Match events against those that must come and those that may."""
    matched = {0}
    for change, must_come in expected:
        following = {count + 1 for count in matched if came[count : count + 1] == [change]}
        matched = following if must_come else following | matched
    return len(came) in matched


async def _run(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _machine(opener: Opener, examples: int, *, may_lose: bool = False, base: type[BackendMachine] = BackendMachine) -> Any:
    attributes = {"opener": staticmethod(opener), "may_lose": may_lose}
    case: Any = type("Machine", (base,), attributes).TestCase
    # A first run loads modules and opens sockets; that is no fault of the data. Shrinking would take longer than a test may.
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=50,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    return case


TestMemoryAgainstAModel = _machine(open_memory, 25)
TestSqliteAgainstAModel = _machine(open_sqlite, 10)
TestHttpOverMemoryAgainstAModel = _machine(open_http_memory, 8, may_lose=True)
TestHttpOverSqliteAgainstAModel = _machine(open_http_sqlite, 8, may_lose=True)


@contextlib.asynccontextmanager
async def open_redis(_folder: Path, _clock: Any) -> AsyncGenerator[Backend]:
    backend = RedisBackend(parse_url(f"redis://{RedisMachine.servers[0].address}"))
    yield backend
    await backend.aclose()


@contextlib.asynccontextmanager
async def open_cluster(_folder: Path, _clock: Any) -> AsyncGenerator[Backend]:
    addresses = ",".join(server.address for server in RedisMachine.servers)
    backend = RedisBackend(parse_url(f"redis+cluster://{addresses}"))
    yield backend
    await backend.aclose()


@pytest.mark.slow
@needs_server
class TestRedisAgainstAModel(_machine(open_redis, 6, may_lose=True, base=RedisMachine)):  # type: ignore[misc]
    @pytest.fixture(autouse=True)
    def servers(self, redis_server: RedisServer) -> None:
        RedisMachine.servers = [redis_server]


@pytest.mark.slow
@needs_server
@may_start_cluster
class TestRedisClusterAgainstAModel(_machine(open_cluster, 4, may_lose=True, base=RedisMachine)):  # type: ignore[misc]
    @pytest.fixture(autouse=True)
    def servers(self, redis_cluster: RedisCluster) -> None:
        RedisMachine.servers = redis_cluster.primaries()
