"""What to do with a stored result. Pure: the present, the options and the dice are arguments."""

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

# `1 - random.random()` is never less than 2**-53.
_MAX_DRAW = 53 * math.log(2)


class Decision(enum.Enum):
    """What to do with a stored result."""

    SERVE = enum.auto()
    SERVE_AND_REFRESH_AHEAD = enum.auto()
    """Fresh, but its time ends soon: compute anew now, so that not every reader does so at that moment."""
    SERVE_STALE_AND_REFRESH = enum.auto()
    COMPUTE_OR_FALL_BACK = enum.auto()
    """Too old, but better than an error."""
    COMPUTE = enum.auto()


_SERVE = Decision.SERVE


class FreshnessOptions(NamedTuple):
    """How long a result is served after it has ceased to be fresh, and how eagerly it is computed before that.

    Args:
        stale_seconds: For how long it is served while it is computed anew.
        error_seconds: For how long it is served where the function fails.
        early: Eagerness of early refresh: 1 is the optimum of the paper, 0 never.
    """

    stale_seconds: float
    error_seconds: float
    early: float


def decide(
    fresh_until: float, compute_seconds: float, now: float, options: FreshnessOptions, draw: Callable[[], float]
) -> Decision:
    """Decide what to do with a stored result.

    Source: Vattani, Chierichetti, Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015, for early refresh.

    Args:
        fresh_until: When it ceases to be fresh, in seconds since the epoch.
        compute_seconds: How long its computation took.
        now: The present, in seconds since the epoch.
        options: What the program has asked for.
        draw: Returns a random number in [0, 1).

    Returns:
        The decision; early refresh is the likelier, the nearer the end and the longer the computation.
    """
    left = fresh_until - now
    if left > 0:
        lead = compute_seconds * options[2]
        # No draw is that unlikely; most results need none.
        if lead * _MAX_DRAW < left:
            return _SERVE
        return _SERVE if -lead * math.log(1.0 - draw()) < left else Decision.SERVE_AND_REFRESH_AHEAD
    if -left < options.stale_seconds:
        return Decision.SERVE_STALE_AND_REFRESH
    return Decision.COMPUTE_OR_FALL_BACK if -left < options.error_seconds else Decision.COMPUTE
