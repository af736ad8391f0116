"""Reads through faults: with aiokv, hedged or not, with the official client, and with aiohttp under tenacity.

Each contender is a process of its own. All send their GETs through one `aiokv.testing.FaultProxy`, which runs in this process,
to one `aiokv serve` process over memory:

  aiokv           AsyncKVStore with its defaults, which does not hedge
  aiokv-hedged    the same with hedge=True
  fal             the official client's KVStore, unchanged, in threads: it blocks, and opens a connection for each call
  tenacity        a bare aiohttp.ClientSession under `@tenacity.retry` with that decorator's defaults: it retries after any
                  Exception, for ever (stop_never), without a wait (wait_none). aiohttp itself sends a GET once more where a
                  pooled connection breaks

In each round, every contender meets the same random draws, with the seed --seed plus the round:

  0, 1, 5, 20 %   the connection of this share of requests is reset: half of them before the upstream sees the request
  resets          (ResetBefore), half after it has answered, before a byte of the answer passes (ResetAfter)
  2 % stalls      this share of answers comes half a second late (LatencyAfter(0.5)); none hangs for ever
  outage          for --outage-seconds no connection is accepted, and open ones are reset; once, not in each round
  5 % resets,     aiokv alone, at full speed: only many calls can show a success of 99.99 %
  unpaced

The load is paced and bounded: --rate calls a second are due, and at most --concurrency run at once. A call that waits for its
turn begins late, and the load falls behind. The latency of a call counts from its start to its end, whether it succeeds or
fails. One core can carry more than the rate, so that latencies do not show a queue. Each run begins with some calls that are
not counted and meet no fault: they open connections, and show the hedger how long answers take. In odd rounds the contenders
come in the opposite order. Percentiles are of the calls of all rounds together. A call fails where its value is not the one
stored, where it takes --call-bound, and where it has not ended when the outage ends (tenacity's defaults would go on). The
official client has bounds of its own: 5 attempts of at most 10 s.

Sends are the requests that the proxy has read. In the outage no request reaches the proxy. There, sends are the attempts to
connect, which the interpreter reports (its audit event socket.connect), for every contender alike. aiokv's calls wait for the
host, and then fail without an attempt of their own: one call a second looks.

  python benchmarks/faults.py                            under six minutes
  python benchmarks/faults.py --quick                    a smoke run, which shows nothing but that the script works
  python benchmarks/faults.py --plot faults.png --json faults.json

The exit status is 1 where an aim is missed. The official client and the plot need packages: pip install fal matplotlib
"""

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import orjson
from harness import add_json_option, note_table, progress, served, verdict, where, write_json
from stampede import percentile

from aiokv import AsyncKVStore
from aiokv.backends.http.retry import QUOTA_TOKENS, quota_of
from aiokv.errors import CallError
from aiokv.testing import FaultOrFaults, FaultProxy, LatencyAfter, ResetAfter, ResetBefore, with_probability

AIOKV, HEDGED, OFFICIAL, TENACITY = "aiokv", "aiokv-hedged", "fal", "tenacity"
CONTENDERS = (AIOKV, HEDGED, OFFICIAL, TENACITY)
PACKAGES = {OFFICIAL: "fal"}

DB_NAME = "faults"
VALUES = {f"key-{number}": f"value {number} {'x' * 100}" for number in range(500)}
KEYS = list(VALUES)

STALL_SECONDS = 0.5
RESETS = (ResetBefore(), ResetAfter())
UNPACED, STALLS, OUTAGE = "5 % resets, unpaced", "2 % stalls", "outage"
# For each scenario: the share of requests that meet a fault, and the faults.
SCENARIOS: dict[str, tuple[float, tuple[FaultOrFaults, ...]]] = {
    "0 % resets": (0.0, RESETS),
    "1 % resets": (0.01, RESETS),
    "5 % resets": (0.05, RESETS),
    "20 % resets": (0.2, RESETS),
    STALLS: (0.02, (LatencyAfter(STALL_SECONDS),)),
    UNPACED: (0.05, RESETS),
}
# About the calls a second that one core carries through the proxy; used only to estimate the time left.
UNPACED_RATE = 1000.0

