"""For tests: a proxy that makes a network bad, a service that answers as a script says, a clock to move, pytest fixtures."""

from typing import TYPE_CHECKING

from aiokv.backends.http.retry import disable_backoff
from aiokv.testing.clock import MovableClock, movable_clock
from aiokv.testing.faults import (
    Bandwidth,
    Fault,
    FaultOrFaults,
    Faults,
    Garbage,
    Latency,
    LatencyAfter,
    RecordedRequest,
    ResetAfter,
    ResetBefore,
    SlowDrip,
    Stall,
    StallAfter,
    Truncate,
    with_probability,
)
from aiokv.testing.proxy import FaultProxy
from aiokv.testing.replies import Replies, Reply, ServiceRequest

if TYPE_CHECKING:
    from aiokv.testing.service import ScriptedService

__all__ = [
    "Bandwidth",
    "Fault",
    "FaultOrFaults",
    "FaultProxy",
    "Faults",
    "Garbage",
    "Latency",
    "LatencyAfter",
    "MovableClock",
    "RecordedRequest",
    "Replies",
    "Reply",
    "ResetAfter",
    "ResetBefore",
    "ScriptedService",
    "ServiceRequest",
    "SlowDrip",
    "Stall",
    "StallAfter",
    "Truncate",
    "disable_backoff",
    "movable_clock",
    "with_probability",
]


if not TYPE_CHECKING:
    # The others need no server, whose packages are an extra.
    def __getattr__(name: str) -> object:
        if name == "ScriptedService":
            from aiokv.server.extra import require_extra  # noqa: PLC0415

            require_extra("aiokv.testing.ScriptedService")
            from aiokv.testing.service import ScriptedService  # noqa: PLC0415

            return globals().setdefault(name, ScriptedService)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
