"""A store that is dead, slow or talks nonsense: cached functions go on giving right results."""

import asyncio
import copyreg
import gc
import logging
import weakref
from collections.abc import AsyncGenerator, Callable

import pytest
from caching_under_test import Cached, MovedTime, WatchedBackend, Work, settle, watched_store

import aiokv.caching.breaker
from aiokv import (
    AsyncKVStore,
    CachedFunction,
    CallError,
    CallTimeoutError,
    ConfigurationError,
    ConnectError,
    CredentialsError,
    RetryPolicy,
    StorageError,
    kv_cached,
)
from aiokv.caching.breaker import FAILURES_TO_OPEN, Breaker

READ_TIMEOUT = 0.05


class Probing:
    """Let probes of a breaker happen when a test says so."""

    def __init__(self) -> None:
        self.waited: list[float] = []
        self._turns: asyncio.Semaphore | None = None

    async def sleep(self, seconds: float) -> None:
        self.waited.append(seconds)
        await self._semaphore().acquire()

    async def once(self) -> None:
        self._semaphore().release()
        await settle()

    def _semaphore(self) -> asyncio.Semaphore:
        self._turns = self._turns or asyncio.Semaphore(0)
        return self._turns


@pytest.fixture
def probing(monkeypatch: pytest.MonkeyPatch) -> Probing:
    made = Probing()
    defaults = Breaker.__init__.__defaults__
    assert defaults == (asyncio.sleep,)
    monkeypatch.setattr(Breaker.__init__, "__defaults__", (made.sleep,))
    return made


Doubled = Callable[..., CachedFunction[[int], int]]


@pytest.fixture
async def doubled(store: AsyncKVStore) -> AsyncGenerator[Doubled]:
    made: list[CachedFunction[[int], int]] = []

    def make(**options: object) -> CachedFunction[[int], int]:
        @kv_cached(60, **{"store": store, "key": lambda number: number, "read_timeout": READ_TIMEOUT, **options})  # type: ignore[arg-type]
        async def double(number: int) -> int:
            await asyncio.sleep(0)
            return 2 * number

        made.append(double)
        return double

    yield make
    for one in made:
        await one.aclose()


async def _right(double: CachedFunction[[int], int], count: int = 20) -> None:
    for number in range(count):
        assert await double(number) == 2 * number
    assert await asyncio.gather(*(double(number) for number in range(count))) == [2 * number for number in range(count)]


def _dead() -> AsyncKVStore:
    return AsyncKVStore("db", url="http://127.0.0.1:1", credentials="id:secret", retry=RetryPolicy.none())


async def test_dead_store_is_gone_around(doubled: Doubled) -> None:
    async with _dead() as dead:
        double = doubled(store=dead)
        await _right(double)
        assert double.info().computations == 40
        assert FAILURES_TO_OPEN <= double.info().store_errors <= FAILURES_TO_OPEN + 1
        assert await double.peek(1) is None
        with pytest.raises(ConnectError):
            await double.prime(7, 1)
        with pytest.raises(ConnectError):
            await double.invalidate(1)
        await double.aclose()


@pytest.mark.parametrize("verbs", [{"get"}, {"set"}, {"get", "set"}], ids=sorted)
@pytest.mark.parametrize("error", [StorageError("broken", verb="get"), OSError("s3cret"), TimeoutError()], ids=repr)
async def test_failing_store_is_gone_around(
    verbs: set[str], error: Exception, doubled: Doubled, backend: WatchedBackend
) -> None:
    backend.failing, backend.error = verbs, error
    await _right(doubled())


@pytest.mark.parametrize("write", ["await", "background"])
@pytest.mark.parametrize("verbs", [("get",), ("set",), ("get", "set")])
async def test_slow_store_is_not_waited_for(
    verbs: tuple[str, ...], write: str, doubled: Doubled, backend: WatchedBackend
) -> None:
    double = doubled(write=write)
    gates = [backend.hold(verb) for verb in verbs]
    # Nothing lets go of the store before the call has returned.
    assert await double(1) == 2
    await _right(double, 3 if verbs == ("set",) else 20)
    for gate in gates:
        gate.set()


