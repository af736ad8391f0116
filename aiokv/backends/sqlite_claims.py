"""Claims in a SQLite file: entries of a namespace of their own, so that they are counted, swept, checked and copied as such.

Claims of the namespace `db` are the entries of `db/claims`, which belongs to the same account and which no store can name. The
value is the owner. Older versions take them for what they are: entries that expire.
"""

import sqlite3

from aiokv.backends import sqlite_schema
from aiokv.backends.capabilities import ClaimOutcome
from aiokv.backends.sqlite_writes import Job

_TAKE = f"{sqlite_schema.SETS[1]} WHERE entries_v2.expires_at <= ? OR entries_v2.value = excluded.value"
_HOLDER = "SELECT value, expires_at FROM entries_v2 WHERE db_name = ? AND key = ?"
_RELEASE = "DELETE FROM entries_v2 WHERE db_name = ? AND key = ? AND value = ? RETURNING expires_at"


def _namespace_of(db_name: str) -> str:
    return f"{db_name}/claims"


class Claim(Job):
    """Taking a claim, or renewing it.

    Args:
        db_name: The namespace.
        key: What is claimed.
        owner: Who claims it.
        seconds: For how long.
        is_renewal: Whether it is taken only where the owner holds it already.

    Attributes:
        outcome: Who holds it.
    """

    __slots__ = ("_is_renewal", "_owner", "_seconds", "outcome")

    def __init__(self, db_name: str, key: str, owner: str, seconds: float, *, is_renewal: bool = False) -> None:
        super().__init__("claim", db_name, key)
        self._owner = owner.encode()
        self._seconds = seconds
        self._is_renewal = is_renewal
        self.outcome = ClaimOutcome(is_held=False, seconds_left=seconds)

    def apply(self, connection: sqlite3.Connection, now: float) -> None:
        """Take the claim unless another owner holds it; as a renewal, unless the owner itself does not hold it."""
        claims, owner = _namespace_of(self.db_name), self._owner
        checksum = sqlite_schema.checksum_of(claims.encode(), self.key.encode(), owner)
        before = connection.execute(_HOLDER, (claims, self.key)).fetchone()
        is_free = before is None or before[1] <= now
        if is_free and self._is_renewal:
            self.outcome = ClaimOutcome(is_held=False, seconds_left=0.0)
            return
        connection.execute(_TAKE, (claims, self.key, now + self._seconds, checksum, len(owner), owner, now))
        holder, expires_at = connection.execute(_HOLDER, (claims, self.key)).fetchone()
        is_held = holder == owner
        seconds_left = expires_at - now
        # The sum may have been rounded up.
        self.outcome = ClaimOutcome(is_held, min(seconds_left, self._seconds) if is_held else seconds_left, is_held and is_free)


class Release(Job):
    """Giving a claim back.

    Args:
        db_name: The namespace.
        key: What is claimed.
        owner: Who claimed it.

    Attributes:
        was_held: Whether the owner held it.
    """

    __slots__ = ("_owner", "was_held")

    def __init__(self, db_name: str, key: str, owner: str) -> None:
        super().__init__("release", db_name, key)
        self._owner = owner.encode()
        self.was_held = False

    def apply(self, connection: sqlite3.Connection, now: float) -> None:
        """Delete the claim if the owner has it."""
        rows = connection.execute(_RELEASE, (_namespace_of(self.db_name), self.key, self._owner)).fetchall()
        self.was_held = any(expires_at > now for (expires_at,) in rows)

    def most_bytes(self) -> int:
        """Return 0: it goes on below the floor."""
        return 0

    def frees_room(self) -> bool:
        """Return True."""
        return True