MAX_FAILED_SHARE = 1e-4
MAX_SENDS = 1.08
MAX_OUTAGE_SENDS = 0.1
MAX_HEDGED_RATIO = 1 / 3
CONFIDENCE = 0.95

WARM_UP_CALLS = 50
GRACE_SECONDS = 120.0
MAX_REPLY_BYTES = 2**27

# In a worker process: the address of every attempt to connect.
_connects: list[object] = []


@dataclass(frozen=True)
class Order:
    """The load of one run: a number of calls, one each `interval_seconds`, that ends after `seconds` at the latest."""

    calls: int
    interval_seconds: float
    concurrency: int
    seconds: float
    call_bound_seconds: float


@dataclass(frozen=True)
class Note:
    """The end of one call. `refused` is whether aiokv's quota refused a retry."""

    began: float
    seconds: float
    failure: str | None = None
    refused: bool = False


@dataclass
class Outcome:
    """The results of a contender in one scenario, of all rounds; latencies are in seconds."""

    sends: int = 0
    succeeded: list[float] = field(default_factory=list)
    failed: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    refused_retries: int = 0
    lowest_tokens: int | None = None

    @classmethod
    def of(cls, notes: Sequence[Note], sends: int, lowest_tokens: int | None) -> Self:
        """Sum up the notes of all calls."""
        return cls(
            sends,
            [note.seconds for note in notes if note.failure is None],
            [note.seconds for note in notes if note.failure is not None],
            Counter(note.failure for note in notes if note.failure is not None),
            sum(note.refused for note in notes),
            lowest_tokens,
        )

    def add(self, other: "Outcome") -> None:
        """Add the results of another round."""
        self.sends += other.sends
        self.succeeded += other.succeeded
        self.failed += other.failed
        self.failures += other.failures
        self.refused_retries += other.refused_retries
        lowest = [tokens for tokens in (self.lowest_tokens, other.lowest_tokens) if tokens is not None]
        self.lowest_tokens = min(lowest, default=None)

    @property
    def calls(self) -> int:
        """The number of calls."""
        return len(self.succeeded) + len(self.failed)

    @property
    def failed_share(self) -> float:
        """The share of the calls that failed."""
        return len(self.failed) / max(1, self.calls)

    @property
    def sends_per_call(self) -> float:
        """The mean number of sends of a call."""
        return self.sends / max(1, self.calls)

    def latency_ms(self, share: float) -> float:
        """Return a percentile of the latencies of all calls."""
        return percentile(self.succeeded + self.failed, share) * 1e3

    def row(self) -> dict[str, object]:
        """Return the figures, by names that hold their units."""
        return {
            "calls": self.calls,
            "succeeded": len(self.succeeded),
            "success_share": 1 - self.failed_share,
            "sends": self.sends,
            "sends_per_call": self.sends_per_call,
            "p50_ms": self.latency_ms(0.5),
            "p99_ms": self.latency_ms(0.99),
            "p99_9_ms": self.latency_ms(0.999),
            "failed_p50_ms": percentile(self.failed, 0.5) * 1e3,
            "failed_longest_ms": max(self.failed, default=math.nan) * 1e3,
            "failures": dict(self.failures),
            "refused_retries": self.refused_retries,
            "lowest_quota_tokens": self.lowest_tokens,
        }


AsyncGet = Callable[[str], Awaitable[str | None]]


@contextlib.asynccontextmanager
async def aiokv_get(url: str, *, hedge: bool) -> AsyncGenerator[AsyncGet]:
    """Read with aiokv."""
    async with AsyncKVStore(DB_NAME, url=url, hedge=hedge) as store:
        yield store.get


@contextlib.asynccontextmanager
async def tenacity_get(url: str) -> AsyncGenerator[AsyncGet]:
    """Read with aiohttp, retried with tenacity's defaults."""
    import aiohttp  # noqa: PLC0415 (of one contender)
    import tenacity  # noqa: PLC0415 (likewise)

    async with aiohttp.ClientSession() as session:

        @tenacity.retry
        async def get(key: str) -> str | None:
            async with session.get(f"{url}/get/{DB_NAME}/{key}") as response:
                response.raise_for_status()
                value: str = (await response.json())["value"]
                return value

        yield get


