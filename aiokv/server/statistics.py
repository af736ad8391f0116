"""What the workers of a server count: rows of plain numbers in shared memory, one row for each worker.

A worker writes to its own row only, so nothing is locked, and every worker can read them all. Counters outlive their worker:
the one that takes the row after it counts on. All slots are 64-bit floats, exact up to 2**53.
"""

import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Literal, get_args

from aiokv import clock
from aiokv.backends.base import Gauges

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

VERBS: Final = ("get", "set", "delete", "token", "other", "batch", "keys", "claims", "watch")
"""What a request asks for; `record` takes the index. `other` is every other path, `keys` listings, counts and clears."""
GET, SET, DELETE, TOKEN, OTHER, BATCH, KEYS, CLAIMS, WATCH = range(len(VERBS))

BATCH_VERBS: Final = ("get", "set", "delete")
"""What a batch does with its keys."""

_KNOWN_STATUSES = (200, 400, 401, 403, 404, 405, 408, 409, 411, 413, 415, 417, 429, 431, 499, 500, 501, 503, 505, 507)
STATUSES: Final = (*(str(status) for status in _KNOWN_STATUSES), "1xx", "2xx", "3xx", "4xx", "5xx")
"""How requests ended: statuses that the server answers with, then the classes of all others. 499: the client left first."""

Reason = Literal[
    "connections",
    "connections_per_address",
    "head_too_large",
    "head_timeout",
    "body_timeout",
    "slow_reader",
    "bytes_in_flight",
    "rate",
    "quota",
    "disk",
    "malformed",
    "host",
    "origin",
    "unauthorized",
    "forbidden",
    "watches",
]
REASONS: Final[tuple[Reason, ...]] = get_args(Reason)
"""Why a connection or a request was refused."""

# The preferred numbers of the series R20 (ISO 3): a step is at most 14.3 %, and 1, 2, 2.5 and 5 are among them.
_STEPS = (1, 1.12, 1.25, 1.4, 1.6, 1.8, 2, 2.24, 2.5, 2.8, 3.15, 3.55, 4, 4.5, 5, 5.6, 6.3, 7.1, 8, 9)
BOUNDS: Final = (*(float(f"{step}e{exponent}") for exponent in range(-6, 2) for step in _STEPS), 100.0)
"""Upper bounds of the buckets of durations, in seconds, from a microsecond on. One more bucket holds what took longer."""