async def test_store_that_reads_well_and_writes_slowly_costs_few_callers_their_time(
    doubled: Doubled, backend: WatchedBackend
) -> None:
    double = doubled()
    gate = backend.hold("set")
    await _right(double, 15)
    # Each caller that waited in vain has counted one; by now nobody waits.
    waited = double.info().store_errors
    assert waited >= FAILURES_TO_OPEN
    await _right(double, 15)
    assert double.info().store_errors == waited
    gate.set()


async def test_slow_write_lands_after_its_caller_has_gone(doubled: Doubled, backend: WatchedBackend) -> None:
    double = doubled()
    gate = backend.hold("set")
    assert await double(1) == 2
    gate.set()
    await settle()
    assert (await double(1), double.info().hits) == (2, 1)


async def test_store_that_talks_nonsense_is_gone_around(doubled: Doubled, backend: WatchedBackend) -> None:
    async def get(db_name: str, key: str) -> str | None:
        return f"{db_name}{key}" if key else None

    backend.get = get  # type: ignore[method-assign]
    double = doubled()
    await _right(double)
    assert double.info().store_errors == 0


async def test_open_breaker_keeps_every_call_from_the_store(
    doubled: Doubled, backend: WatchedBackend, probing: Probing
) -> None:
    double = doubled()
    backend.failing = {"get", "set", "delete"}
    for number in range(FAILURES_TO_OPEN):
        await double(number)
    assert backend.asked("get") == FAILURES_TO_OPEN
    backend.calls.clear()
    await _right(double)
    assert (backend.calls, probing.waited) == ([], [pytest.approx(0.5)])
    # Writes have breakers of their own.
    for _ in range(FAILURES_TO_OPEN):
        with pytest.raises(CallError):
            await double.prime(1, 1)
    backend.calls.clear()
    assert await double.refresh(1) == 2
    assert (backend.calls, probing.waited) == ([], [pytest.approx(0.5)])


async def test_fewer_failures_in_a_row_leave_the_breaker_closed(
    doubled: Doubled, backend: WatchedBackend, probing: Probing
) -> None:
    double = doubled()
    for _ in range(5):
        backend.failing = {"get"}
        for number in range(FAILURES_TO_OPEN - 1):
            assert await double(number) == 2 * number
        backend.failing = set()
        assert await double(100) == 200
    assert probing.waited == []
    assert backend.asked("get") == 5 * FAILURES_TO_OPEN


async def test_one_probe_finds_the_store_well(doubled: Doubled, backend: WatchedBackend, probing: Probing) -> None:
    double = doubled()
    backend.failing = {"get", "set"}
    await _right(double, 5)
    backend.failing = set()
    backend.calls.clear()
    await probing.once()
    assert backend.calls == [("get", "aiokv-probe")]
    backend.calls.clear()
    assert [await double(1), await double(1)] == [2, 2]
    assert (backend.asked("get"), backend.asked("set"), double.info().hits) == (2, 1, 1)


async def test_probes_become_rarer_and_go_on(doubled: Doubled, backend: WatchedBackend, probing: Probing) -> None:
    double = doubled()
    backend.failing = {"get", "set"}
    await _right(double, 5)
    for _ in range(7):
        await probing.once()
    assert probing.waited == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]
    backend.calls.clear()
    await _right(double, 5)
    assert backend.calls == []
    backend.failing = set()
    await probing.once()
    await double(1)
    assert backend.asked("get") == 1


async def test_breaker_opens_again_after_it_was_closed(doubled: Doubled, backend: WatchedBackend, probing: Probing) -> None:
    double = doubled()
    for _ in range(3):
        backend.failing = {"get", "set"}
        await _right(double, 5)
        backend.failing = set()
        await probing.once()
    backend.calls.clear()
    await double(1)
    assert (backend.asked("get"), probing.waited) == (1, [0.5] * 3)


async def test_probe_of_a_hanging_store_is_given_up_on(doubled: Doubled, backend: WatchedBackend, probing: Probing) -> None:
    double = doubled()
    gate = backend.hold("get")
    await _right(double, 3)
    await probing.once()
    await asyncio.sleep(2 * READ_TIMEOUT)
    assert len(probing.waited) == 2
    gate.set()
    await probing.once()
    backend.calls.clear()
    await double(1)
    assert backend.asked("get") == 1