def official_get(url: str) -> Callable[[str], str | None]:
    """Return the official client's `get`, with a token in place: the client would fetch one over TLS only."""
    from fal.toolkit import kv  # noqa: PLC0415 (the import takes seconds)
    from fal.toolkit.file.providers import fal as provider  # noqa: PLC0415 (likewise)

    kv.FAL_KV_HOST = url
    provider.fal_v3_token_manager._token = provider.FalV3Token(  # noqa: SLF001 (there is no public way to set one)
        token="benchmark",  # noqa: S106 (the server asks for none)
        token_type="Bearer",  # noqa: S106 (likewise)
        base_upload_url="",
        expires_at=datetime.now(UTC) + timedelta(days=1),
    )
    return kv.KVStore(DB_NAME).get


def judge_call(began: float, key: str, value: str | None, error: Exception | None) -> Note:
    """Judge a call that has just ended."""
    seconds = time.monotonic() - began
    if isinstance(error, CallError):
        return Note(began, seconds, type(error).__name__, "retry quota" in error.reason)
    if error is not None:
        return Note(began, seconds, type(error).__name__)
    return Note(began, seconds, None if value == VALUES[key] else "wrong value")


async def load_tasks(get: AsyncGet, order: Order, look: Callable[[], object]) -> list[Note]:
    """Make the calls in tasks; call `look` at the end of each."""
    notes: list[Note] = []
    numbers = iter(range(order.calls))
    start = time.monotonic()
    end = start + order.seconds

    async def make_calls() -> None:
        for number in numbers:
            await asyncio.sleep(start + number * order.interval_seconds - time.monotonic())
            began = time.monotonic()
            if began >= end:
                return
            key, value, failure = KEYS[number % len(KEYS)], None, None
            try:
                async with asyncio.timeout_at(min(began + order.call_bound_seconds, end)):
                    value = await get(key)
            except Exception as error:  # noqa: BLE001 (counted by kind; the load goes on)
                failure = error
            notes.append(judge_call(began, key, value, failure))
            look()

    await asyncio.gather(*(make_calls() for _ in range(order.concurrency)))
    return notes


def load_threads(get: Callable[[str], str | None], order: Order) -> list[Note]:
    """Make the calls in threads, which cannot be cut off."""
    notes: list[Note] = []
    numbers = iter(range(order.calls))
    start = time.monotonic()

    def make_calls() -> None:
        for number in numbers:
            time.sleep(max(0.0, start + number * order.interval_seconds - time.monotonic()))
            began = time.monotonic()
            if began >= start + order.seconds:
                return
            key, value, failure = KEYS[number % len(KEYS)], None, None
            try:
                value = get(key)
            except Exception as error:  # noqa: BLE001 (counted by kind; the load goes on)
                failure = error
            notes.append(judge_call(began, key, value, failure))

    # The official client prints each of its retries.
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        ThreadPoolExecutor(order.concurrency) as threads,
    ):
        for future in [threads.submit(make_calls) for _ in range(order.concurrency)]:
            future.result()
    return notes


