"""`ServerOptions`: every bound of the server, each with the default that `aiokv serve --help` shows.

One table gives each option its flag, its variable of the environment and its key in a configuration file. The first that says
something counts: flag, environment, file, default.
"""

import argparse
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aiokv.backends.redis.urls import SCHEMES as REDIS_SCHEMES
from aiokv.errors import ConfigurationError, truncated
from aiokv.limits import MAX_VALUE_BYTES
from aiokv.record import Record
from aiokv.server.option_kinds import DURABILITY, FILE, FLAG, NUMBER, SECONDS, SIZE, TEXT, URL, WHOLE, Kind

MIB = 1024 * 1024
ENVIRONMENT_PREFIX = "AIOKV_SERVE_"
ACCESS_FILE_VARIABLE = "AIOKV_ACCESS_FILE"
# What 64 bits hold: a supervisor passes options to its workers as JSON.
_MOST_WHOLE = 2**63 - 1
# What shuts out whoever has no key, or readers on the network.
_PROTECTIONS = ("access_file", "tls_cert", "tls_key")


class ServerOptions(Record, kw_only=True):
    """How a server listens, and what it grants.

    Args:
        store: The URL of the store with the values.
        durability: Of a store on Redis or Valkey: `acked` where a write has succeeded once the primary has it, `replicated`
            once a replica has it, too.
        host: The address to bind; anything but loopback needs an access file.
        port: The port, 0 for a free one.
        access_file: The file of the accounts; None lets every program of this machine in.
        insecure_http: Whether plain HTTP may be served beyond loopback, where keys and values travel readable.
        tls_cert: A PEM file with the certificate chain, or None for plain HTTP.
        tls_key: A PEM file with the certificate's key; None where `tls_cert` holds the key, too.
        workers: Processes that serve the one address.
        max_connections: Connections at once in one process; None takes what the limit of open files allows, less a reserve.
        max_connections_per_address: Connections at once from one address (of IPv6: from one /64 network); None takes half of
            `max_connections`.
        max_head_bytes: Bytes of a request's first line and headers.
        head_timeout_seconds: How long the head of a request may take from its first byte, or from the connection on.
        idle_timeout_seconds: How long a connection may stand without a request.
        min_bytes_per_second: The least rate at which a body must arrive and an answer must be read, after `grace_seconds`.
        grace_seconds: How long a body or an unread answer may stand still.
        max_bytes_in_flight: Bytes of bodies and answers held in memory at once in one process.
        max_watches: Watches of namespaces at once in one process; 0 for a server without watches.
        max_watches_per_account: Watches of one account at once in one process; None takes half of `max_watches`.
        requests_per_second: Requests of one account, each key of a batch counted as one; None for no bound. The access file
            may say otherwise for an account.
        max_stored_bytes: Bytes of values that one account may store; None for no bound. Likewise.
        max_stored_entries: Entries that one account may store; None for no bound. Likewise.
        min_free_bytes: Free disk below which nothing more is stored.
        ballast_bytes: A file beside the store that is given back so that deletes have room on a full disk; 0 for none.
        quick_check: Whether the pages of the store's file are checked before the server starts; not its values' checksums.
        drain_delay_seconds: How long a stopping server goes on serving while `/readyz` says that it stops.
        drain_seconds: How long requests under way may take to finish after that.
        access_log: A file that gets a line of JSON for each request, `-` for standard output, or None.
        log_keys: Whether the access log names keys.
    """

    store: str = "sqlite:///kv.db"
    durability: str = "acked"
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
    max_watches: int = 4096
    max_watches_per_account: int | None = None
    requests_per_second: float | None = None
    max_stored_bytes: int | None = None
    max_stored_entries: int | None = None
    min_free_bytes: int = 64 * MIB
    ballast_bytes: int = 32 * MIB
    quick_check: bool = False
    drain_delay_seconds: float = 0.0
    drain_seconds: float = 10.0
    access_log: str | None = None
    log_keys: bool = False


class _Option(Record):
    """One row of the table; `least` and `most` bound numbers, `optional` takes `none`."""

    name: str
    kind: Kind
    help: str
    least: float = 0
    most: float = math.inf
    optional: bool = False

    @property
    def word(self) -> str:
        # The help names the unit.
        return self.name.removesuffix("_seconds")

    @property
    def key(self) -> str:
        return self.word.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.word.upper()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `aiokv serve`; one that is not given leaves no attribute.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument(
        "--config",
        metavar="F",
        default=argparse.SUPPRESS,
        help="a TOML file with options; its keys are the flags without the leading dashes, such as `drain-delay = 5`",
    )
    for title, rows in _GROUPS.items():
        group = parser.add_argument_group(title)
        for row in rows:
            help_ = f"{row.help} (default: {_show(row, getattr(ServerOptions, row.name))})".replace("%", "%%")
            if row.kind is FLAG:
                action = argparse.BooleanOptionalAction
                group.add_argument(f"--{row.key}", action=action, default=argparse.SUPPRESS, help=help_)
            else:
                group.add_argument(f"--{row.key}", metavar=row.kind.metavar, default=argparse.SUPPRESS, help=help_)


