"""What waits in the queue of a SQLite file's writer: single sets and deletes, and jobs of several steps."""

import itertools
import sqlite3
from collections.abc import Callable
from zlib import crc32

from aiokv.backends import sqlite_schema
from aiokv.backends.sqlite_disk import PAGE_BYTES
from aiokv.errors import CallError

# Values that are set by one statement are encoded at once.
SMALL_CHARS = 4096

Done = Callable[[CallError | None], None]


class Write:
    """One queued set, delete or probe, and what is called at its end.

    Args:
        verb: `"set"`, `"delete"`, or `"probe"` for a write that shows whether one succeeds.
        db_name: The namespace.
        key: The key.
        value: The value of a set.
        expires_at: When the entry of a set expires, or when a probe was asked for.
        done: Called in the loop with None or the error; None where no task waits.
    """

    __slots__ = ("db_name", "done", "expires_at", "key", "value", "verb")

    size_chars = 0
    """What it weighs beside its value."""

    def __init__(  # noqa: PLR0913, PLR0917 (a record)
        self, verb: str, db_name: str, key: str, value: str = "", expires_at: float = 0.0, done: Done | None = None
    ) -> None:
        self.verb = verb
        self.db_name = db_name
        self.key = key
        self.value = value
        self.expires_at = expires_at
        self.done = done or _ignore

    def parameters(self) -> tuple[object, ...]:
        """Return the parameters of its SQL statement."""
        if self.verb == "delete":
            return self.db_name, self.key
        if self.verb == "probe":
            return (self.expires_at,)
        data = self.value.encode()
        # As `checksum_of`, for the text at hand.
        checksum = crc32(data, crc32(f"{self.db_name}\0{self.key}".encode()))
        return self.db_name, self.key, self.expires_at, checksum, len(data), data

    def most_bytes(self) -> int:
        """Return the room that it can take in the file, 0 for one that goes on below the floor of free space."""
        return 0 if self.verb == "delete" else most_bytes_of(self.value)

    def frees_room(self) -> bool:
        """Return whether it gives room back, so that it may have the ballast's."""
        return self.verb == "delete"


class Job(Write):
    """A queued item of several statements: one transaction has all of them or none.

    Args:
        verb: What errors call it.
        db_name: The namespace.
        key: The key, "" where there are several.

    Attributes:
        entries: How many entries it writes.
    """

    __slots__ = ("entries", "size_chars")

    def __init__(self, verb: str, db_name: str, key: str = "") -> None:
        super().__init__(verb, db_name, key)
        self.entries = 1
        self.size_chars = 0

    def apply(self, connection: sqlite3.Connection, now: float) -> None:
        """Execute the statements; called anew where the transaction had to be rolled back.

        Args:
            connection: A connection in a transaction.
            now: The present by the store's clock.
        """
        raise NotImplementedError


def most_bytes_of(value: str) -> int:
    """Return the room that an entry can take in the file.

    Args:
        value: Its value.

    Returns:
        Bytes, those of two more pages included.
    """
    size_bytes = len(value) if value.isascii() else 4 * len(value)
    return size_bytes + 2 * PAGE_BYTES


def kind_of(write: Write) -> tuple[str, bool]:
    """Return what neighbours in a group must share to be applied together: the verb, and whether the value is small."""
    return write.verb, len(write.value) <= SMALL_CHARS


def set_together(connection: sqlite3.Connection, rows: list[tuple[object, ...]]) -> None:
    """Set small values, several by one statement.

    For each statement this thread gives the interpreter's lock away and gets it back, which can cost more than the set.

    Args:
        connection: A connection in a transaction.
        rows: The parameters of each set, in their order.
    """
    done = 0
    for count, statement in sqlite_schema.SETS.items():
        while len(rows) - done >= count:
            connection.execute(statement, tuple(itertools.chain.from_iterable(rows[done : done + count])))
            done += count


def _ignore(_error: CallError | None) -> None:
    """Take the outcome of a write that no task waits for."""
