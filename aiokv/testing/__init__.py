"""Test against faults: a proxy that makes a network bad, a service that answers as it is told, and pytest fixtures."""

from aiokv.backends.http.retry import without_waits
from aiokv.testing.faults import (
    Bandwidth,
    Fault,
    FaultOrFaults,
    Faults,
    Garbage,
    Latency,
    LatencyAfter,
    RequestSeen,
    ResetAfter,
    ResetBefore,
    SlowDrip,
    Stall,
    StallAfter,
    Truncate,
    at_rate,
)
from aiokv.testing.proxy import FaultProxy
from aiokv.testing.service import Replies, Reply, ScriptedService, ServiceRequest

__all__ = [
    "Bandwidth",
    "Fault",
    "FaultOrFaults",
    "FaultProxy",
    "Faults",
    "Garbage",
    "Latency",
    "LatencyAfter",
    "Replies",
    "Reply",
    "RequestSeen",
    "ResetAfter",
    "ResetBefore",
    "ScriptedService",
    "ServiceRequest",
    "SlowDrip",
    "Stall",
    "StallAfter",
    "Truncate",
    "at_rate",
    "without_waits",
]
