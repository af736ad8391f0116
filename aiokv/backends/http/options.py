"""The options of a store behind HTTP; this module loads nothing that a program without such a store would not need."""

import math
from typing import Protocol, runtime_checkable

from aiokv.errors import CredentialsError
from aiokv.record import Record


class HttpOptions(Record, kw_only=True):
    """The pooled session of an `http(s)://` store.

    Args:
        pool_size: The number of connections, and so of requests under way at once; further calls wait.
        keepalive_seconds: How long an idle connection is kept; keep it below the server's or load balancer's own limit.
        dns_cache_seconds: How long a resolved address is kept.
        ca_file: A PEM file of the certificates to trust in place of the system's, as for a server with its own authority.
        batching: Whether `get`s that are asked for in one turn of the event loop travel as one request, where the server takes
            batches (`aiokv serve` does, fal's service does not). Each keeps its own deadline, cancellation and error. A get
            that finds no other under way is sent at once.
    """

    pool_size: int = 100
    keepalive_seconds: float = 30.0
    dns_cache_seconds: int = 60
    ca_file: str | None = None
    batching: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.pool_size, bool) or not isinstance(self.pool_size, int) or self.pool_size < 1:
            raise ValueError(f"pool_size must be an int of 1 or more, not {self.pool_size!r}")
        if not 0 <= self.keepalive_seconds < math.inf:
            raise ValueError(f"keepalive_seconds must be 0 or more, not {self.keepalive_seconds!r}")
        if self.dns_cache_seconds < 0:
            raise ValueError(f"dns_cache_seconds must be 0 or more, not {self.dns_cache_seconds!r}")
        if not isinstance(self.batching, bool):
            raise TypeError(f"batching must be bool, not {type(self.batching).__name__}")


@runtime_checkable
class Credentials(Protocol):
    """A source of the header that is exchanged for a token; implement it to fetch secrets from a vault."""

    async def authorization(self) -> str:
        """Return the Authorization header for the token endpoint.

        Returns:
            Scheme and secret, such as `Key <id>:<secret>`.

        Raises:
            CredentialsError: There is none.
        """
        ...


def check_key_form(key: str, source: str) -> None:
    """Check that a text is a key; the message does not repeat it.

    Args:
        key: The text; white space around it does not count.
        source: Where it was found, for the message.

    Raises:
        CredentialsError: It is not `<id>:<secret>` of printable ASCII.
    """
    key = key.strip()
    key_id, _, secret = key.partition(":")
    if not (key_id and secret and key.isascii() and key.isprintable() and " " not in key):
        raise CredentialsError(f"{source} holds a text of {len(key)} characters that is not a key of the form '<id>:<secret>'")