async def test_breaker_heals_with_its_own_waits(
    doubled: Doubled, backend: WatchedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiokv.caching.breaker, "_FIRST_PROBE_SECONDS", 0.01)
    double = doubled()
    backend.failing = {"get", "set"}
    await _right(double, 5)
    backend.failing = set()
    await asyncio.sleep(0.1)
    await double(1)
    assert (await double(1), double.info().hits) == (2, 1)


async def test_stores_of_one_function_have_breakers_of_their_own(backend: WatchedBackend, store: AsyncKVStore) -> None:
    well_backend, well = watched_store()
    backend.failing = {"get", "set"}

    @kv_cached(60, store=lambda name: {"ill": store, "well": well}[name], key=lambda name: name)
    async def compute(name: str) -> str:
        return name

    for _ in range(5):
        assert [await compute("ill"), await compute("well")] == ["ill", "well"]
    assert (well_backend.asked("get"), compute.info().hits) == (5, 4)
    await compute.aclose()


@pytest.mark.parametrize("verb", ["get", "set"])
async def test_failing_store_raises_at_every_call_where_that_is_asked_for(
    verb: str, doubled: Doubled, backend: WatchedBackend, probing: Probing
) -> None:
    double = doubled(on_store_error="raise")
    backend.failing = {verb}
    for number in range(3 * FAILURES_TO_OPEN):
        with pytest.raises(CallError):
            await double(number)
    backend.failing = set()
    await probing.once()
    assert await double(1) == 2


@pytest.mark.parametrize("verb", ["get", "set"])
async def test_slow_store_raises_where_that_is_asked_for(verb: str, doubled: Doubled, backend: WatchedBackend) -> None:
    gate = backend.hold(verb)
    with pytest.raises(TimeoutError):
        await doubled(on_store_error="raise")(1)
    gate.set()


async def test_failing_store_fails_all_waiters_at_once_where_it_raises(doubled: Doubled, backend: WatchedBackend) -> None:
    double = doubled(on_store_error="raise")
    gate = backend.hold("get")
    results = await asyncio.gather(*(double(1) for _ in range(20)), return_exceptions=True)
    assert {type(result) for result in results} == {CallTimeoutError}
    assert backend.asked("get") == 1
    gate.set()


