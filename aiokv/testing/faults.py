"""What can go wrong with one request, and who decides that it does."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

R = TypeVar("R")
T = TypeVar("T")

Script = Callable[[R], T | None]
"""Says what happens to a request; None is nothing out of the ordinary."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Be the root of every fault; a tuple of faults befalls one request together."""


@dataclass(frozen=True, slots=True)
class Latency(Fault):
    """Hand a request on late; it arrives even where its client has left meanwhile, as in a slow network.

    Args:
        seconds: The least delay.
        jitter_seconds: What is added at most, drawn uniformly.
    """

    seconds: float
    jitter_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check_delay(self.seconds, self.jitter_seconds)


@dataclass(frozen=True, slots=True)
class LatencyAfter(Fault):
    """Hand an answer on late: the upstream has done what it was asked long before the client hears of it.

    Args:
        seconds: The least delay.
        jitter_seconds: What is added at most, drawn uniformly.
    """

    seconds: float
    jitter_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check_delay(self.seconds, self.jitter_seconds)


@dataclass(frozen=True, slots=True)
class Bandwidth(Fault):
    """Carry a request and its answer at a limited rate, in pieces of a twentieth of a second.

    Args:
        bytes_per_second: The rate of each direction, at most.
    """

    bytes_per_second: float

    def __post_init__(self) -> None:
        _check_rate(self.bytes_per_second)


@dataclass(frozen=True, slots=True)
class SlowDrip(Fault):
    """Carry an answer byte by byte.

    Args:
        bytes_per_second: The rate, at most.
    """

    bytes_per_second: float

    def __post_init__(self) -> None:
        _check_rate(self.bytes_per_second)


@dataclass(frozen=True, slots=True)
class Ending(Fault):
    """Be the root of the faults after which no whole answer arrives; a request meets one of them at most."""


@dataclass(frozen=True, slots=True)
class ResetBefore(Ending):
    """Reset the connection once the request was read; the upstream never sees it."""


@dataclass(frozen=True, slots=True)
class ResetAfter(Ending):
    """Reset the connection once the upstream has answered; the client sees no byte of that."""


@dataclass(frozen=True, slots=True)
class Stall(Ending):
    """Never answer, with the connection open until the client leaves; the upstream never sees the request."""


@dataclass(frozen=True, slots=True)
class StallAfter(Ending):
    """Never answer, with the connection open until the client leaves; the upstream has answered all the same."""


@dataclass(frozen=True, slots=True)
class Truncate(Ending):
    """Close the connection in the middle of the answer, whose head announces all of it.

    Args:
        kept_bytes: How much of the body is let through, without the framing of chunks; a shorter body arrives whole.
    """

    kept_bytes: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.kept_bytes, bool) or not isinstance(self.kept_bytes, int) or self.kept_bytes < 0:
            raise ValueError(f"kept_bytes must be an int of 0 or more, not {self.kept_bytes!r}")


@dataclass(frozen=True, slots=True)
class Garbage(Ending):
    """Answer with bytes that are no HTTP and close the connection; the upstream never sees the request.

    Args:
        data: What is sent.
    """

    data: bytes = field(default=b"\x00\xffSSH-2.0-not-http\r\n\r\n", repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes) or not self.data:
            raise ValueError("data must be bytes, at least one")


@dataclass(slots=True)
class RequestSeen:
    """One request as the proxy saw it; bears no header and no body.

    Args:
        number: Its place among all requests of the proxy, from 1.
        connection: The client connection that it came by, from 1.
        method: Its method.
        path: Its path and query, as they were sent.
        fault: What it met: a fault, a tuple of them, or None.
        reached_upstream: Whether the whole of it was handed to the upstream.
        status: The upstream's answer, or None where there is none yet.
        answered: Whether the whole of that answer was handed to the client's connection.
    """

    number: int
    connection: int
    method: str
    path: str
    fault: "FaultOrFaults | None" = None
    reached_upstream: bool = False
    status: int | None = None
    answered: bool = False


FaultOrFaults = Fault | tuple[Fault, ...]
"""What befalls one request: a fault, or a tuple of faults together."""

