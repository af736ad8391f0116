"""`aiokv bench`: how long gets and sets of a store take, under a load of one's choice."""

import argparse
import asyncio
import itertools
import os
import platform
import random
import secrets
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from aiokv import clock
from aiokv.backends.registry import redacted_url
from aiokv.cli.histogram import SVG_START, Histogram, draw_svg, draw_text, format_seconds
from aiokv.cli.live import Row, Screen
from aiokv.cli.paths import check_no_store
from aiokv.cli.terminal import binary_output, can_show, naming, print_message
from aiokv.errors import AioKVError
from aiokv.limits import MAX_TTL_SECONDS, MAX_VALUE_BYTES, MIN_TTL_SECONDS
from aiokv.store import AsyncKVStore

T = TypeVar("T", int, float)

_FAILED = 3
_KEYS = 1_000
_PRELOAD_BYTES = 16 * 1024 * 1024
_COLUMNS = ("call", "calls", "a second", "p50", "p90", "p99", "p99.9", "errors")

_EPILOG = """\
examples: aiokv bench http://127.0.0.1:8787 --seconds 30 --concurrency 64
          aiokv bench sqlite:///kv.db --json --plot latency.svg

Tasks of one process get and set values all the time, without retries. It writes only into a namespace of its own (or under keys
of its own in that of --db), deletes what it wrote, and what it cannot delete expires. One client process is often busier than
the server: look at its CPU before you blame the store. Progress goes to standard error, the result to standard output.
"""


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench`.

    Args:
        parser: That of the command.
    """
    parser.epilog = _EPILOG
    url = os.environ.get("AIOKV_URL")
    parser.add_argument("url", metavar="URL", nargs="?", default=url, help="the store (default: AIOKV_URL)")
    parser.add_argument("--seconds", type=_positive(float), default=10.0, metavar="S", help="how long (default: 10)")
    parser.add_argument("--concurrency", type=_positive(int), default=32, metavar="N", help="calls at once (default: 32)")
    parser.add_argument("--value-bytes", type=_positive(int), default=1_000, metavar="N", help="size of values (default: 1000)")
    parser.add_argument("--set-share", type=float, default=0.2, metavar="X", help="share of sets, 0 to 1 (default: 0.2)")
    parser.add_argument("--db", dest="db_name", metavar="DB", help="the namespace (default: a new one)")
    parser.add_argument("--json", action="store_true", help="write the result as a JSON object")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw the times of calls")
    parser.set_defaults(run=_bench)


def _positive(kind: type[T]) -> Callable[[str], T]:
    """Return what reads a number above 0."""

    def parse(text: str) -> T:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise ValueError
        return number

    # argparse names it in its message.
    parse.__name__ = "number above 0"
    return parse


def _bench(options: argparse.Namespace) -> int:
    if not options.url:
        raise ValueError("name the store: aiokv bench URL, or set AIOKV_URL; fal's service is not measured unasked")
    if options.value_bytes > MAX_VALUE_BYTES:
        raise ValueError(f"--value-bytes must be at most {MAX_VALUE_BYTES:,}")
    if not 0 <= options.set_share <= 1:
        raise ValueError("--set-share must be from 0 to 1")
    if options.plot:
        _check_plot(options.url, Path(options.plot))
    load = _Load(options)
    asyncio.run(load.run())
    if options.plot:
        with naming(options.plot):
            Path(options.plot).write_text(draw_svg(load.title, load.times), encoding="utf-8")
        print_message(f"drew {options.plot}")
    output = binary_output()
    output.write(load.as_json() if options.json else load.as_text().encode(sys.stdout.encoding or "ascii", "replace"))
    output.flush()
    return _FAILED if not sum(times.count for times in load.times.values()) else 0


def _check_plot(url: str, path: Path) -> None:
    """Refuse to draw into a file of the store, or over one that holds no picture."""
    check_no_store(url, path, "--plot FILE.svg")
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(SVG_START))
        if start not in {b"", SVG_START.encode()}:
            raise ValueError(f"{path} exists, and is no picture of `aiokv bench`; name another file by --plot, or move it away")


class _Load:
    """Calls on their way, and how long they took."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.times = {"get": Histogram(), "set": Histogram()}
        self.title = (
            f"{redacted_url(options.url)}, {options.concurrency} calls at once, values of {options.value_bytes:,} bytes, "
            f"{options.set_share:.0%} sets"
        )
        self._options = options
        self._errors = {"get": Counter[str](), "set": Counter[str]()}
        self._seconds = 0.0
        self._value = "v" * options.value_bytes
        name = secrets.token_hex(4)
        self._db_name = options.db_name or f"aiokv-bench-{name}"
        count = max(1, min(_KEYS, _PRELOAD_BYTES // options.value_bytes))
        self._keys = [f"bench-{name}-{number}" for number in range(count)]
        # What cannot be deleted, as after a kill, expires.
        self._ttl = min(MAX_TTL_SECONDS, MIN_TTL_SECONDS + round(options.seconds))

    async def run(self) -> None:
        """Write what is read, make the calls, and delete it all."""
        from aiokv.backends.http.retry import RetryPolicy  # noqa: PLC0415 (`--help` needs none of it)

        async with AsyncKVStore(self._db_name, url=self._options.url) as store:
            try:
                await store.set_many(dict(zip(self._keys, itertools.repeat(self._value), strict=False)), self._ttl)
                await self._call_all(store.with_options(retry=RetryPolicy.none()))
            finally:
                try:
                    await store.delete_many(self._keys)
                except AioKVError:
                    print_message(f"what was written could not be deleted; it expires within {self._ttl} seconds")

    async def _call_all(self, store: AsyncKVStore) -> None:
        began = clock.monotonic()
        end = began + self._options.seconds
        with Screen(self.title, _COLUMNS) as screen:
            tasks = [asyncio.create_task(self._call(store, end)) for _ in range(self._options.concurrency)]
            try:
                while not all(task.done() for task in tasks):
                    await asyncio.wait(tasks, timeout=1.0)
                    self._seconds = clock.monotonic() - began
                    screen.show(self._rows(), self._line())
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self, store: AsyncKVStore, end: float) -> None:
        draw = random.Random()  # noqa: S311 (spreads load, guards nothing)
        for calls in itertools.count():
            began = clock.monotonic()
            if began >= end:
                return
            verb = "set" if draw.random() < self._options.set_share else "get"
            key = draw.choice(self._keys)
            try:
                await (store.set(key, self._value, self._ttl) if verb == "set" else store.get(key))
            except AioKVError as error:
                self._errors[verb][type(error).__name__] += 1
            else:
                self.times[verb].add(clock.monotonic() - began)
            if not calls % 16:
                # A store that never waits would let nothing else run.
                await asyncio.sleep(0)

    def _rows(self) -> list[Row]:
        return [
            (
                verb,
                f"{times.count:,}",
                f"{times.count / max(self._seconds, 1e-9):,.0f}",
                *map(format_seconds, times.percentiles().values()),
                f"{self._errors[verb].total():,}",
            )
            for verb, times in self.times.items()
        ]

    def _line(self) -> str:
        parts = []
        for verb, _, rate, *figures in self._rows():
            named = ", ".join(f"{name} {figure}" for name, figure in zip(_COLUMNS[3:], figures, strict=True))
            parts.append(f"{verb} {rate} a second, {named}")
        return f"{self._seconds:.0f} s: {'; '.join(parts)}"

    def as_text(self) -> str:
        """Return the result for people."""
        lines = [self.title, "  ".join(f"{text:>10}" for text in _COLUMNS)]
        lines += ["  ".join(f"{text:>10}" for text in row) for row in self._rows()]
        bar = "█" if can_show("█", sys.stdout) else "#"
        for verb, times in self.times.items():
            if times.count:
                lines += [f"{verb}: calls by the time that they took", draw_text(times, bar)]
            lines += [f"{verb}: {count:,} x {name}" for name, count in self._errors[verb].most_common()]
        return "\n".join(lines) + "\n"

    def as_json(self) -> bytes:
        """Return the result for programs."""
        import orjson  # noqa: PLC0415 (few commands need it)

        calls = {
            verb: {
                "calls": times.count,
                "per_second": times.count / max(self._seconds, 1e-9),
                "seconds": times.percentiles(),
                "errors": dict(self._errors[verb]),
            }
            for verb, times in self.times.items()
        }
        options = {name: getattr(self._options, name) for name in ("concurrency", "value_bytes", "set_share")}
        where = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
        content = {"url": redacted_url(self._options.url), "seconds": self._seconds, **options, **where, "calls": calls}
        return orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n"
