"""From a URL to the backend that it names: one table of schemes, to which installed packages can add.

A package adds a scheme by an entry point of the group `aiokv.backends`: its name is the scheme, its object a
`aiokv.backends.scheme.Scheme` or a function that takes the URL and returns a `Backend`. It is loaded when a URL of that scheme
is first used.
"""

import os
import re
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from aiokv.backends.base import Backend, check_backend
from aiokv.backends.redis.urls import SCHEMES as REDIS_SCHEMES
from aiokv.backends.redis.urls import parse_url
from aiokv.backends.scheme import ClientOptions, Scheme
from aiokv.errors import AioKVError, ConfigurationError, truncated

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from urllib.parse import SplitResult

    from yarl import URL

    from aiokv.backends.memory import MemoryBackend
    from aiokv.backends.redis.backend import RedisBackend

DEFAULT_URL = "https://kv.fal.media"
ENTRY_POINT_GROUP = "aiokv.backends"


def resolve_url(url: str | None) -> str:
    """Return the URL that counts.

    Args:
        url: The program's, or None.

    Returns:
        It, else the environment's `AIOKV_URL`, else that of fal's service.
    """
    return url if url is not None else os.environ.get("AIOKV_URL") or DEFAULT_URL


def redacted_url(url: str) -> str:
    """Return a URL that can be shown, whatever it holds.

    Args:
        url: A URL of any form.

    Returns:
        It, with `***` for the text before an `@`.
    """
    before, separator, rest = url.rpartition("@")
    # One that is written wrongly may have credentials all the same.
    scheme = re.match(r"(?:[a-zA-Z][a-zA-Z0-9+.-]*:/+|//)?", before)
    return f"{scheme[0] if scheme else ''}***@{rest}" if separator else url


def check_url(url: str) -> Scheme:
    """Check a store's URL, without I/O.

    Args:
        url: `http(s)://host[:port][/prefix]`, `sqlite:///relative`, `sqlite:////absolute`, `memory://[name]`,
            `redis://host:port`, `redis+cluster://host1:port,host2:port`, `redis+sentinel://host1:port,host2:port/name`
            (`rediss`, `valkey` and `valkeys` likewise), or a URL of a scheme that an installed package adds.

    Returns:
        The row of its scheme.

    Raises:
        TypeError: It is not a string.
        ConfigurationError: It is none of these forms, or the package that adds its scheme cannot be loaded; credentials
            in it are not repeated.
    """
    if not isinstance(url, str):
        raise TypeError(f"url must be str, not {type(url).__name__}")
    from urllib.parse import urlsplit  # noqa: PLC0415 (costly to import)

    if not url.isprintable() or url != url.strip():
        raise ConfigurationError(f"url must not have control characters or white space at its ends; {_known_forms()}")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigurationError(f"url is malformed; {_known_forms()}") from None
    scheme = _SCHEMES.get(parts.scheme) or _plugin_scheme(parts.scheme)
    if scheme is None and not parts.scheme:
        # A key, put here by mistake, has a colon.
        shown = "" if set(url) & set(":@?#") else f" {truncated(url)}"
        raise ConfigurationError(f"url{shown} has no scheme, such as sqlite:///kv.db for a file; {_known_forms()}")
    if scheme is None:
        raise ConfigurationError(
            f"url has the unknown scheme {truncated(parts.scheme)}; {_known_forms()}, "
            f"or what an installed package adds (entry point group {ENTRY_POINT_GROUP})"
        )
    if "@" in parts.netloc:
        raise ConfigurationError(
            f"url must not hold credentials; pass credentials='<id>:<secret>' or set {scheme.credentials_variable}"
        )
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        # Not repeated: a query may hold a secret.
        raise ConfigurationError(f"url must not have a query or a fragment; {_known_forms()}")
    scheme.check(url, parts)
    return scheme


def canonical_url(url: str) -> str:
    """Return the one form of all URLs that name the same place.

    Args:
        url: As for `check_url`.

    Returns:
        The scheme in lower case; for `http(s)` the host too, without a default port or a slash at the end, and escapes as they
        are sent; for `sqlite` the path absolute and without symbolic links.

    Raises:
        ConfigurationError: As for `check_url`.
    """
    scheme = check_url(url)
    name, _, rest = url.partition(":")
    return scheme.canonical(f"{name.lower()}:{rest}")


def preload(url: str) -> None:
    """Import what a URL's backend needs, so that the first call in a running event loop need not.

    Args:
        url: A URL of any form.
    """
    import_module("urllib.parse")
    scheme = _SCHEMES.get(url.partition(":")[0].lower())
    if scheme is _REDIS:
        _redis_backend()
    elif scheme is not None and scheme.module is not None:
        import_module(scheme.module)


