"""`ServerOptions`: every bound of the server, each with the default that `aiokv serve --help` shows."""

from aiokv.record import Record

MIB = 1024 * 1024


class ServerOptions(Record, kw_only=True):
    """How a server listens, and what it grants.

    Args:
        host: The address to bind; anything but loopback needs an access file.
        port: The port, 0 for a free one.
        access_file: The file of the accounts; None lets every program of this machine in.
        insecure_http: Whether plain HTTP may be served beyond loopback, where keys and values travel readable.
        tls_cert: A PEM file with the certificate chain, or None for plain HTTP.
        tls_key: A PEM file with the certificate's key; None where `tls_cert` holds the key, too.
        workers: Processes that serve the one address.
        max_connections: Connections at once in one process; None takes what the limit of open files allows, less a reserve.
        max_connections_per_address: Connections at once from one address; None takes half of `max_connections`.
        max_head_bytes: Bytes of a request's first line and headers.
        head_timeout_seconds: How long the head of a request may take from its first byte, or from the connection on.
        idle_timeout_seconds: How long a connection may stand without a request.
        min_bytes_per_second: The least rate at which a body must arrive and an answer must be read, after `grace_seconds`.
        grace_seconds: How long a body or an unread answer may stand still.
        max_bytes_in_flight: Bytes of bodies and answers held in memory at once in one process.
        requests_per_second: Requests of one account; None for no bound. The access file may say otherwise for an account.
        max_stored_bytes: Bytes of values that one account may store; None for no bound. Likewise.
        max_stored_entries: Entries that one account may store; None for no bound. Likewise.
        min_free_bytes: Free disk below which nothing more is stored.
        ballast_bytes: A file beside the store that is given back so that deletes have room on a full disk; 0 for none.
        quick_check: Whether the store's file is checked before the server starts.
        drain_delay_seconds: How long a stopping server goes on serving while `/readyz` says that it stops.
        drain_seconds: How long requests under way may take to finish after that.
        access_log: A file that gets a line of JSON for each request, `-` for standard output, or None.
        log_keys: Whether the access log names keys.
    """

    host: str = "127.0.0.1"
    port: int = 8787
    access_file: str | None = None
    insecure_http: bool = False
    tls_cert: str | None = None
    tls_key: str | None = None
    workers: int = 1
    max_connections: int | None = None
    max_connections_per_address: int | None = None
    max_head_bytes: int = 16 * 1024
    head_timeout_seconds: float = 15.0
    idle_timeout_seconds: float = 75.0
    min_bytes_per_second: int = 4 * 1024
    grace_seconds: float = 10.0
    max_bytes_in_flight: int = 64 * MIB
    requests_per_second: float | None = None
    max_stored_bytes: int | None = None
    max_stored_entries: int | None = None
    min_free_bytes: int = 64 * MIB
    ballast_bytes: int = 4 * MIB
    quick_check: bool = False
    drain_delay_seconds: float = 0.0
    drain_seconds: float = 10.0
    access_log: str | None = None
    log_keys: bool = False
