"""From a URL to the backend that it names; what a backend needs is loaded only where it is named."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from aiokv.backends.base import Backend
from aiokv.backends.http.hedge import HedgePolicy
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.observed import ObservedBackend
from aiokv.errors import ConfigurationError
from aiokv.telemetry import Observer

DEFAULT_URL = "https://kv.fal.media"

_KNOWN_URLS = "https://host, http://host, sqlite:///kv.db (relative), sqlite:////path/kv.db (absolute), memory://"

# What memory:// names belongs to the process, like a file to a machine: every store of one URL sees the same values.
_memory_backends: dict[str, MemoryBackend] = {}


def resolve_url(url: str | None) -> str:
    """Say which URL counts.

    Args:
        url: The program's, or None.

    Returns:
        It, else the environment's `AIOKV_URL`, else fal's service.
    """
    return url if url is not None else os.environ.get("AIOKV_URL") or DEFAULT_URL


def shown_url(url: str) -> str:
    """Make a URL fit to be shown, whatever somebody has put into it.

    Args:
        url: A URL of any form.

    Returns:
        It, with `***` for what stands before an `@`.
    """
    scheme, separator, rest = url.partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}" if separator and "@" in rest else url


def check_url(url: str) -> str:
    """Check a store's URL, without I/O.

    Args:
        url: `http(s)://host[:port][/prefix]`, `sqlite:///relative`, `sqlite:////absolute` or `memory://[name]`.

    Returns:
        Its scheme.

    Raises:
        TypeError: It is not a string.
        ConfigurationError: It is none of these forms; credentials in it are not repeated.
    """
    if not isinstance(url, str):
        raise TypeError(f"url must be str, not {type(url).__name__}")
    if not url.isprintable() or url != url.strip():
        raise ConfigurationError(f"url must not have control characters or white space at its ends; known forms: {_KNOWN_URLS}")
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        raise ConfigurationError(f"url is malformed; known forms: {_KNOWN_URLS}") from None
    if parts.scheme not in {"http", "https", "sqlite", "memory"}:
        raise ConfigurationError(f"url has the unknown scheme {parts.scheme!r}; known forms: {_KNOWN_URLS}")
    if "@" in parts.netloc:
        raise ConfigurationError("url must not hold credentials; pass credentials='<id>:<secret>' or set AIOKV_KEY")
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        # Not repeated: a query may hold a secret.
        raise ConfigurationError(f"url must not have a query or a fragment; known forms: {_KNOWN_URLS}")
    if parts.scheme in {"http", "https"} and not host:
        raise ConfigurationError(f"url {url!r} names no host")
    if parts.scheme == "sqlite":
        _sqlite_path(url)
    if parts.scheme == "memory" and parts.path not in {"", "/"}:
        raise ConfigurationError(f"url {url!r} must be memory:// or memory://name")
    return parts.scheme


def identity_of(url: str) -> str:
    """Say which store a URL means, so that two stores can tell whether they share it.

    Args:
        url: A URL of any form.

    Returns:
        The URL, with a file's path made absolute.
    """
    return f"sqlite:///{_sqlite_path(url).absolute()}" if check_url(url) == "sqlite" else url


def preload(url: str) -> None:
    """Import what a URL's backend needs, so that the first call in a running event loop does not pay for that.

    Args:
        url: A URL of any form.
    """
    if url.lower().startswith(("http://", "https://")):
        import aiokv.backends.http.backend  # noqa: F401, PLC0415


def open_backend(
    url: str,
    *,
    credentials: str | Credentials | None = None,
    http: HttpOptions | None = None,
) -> Backend:
    """Make the backend that a URL names; nothing is read or sent before its first call.

    Args:
        url: As for `check_url`.
        credentials: `"<id>:<secret>"` or an object with `authorization`, for `http(s)` URLs.
        http: The pooled session, for `http(s)` URLs, which need a running event loop.

    Returns:
        The backend.

    Raises:
        ConfigurationError: The URL or an option cannot work.
        CredentialsError: The credentials are malformed or would travel in the clear.
    """
    scheme = check_url(url)
    if scheme == "memory":
        return _memory_backends.setdefault(urlsplit(url).netloc, MemoryBackend())
    if scheme == "sqlite":
        from aiokv.backends.sqlite import SqliteBackend  # noqa: PLC0415

        return SqliteBackend(_sqlite_path(url))
    from yarl import URL  # noqa: PLC0415

    from aiokv.backends.http.backend import RemoteBackend  # noqa: PLC0415

    return RemoteBackend(URL(url), credentials=credentials, options=http)


def tailored(
    backend: Backend, url: str, *, retry: RetryPolicy, hedge: HedgePolicy | None = None, observer: Observer | None = None
) -> Backend:
    """Give a store's own view of a backend that it shares with others.

    Args:
        backend: What `open_backend` gave.
        url: The URL that names it.
        retry: Attempts and timeouts, for `http(s)` URLs.
        hedge: When reads are sent a second time, for `http(s)` URLs; None never.
        observer: Who is told of its calls; None costs nothing.

    Returns:
        The backend itself, or one in front of it.
    """
    if check_url(url) in {"http", "https"}:
        from aiokv.backends.http.backend import RemoteBackend  # noqa: PLC0415

        if isinstance(backend, RemoteBackend):
            backend = backend.with_options(retry, hedge)
    return backend if observer is None else ObservedBackend(backend, observer, url)


def _sqlite_path(url: str) -> Path:
    head, path = url[: len("sqlite:///")].lower(), url[len("sqlite:///") :]
    if head != "sqlite:///" or path in {"", "/"}:
        raise ConfigurationError(f"url {url!r} names no file; write sqlite:///kv.db, or sqlite:////path/kv.db from the root")
    if path == ":memory:":
        raise ConfigurationError("sqlite:///:memory: is not supported; use memory://")
    return Path(path)
