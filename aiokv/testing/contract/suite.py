"""What all suites need: how time passes for a backend, and keys that break careless ones."""

import asyncio
from collections.abc import Generator
from typing import Any, ClassVar, Final

import pytest

from aiokv.testing.clock import movable_clock

# Real time is late, never early; this much more is slept so that a sleep of two seconds ends two seconds after what it follows.
_MARGIN_SECONDS: Final = 0.1

ODD_KEYS: Final = [
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
    "_",
    "*",
    "[a]",
    "{a}",
    ":",
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
    "\ufeff",
    "\uffff",
    "😀",
    "\u202eabc",
    "\U0010ffff",
    "x" * 1000,
]
"""Keys that are all different, and each of which somebody somewhere takes for another."""


class Passing:
    """How a test lets time pass.

    Args:
        clock: An object with `advance(seconds)`; None waits.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock

    @property
    def life_seconds(self) -> int:
        """A time to live, or a claim's, that a test can see the end of."""
        return 2 if self._clock is None else 60

    async def wait(self, part: float) -> None:
        """Let time pass.

        Args:
            part: How much of `life_seconds`.
        """
        if self._clock is None:
            await asyncio.sleep(self.life_seconds * part + _MARGIN_SECONDS)
        else:
            self._clock.advance(self.life_seconds * part)


class ContractSuite:
    """The base of the suites."""

    follows_clock: ClassVar[bool] = True
    """Whether time for the backend moves with the fixture `clock`; else the tests wait."""

    @pytest.fixture
    def clock(self) -> Generator[Any]:
        """The clock that tests move; override it where the backend is given its clock."""
        with movable_clock() as clock:
            yield clock

    @pytest.fixture
    def passing(self, clock: Any) -> Passing:
        """How tests let time pass."""
        return Passing(clock if self.follows_clock else None)
