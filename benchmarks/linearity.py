"""A random checker of `kv_cached`: after `invalidate`, `prime` or `refresh` returned, its process serves nothing older.

There is one source of truth: a version for each key, which only grows. Every computation returns the version that it read at
its start. Whenever a task has invalidated, primed or refreshed a key, it notes the floor: the least version that may be served
from then on. Every call that starts afterwards in that process must give the floor or more. It must also give the key that it
asked for.

Several processes, threads and loops, with several store objects of each target, use the same functions at once: by
`kv_cached` and `kv_cached_many`, with and without a near cache, with `stale_while_revalidate`, over a slow and sometimes
failing memory store (one for each process) and over one SQLite file. Callers give up, or change their arguments while they
wait. Every other loop makes eager tasks (Python 3.12). The seed fixes what each task wants to do, not how threads take turns.

  python benchmarks/linearity.py                                  a minute
  python benchmarks/linearity.py --seconds 600 --seed 7 --processes 3 --threads 3
  python benchmarks/linearity.py --seconds 5 --forget-invalidations    must find something

Another process may store a result that it computed before this one's `invalidate` returned: what another process began to
compute less than 5 seconds before is excused, and counted. The exit status is 1 where something was found; its seed and the
history of the key are printed.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import inspect
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final

from harness import add_json_option, note_aim, note_table, write_json
from linearity_subject import KEYS, Floor, Result, SlowBackend, Subject, chances, pause

import aiokv.backends.registry
from aiokv import AioKVError, AsyncKVStore, NearCache

TASKS: Final = 6
STORES: Final = 3
LATE_NS: Final = 5_000_000_000
COUNTS: Final = (
    "operations",
    "calls",
    "invalidations",
    "primes",
    "refreshes",
    "changed",
    "left",
    "failed",
    "excused",
    "findings",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What one run does."""

    seconds: float
    seed: int
    processes: int
    threads: int
    folder: str
    faults: float
    skip: frozenset[str]
    forget_invalidations: bool