def resolve_options(flags: Mapping[str, object], environment: Mapping[str, str]) -> ServerOptions:
    """Return the options that count, each checked.

    Args:
        flags: The flags that were given, by the option's name; `config` among them.
        environment: The environment; its variables that begin with `AIOKV_SERVE_` count, and `AIOKV_ACCESS_FILE`, the variable
            of `aiokv access`, where nothing else names an access file. See `unknown_variables` for others.

    Returns:
        The options; the first of flag, environment, file and default.

    Raises:
        ConfigurationError: An option is unknown, is of a wrong type or cannot work; the message says where it stands.
    """
    given = {name: text for name, text in environment.items() if name.startswith(ENVIRONMENT_PREFIX)}
    config = flags.get("config", given.pop(ENVIRONMENT_PREFIX + "CONFIG", None))
    values: dict[str, Any] = {}
    if config is not None:
        path = Path(str(config))
        keys = {row.key: row for row in _ROWS.values()}
        for key, value in _read_file(path).items():
            if isinstance(value, dict):
                raise ConfigurationError(f"{path}: options stand at the top of the file, not in the table {truncated(key)}")
            row = _find(keys, key, f"{path}, key {truncated(key)}")
            values[row.name] = _read(row, value, f"{path}, key {row.key}")
    if "access_file" not in values and (path_of_access := environment.get(ACCESS_FILE_VARIABLE)):
        # That of `aiokv access`: who made keys with it expects them to count.
        values["access_file"] = _read(_ROWS["access_file"], path_of_access, f"environment, {ACCESS_FILE_VARIABLE}")
    variables = {row.variable: row for row in _ROWS.values()}
    for name in given.keys() & variables.keys():
        row, text = variables[name], given[name]
        if row.name == "port" and text.startswith("tcp://"):
            raise ConfigurationError(
                f"environment, {name}: must be a port, not an address such as Kubernetes sets for a Service named aiokv-serve; "
                "give the Service another name, or the pod `enableServiceLinks: false`"
            )
        values[row.name] = _read(row, text, f"environment, {name}")
    for word in flags.keys() & _ROWS.keys():
        row = _ROWS[word]
        values[row.name] = _read(row, flags[word], f"flag --{row.key}")
    options = ServerOptions(**values)
    _check_together(options)
    return options


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable of the environment that looks like an option and is none.

    Args:
        environment: The environment. Not all of it is the operator's: Kubernetes sets variables for each Service.

    Returns:
        The warnings, which name the nearest option; without any value.
    """
    variables = {row.variable: row for row in _ROWS.values()}
    known = {*variables, ENVIRONMENT_PREFIX + "CONFIG"}
    return [
        f"environment, {truncated(name)}: there is no such option, so it is ignored; {_hint(variables, name)}"
        for name in sorted(environment)
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known
    ]


def nearest_flag(given: str) -> str | None:
    """Return the flag that one that does not exist is most like.

    Args:
        given: What was given, such as `--min-free` or `--min-free=5M`.

    Returns:
        The flag, or None where none is like it.
    """
    name = given.partition("=")[0]
    return _nearest(name, ["--config", *(f"--{row.key}" for row in _ROWS.values())]) if name.startswith("--") else None


def changed_keys(before: ServerOptions, after: ServerOptions) -> list[str]:
    """Return the options that differ, as a file of `--config` names them.

    Args:
        before: Options of a server.
        after: Others.

    Returns:
        Their keys, in the order of the help.
    """
    return [row.key for row in _ROWS.values() if getattr(before, row.name) != getattr(after, row.name)]


def check_exposure(options: ServerOptions, hosts: Iterable[str]) -> str | None:
    """Check that what is bound may be reached from where it can be.

    Args:
        options: The server's options.
        hosts: The addresses that are bound.

    Returns:
        A warning for the operator, or None.

    Raises:
        ConfigurationError: Other machines could reach the server without keys, or read keys and values on the network.
    """
    from aiokv.wire import is_loopback  # noqa: PLC0415 (not for `--help`)

    host = next((host for host in hosts if not is_loopback(host)), None)
    if host is None:
        return None
    if options.access_file is None:
        raise ConfigurationError(
            f"without an access file the server binds to loopback only, not to {host!r}; "
            "make one with `aiokv access add <account> --access-file FILE` and pass it"
        )
    if options.tls_cert is not None:
        return None
    if not options.insecure_http:
        raise ConfigurationError(
            f"plain HTTP at {host!r} shows keys and values to everybody on the network; pass --tls-cert, "
            "or --insecure-http where a proxy in a trusted network encrypts"
        )
    return f"plain HTTP at {host!r} (--insecure-http): keys and values travel readable, so the network must be a trusted one"


def check_reload(present: ServerOptions, options: ServerOptions) -> None:
    """Check that a reload takes no protection away: a configuration file may be half written.

    Args:
        present: The options in force.
        options: The options that would replace them.

    Raises:
        ConfigurationError: There would be no access file, certificate or key any more.
    """
    for name in _PROTECTIONS:
        if getattr(present, name) is not None and getattr(options, name) is None:
            raise ConfigurationError(f"{_ROWS[name].key} is no longer there; to serve without it needs a restart")


def _check_together(options: ServerOptions) -> None:
    if options.tls_key is not None and options.tls_cert is None:
        raise ConfigurationError("--tls-key needs --tls-cert")
    if options.workers > 1 and options.store[: len("memory:")].lower() == "memory:":
        raise ConfigurationError(
            f"memory:// keeps its values in one process, so {options.workers} workers would each have others; "
            "pass --workers 1, or a store that processes share, such as sqlite:///kv.db"
        )
    scheme = options.store.partition(":")[0].lower()
    if options.durability != ServerOptions.durability and scheme not in REDIS_SCHEMES:
        raise ConfigurationError(
            f"--durability {options.durability} is for stores on Redis or Valkey, such as redis://host, not for "
            f"{truncated(scheme)}:; leave it out"
        )


def _read_file(path: Path) -> dict[str, object]:
    import tomllib  # noqa: PLC0415 (not for `--help`)

    from aiokv.server.private_file import read_small_file  # noqa: PLC0415 (likewise)

    try:
        return tomllib.loads(read_small_file(path).decode())
    except OSError as error:
        raise ConfigurationError(f"configuration file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except tomllib.TOMLDecodeError as error:
        reason = str(error)
    except ValueError:
        # The one that int() raises.
        reason = "a whole number has too many digits"
    except RecursionError:
        reason = "its values are nested too deeply"
    raise ConfigurationError(f"configuration file {path} is not TOML: {reason}")


def _find(spellings: Mapping[str, _Option], given: str, source: str) -> _Option:
    # One spelling of each, so that a file cannot hold an option twice.
    row = spellings.get(given)
    if row is None:
        raise ConfigurationError(f"{source}: there is no such option; {_hint(spellings, given)}")
    return row


def _hint(spellings: Iterable[str], given: str) -> str:
    near = _nearest(given, spellings)
    return f"did you mean {near}?" if near else "`aiokv serve --help` shows all"


def _nearest(given: str, spellings: Iterable[str]) -> str | None:
    from difflib import get_close_matches  # noqa: PLC0415 (only for a message)

    known = list(spellings)
    # A beginning first: the rest of a long name makes it unlike.
    begun = [name for name in known if name.startswith(given)]
    return next(iter(begun if len(begun) == 1 else get_close_matches(given, known, 1)), None)


def _read(row: _Option, raw: object, source: str) -> object:
    if row.optional and _is_none(raw):
        return None
    try:
        return _check_bounds(row, row.kind.read(raw))
    except ValueError:
        bounds = "" if row.kind.is_free else _bounds(row)
        none = " or none" if row.optional else ""
        # A URL may hold a secret, and what stands in a wrong place may be anything.
        may_be_shown = row.kind.may_be_shown or not raw
        shown = truncated(raw) if isinstance(raw, str) and may_be_shown else f"a value of type {type(raw).__name__}"
        if isinstance(raw, (int, float)) and not isinstance(raw, bool):
            shown = f"{raw:,}" if abs(raw) <= _MOST_WHOLE or isinstance(raw, float) else f"a number of {raw.bit_length()} bits"
        hint = f"; only --{', --'.join(_optional_keys())} take none" if _is_none(raw) else ""
        raise ConfigurationError(f"{source}: must be {row.kind.rule}{bounds}{none}, not {shown}{hint}") from None


def _is_none(raw: object) -> bool:
    return isinstance(raw, str) and raw.lower() == "none"


def _optional_keys() -> list[str]:
    return [row.key for row in _ROWS.values() if row.optional]


def _check_bounds(row: _Option, value: object) -> object:
    if isinstance(value, (int, float)) and not row.least <= value <= row.most:
        raise ValueError
    if isinstance(value, int) and value > _MOST_WHOLE:
        raise ValueError
    return value


def _bounds(row: _Option) -> str:
    if row.most < math.inf:
        return f" from {_show(row, row.least)} to {_show(row, row.most) if row.kind is SIZE else f'{row.most:,}'}"
    # A size cannot be below 0: there is no such text.
    return f" of at least {_show(row, row.least)}" if row.least or row.kind is not SIZE else ""


def _show(row: _Option, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if row.kind is SIZE and isinstance(value, (int, float)) and value:
        units = ((MIB, 1, "MiB"), (1024, 1, "KiB"), (100_000, 10, "MB"), (1, 1, " bytes"))
        number, unit = next((value // size / parts, unit) for size, parts, unit in units if not value % size)
        return f"{number:,.10g}{unit}"
    return f"{value:.10g}" + (" s" if row.kind is SECONDS else "") if isinstance(value, (int, float)) else str(value)


_GROUPS: dict[str, tuple[_Option, ...]] = {
    "where": (
        _Option("store", URL, "where values live"),
        _Option(
            "durability",
            DURABILITY,
            "of a Redis store: `acked`, a write has succeeded once the primary has it, or `replicated`",
        ),
        _Option("host", TEXT, "address to bind; beyond loopback needs --access-file, and --tls-cert or --insecure-http"),
        _Option("port", WHOLE, "port to bind, 0 for a free one", most=65_535),
        _Option("tls_cert", FILE, "PEM certificate chain; without it the server speaks plain HTTP", optional=True),
        _Option("tls_key", FILE, "PEM key of the certificate, where --tls-cert does not hold it", optional=True),
        _Option("insecure_http", FLAG, "serve plain HTTP beyond loopback, behind a proxy that encrypts"),
        _Option("workers", WHOLE, "processes that serve the one address; restarted when they die", least=1, most=256),
    ),
    "accounts": (
        _Option(
            "access_file",
            FILE,
            "the accounts, made by `aiokv access add`; without it the server binds to loopback and lets everybody in",
            optional=True,
        ),
        _Option(
            "requests_per_second",
            NUMBER,
            "requests of one account a second; each key of a batch counts as one",
            least=0.001,
            optional=True,
        ),
        _Option("max_stored_bytes", SIZE, "bytes of values that one account may store", optional=True),
        _Option("max_stored_entries", WHOLE, "entries that one account may store", optional=True),
    ),
    "connections, of each worker": (
        _Option(
            "max_connections",
            WHOLE,
            "connections at once; none: what the limit of open files allows, less a reserve",
            least=1,
            optional=True,
        ),
        _Option(
            "max_connections_per_address",
            WHOLE,
            "connections at once from one address; none: half of --max-connections",
            least=1,
            optional=True,
        ),
        # A request line may have 8,190 bytes.
        _Option("max_head_bytes", SIZE, "bytes of a request's first line and headers", least=8 * 1024, most=MIB),
        _Option("head_timeout_seconds", SECONDS, "time for the head of a request", least=0.1),
        _Option("idle_timeout_seconds", SECONDS, "time that a connection may stand without a request", least=0.1),
        _Option("min_bytes_per_second", SIZE, "least rate of bodies and of the reading of answers, after --grace"),
        _Option("grace_seconds", SECONDS, "time that a body or an unread answer may stand still", least=0.1),
        _Option("max_bytes_in_flight", SIZE, "bytes of bodies and answers in memory at once", least=MAX_VALUE_BYTES),
        _Option("max_watches", WHOLE, "watches of namespaces at once; 0 for none"),
        _Option(
            "max_watches_per_account",
            WHOLE,
            "watches of one account at once; none: half of --max-watches",
            optional=True,
        ),
    ),
    "disk": (
        _Option("min_free_bytes", SIZE, "free disk below which nothing more is stored"),
        _Option("ballast_bytes", SIZE, "file that is given back so that deletes have room on a full disk; 0 for none"),
        _Option(
            "quick_check",
            FLAG,
            "before the server starts, check the pages of the store's file, but not the checksums of its values, which "
            "`aiokv check` reads too",
        ),
    ),
    "stopping": (
        _Option("drain_delay_seconds", SECONDS, "after SIGTERM, time of serving on while /readyz says that the server stops"),
        _Option("drain_seconds", SECONDS, "time that requests under way may take to finish after that"),
    ),
    "log": (
        _Option("access_log", FILE, "file with a line of JSON for each request, - for standard output", optional=True),
        _Option("log_keys", FLAG, "name keys in the access log"),
    ),
}
_ROWS = {row.word: row for rows in _GROUPS.values() for row in rows}