def open_backend(url: str, options: ClientOptions | None = None) -> Backend:
    """Make the backend that a URL names; nothing is read or sent before its first call.

    Args:
        url: As for `check_url`. A backend behind `http(s)` needs a running event loop.
        options: Credentials, the connection pool and what a server asks, for schemes to which they apply.

    Returns:
        The backend.

    Raises:
        ConfigurationError: The URL or an option cannot work.
        CredentialsError: The credentials are malformed or would travel in the clear.
    """
    scheme = check_url(url)
    if options is not None and options.hosting is not None and options.hosting.quick_check and not scheme.takes_quick_check:
        raise ConfigurationError(f"quick_check needs a store with a file of its own (sqlite:///kv.db), not {redacted_url(url)}")
    return scheme.open(canonical_url(url), ClientOptions() if options is None else options)


def sqlite_path_of(url: str) -> str:
    """Return the file of a store, for what works on the file itself.

    Args:
        url: `sqlite:///relative` or `sqlite:////absolute`.

    Returns:
        The path.

    Raises:
        ConfigurationError: The URL names no SQLite file.
    """
    if check_url(url) is not _SCHEMES["sqlite"]:
        raise ConfigurationError(f"{redacted_url(url)} is no SQLite file; write sqlite:///kv.db")
    return _sqlite_path(url)


def with_client_options(backend: Backend, url: str, options: ClientOptions) -> Backend:
    """Return a store's own view of a backend that it shares with others.

    Args:
        backend: What `open_backend` returned.
        url: The URL that names it.
        options: The store's `retry` and `hedge`, for schemes to which they apply.

    Returns:
        The backend itself, or one that shares its connections.
    """
    change = check_url(url).with_client_options
    return backend if change is None else change(backend, options)


def _known_forms() -> str:
    return "known forms: " + ", ".join(dict.fromkeys(scheme.example for scheme in _SCHEMES.values()))


# Schemes that installed packages add, as they were found.
_plugins: dict[str, Scheme] = {}


def _plugin_scheme(name: str) -> Scheme | None:
    if name not in _plugins and name:
        from importlib.metadata import entry_points  # noqa: PLC0415 (costly to import, and needed only here)

        found = [entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name.lower() == name]
        if len({entry.value for entry in found}) > 1:
            packages = " and ".join(sorted(_package_of(entry) for entry in found))
            raise ConfigurationError(f"the packages {packages} both add the scheme {name!r}; uninstall one of them")
        if found:
            _plugins[name] = _load_plugin(name, found[0])
    return _plugins.get(name)


def _load_plugin(name: str, entry: "EntryPoint") -> Scheme:
    package = _package_of(entry)
    try:
        loaded = entry.load()
    except Exception as error:
        raise ConfigurationError(
            f"the package {package}, which adds the scheme {name!r}, cannot be loaded ({type(error).__name__}); "
            "repair or uninstall it"
        ) from error
    if isinstance(loaded, Scheme):
        return loaded._replace(open=_guarded(package, name, loaded.open))
    if not callable(loaded):
        raise ConfigurationError(
            f"the package {package} adds the scheme {name!r} by an object of type {type(loaded).__name__}; "
            f"it must be an aiokv.backends.scheme.Scheme or a function that takes the URL and returns a Backend"
        )
    return Scheme(open=_guarded(package, name, lambda url, _: loaded(url)))


def _guarded(
    package: str, name: str, open_plugin: Callable[[str, ClientOptions], object]
) -> Callable[[str, ClientOptions], Backend]:
    def open_(url: str, options: ClientOptions) -> Backend:
        try:
            backend = open_plugin(url, options)
            check_backend(backend)
        except AioKVError:
            raise
        except Exception as error:
            # Not its text, which may hold anything.
            raise ConfigurationError(
                f"the package {package} cannot open its scheme {name!r} ({type(error).__name__}); repair or uninstall it"
            ) from error
        return backend  # type: ignore[return-value]  # checked above

    return open_


def _package_of(entry: "EntryPoint") -> str:
    return entry.dist.name if entry.dist is not None else entry.value


# What memory:// names belongs to the process, like a file to a machine: every store of one URL sees the same values.
_memory_backends: "dict[str, MemoryBackend]" = {}


def _check_memory(url: str, parts: "SplitResult") -> None:
    if parts.path not in {"", "/"}:
        raise ConfigurationError(f"url {truncated(redacted_url(url))} must be memory:// or memory://name")