class Checker:
    """All that one process does."""

    def __init__(self, config: Config, number: int, truth: Any) -> None:
        self.config = config
        self.number = number
        self.truth = truth
        self.versions = truth.get_obj()
        self.stop = threading.Event()
        self.findings: list[str] = []
        self.counts: list[collections.Counter[str]] = []
        self.subjects = list(self._subjects())

    def _subjects(self) -> Iterator[Subject]:
        backend = SlowBackend(0.0 if "faults" in self.config.skip else self.config.faults)
        for kind in ("memory", "sqlite"):
            if kind in self.config.skip:
                continue
            stores = [self._store(kind, backend) for _ in range(1 if "stores" in self.config.skip else STORES)]
            for many in (False, True):
                if many and "many" in self.config.skip:
                    continue
                for near in (False, True):
                    options: dict[str, Any] = {"near": NearCache(5)} if near and "near" not in self.config.skip else {}
                    if "swr" not in self.config.skip and near != many:
                        options |= {"stale_while_revalidate": 5, "early": 1e4}
                    name = f"{kind}-{'many' if many else 'one'}-{'near' if near else 'far'}"
                    yield Subject(name, self.version, stores, many=many, **options)

    def _store(self, kind: str, backend: SlowBackend) -> AsyncKVStore:
        if kind == "sqlite":
            return AsyncKVStore("db", url=f"sqlite:///{self.config.folder}/kv.db")
        if "backend" in inspect.signature(AsyncKVStore).parameters:
            make: Callable[..., AsyncKVStore] = AsyncKVStore
            return make("db", backend=backend)
        aiokv.backends.registry._memory_backends["linearity"] = backend  # type: ignore[assignment]  # noqa: SLF001 (a slow one)
        return AsyncKVStore("db", url="memory://linearity")

    def version(self, key: int) -> int:
        """Return the present version of a key."""
        return int(self.versions[key])

    def run_thread(self, number: int, counts: "collections.Counter[str]") -> None:
        """Run one loop until the end."""
        try:
            with asyncio.Runner() as runner:
                if number % 2 and sys.version_info >= (3, 12) and "eager" not in self.config.skip:
                    runner.get_loop().set_task_factory(asyncio.eager_task_factory)
                runner.run(self._run_loop(number, counts))
        except BaseException:  # noqa: BLE001 (whatever ends a loop is a finding)
            counts["findings"] += 1
            self.findings.append(f"a loop ended with\n{traceback.format_exc()}")
            self.stop.set()

    async def _run_loop(self, number: int, counts: "collections.Counter[str]") -> None:
        async with asyncio.TaskGroup() as group:
            for task in range(TASKS):
                chance = random.Random(f"{self.config.seed}-{self.number}-{number}-{task}")  # noqa: S311 (guards nothing)
                group.create_task(self._run_task(chance, counts))
        for subject in self.subjects:
            await subject.cached.aclose()

    async def _run_task(self, chance: random.Random, counts: "collections.Counter[str]") -> None:
        steps = {"call": 12, "leave": 1, "bump": 2, "invalidate": 2, "prime": 1, "refresh": 1, "change": 1}
        for name in self.config.skip & steps.keys():
            del steps[name]
        while not self.stop.is_set():
            (name,) = chance.choices(list(steps), list(steps.values()))
            subject = chance.choice(self.subjects)
            keys = chance.sample(range(KEYS), chance.randint(1, KEYS) if subject.many else 1)
            counts["operations"] += 1
            try:
                await getattr(self, f"_{name}")(subject, keys, chance, counts)
            except AioKVError as error:
                counts["failed"] += 1
                subject.note(keys, f"{name} {keys} failed: {type(error).__name__}")
            if chance.random() < 0.3:  # noqa: PLR2004 (a share)
                await pause()

    async def _call(self, subject: Subject, keys: list[int], _: random.Random, counts: "collections.Counter[str]") -> None:
        floors = [dataclasses.replace(floor) for floor in subject.floors]
        results = await subject.call(list(keys), [0])
        counts["calls"] += 1
        for key in keys:
            self._check(subject, key, floors[key], results.get(key), counts)

    async def _leave(
        self, subject: Subject, keys: list[int], chance: random.Random, counts: "collections.Counter[str]"
    ) -> None:
        counts["left"] += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.random() * 0.005):
                await self._call(subject, keys, chance, counts)

    async def _bump(self, _: Subject, keys: list[int], *__: Any) -> None:
        with self.truth.get_lock():
            for key in keys:
                self.versions[key] += 1

    async def _invalidate(self, subject: Subject, keys: list[int], *rest: Any) -> None:
        await self._bump(subject, keys)
        versions, begun_ns = {key: self.version(key) for key in keys}, time.monotonic_ns()
        if not self.config.forget_invalidations:
            await subject.invalidate(list(keys), [0])
        rest[-1]["invalidations"] += 1
        for key, version in versions.items():
            subject.raise_floor(key, version, begun_ns)
        subject.note(keys, f"invalidated {versions}, begun {begun_ns / 1e9:.6f}")

    async def _prime(self, subject: Subject, keys: list[int], *rest: Any) -> None:
        if not hasattr(subject.cached, "prime"):
            return
        for key in keys:
            # One at a time: a prime has one version.
            await self._bump(subject, [key])
            with subject.priming([key]) as prime:
                begun_ns = time.monotonic_ns()
                prime.version = self.version(key)
                await subject.prime({key: [key, 0, prime.version, os.getpid(), begun_ns]}, [0])
                rest[-1]["primes"] += 1
                subject.raise_floor(key, prime.version, begun_ns)
            subject.note([key], f"primed {prime.version}, begun {begun_ns / 1e9:.6f}")

    async def _refresh(self, subject: Subject, keys: list[int], *rest: Any) -> None:
        await self._bump(subject, keys)
        versions, begun_ns = {key: self.version(key) for key in keys}, time.monotonic_ns()
        floors = [dataclasses.replace(floor) for floor in subject.floors]
        results = await subject.refresh(list(keys), [0])
        rest[-1]["refreshes"] += 1
        for key in keys:
            self._check(subject, key, floors[key], results.get(key), rest[-1])
            if key in results:
                # Several refreshes at once compute once: this one may have joined one that began a little before.
                subject.raise_floor(key, min(versions[key], results[key][2]), begun_ns)
        subject.note(keys, f"refreshed {results}, begun {begun_ns / 1e9:.6f}")

    async def _change(
        self, subject: Subject, keys: list[int], chance: random.Random, counts: "collections.Counter[str]"
    ) -> None:
        counts["changed"] += 1
        tags, asked = [0], list(keys)
        call = asyncio.ensure_future(subject.call(asked, tags))
        for _ in range(chance.randint(0, 8)):
            await asyncio.sleep(0)
        # The caller alone may get something odd.
        tags[0] = 1
        asked.reverse()
        await call

    def _check(
        self, subject: Subject, key: int, floor: Floor, result: Result | None, counts: "collections.Counter[str]"
    ) -> None:
        if result is None:
            self._find(subject, key, f"no result of key {key}", counts)
            return
        of, tag, version, process, begun_ns = result
        if (of, tag) != (key, 0):
            self._find(subject, key, f"asked for key {key} and tag 0, got {result}", counts)
        elif version >= floor.version:
            return
        elif process != os.getpid() and begun_ns > floor.begun_ns - LATE_NS:
            counts["excused"] += 1
        else:
            self._find(subject, key, f"got version {version}, floor is {floor}: {result}", counts)

    def _find(self, subject: Subject, key: int, what: str, counts: "collections.Counter[str]") -> None:
        counts["findings"] += 1
        history = "\n    ".join(subject.history[key])
        self.findings.append(
            f"{subject.name} at {time.monotonic():.6f} in {threading.current_thread().name}: {what}\n    {history}"
        )
        self.stop.set()