@pytest.mark.parametrize("error", [ConfigurationError("no such host"), CredentialsError("no credentials")], ids=repr)
async def test_store_that_is_misconfigured_keeps_results_right_and_says_so(
    error: Exception, doubled: Doubled, backend: WatchedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.failing, backend.error = {"get", "set"}, error
    await _right(doubled())
    assert str(error) in caplog.text


async def test_failures_are_logged_once_in_a_while_and_without_values(
    doubled: Doubled, backend: WatchedBackend, moved_time: MovedTime, caplog: pytest.LogCaptureFixture
) -> None:
    double = doubled()
    backend.failing, backend.error = {"get", "set"}, OSError("s3cret")
    moved_time.advance(59)
    with caplog.at_level(logging.INFO, "aiokv"):
        await _right(double)
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == logging.WARNING
    assert "s3cret" not in caplog.text


async def test_failures_are_logged_again_after_a_minute(moved_time: MovedTime, caplog: pytest.LogCaptureFixture) -> None:
    async def probe(_: object) -> None: ...

    breaker = Breaker(probe)
    for seconds in (0.0, 1.0, 58.9, 0.1, 1.0, 59.1):
        moved_time.advance(seconds)
        breaker.failed("read", OSError("s3cret"), 1.0)
    await breaker.aclose()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "s3cret" not in caplog.text


async def test_outage_between_read_and_write_is_nobodys(backend: WatchedBackend, store: AsyncKVStore, work: Work) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    async def number() -> int:
        return await work()

    gate = work.hold()
    calls = [asyncio.create_task(number()) for _ in range(10)]
    await settle()
    backend.failing = {"get", "set", "delete"}
    gate.set()
    assert await asyncio.gather(*calls) == [1] * 10
    backend.failing = set()
    assert [await number(), await number()] == [2, 2]


async def test_outage_during_a_read_is_nobodys(backend: WatchedBackend, store: AsyncKVStore, work: Work) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    async def number() -> int:
        return await work()

    await number()
    gate = backend.hold("get")
    calls = [asyncio.create_task(number()) for _ in range(10)]
    await settle()
    backend.failing = {"get", "set"}
    gate.set()
    assert (await asyncio.gather(*calls), work.runs) == ([2] * 10, 2)


async def test_store_that_failed_at_the_read_is_not_written_to(doubled: Doubled, backend: WatchedBackend) -> None:
    backend.failing = {"get"}
    assert await doubled()(1) == 2
    assert backend.asked("set") == 0


async def test_failing_store_does_not_hide_the_functions_own_failure(
    backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", stale_if_error=60)
    async def number() -> int:
        return await work()

    backend.failing, work.error = {"get", "set"}, LookupError("its own")
    with pytest.raises(LookupError, match="its own"):
        await number()


async def test_function_that_times_out_does_not_count_against_the_store(
    store: AsyncKVStore, work: Work, probing: Probing
) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    async def number() -> int:
        return await work()

    for error in [TimeoutError(), OSError("its own")] * FAILURES_TO_OPEN:
        work.error = error
        with pytest.raises(type(error)):
            await number()
    assert (number.info().store_errors, probing.waited) == (0, [])


async def test_aclose_finishes_what_can_be(doubled: Doubled, backend: WatchedBackend) -> None:
    double = doubled(write="background", read_timeout=1.0)
    gate = backend.hold("set")
    assert await double(1) == 2
    closing = asyncio.create_task(double.aclose())
    await settle()
    assert not closing.done()
    gate.set()
    await closing
    assert await double.peek(1) is not None


@pytest.mark.parametrize("held", ["set", "computation", "probe"])
async def test_aclose_leaves_no_task_behind(
    held: str, backend: WatchedBackend, store: AsyncKVStore, work: Work, moved_time: MovedTime
) -> None:
    before = asyncio.all_tasks()

    @kv_cached(1, store=store, key=lambda: "one", write="background", read_timeout=READ_TIMEOUT, stale_while_revalidate=60)
    async def number() -> int:
        return await work()

    if held == "probe":
        backend.failing = {"get", "set"}
        for _ in range(5):
            await number()
    else:
        await number()
        await settle()
        moved_time.advance(30)
        if held == "set":
            backend.hold("set")
        else:
            work.hold()
        assert await number() == 1
        await settle()
    assert asyncio.all_tasks() > before
    await number.aclose()
    assert asyncio.all_tasks() == before


async def test_aclose_finishes_the_write_of_what_it_let_be_computed(
    backend: WatchedBackend, store: AsyncKVStore, work: Work, moved_time: MovedTime
) -> None:
    @kv_cached(1, store=store, key=lambda: "one", write="background", stale_while_revalidate=60)
    async def number() -> int:
        return await work()

    await number()
    await settle()
    moved_time.advance(30)
    computing = work.hold()
    assert await number() == 1
    await settle()
    assert work.runs == 2
    writing = backend.hold("set")
    closing = asyncio.create_task(number.aclose())
    await settle()
    computing.set()
    await settle()
    assert not closing.done()
    writing.set()
    await closing
    peeked = await number.peek()
    assert peeked is not None
    assert peeked.value == 2


async def test_function_is_used_again_after_aclose_though_its_store_was_ill(
    doubled: Doubled, backend: WatchedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiokv.caching.breaker, "_FIRST_PROBE_SECONDS", 0.01)
    double = doubled()
    backend.failing = {"get", "set"}
    await _right(double, 5)
    await double.aclose()
    backend.failing = set()
    await asyncio.sleep(0.05)
    await double(1)
    assert (await double(1), double.info().hits) == (2, 1)


async def test_aclose_is_safe_twice_and_before_any_call(doubled: Doubled) -> None:
    double = doubled()
    await double.aclose()
    await double(1)
    await double.aclose()
    await double.aclose()
    assert await double(1) == 2


async def test_breaker_closes_at_the_first_answer() -> None:
    answers: list[Exception | None] = [OSError(), OSError(), None]
    probes = 0

    async def probe(verb: str) -> None:
        nonlocal probes
        assert verb == "read"
        probes += 1
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    async def no_wait(_: float) -> None:
        await asyncio.sleep(0)

    breaker = Breaker(probe, no_wait)
    for _ in range(2 * FAILURES_TO_OPEN):
        breaker.failed("read", OSError(), 1.0)
    assert breaker.reads.is_open(1.0)
    await settle()
    assert (breaker.reads.is_open(1.0), probes) == (False, 3)


def test_breaker_of_a_loop_that_ended_does_not_keep_the_next_from_the_store() -> None:
    backend, store = watched_store()

    @kv_cached(60, store=store, key=lambda: "one")
    async def compute() -> int:
        return 1

    async def calls() -> None:
        for _ in range(5):
            assert await compute() == 1

    backend.failing = {"get", "set"}
    asyncio.run(calls())
    backend.failing = set()
    asyncio.run(calls())
    assert compute.info().hits == 4


async def test_refresh_and_prime_raise_too_while_the_store_is_given_up_on(doubled: Doubled, backend: WatchedBackend) -> None:
    double = doubled(on_store_error="raise")
    backend.failing = {"get", "set"}
    for number in range(FAILURES_TO_OPEN):
        with pytest.raises(CallError):
            await double(number)
    with pytest.raises(CallError):
        await double.refresh(1)
    with pytest.raises(CallError):
        await double.prime(2, 1)
    await double.aclose()


async def test_store_that_cancels_itself_is_gone_around(
    doubled: Doubled, backend: WatchedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiokv.caching.breaker, "_FIRST_PROBE_SECONDS", 0.01)
    double = doubled()
    backend.failing, backend.error = {"get", "set"}, asyncio.CancelledError()  # type: ignore[assignment]
    await _right(double, 5)
    await asyncio.sleep(0.05)
    backend.failing = set()
    await asyncio.sleep(0.2)
    await double(1)
    assert (await double(1), double.info().hits) == (2, 1)


async def test_cancelled_read_is_the_callers_own_and_no_failure(doubled: Doubled, backend: WatchedBackend) -> None:
    double = doubled(read_timeout=30.0)
    gate = backend.hold("get")
    call = asyncio.create_task(double(1))
    await settle()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.set()
    assert double.info().store_errors == 0


async def test_breaker_closes_where_its_probes_are_ended_from_outside() -> None:
    async def probe(_: object) -> None: ...

    breaker = Breaker(probe)
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed("write", OSError(), 1.0)
    assert breaker.writes.is_open(1.0)
    assert breaker._probing is not None
    breaker._probing.cancel()
    await settle()
    assert not breaker.writes.is_open(1.0)


@pytest.mark.parametrize("write", ["await", "background"])
async def test_error_that_is_kept_holds_no_values(
    write: str, doubled: Doubled, backend: WatchedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Value:
        pass

    def with_traceback(error: OSError) -> object:
        return OSError.with_traceback, (OSError(*error.args), error.__traceback__)

    # As a library does that lets tracebacks be pickled.
    monkeypatch.setitem(copyreg.dispatch_table, OSError, with_traceback)

    alive: list[weakref.ref[Value]] = []

    async def get(db_name: str, key: str) -> str | None:
        value = Value()
        alive.append(weakref.ref(value))
        raise OSError(db_name, key)

    backend.get = get  # type: ignore[method-assign]
    double = doubled(write=write)
    await double(1)
    gc.collect()
    assert [reference() for reference in alive] == [None]


async def test_store_that_fails_in_a_way_of_its_own_is_gone_around(doubled: Doubled, backend: WatchedBackend) -> None:
    backend.failing, backend.error = {"get", "set"}, RuntimeError("no such pool")
    await _right(doubled())


async def test_error_of_a_class_that_cannot_be_copied_is_still_raised(doubled: Doubled, backend: WatchedBackend) -> None:
    class OddError(OSError):
        def __init__(self, *, code: int) -> None:
            super().__init__(str(code))

    double = doubled(on_store_error="raise")
    backend.failing, backend.error = {"get"}, OddError(code=7)
    for number in range(2 * FAILURES_TO_OPEN):
        with pytest.raises(OSError):  # noqa: PT011 (of any class)
            await double(number)


def test_write_that_aclose_gave_up_on_costs_its_caller_nothing(
    cached: Cached, backend: WatchedBackend, work: Work, moved_time: MovedTime
) -> None:
    async def scenario() -> None:
        number = cached(read_timeout=1.0)
        computing, writing = work.hold(), backend.hold("set")
        call = asyncio.create_task(number())
        await settle()
        closing = asyncio.create_task(number.aclose())
        await asyncio.sleep(0.5)
        # The write has half a second left until it is given up on.
        computing.set()
        assert await call == 1
        await closing
        writing.set()

    moved_time.run(scenario())
