"""The options of a store on Redis or Valkey; this module loads nothing that a program without such a store would not need."""

from typing import Final

from aiokv.record import Record

ACKED: Final = "acked"
REPLICATED: Final = "replicated"
DURABILITIES: Final = (ACKED, REPLICATED)


class RedisOptions(Record, kw_only=True):
    """What a program may set for a store on Redis or Valkey.

    Args:
        durability: When a write has succeeded: `"acked"`, once the primary has accepted it, or `"replicated"`, once `replicas`
            of its replicas have it, too.
        replicas: How many replicas have to have a write, where `durability` is `"replicated"`.
        replication_timeout: How many seconds a write waits for them before it counts as failed, and is tried again.
        max_connections: Connections to each node, and so calls under way at once on it; further calls wait.
        ca_file: A PEM file of the certificates to trust in place of the system's, for `rediss` URLs.

    Raises:
        TypeError: `ca_file` is no text.
        ValueError: Another option is not acceptable.
    """

    durability: str = ACKED
    replicas: int = 1
    replication_timeout: float = 1.0
    max_connections: int = 64
    ca_file: str | None = None

    def __post_init__(self) -> None:
        if self.durability not in DURABILITIES:
            raise ValueError(f"durability must be 'acked' or 'replicated', not {self.durability!r}")
        for name, number in (("replicas", self.replicas), ("max_connections", self.max_connections)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be an int of 1 or more, not {number!r}")
        if not self.replication_timeout > 0:
            raise ValueError(f"replication_timeout must be more than 0 seconds, not {self.replication_timeout!r}")
        if self.ca_file is not None and not isinstance(self.ca_file, str):
            raise TypeError(f"ca_file must be a path as text, not {type(self.ca_file).__name__}")
