"""`LogLimit`: what happens a thousand times a second is logged once in a while, with how often it happened."""

import logging

from aiokv import clock

INTERVAL_SECONDS = 60.0


class LogLimit:
    """Lines of a log, each kind at most once a minute.

    Args:
        interval_seconds: The time between two lines of a kind.
    """

    __slots__ = ("_interval_seconds", "_lines")

    def __init__(self, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._interval_seconds = interval_seconds
        # For each kind: when the next line may be written, and what was left out since the last one.
        self._lines: dict[str, tuple[float, int]] = {}

    def error(self, logger: logging.Logger, kind: str, message: str) -> None:
        """Log an error, where its kind was not logged a short time ago.

        Args:
            logger: Gets the line.
            kind: One of a few words.
            message: Without a value or a secret.
        """
        self._log(logger, logging.ERROR, kind, message, None)

    def warning(self, logger: logging.Logger, kind: str, message: str) -> None:
        """Log a warning; see `error`."""
        self._log(logger, logging.WARNING, kind, message, None)

    def exception(self, logger: logging.Logger, kind: str, message: str, error: Exception) -> None:
        """Log an error with its traceback; see `error`."""
        self._log(logger, logging.ERROR, kind, message, error)

    def _log(self, logger: logging.Logger, level: int, kind: str, message: str, error: Exception | None) -> None:
        now = clock.monotonic()
        next_at, left_out = self._lines.get(kind, (now, 0))
        if now < next_at:
            self._lines[kind] = (next_at, left_out + 1)
            return
        self._lines[kind] = (now + self._interval_seconds, 0)
        more = f" (and {left_out:,} more like it since the last line)" if left_out else ""
        logger.log(level, "%s%s", message, more, exc_info=error)
