"""The keys by which a server knows the entries and claims of a store."""

from functools import lru_cache
from typing import Final

# An empty hash tag: so the whole key chooses the slot, whatever braces a namespace or a key has, and the keys of one namespace
# are spread over all nodes.
_ENTRY: Final = b"aiokv{}v:"
_CLAIM: Final = b"aiokv{}c:"
PROBE: Final = b"aiokv{}probe:"
"""What the keys begin with that a look at the server's health sets for a second."""


@lru_cache(maxsize=1024)
def entry_prefix(db_name: str) -> bytes:
    """Return what the keys of a namespace begin with; none begins with that of another one.

    Args:
        db_name: The namespace.

    Returns:
        The prefix.
    """
    return _ENTRY + _quote(db_name) + b"/"


def entry_key(db_name: str, key: str) -> bytes:
    """Return the key of an entry.

    Args:
        db_name: The namespace.
        key: The key.

    Returns:
        Another one for every other entry.
    """
    return entry_prefix(db_name) + key.encode()


def claim_key(db_name: str, key: str) -> bytes:
    """Return the key of a claim.

    Args:
        db_name: The namespace.
        key: What is claimed.

    Returns:
        Another one for every other claim, and for every entry.
    """
    return _CLAIM + _quote(db_name) + b"/" + key.encode()


def pattern_of(db_name: str, prefix: str) -> bytes:
    """Return the pattern of the keys that a listing shows.

    Args:
        db_name: The namespace.
        prefix: What the keys begin with.

    Returns:
        The pattern for SCAN.
    """
    literal = entry_key(db_name, prefix)
    for special in (b"\\", b"*", b"?", b"[", b"]", b"^"):
        literal = literal.replace(special, b"\\" + special)
    return literal + b"*"


def _quote(db_name: str) -> bytes:
    # The store refuses a slash; another caller's must not end the namespace either.
    return db_name.replace("%", "%25").replace("/", "%2F").encode()