async def work(name: str, url: str) -> None:
    """Run a contender's process: for each order, a line of standard input, make its calls; end when standard input does."""
    host = url.removeprefix("http://")
    sys.addaudithook(lambda event, arguments: _connects.append(arguments[1]) if event == "socket.connect" else None)
    quota = quota_of(host) if name in {AIOKV, HEDGED} else None
    lowest = QUOTA_TOKENS

    def look() -> None:
        nonlocal lowest
        lowest = min(lowest, quota.tokens if quota is not None else lowest)

    async with contextlib.AsyncExitStack() as stack:
        load: Callable[[Order], Awaitable[list[Note]]]
        if name == OFFICIAL:
            blocking = official_get(url)
            load = lambda order: asyncio.to_thread(load_threads, blocking, order)  # noqa: E731 (one of two)
        else:
            client = tenacity_get(url) if name == TENACITY else aiokv_get(url, hedge=name == HEDGED)
            get = await stack.enter_async_context(client)
            load = lambda order: load_tasks(get, order, look)  # noqa: E731 (one of two)
        out = sys.stdout.buffer
        out.write(b"ready\n")
        out.flush()
        # In a thread, so that the loop notices meanwhile when a pooled connection is closed.
        while line := await asyncio.to_thread(sys.stdin.buffer.readline):
            order = Order(**orjson.loads(line))
            lowest = QUOTA_TOKENS
            look()
            _connects.clear()
            notes = await load(order)
            tried = sum(isinstance(address, tuple) and f"{address[0]}:{address[1]}" == host for address in _connects)
            outcome = Outcome.of(notes, tried, None if quota is None else lowest)
            out.write(orjson.dumps(outcome) + b"\n")
            out.flush()


class Worker:
    """The process of a contender, seen from the measuring process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, name: str, url: str) -> AsyncGenerator[Self]:
        """Start the process, and stop it at the end."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("AIOKV_", "FAL_"))}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, f"--worker={name}", f"--url={url}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_REPLY_BYTES,
            env=environment,
        )
        worker = cls(name, process)
        try:
            await worker._read_line(GRACE_SECONDS)
            yield worker
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def run(self, order: Order) -> Outcome:
        """Have the process make calls; the sends of the outcome are its attempts to connect."""
        if self._process.stdin is None:
            raise AssertionError("the process was started with a pipe")
        self._process.stdin.write(orjson.dumps(order) + b"\n")
        reply = orjson.loads(await self._read_line(order.seconds + GRACE_SECONDS))
        return Outcome(**{**reply, "failures": Counter(reply["failures"])})

    async def _read_line(self, bound_seconds: float) -> bytes:
        if self._process.stdout is None:
            raise AssertionError("the process was started with a pipe")
        async with asyncio.timeout(bound_seconds):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._name} has ended; its output is above")
        return line


class Estimate:
    """The progress of all runs, in seconds of load."""

    def __init__(self, total_seconds: float) -> None:
        self._total_seconds = total_seconds
        self._done_seconds = 0.0

    @contextlib.asynccontextmanager
    async def during(self, seconds: float) -> AsyncGenerator[None]:
        """Show the progress during a run of about so many seconds."""

        async def show() -> None:
            began = time.monotonic()
            while True:
                done = self._done_seconds + min(seconds, time.monotonic() - began)
                # Only `end` shows the last step.
                progress(min(int(done), math.ceil(self._total_seconds) - 1), math.ceil(self._total_seconds), "seconds of load")
                await asyncio.sleep(0.5)

        task = asyncio.create_task(show())
        try:
            yield
        finally:
            task.cancel()
            self._done_seconds += seconds

    def end(self) -> None:
        """Show that all runs are done."""
        progress(1, 1, "seconds of load: done")


Outcomes = dict[str, dict[str, Outcome]]