_PID, _STARTED, _STARTS, _DRAINING, _OPEN, _ACCEPTED, _WRONG_KEYS, _DROPPED_LINES, _WATCHES = range(9)
_BACKEND = ("expired", "commits", "committed_writes", "failures")
_BACKEND_START = _WATCHES + 1
_BATCH_KEYS_START = _BACKEND_START + len(_BACKEND)
_REASONS_START = _BATCH_KEYS_START + len(BATCH_VERBS)
_VERBS_START = _REASONS_START + len(REASONS)
# Of each verb: requests by status, requests by duration, then three sums.
_BUCKETS = len(STATUSES)
_SECONDS = _BUCKETS + len(BOUNDS) + 1
_BYTES_IN = _SECONDS + 1
_BYTES_OUT = _BYTES_IN + 1
_SLOTS_PER_VERB = _BYTES_OUT + 1
_CACHE_LINE = 8
_SLOTS = -(-(_VERBS_START + len(VERBS) * _SLOTS_PER_VERB) // _CACHE_LINE) * _CACHE_LINE
_MOST_TALLIED = 4096
_CLEARED_AT_START = (_DRAINING, _OPEN, _WATCHES)

ROW_BYTES: Final = 8 * _SLOTS
"""The size of one worker's row."""

_VERB_STARTS = tuple(_VERBS_START + index * _SLOTS_PER_VERB for index in range(len(VERBS)))
_REASON_SLOTS: Mapping[str, int] = {reason: _REASONS_START + index for index, reason in enumerate(REASONS)}
_STATUS_OFFSETS = tuple(
    STATUSES.index(str(status) if status in _KNOWN_STATUSES else f"{max(1, status // 100)}xx") for status in range(600)
)


class Reading:
    """The figures of one worker, or the sums over several, at one moment.

    Args:
        slots: The numbers of a row.
    """

    def __init__(self, slots: Sequence[float]) -> None:
        self._slots = slots
        self.pid = int(slots[_PID])
        """The process of the worker, 0 where none runs."""
        self.started = slots[_STARTED]
        """When that process started, in seconds since the epoch."""
        self.starts = int(slots[_STARTS])
        """How many processes have used the row, this one included."""
        self.draining = slots[_DRAINING] > 0
        self.connections = int(slots[_OPEN])
        self.accepted = int(slots[_ACCEPTED])
        """Connections accepted, those that were refused at once included."""
        self.wrong_keys = int(slots[_WRONG_KEYS])
        """Keys that were offered for a token and are not known."""
        self.dropped_lines = int(slots[_DROPPED_LINES])
        """Lines of the access log that could not be written."""
        self.expired, self.commits, self.committed_writes, self.failures = (
            int(count) for count in slots[_BACKEND_START:_BATCH_KEYS_START]
        )
        self.watches = int(slots[_WATCHES])
        """Watches under way."""
        self.batch_keys = {verb: int(slots[_BATCH_KEYS_START + index]) for index, verb in enumerate(BATCH_VERBS)}
        """Keys in batches, by what was done with them."""
        self.refusals: dict[Reason, int] = {
            reason: int(count) for reason, count in zip(REASONS, slots[_REASONS_START:_VERBS_START], strict=True)
        }

    def statuses(self, verb: int) -> dict[str, int]:
        """Return the requests of a verb by status, without the statuses that were never answered."""
        return {status: int(count) for status, count in zip(STATUSES, self._of(verb, 0, _BUCKETS), strict=True) if count}

    def requests(self, verb: int) -> int:
        """Return how many requests of a verb were answered."""
        return int(sum(self._of(verb, 0, _BUCKETS)))

    def durations(self, verb: int) -> list[int]:
        """Return the requests of a verb by duration: one count for each of `BOUNDS`, then that of the longer ones."""
        return [int(count) for count in self._of(verb, _BUCKETS, _SECONDS)]

    def seconds(self, verb: int) -> float:
        """Return how long the requests of a verb took in all."""
        return self._slots[_VERB_STARTS[verb] + _SECONDS]

    @property
    def bytes_in(self) -> int:
        """Bytes of bodies received."""
        return int(sum(self._slots[start + _BYTES_IN] for start in _VERB_STARTS))

    @property
    def bytes_out(self) -> int:
        """Bytes of bodies sent."""
        return int(sum(self._slots[start + _BYTES_OUT] for start in _VERB_STARTS))

    @property
    def hits(self) -> int:
        """Gets that found a value."""
        return self.statuses(GET).get("200", 0)

    @property
    def misses(self) -> int:
        """Gets whose key was absent or had expired."""
        return self.statuses(GET).get("404", 0)

    def _of(self, verb: int, start: int, end: int) -> Sequence[float]:
        base = _VERB_STARTS[verb]
        return self._slots[base + start : base + end]


class Tally:
    """Requests that succeeded, counted apart from the row, which is cheaper.

    Args:
        slots: The row's slots of their verb.
    """

    def __init__(self, slots: "memoryview[float]") -> None:
        self._slots = slots
        self._seconds: list[float] = []
        self._bytes_in = self._bytes_out = 0

    def add(self, seconds: float, bytes_in: int, bytes_out: int) -> None:
        """Count one; the arguments are those of `Statistics.record`."""
        self._seconds.append(seconds)
        self._bytes_in += bytes_in
        self._bytes_out += bytes_out
        if len(self._seconds) == _MOST_TALLIED:
            self.enter()

    def enter(self) -> None:
        """Enter them into the row."""
        durations, self._seconds = self._seconds, []
        slots = self._slots
        slots[_STATUS_OFFSETS[200]] += len(durations)
        slots[_SECONDS] += sum(durations)
        slots[_BYTES_IN] += self._bytes_in
        slots[_BYTES_OUT] += self._bytes_out
        self._bytes_in = self._bytes_out = 0
        # Sorted, those of one bucket need one search.
        durations.sort()
        start = 0
        while start < len(durations):
            bucket = bisect_left(BOUNDS, durations[start])
            end = bisect_right(durations, BOUNDS[bucket], start) if bucket < len(BOUNDS) else len(durations)
            slots[_BUCKETS + bucket] += end - start
            start = end


class Statistics:
    """The counters of one worker, and the view of those of all.

    Args:
        rows: Writable memory of `workers * ROW_BYTES` bytes, such as an `mmap` of a file that all workers map; zeros at first.
            None takes memory of this process alone, for one worker.
        row: The row of this worker. No other process may write to it: a worker that replaces one which still drains takes
            another row. Its counters go on from what they are.

    Raises:
        ValueError: The memory is no whole number of rows, or has no such row.
    """

    def __init__(self, rows: "WriteableBuffer | None" = None, row: int = 0) -> None:
        self._rows = _split(bytearray(ROW_BYTES) if rows is None else rows)
        if not 0 <= row < len(self._rows):
            raise ValueError(
                f"row must be from 0 to {len(self._rows) - 1}, not {row}: the memory holds {len(self._rows)} row(s)"
            )
        self._row = own = self._rows[row]
        self._verbs = tuple(own[start : start + _SLOTS_PER_VERB] for start in _VERB_STARTS)
        for slot in _CLEARED_AT_START:
            own[slot] = 0.0
        own[_PID], own[_STARTED] = os.getpid(), clock.now()
        own[_STARTS] += 1
        self.found = Tally(self._verbs[GET])
        """Gets that found a value."""
        self.stored = Tally(self._verbs[SET])
        """Sets that were stored."""
        self._of_earlier_workers = own[_BACKEND_START:_BATCH_KEYS_START].tolist()

    def record(self, verb: int, status: int, seconds: float, bytes_in: int, bytes_out: int) -> None:
        """Count one request that was answered.

        Args:
            verb: The index in `VERBS`.
            status: The status of the answer; 499 where the client left before it.
            seconds: From the first byte of the request to the last one of the answer, or to its handing over to the system.
            bytes_in: The size of the request's body.
            bytes_out: The size of the answer's body.
        """
        slots = self._verbs[verb]
        slots[_STATUS_OFFSETS[status]] += 1.0
        slots[_BUCKETS + bisect_left(BOUNDS, seconds)] += 1.0
        slots[_SECONDS] += seconds
        if bytes_in:
            slots[_BYTES_IN] += bytes_in
        if bytes_out:
            slots[_BYTES_OUT] += bytes_out

    def refused(self, reason: Reason) -> None:
        """Count a refusal, beside the request that got it, if one did.

        Args:
            reason: One of `REASONS`.
        """
        self._row[_REASON_SLOTS[reason]] += 1.0

    def opened(self) -> None:
        """Count a connection that was accepted."""
        row = self._row
        row[_OPEN] += 1.0
        row[_ACCEPTED] += 1.0

    def closed(self) -> None:
        """Count the end of a connection that was counted as opened."""
        self._row[_OPEN] -= 1.0

    def wrong_key(self) -> None:
        """Count an unknown key that was offered for a token."""
        self._row[_WRONG_KEYS] += 1.0

    def dropped_lines(self, count: int) -> None:
        """Count lines that the access log could not write.

        Args:
            count: How many.
        """
        self._row[_DROPPED_LINES] += count

    def extensions(self, watches: int, batch_keys: Mapping[str, int]) -> None:
        """Note what the extensions do; call it every few seconds.

        Args:
            watches: Watches under way.
            batch_keys: Keys in batches since the last call, by verb.
        """
        self._row[_WATCHES] = watches
        for verb, count in batch_keys.items():
            self._row[_BATCH_KEYS_START + BATCH_VERBS.index(verb)] += count

    def drain(self) -> None:
        """Mark this worker as one that stops."""
        self._row[_DRAINING] = 1.0

    def publish(self, gauges: Gauges) -> None:
        """Make what this worker's backend has counted visible to the other workers; call it every few seconds.

        Args:
            gauges: The present figures of the backend.
        """
        counts = (gauges.expired, gauges.commits or 0, gauges.committed_writes or 0, gauges.failures)
        for slot, (before, count) in enumerate(zip(self._of_earlier_workers, counts, strict=True), start=_BACKEND_START):
            self._row[slot] = before + count

    def enter_tallies(self) -> None:
        """Enter what `found` and `stored` have counted into the row; call it about once a second."""
        self.found.enter()
        self.stored.enter()

    def total(self) -> Reading:
        """Return the sums over all workers, past ones included."""
        self.enter_tallies()
        return Reading([sum(column) for column in zip(*(row.tolist() for row in self._rows), strict=True)])

    def workers(self) -> dict[int, Reading]:
        """Return the figures of each worker that ever ran, by row."""
        self.enter_tallies()
        readings = (Reading(row.tolist()) for row in self._rows)
        return {row: reading for row, reading in enumerate(readings) if reading.starts}


def make_memory_file() -> int:
    """Make a file in memory for the rows of the workers.

    Returns:
        Its descriptor; it has no name and no size yet.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("aiokv statistics")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def retire(rows: "WriteableBuffer", row: int) -> None:
    """Mark a row as one without a worker, once its process has ended; its counters stay.

    Args:
        rows: The memory that the workers share.
        row: The row of the worker that ended.

    Raises:
        ValueError: The memory is no whole number of rows.
        IndexError: The memory has no such row.
    """
    own = _split(rows)[row]
    for slot in (_PID, *_CLEARED_AT_START):
        own[slot] = 0.0


def _split(rows: "WriteableBuffer") -> list["memoryview[float]"]:
    view = memoryview(rows).cast("B")
    if not len(view) or len(view) % ROW_BYTES:
        raise ValueError(f"rows must be one or more rows of {ROW_BYTES} bytes, not {len(view)} bytes")
    slots = view.cast("d")
    return [slots[start : start + _SLOTS] for start in range(0, len(slots), _SLOTS)]


def quantile(durations: Sequence[int], share: float) -> float | None:
    """Estimate the duration that a share of the requests did not exceed, to about 7 %.

    Args:
        durations: Requests by duration, as `Reading.durations` returns them.
        share: Such as 0.99.

    Returns:
        Seconds, at most the last of `BOUNDS`; None where there are no requests.
    """
    sums = list(accumulate(durations))
    if not sums or not sums[-1]:
        return None
    rank = share * sums[-1]
    # The first bucket in which a request stands and that reaches the rank.
    index = next(i for i, (count, reached) in enumerate(zip(durations, sums, strict=True)) if count and reached >= rank)
    if index == len(BOUNDS):
        return BOUNDS[-1]
    low = BOUNDS[index - 1] if index else 0.0
    return low + (BOUNDS[index] - low) * (rank - sums[index] + durations[index]) / durations[index]
