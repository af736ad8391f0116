"""The URLs of stores on Redis and Valkey, and who may see the password; this module loads nothing else."""

import os
import re
from typing import Final, NamedTuple

from aiokv.backends.http.options import Credentials
from aiokv.errors import ConfigurationError, CredentialsError, truncated

SINGLE: Final = ""
CLUSTER: Final = "cluster"
SENTINEL: Final = "sentinel"

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_MAX_PORT: Final = 65_535
_DEFAULT_USER: Final = "default"
# Not compiled at the import, which every program pays for.
_NAME: Final = r"[A-Za-z0-9_.:-]{1,100}"
_HOST: Final = r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^\s:/\[\]@,]+))(?::([0-9]{1,5}))?"
_EXAMPLES: Final = {
    SINGLE: "redis://host:6379, or redis://host:6379/1 for database 1",
    CLUSTER: "redis+cluster://host1:6379,host2:6379",
    SENTINEL: "redis+sentinel://host1:26379,host2:26379/name",
}

SCHEMES: Final = tuple(
    f"{engine}{kind}" for engine in ("redis", "rediss", "valkey", "valkeys") for kind in ("", f"+{CLUSTER}", f"+{SENTINEL}")
)
"""Every scheme of this backend."""

Address = tuple[str, int]
"""Host and port."""


class RedisUrl(NamedTuple):
    """What a URL says.

    Args:
        kind: `SINGLE`, `CLUSTER` or `SENTINEL`.
        is_tls: Whether connections are encrypted.
        hosts: The servers that the URL names, without repetition; of several in alphabetical order.
        database: The number of the logical database.
        service: The name of the primary that the sentinels know; "" elsewhere.
    """

    kind: str
    is_tls: bool
    hosts: tuple[Address, ...]
    database: int = 0
    service: str = ""

    def __str__(self) -> str:
        scheme = ("rediss" if self.is_tls else "redis") + (f"+{self.kind}" if self.kind else "")
        tail = "".join(f"/{part}" for part in (self.service, self.database) if part)
        return f"{scheme}://{','.join(map(format_address, self.hosts))}{tail}"


def format_address(address: Address) -> str:
    """Return host and port as a URL has them.

    Args:
        address: Host and port.

    Returns:
        Such as `127.0.0.1:6379` or `[::1]:6379`.
    """
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_url(url: str) -> RedisUrl:
    """Read a URL.

    Args:
        url: A URL of one of `SCHEMES`, without user information, query and fragment.

    Returns:
        What it says; equal for all ways to write one place.

    Raises:
        ConfigurationError: It is of another form; credentials in it are not repeated.
    """
    scheme, _, rest = url.partition("://")
    if "@" in rest:
        # Not repeated: a password with a slash looks like a path.
        raise ConfigurationError(
            "url must not hold credentials; pass credentials='<user>:<password>' or set AIOKV_REDIS_PASSWORD"
        )
    engine, _, kind = scheme.lower().partition("+")
    netloc, *path = rest.split("/")
    while path and not path[-1]:
        path.pop()
    hosts = [_parse_host(url, kind, text) for text in netloc.split(",")]
    service = ""
    if kind == SENTINEL:
        service = path.pop(0) if path else ""
        if not re.fullmatch(_NAME, service):
            raise _malformed(url, kind, "it names no primary of the sentinels, of letters, digits, and _ . : -")
    if kind == SINGLE and len(hosts) > 1:
        raise _malformed(url, kind, f"it names {len(hosts)} servers; of several the scheme is redis+cluster or redis+sentinel")
    database = path.pop(0) if path else "0"
    if path or not (database.isascii() and database.isdigit() and len(database) <= len("65535")):
        raise _malformed(url, kind, "its path is no number of a database")
    if kind == CLUSTER and int(database):
        raise _malformed(url, kind, "a cluster has database 0 alone")
    return RedisUrl(kind, engine in {"rediss", "valkeys"}, tuple(sorted(set(hosts))), int(database), service)


def _parse_host(url: str, kind: str, text: str) -> Address:
    found = re.fullmatch(_HOST, text)
    if found is None:
        raise _malformed(url, kind, "a host in it is malformed or missing")
    port = int(found[3]) if found[3] else (_SENTINEL_PORT if kind == SENTINEL else _PORT)
    if not 0 < port <= _MAX_PORT:
        raise _malformed(url, kind, "a port in it is not from 1 to 65535")
    return (found[1] or found[2]).lower(), port


def _malformed(url: str, kind: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"url {truncated(url)} cannot be used: {reason}; write {_EXAMPLES.get(kind, _EXAMPLES[SINGLE])}")


class Login(NamedTuple):
    """A user and a password; both None where the server asks for none. Shown masked."""

    username: str | None
    password: str | None
    source: str = ""

    def __repr__(self) -> str:
        return f"Login({self.source or 'none'})"


NO_LOGIN: Final = Login(None, None)


def choose_login(credentials: str | Credentials | None) -> Login:
    """Find the user and the password of the data's servers.

    Args:
        credentials: `"<user>:<password>"`, or None for `AIOKV_REDIS_USERNAME` and `AIOKV_REDIS_PASSWORD` of the environment.

    Returns:
        The login.

    Raises:
        CredentialsError: The credentials are an object, which only stores behind HTTP can use, or the password is missing.
    """
    if credentials is None:
        return login_of_environment("AIOKV_REDIS")
    if not isinstance(credentials, str):
        raise CredentialsError(
            f"credentials of a Redis store must be '<user>:<password>', not an object of type {type(credentials).__name__}"
        )
    user, _, password = credentials.strip().partition(":")
    return Login(user, password, "the argument credentials")


def login_of_environment(prefix: str) -> Login:
    """Find a user and a password in the environment.

    Args:
        prefix: What the variables' names begin with: `AIOKV_REDIS` or, for the sentinels' own, `AIOKV_REDIS_SENTINEL`.

    Returns:
        The login; `NO_LOGIN` where neither variable is set.

    Raises:
        CredentialsError: There is a user without a password.
    """
    user, password = os.environ.get(f"{prefix}_USERNAME"), os.environ.get(f"{prefix}_PASSWORD")
    if password:
        return Login(user or _DEFAULT_USER, password, f"{prefix}_PASSWORD")
    if user:
        raise CredentialsError(f"{prefix}_USERNAME is set without {prefix}_PASSWORD; set both")
    return NO_LOGIN