class Measurement:
    """Every run of every contender, one after the other.

    Args:
        proxy: The proxy that all requests go through.
        workers: The contenders.
        options: The command line.
    """

    def __init__(self, proxy: FaultProxy, workers: Mapping[str, Worker], options: argparse.Namespace) -> None:
        self._proxy = proxy
        self._workers = workers
        self._options = options
        paced = len(workers) * options.rounds * (len(SCENARIOS) - 1) * (options.calls + WARM_UP_CALLS) / options.rate
        unpaced = options.unpaced_calls / UNPACED_RATE if AIOKV in workers else 0.0
        self._estimate = Estimate(paced + unpaced + len(workers) * options.outage_seconds)
        self.outcomes: Outcomes = {}

    async def run(self) -> Outcomes:
        """Run all scenarios, then the outages."""
        for number in range(self._options.rounds):
            names = list(self._workers)[:: -1 if number % 2 else 1]
            for scenario in SCENARIOS:
                for name in names:
                    if scenario != UNPACED or name == AIOKV:
                        await self._run_once(scenario, name, number)
        for name in self._workers:
            await self._run_outage(name)
        self._estimate.end()
        return self.outcomes

    async def _run_once(self, scenario: str, name: str, number: int) -> None:
        share, faults = SCENARIOS[scenario]
        calls, seconds = self._options.calls, self._options.calls / self._options.rate
        interval_seconds = 1 / self._options.rate
        if scenario == UNPACED:
            calls = math.ceil(self._options.unpaced_calls / self._options.rounds)
            seconds, interval_seconds = calls / UNPACED_RATE, 0.0
        await self._warm_up(name)
        async with self._estimate.during(seconds + WARM_UP_CALLS / self._options.rate):
            self._proxy.faults = with_probability(share, *faults, seed=self._options.seed + number)
            outcome = await self._workers[name].run(self._order(calls, interval_seconds))
            # A request that its client gave up may still be on its way.
            await asyncio.sleep(0.05)
            self._proxy.faults = None
        outcome.sends = len(self._proxy.requests)
        self.outcomes.setdefault(scenario, {}).setdefault(name, Outcome()).add(outcome)

    async def _run_outage(self, name: str) -> None:
        seconds = self._options.outage_seconds
        await self._warm_up(name)
        order = self._order(math.ceil(seconds * self._options.rate), 1 / self._options.rate, seconds)
        async with self._estimate.during(seconds), self._proxy.outage():
            self.outcomes.setdefault(OUTAGE, {})[name] = await self._workers[name].run(order)

    async def _warm_up(self, name: str) -> None:
        # At the same pace: in a burst the hedger would learn that answers take long.
        await self._workers[name].run(self._order(WARM_UP_CALLS, 1 / self._options.rate))
        self._proxy.requests.clear()

    def _order(self, calls: int, interval_seconds: float, seconds: float = 600.0) -> Order:
        return Order(calls, interval_seconds, self._options.concurrency, seconds, self._options.call_bound)


async def measure(address: str, options: argparse.Namespace) -> Outcomes:
    """Store the values, start the contenders, and measure."""
    async with AsyncKVStore(DB_NAME, url=address) as store:
        await store.set_many(VALUES)
    async with FaultProxy(address) as proxy, contextlib.AsyncExitStack() as stack:
        # One after the other: an import takes a core.
        workers = {name: await stack.enter_async_context(Worker.start(name, proxy.url)) for name in options.contenders}
        return await Measurement(proxy, workers, options).run()


def describe(outcomes: Outcomes, options: argparse.Namespace) -> None:
    """Print the table."""
    print(
        f"\nGETs through faults, {options.rounds} rounds of {options.calls} calls, {options.rate:g} a second,"
        f" {options.concurrency} at once, seed {options.seed}\n{where()}\n"
        f"  faults are resets, half of them before the server and half after it, stalls of {STALL_SECONDS:g} s,"
        f" and an outage of {options.outage_seconds:g} s\n"
        f"  tenacity is @tenacity.retry by default: for ever, without a wait; cut off after {options.call_bound:g} s\n"
    )
    print(
        f"  {'':<20} {'':<14} {'calls':>6} {'success':>9} {'sends':>9} {'p50':>8} {'p99':>8} {'p99.9':>8}"
        f" {'failed':>7} {'their p50':>9} {'longest':>8}"
    )
    print(f"  {'':<20} {'':<14} {'':>6} {'%':>9} {'per call':>9} {'ms':>8} {'ms':>8} {'ms':>8} {'':>7} {'ms':>9} {'ms':>8}")
    for scenario, of_contenders in outcomes.items():
        rows: dict[str, Sequence[float | None]] = {}
        for position, (name, outcome) in enumerate(of_contenders.items()):
            rows[name] = [
                100 * (1 - outcome.failed_share),
                outcome.sends_per_call,
                *(outcome.latency_ms(share) for share in (0.5, 0.99, 0.999)),
            ]
            failed = "        -        -"
            if outcome.failed:
                failed = f"{percentile(outcome.failed, 0.5) * 1e3:9.1f}{max(outcome.failed) * 1e3:9.1f}"
            print(
                f"  {scenario if position == 0 else '':<20} {name:<14} {outcome.calls:6}"
                f" {100 * (1 - outcome.failed_share):9.3f} {outcome.sends_per_call:9.3f}"
                f" {outcome.latency_ms(0.5):8.1f} {outcome.latency_ms(0.99):8.1f} {outcome.latency_ms(0.999):8.1f}"
                f" {len(outcome.failed):7} {failed}"
            )
        note_table(scenario, ["success %", "sends per call", "p50 ms", "p99 ms", "p99.9 ms"], rows)
    if {AIOKV, HEDGED} & set(options.contenders):
        print(f"\n  aiokv's retry quota of {QUOTA_TOKENS} tokens")
    for scenario, of_contenders in outcomes.items():
        for name, outcome in of_contenders.items():
            if outcome.lowest_tokens is not None:
                print(
                    f"  {scenario:<20} {name:<14} at the ends of calls never below {outcome.lowest_tokens:3} tokens,"
                    f" {outcome.refused_retries} retries refused"
                )


