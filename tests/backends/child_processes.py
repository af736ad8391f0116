"""Other processes on the same SQLite file."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import IO

HEAD = """
import asyncio, sys
from aiokv.backends.capabilities import Entry
from aiokv.backends.sqlite import SqliteBackend
"""


class Child:
    """A process that runs a program of Python, given the file as its first argument.

    Its standard output is read line by line; `kill` is kill -9.
    """

    def __init__(self, program: str, path: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD + program, str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def _output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def line(self) -> str:
        """Wait for the next line."""
        return self._output.readline().rstrip("\n")

    def go(self) -> None:
        """Let a program go on that waits for a line."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> list[str]:
        """Kill the process and return the lines that are left, the last of which may be cut."""
        os.kill(self.process.pid, signal.SIGKILL)
        lines = self._output.read().splitlines()
        self.process.wait()
        return lines

    def join(self) -> list[str]:
        """Wait for the end and return the lines that are left."""
        lines = self._output.read().splitlines()
        assert self.process.wait() == 0
        return lines


@contextlib.contextmanager
def child(program: str, path: Path, *arguments: str) -> Generator[Child]:
    started = Child(program, path, *arguments)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        for file in (started.process.stdin, started.process.stdout):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()


def execute(path: Path, statement: str, *parameters: object) -> list[tuple[object, ...]]:
    """Execute a statement as another process would; return its rows."""
    with contextlib.closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as connection:
        return connection.execute(statement, parameters).fetchall()
