"""What is stored of a result: the result's text, and what a reader must know of it. Pure; times are arguments.

The form is a persistent format: a line of JSON, then the result's text.
"""

import enum
import math
from typing import Final, NamedTuple

import orjson

FORMAT_VERSION: Final = 1

# random.random() gives no chance, 1 - random.random(), that is less than 2**-53.
_LEAST_LOG = 53 * math.log(2)
_NUMBERS = frozenset({int, float})


class Freshness(enum.Enum):
    """How a stored result stands to the present."""

    FRESH = "fresh"
    STALE = "stale"
    EXPIRED = "expired"


class Entry(NamedTuple):
    """A stored result.

    Args:
        payload: The result's text, as the codec made it.
        codec: What was done to it, such as `""` or `"zstd+aesgcm"`.
        started: When its computation began, in seconds since the epoch.
        fresh_until: Until when it is served without a thought, likewise.
        compute_seconds: How long the computation took.
    """

    payload: str
    codec: str
    started: float
    fresh_until: float
    compute_seconds: float

    def freshness(self, now: float, stale_seconds: float) -> Freshness:
        """Say how the entry stands.

        Args:
            now: Seconds since the epoch.
            stale_seconds: How long after its fresh time it may still be served.

        Returns:
            Fresh before `fresh_until`, then stale for `stale_seconds`, then expired.
        """
        if now < self.fresh_until:
            return Freshness.FRESH
        return Freshness.STALE if now < self.fresh_until + stale_seconds else Freshness.EXPIRED

    def due_early(self, now: float, early: float, chance: float) -> bool:
        """Say whether to compute anew before the entry ceases to be fresh, so that not every reader does so at that moment.

        Source: Vattani, Chierichetti, Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015.

        Args:
            now: Seconds since the epoch.
            early: 1 is the paper's optimum, more is earlier, 0 never.
            chance: Uniform in (0, 1].

        Returns:
            True the likelier, the nearer the end and the longer the computation.
        """
        return now - self.compute_seconds * early * math.log(chance) >= self.fresh_until

    def may_be_due_early(self, now: float, early: float) -> bool:
        """Say whether any chance would make `due_early` true, which it seldom does and which costs less to ask.

        Args:
            now: Seconds since the epoch.
            early: As for `due_early`.

        Returns:
            False where there is no need to draw a chance.
        """
        return now + _LEAST_LOG * self.compute_seconds * early >= self.fresh_until


def pack(key: str, entry: Entry) -> str:
    """Make the text that is stored.

    Args:
        key: The whole key, kept to be verified on read.
        entry: The result.

    Returns:
        One line of JSON, and the payload.
    """
    head = orjson.dumps([FORMAT_VERSION, key, entry.started, entry.fresh_until, entry.compute_seconds, entry.codec])
    return f"{head.decode()}\n{entry.payload}"


def unpack(key: str, text: str) -> Entry | None:
    """Read what is stored.

    Args:
        key: The key that was asked for.
        text: What the store gave.

    Returns:
        The entry, or None where it is of another format, another key, or not ours at all: a miss that will be overwritten.
    """
    head, separator, payload = text.partition("\n")
    if not separator:
        return None
    try:
        version, own_key, started, fresh_until, compute_seconds, codec = orjson.loads(head)
    except (ValueError, TypeError):
        return None
    if type(version) is not int or version != FORMAT_VERSION or own_key != key or type(codec) is not str:
        return None
    if type(started) not in _NUMBERS or type(fresh_until) not in _NUMBERS or type(compute_seconds) not in _NUMBERS:
        return None
    if compute_seconds < 0:
        return None
    return Entry(payload, codec, started, fresh_until, compute_seconds)