def _open_memory(url: str, _options: ClientOptions) -> Backend:
    from aiokv.backends.memory import MemoryBackend  # noqa: PLC0415

    return _memory_backends.setdefault(_memory_name(url), MemoryBackend())


def _memory_name(url: str) -> str:
    return url[len("memory://") :].partition("/")[0]


def _check_sqlite(url: str, _parts: "SplitResult") -> None:
    path = _sqlite_path(url)
    if url[: len("sqlite:///")].lower() != "sqlite:///" or path in {"", "/"}:
        raise ConfigurationError(
            f"url {truncated(redacted_url(url))} names no file; write sqlite:///kv.db, or sqlite:////path/kv.db from the root"
        )
    if path == ":memory:":
        raise ConfigurationError("sqlite:///:memory: is not supported; use memory://")


def _open_sqlite(url: str, options: ClientOptions) -> Backend:
    from aiokv.backends.sqlite import SqliteBackend  # noqa: PLC0415

    return SqliteBackend(_sqlite_path(url), hosting=options.hosting)


def _sqlite_path(url: str) -> str:
    return url[len("sqlite:///") :]


def _check_http(url: str, parts: "SplitResult") -> None:
    try:
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"url is malformed; {_known_forms()}") from None
    if not host:
        raise ConfigurationError(f"url {truncated(redacted_url(url))} names no host")


def _http_address(url: str) -> "URL":
    from yarl import URL  # noqa: PLC0415

    try:
        address = URL(url)
        # A host has to be shown, and to be resolved.
        _ = address.host, (address.raw_host or "").encode("idna")
    except ValueError:
        raise ConfigurationError(f"url {truncated(redacted_url(url))} names no valid host; {_known_forms()}") from None
    return address


def _canonical_http(url: str) -> str:
    # As the client sends it: escapes that need not be are decoded, dot segments are resolved.
    address = _http_address(url)
    return f"{address.scheme}://{address.host_port_subcomponent}{address.raw_path.rstrip('/')}"


def _open_http(url: str, options: ClientOptions) -> Backend:
    from aiokv.backends.http.backend import RemoteBackend  # noqa: PLC0415

    return RemoteBackend(_http_address(url), credentials=options.credentials, options=options.http)


def _with_http_options(backend: Backend, options: ClientOptions) -> Backend:
    from aiokv.backends.http.backend import RemoteBackend  # noqa: PLC0415

    return backend.with_options(options.retry, options.hedge) if isinstance(backend, RemoteBackend) else backend


def _check_redis(url: str, _parts: "SplitResult") -> None:
    parse_url(url)


def _canonical_redis(url: str) -> str:
    return str(parse_url(url))


def _open_redis(url: str, options: ClientOptions) -> Backend:
    backend = _redis_backend()
    return backend(parse_url(url), credentials=options.credentials, policy=options.retry, options=options.redis)


def _with_redis_options(backend: Backend, options: ClientOptions) -> Backend:
    kind = _redis_backend()
    return backend.with_options(options.retry, options.redis) if isinstance(backend, kind) else backend


def _redis_backend() -> "type[RedisBackend]":
    try:
        from aiokv.backends.redis.backend import RedisBackend  # noqa: PLC0415
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "redis":
            raise
        raise ConfigurationError("a store on Redis or Valkey needs redis-py: pip install 'aiokv[redis]'") from error
    return RedisBackend


_REDIS = Scheme(
    open=_open_redis,
    check=_check_redis,
    canonical=_canonical_redis,
    with_client_options=_with_redis_options,
    takes_credentials=True,
    credentials_variable="AIOKV_REDIS_PASSWORD",
    example="redis://host:6379, redis+cluster://host1:6379,host2:6379, redis+sentinel://host1,host2/name (valkey alike)",
)
_HTTP = Scheme(
    open=_open_http,
    check=_check_http,
    canonical=_canonical_http,
    with_client_options=_with_http_options,
    takes_credentials=True,
    module="aiokv.backends.http.backend",
    example="https://host, http://host",
)
_SCHEMES = {
    "https": _HTTP,
    "http": _HTTP,
    "sqlite": Scheme(
        open=_open_sqlite,
        check=_check_sqlite,
        canonical=lambda url: f"sqlite:///{os.path.realpath(_sqlite_path(url))}",
        takes_quick_check=True,
        module="aiokv.backends.sqlite",
        example="sqlite:///kv.db (relative), sqlite:////path/kv.db (absolute)",
    ),
    **dict.fromkeys(REDIS_SCHEMES, _REDIS),
    "memory": Scheme(
        open=_open_memory,
        check=_check_memory,
        canonical=lambda url: f"memory://{_memory_name(url)}",
        module="aiokv.backends.memory",
        example="memory://",
    ),
}