Faults = FaultOrFaults | Iterable[FaultOrFaults | None] | Callable[[RequestSeen], FaultOrFaults | None] | None
"""What befalls the requests to come.

None is nothing. A fault, or a tuple of faults together, befalls every request. Any other iterable, such as a list, has an item
for each request, after which there are no more faults. A function is called with each request once its head was read.
"""


def at_rate(share: float, *faults: FaultOrFaults, seed: int = 0) -> Callable[[RequestSeen], FaultOrFaults | None]:
    """Let a share of the requests meet a fault, drawn for each request anew.

    Args:
        share: From 0 (none) to 1 (each).
        faults: What is drawn from, each as likely as the others; a tuple is drawn as a whole.
        seed: Where the draws begin: the same seed gives the same faults, in the order in which requests are read.

    Returns:
        A function for `FaultProxy.faults`; given to another proxy, it goes on where it was.

    Raises:
        ValueError: The share is outside the range, or there is nothing to draw from.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, not {share!r}")
    if not faults:
        raise ValueError("at_rate needs a fault to draw, such as at_rate(0.1, ResetAfter())")
    for fault in faults:
        course_of(fault)
    draws = random.Random(seed)  # noqa: S311 (repeatable on purpose, guards nothing)

    def draw(_request: RequestSeen) -> FaultOrFaults | None:
        # Two draws each time: with a larger share, requests that meet a fault still meet the same one, and others do, too.
        hit, which = draws.random() < share, draws.random()
        return faults[int(which * len(faults))] if hit else None

    return draw


@dataclass(frozen=True, slots=True)
class Course:
    """How one request goes, put together from its faults; None where a part goes as usual."""

    latency: Latency | None = None
    latency_after: LatencyAfter | None = None
    pace: Bandwidth | SlowDrip | None = None
    ending: Ending | None = None


def course_of(fault: FaultOrFaults | None) -> Course:
    """Put the faults of one request together.

    Args:
        fault: A fault, a tuple of faults, or None.

    Returns:
        The course that the request takes.

    Raises:
        TypeError: There is something else than a fault.
        ValueError: Two faults are of one kind, or exclude each other.
    """
    latency, latency_after, pace, ending = None, None, None, None
    faults: tuple[object, ...] = () if fault is None else fault if isinstance(fault, tuple) else (fault,)
    for part in faults:
        taken: object
        if isinstance(part, Latency):
            taken, latency = latency, part
        elif isinstance(part, LatencyAfter):
            taken, latency_after = latency_after, part
        elif isinstance(part, Bandwidth | SlowDrip):
            taken, pace = pace, part
        elif isinstance(part, Ending):
            taken, ending = ending, part
        else:
            raise TypeError(
                f"the faults of one request must be Fault objects, not {type(part).__name__}; "
                "a tuple is the faults of one request, a list has an item for each request"
            )
        if taken is not None:
            raise ValueError(
                f"one request cannot meet both {taken!r} and {part!r}; "
                "a tuple is the faults of one request, a list has an item for each request"
            )
    return Course(latency, latency_after, pace, ending)


def script_of(argument: str, given: Any, check: Callable[[Any], object], single: type | tuple[type, ...]) -> Script[Any, Any]:
    """Make a function of what a script may be written as.

    Args:
        argument: What the script is called in messages.
        given: None, one item for every request, an iterable with an item for each, or a function.
        check: Raises where an item cannot be one.
        single: The types that are one item.

    Returns:
        The function; an iterable that has ended gives None.

    Raises:
        TypeError: It is none of these.
    """
    if given is None or isinstance(given, single):
        check(given)
        return lambda _request: given
    if callable(given) and not isinstance(given, type):
        return given  # type: ignore[no-any-return]
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | type):
        kind = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(f"{argument} must be None, one item, an iterable of items or a function, not {kind}")
    if isinstance(given, Sequence):
        for item in given:
            check(item)
    rest = itertools.chain(given, itertools.repeat(None))
    return lambda _request: next(rest)


def _check_delay(seconds: float, jitter_seconds: float) -> None:
    for name, value in (("seconds", seconds), ("jitter_seconds", jitter_seconds)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or more, and finite, not {value!r}")


def _check_rate(bytes_per_second: float) -> None:
    if not 0 < bytes_per_second < math.inf:
        raise ValueError(f"bytes_per_second must be more than 0, and finite, not {bytes_per_second!r}")