def upper_bound(failed: int, calls: int) -> float:
    """Return an upper bound of the true share of failures, with 95 % confidence (Poisson, one-sided)."""
    low, high = 0.0, failed + 20.0 + 10.0 * math.sqrt(failed)
    for _ in range(60):
        mean = (low + high) / 2
        below = sum(math.exp(number * math.log(mean) - mean - math.lgamma(number + 1)) for number in range(failed + 1))
        low, high = (mean, high) if below > 1 - CONFIDENCE else (low, mean)
    return high / calls


def judge(outcomes: Outcomes) -> dict[str, bool]:
    """Print the aims; return which were met."""
    print()
    met: dict[str, bool] = {}
    many = outcomes[UNPACED].get(AIOKV) if UNPACED in outcomes else None
    if many is not None:
        share = upper_bound(len(many.failed), many.calls)
        print(
            f"  {UNPACED}: {len(many.failed)} of {many.calls} calls of {AIOKV} failed;"
            f" with {CONFIDENCE:.0%} confidence the true share is below {share:.2g}"
        )
        met["success"] = verdict("failed calls for each call, at 5 % resets,", many.failed_share, MAX_FAILED_SHARE)
        met["sends"] = verdict("sends for each call, at 5 % resets,", many.sends_per_call, MAX_SENDS)
        refused = sum(outcomes[scenario][AIOKV].refused_retries for scenario in ("5 % resets", "20 % resets", UNPACED))
        met["quota"] = verdict("retries refused, at 5 % and 20 % resets,", refused, 0)
    outage = outcomes[OUTAGE].get(AIOKV)
    if outage is not None:
        print(f"  {OUTAGE}: {outage.sends} attempts to connect of {outage.calls} calls of {AIOKV}")
        met["outage"] = verdict("attempts to connect for each call, in an outage,", outage.sends_per_call, MAX_OUTAGE_SENDS)
    plain, hedged = outcomes[STALLS].get(AIOKV), outcomes[STALLS].get(HEDGED)
    if plain is not None and hedged is not None:
        ratio = hedged.latency_ms(0.99) / plain.latency_ms(0.99)
        met["hedging"] = verdict("p99 where 2 % of answers stall, hedged to not hedged,", ratio, MAX_HEDGED_RATIO)
    return met