@dataclasses.dataclass
class Shared:
    """What all processes have in common."""

    truth: Any
    totals: Any
    ending: Any
    found: Any


def run_process(config: Config, number: int, shared: Shared) -> None:
    """Run one process's loops, and report its counts as it goes on."""
    chances.seed(f"{config.seed}-{number}")
    # Stores that fail are part of this.
    logging.getLogger("aiokv").setLevel(logging.ERROR)
    sys.setswitchinterval(1e-4)
    checker = Checker(config, number, shared.truth)
    threads = []
    for thread in range(config.threads):
        counts: collections.Counter[str] = collections.Counter()
        checker.counts.append(counts)
        threads.append(threading.Thread(target=checker.run_thread, args=(thread, counts), name=f"p{number}t{thread}"))
    for one in threads:
        one.start()
    while any(one.is_alive() for one in threads):
        if shared.ending.wait(0.2):
            checker.stop.set()
            for one in threads:
                one.join()
        for place, name in enumerate(COUNTS):
            shared.totals[number * len(COUNTS) + place] = sum(of[name] for of in checker.counts)
        if checker.findings:
            shared.ending.set()
    for finding in checker.findings:
        shared.found.put(finding)


def run(config: Config) -> tuple[dict[str, int], list[str]]:
    """Run all processes; return the counts and what was found."""
    context = multiprocessing.get_context("spawn")
    shared = Shared(
        context.Array("q", KEYS),
        context.Array("q", config.processes * len(COUNTS)),
        context.Event(),
        context.SimpleQueue(),
    )
    processes = [context.Process(target=run_process, args=(config, number, shared)) for number in range(config.processes)]
    for process in processes:
        process.start()
    findings: list[str] = []
    deadline = time.monotonic() + config.seconds
    while any(process.is_alive() for process in processes):
        left = deadline - time.monotonic()
        if left <= 0 or any(process.exitcode for process in processes):
            shared.ending.set()
        time.sleep(0.1)
        while not shared.found.empty():
            findings.append(shared.found.get())
        if sys.stderr.isatty():
            done = _sums(shared.totals)["operations"]
            print(f"\r{max(left, 0):5.0f} s left, {done:,} operations ", end="", file=sys.stderr, flush=True)
    while not shared.found.empty():
        findings.append(shared.found.get())
    if sys.stderr.isatty():
        print(file=sys.stderr)
    for number, process in enumerate(processes):
        if process.exitcode:
            findings.append(f"process {number} ended with status {process.exitcode}")
    return _sums(shared.totals), findings


def _sums(totals: Any) -> dict[str, int]:
    return {name: sum(totals[place :: len(COUNTS)]) for place, name in enumerate(COUNTS)}


def main() -> int:
    """Check, and print what was counted and found."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="loops in each process")
    parser.add_argument("--faults", type=float, default=0.004, help="share of steps of the slow store that fail")
    parser.add_argument(
        "--skip",
        default="",
        help="what to leave out, by comma: "
        "change, leave, prime, refresh, near, swr, many, stores (but one), eager, faults, memory, sqlite",
    )
    parser.add_argument("--forget-invalidations", action="store_true", help="only say so: the checker must find that")
    add_json_option(parser)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            seconds=said.seconds,
            seed=said.seed,
            processes=said.processes,
            threads=said.threads,
            folder=folder,
            faults=said.faults,
            skip=frozenset(filter(None, said.skip.split(","))),
            forget_invalidations=said.forget_invalidations,
        )
        counts, findings = run(config)
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()))
    for finding in findings:
        print(f"\nFOUND with --seed {config.seed} --processes {config.processes} --threads {config.threads}\n{finding}")
    note_table("Random calls, invalidations and failures", list(counts), {"kv_cached": list(counts.values())})
    note_aim("results older than promised", len(findings), 0, "", is_met=not findings)
    write_json(said)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
