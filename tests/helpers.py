"""What several test files need."""

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from aiokv import clock

REPOSITORY = Path(__file__).resolve().parent.parent


class FakeClock:
    """A clock that moves only when a test says so."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@contextlib.contextmanager
def still_clock() -> Generator[FakeClock]:
    """Stop the clock that expiries are counted by, which then moves by `advance` alone."""
    before = clock.now
    still = FakeClock(time.time())
    clock.now = still
    try:
        yield still
    finally:
        clock.now = before


async def no_wait(_seconds: float) -> None:
    """Stand in for the sleep between attempts."""
    await asyncio.sleep(0)


def all_texts(error: BaseException) -> str:
    """Return all that an error and the errors behind it could show in a log or a traceback."""
    texts: list[str] = []
    links: list[BaseException | None] = [error]
    while links:
        if (link := links.pop()) is not None:
            texts += [str(link), repr(link), repr(link.args), repr(vars(link))]
            links += [link.__cause__, link.__context__]
    return "\n".join(texts)


def stable_id(value: object) -> str:
    """Name a parameter alike in every process, which those that share a run must agree on: without addresses, sets in order."""
    text = "{" + ", ".join(sorted(map(repr, value))) + "}" if isinstance(value, set | frozenset) else ascii(value)
    return re.sub(r" at 0x[0-9a-f]+|(?<=id=')[0-9a-f]+", "", text)[:60]


def clean_environment(home: Path) -> dict[str, str]:
    """Return the environment of a child process, without credentials of the machine's user."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "AIOKV_"))}
    return {**kept, "HOME": str(home)}


@contextlib.contextmanager
def serving(command: Sequence[str], home: Path, *descriptors: int, **environment: str) -> Generator[subprocess.Popen[str]]:
    """Run a program of Python as a process of its own, and kill it at the end."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**clean_environment(home), **environment},
        pass_fds=descriptors,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@contextlib.contextmanager
def served_process(
    *arguments: str, home: Path, command: Sequence[str] = ("-m", "aiokv"), **environment: str
) -> Generator[tuple[subprocess.Popen[str], str]]:
    """Run `aiokv serve` as a process of its own; yield it and its address once it accepts connections."""
    with serving([*command, "serve", "--port", "0", *arguments], home, **environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert " at http" in line, f"no address announced: {line!r}"
        yield process, line.split(" at ", 1)[1].split(",")[0].strip()


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
    """Wait for another thread or process, which has no clock to inject."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)
