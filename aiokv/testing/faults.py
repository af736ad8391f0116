"""The faults of one request, and the scripts that decide which request has which."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

R = TypeVar("R")
T = TypeVar("T")

Script = Callable[[R], T | None]
"""Return the item of a request, such as its fault; None is the ordinary course."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The root of every fault; a tuple of faults is applied to one request together."""


@dataclass(frozen=True, slots=True)
class Latency(Fault):
    """Forward a request late; it arrives even where its client has left meanwhile, as in a slow network.

    Args:
        seconds: The least delay.
        jitter_seconds: The most that is added, drawn uniformly.
    """

    seconds: float
    jitter_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check_delay(self.seconds, self.jitter_seconds)


@dataclass(frozen=True, slots=True)
class LatencyAfter(Fault):
    """Forward an answer late: the upstream has applied the request long before the client gets the answer.

    Args:
        seconds: The least delay.
        jitter_seconds: The most that is added, drawn uniformly.
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
class TerminalFault(Fault):
    """The root of the faults after which no whole answer arrives; a request has at most one of them."""


@dataclass(frozen=True, slots=True)
class ResetBefore(TerminalFault):
    """Reset the connection once the request was read; the upstream never sees it."""


@dataclass(frozen=True, slots=True)
class ResetAfter(TerminalFault):
    """Reset the connection once the upstream has answered; the client sees no byte of the answer."""


@dataclass(frozen=True, slots=True)
class Stall(TerminalFault):
    """Never answer, with the connection open until the client leaves; the upstream never sees the request."""


@dataclass(frozen=True, slots=True)
class StallAfter(TerminalFault):
    """Never answer, with the connection open until the client leaves; the upstream has answered."""


@dataclass(frozen=True, slots=True)
class Truncate(TerminalFault):
    """Close the connection in the middle of the answer, whose head announces all of it.

    Args:
        kept_bytes: How much of the body is forwarded, without the framing of chunks; a shorter body arrives whole.
    """

    kept_bytes: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.kept_bytes, bool) or not isinstance(self.kept_bytes, int) or self.kept_bytes < 0:
            raise ValueError(f"kept_bytes must be an int of 0 or more, not {self.kept_bytes!r}")


@dataclass(frozen=True, slots=True)
class Garbage(TerminalFault):
    """Answer with bytes that are not HTTP and close the connection; the upstream never sees the request.

    Args:
        data: The bytes.
    """

    data: bytes = field(default=b"\x00\xffSSH-2.0-not-http\r\n\r\n", repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes) or not self.data:
            raise ValueError("data must be bytes, at least one")


@dataclass(slots=True)
class RecordedRequest:
    """One request as the proxy recorded it, without headers and body.

    Args:
        number: Its number among all requests of the proxy, from 1.
        connection: The number of its client connection, from 1.
        method: Its method.
        path: Its path and query, as they were sent.
        fault: The fault or the tuple of faults that was applied to it, or None.
        reached_upstream: Whether the whole request was forwarded to the upstream.
        status: The status of the upstream's answer, or None where there is none yet.
        answered: Whether the whole answer was forwarded to the client's connection.
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
"""What is applied to one request: a fault, or a tuple of faults together."""

Faults = FaultOrFaults | Iterable[FaultOrFaults | None] | Callable[[RecordedRequest], FaultOrFaults | None] | None
"""What is applied to the coming requests.

None is nothing. A fault, or a tuple of faults together, is applied to every request. Any other iterable, such as a list, has an
item for each request; after its end there are no more faults. A function is called with each request once its head was read.
"""


def with_probability(
    probability: float, *faults: FaultOrFaults, seed: int = 0
) -> Callable[[RecordedRequest], FaultOrFaults | None]:
    """Apply a fault to each request with a probability, drawn for each request anew.

    Args:
        probability: From 0 (no request) to 1 (every request).
        faults: The faults to draw from, each as likely as the others; a tuple is drawn as a whole.
        seed: The seed of the draws: the same one gives the same faults, in the order in which requests are read.

    Returns:
        A function for `FaultProxy.faults`; a second proxy that gets the same function continues its draws.

    Raises:
        ValueError: The probability is outside the range, or there is no fault to draw.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be from 0 to 1, not {probability!r}")
    if not faults:
        raise ValueError("with_probability needs a fault to draw, such as with_probability(0.1, ResetAfter())")
    for fault in faults:
        plan_of(fault)
    draws = random.Random(seed)  # noqa: S311 (repeatable on purpose, guards nothing)

    def draw(_request: RecordedRequest) -> FaultOrFaults | None:
        # Two draws each time: so with a higher probability the same requests keep their faults, and others get some too.
        hit, which = draws.random() < probability, draws.random()
        return faults[int(which * len(faults))] if hit else None

    return draw


@dataclass(frozen=True, slots=True)
class Plan:
    """The faults of one request by kind; None where it has none of that kind."""

    latency: Latency | None = None
    latency_after: LatencyAfter | None = None
    pace: Bandwidth | SlowDrip | None = None
    terminal: TerminalFault | None = None


def plan_of(fault: FaultOrFaults | None) -> Plan:
    """Combine the faults of one request.

    Args:
        fault: A fault, a tuple of faults, or None.

    Returns:
        The plan of the request.

    Raises:
        TypeError: An item is no fault.
        ValueError: Two faults are of one kind, or exclude each other.
    """
    latency, latency_after, pace, terminal = None, None, None, None
    faults: tuple[object, ...] = () if fault is None else fault if isinstance(fault, tuple) else (fault,)
    for part in faults:
        taken: object
        if isinstance(part, Latency):
            taken, latency = latency, part
        elif isinstance(part, LatencyAfter):
            taken, latency_after = latency_after, part
        elif isinstance(part, Bandwidth | SlowDrip):
            taken, pace = pace, part
        elif isinstance(part, TerminalFault):
            taken, terminal = terminal, part
        else:
            raise TypeError(
                f"the faults of one request must be Fault objects, not {type(part).__name__}; "
                "a tuple is the faults of one request, a list has an item for each request"
            )
        if taken is not None:
            raise ValueError(
                f"one request cannot have both {taken!r} and {part!r}; "
                "a tuple is the faults of one request, a list has an item for each request"
            )
    return Plan(latency, latency_after, pace, terminal)


def script_of(argument: str, given: Any, check: Callable[[Any], object], single: type | tuple[type, ...]) -> Script[Any, Any]:
    """Return a function for each form in which a script can be written.

    Args:
        argument: The script's name in messages.
        given: None, one item for every request, an iterable with an item for each, or a function.
        check: Raise where an item is not acceptable.
        single: The types of one item.

    Returns:
        The function; after the end of an iterable it returns None.

    Raises:
        TypeError: `given` has none of these forms.
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