def plot(outcomes: Outcomes, options: argparse.Namespace) -> None:
    """Draw the failures, the sends of a call, the latencies, and the tail where answers stall."""
    import matplotlib as mpl  # noqa: PLC0415 (only for those who want a plot)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the choice of the backend)

    figure, ((failed, sends), (latency, tail)) = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    scenarios = [scenario for scenario in outcomes if scenario != UNPACED]
    width = 0.8 / len(options.contenders)
    for position, name in enumerate(options.contenders):
        of_scenarios = [outcomes[scenario][name] for scenario in scenarios]
        at = [number + (position - (len(options.contenders) - 1) / 2) * width for number in range(len(scenarios))]
        failed.bar(at, [100 * outcome.failed_share for outcome in of_scenarios], width, label=name)
        sends.bar(at, [outcome.sends_per_call for outcome in of_scenarios], width, label=name)
        middle = [outcome.latency_ms(0.5) for outcome in of_scenarios]
        high, highest = ([outcome.latency_ms(share) for outcome in of_scenarios] for share in (0.99, 0.999))
        color = f"C{position}"
        latency.vlines(at, middle, highest, color=color, label=name)
        for marker, values in (("o", middle), ("s", high), ("^", highest)):
            latency.plot(at, values, marker, color=color, markersize=5)
        stalled = sorted(seconds * 1e3 for seconds in outcomes[STALLS][name].succeeded + outcomes[STALLS][name].failed)
        tail.step(stalled, [1 - rank / len(stalled) for rank in range(len(stalled))], where="post", label=name)
    for axes in (failed, sends, latency):
        axes.set_xticks(range(len(scenarios)), scenarios)
    failed.set(ylabel="calls that fail, %", title="Failures")
    failed.set_yscale("symlog", linthresh=0.1)
    sends.set(ylabel="sends for each call", title="Load on the service", yscale="log")
    sends.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    latency.set(ylabel="latency, ms", title="Latency, failed calls included: p50 (circle), p99 (square), p99.9 (triangle)")
    latency.set_yscale("log")
    tail.set(xlabel="latency, ms", ylabel="share of calls that took longer", xscale="log", yscale="log")
    tail.set_title(f"Where 2 % of answers come {STALL_SECONDS:g} s late")
    for axes in (failed, sends, latency, tail):
        axes.legend()
    figure.suptitle(
        f"GETs through faults, {options.rate:g} calls a second, {options.concurrency} at once,"
        f" an outage of {options.outage_seconds:g} s\n{where()}"
    )
    figure.savefig(options.plot, dpi=120)
    print(f"\nplot: {options.plot}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Each with its default, and its value with --quick.
    sizes: dict[str, tuple[type, float, float, str]] = {
        "rounds": (int, 4, 1, "rounds of every contender in every scenario"),
        "calls": (int, 1000, 60, "calls of each contender in each scenario of a round"),
        "unpaced-calls": (int, 32_000, 300, "calls of aiokv as fast as it goes, in all rounds together"),
        "outage-seconds": (float, 30.0, 0.5, "how long the outage lasts"),
        "rate": (float, 500.0, 500.0, "calls a second"),
        "concurrency": (int, 32, 16, "calls under way at once, at most"),
        "call-bound": (float, 10.0, 10.0, "seconds after which a call is cut off"),
    }
    for name, (kind, default, quick, what) in sizes.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{what} (default: {default:g}, with --quick {quick:g})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round's faults (default: %(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="try whether the script works")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw a plot (needs matplotlib)")
    add_json_option(parser)
    for name in ("worker", "url"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, (kind, default, quick, _) in sizes.items():
        attribute = name.replace("-", "_")
        if getattr(options, attribute) is None:
            setattr(options, attribute, kind(quick if options.quick else default))
        if getattr(options, attribute) <= 0:
            parser.error(f"--{name} must be more than 0")
    return options


def main() -> int:
    """Run the measurement."""
    options = parse()
    # By default each retry logs a warning.
    logging.basicConfig(level=logging.ERROR)
    if options.worker is not None:
        asyncio.run(work(options.worker, options.url))
        return 0
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    for name, package in PACKAGES.items():
        if name in options.contenders and importlib.util.find_spec(package) is None:
            print(f"{name} is left out, since it is not installed: pip install {package}", file=sys.stderr)
            options.contenders.remove(name)
    if not options.contenders:
        return 2
    with served("memory://") as address:
        outcomes = asyncio.run(measure(address, options))
    describe(outcomes, options)
    met = judge(outcomes)
    if options.plot:
        plot(outcomes, options)
    rows = [
        {"scenario": scenario, "contender": name, **outcome.row()}
        for scenario, of_contenders in outcomes.items()
        for name, outcome in of_contenders.items()
    ]
    write_json(options, rows=rows)
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
