"""For tests: a proxy that makes a network bad, a service that answers as a script says, a clock to move, pytest fixtures."""

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
