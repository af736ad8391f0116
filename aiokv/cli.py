"""The command line: serve a store, make keys, and get, set and delete from a shell."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from aiokv.errors import AioKVError
from aiokv.limits import MAX_VALUE_BYTES, check_value_size
from aiokv.maintenance_commands import add_maintenance_commands
from aiokv.store import AsyncKVStore

_ABSENT = 1
_FAILED = 2

_DESCRIPTION = """\
An expiring key-value store over HTTP.

  aiokv serve                              serve kv.db of this folder at http://127.0.0.1:8787
  export AIOKV_URL=http://127.0.0.1:8787   name the store; without it fal's service is used
  aiokv set settings theme dark --ttl 3600
  aiokv get settings theme
"""

_URL_HELP = (
    "the store: https://host, http://127.0.0.1:8787, sqlite:///kv.db, redis://host, memory:// "
    "(default: AIOKV_URL, else fal's service)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: 0 done, 1 the key is absent, 2 failed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(arguments[0] if arguments else "")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_refuse(arguments[0], unknown))
    import logging  # noqa: PLC0415 (after the arguments: `--help` needs none of it)

    logging.basicConfig(format="aiokv: %(message)s", level=logging.WARNING)
    try:
        return int(options.run(options))
    except (AioKVError, ValueError, TypeError) as error:
        print(f"aiokv: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"aiokv: {error}", file=sys.stderr)
        if sys.stdout is not None:
            # Else the interpreter would flush the rest at its end, and print a second error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED


def _refuse(command: str, unknown: Sequence[str]) -> str:
    """Return the message of arguments that no command takes."""
    message = f"unrecognized arguments: {' '.join(unknown)}"
    if command != "serve":
        return message
    from aiokv.server.options import nearest_flag  # noqa: PLC0415 (only for this message)

    near = next(filter(None, map(nearest_flag, unknown)), None)
    return f"{message}; did you mean {near}?" if near else message


def _parser(command: str) -> argparse.ArgumentParser:
    """Return the parser; `serve` and `access`, which have many flags, have them where they are the command."""
    parser = argparse.ArgumentParser(
        prog="aiokv", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser(
        "serve",
        help="serve a store over HTTP",
        description="Serve a store over HTTP until SIGTERM or Ctrl-C; a second one, half a second later or more, ends it at "
        "once. One line on standard error gives the address once connections are accepted. SIGHUP reads access file, "
        "certificate and configuration again, and opens the log file again.",
        epilog="Each option can stand in the environment, such as AIOKV_SERVE_MAX_CONNECTIONS, or in the file of --config, "
        "such as `max-connections = 1000`. The first of flag, environment, file and default counts. `none` lifts a bound.",
        allow_abbrev=False,
    )
    if command == "serve":
        from aiokv.server.options import add_flags  # noqa: PLC0415 (likewise)

        add_flags(serve)
    serve.set_defaults(run=_serve)

    access = commands.add_parser(
        "access", help="make, list and revoke keys for `aiokv serve --access-file`, and limit accounts"
    )
    if command == "access":
        from aiokv.access_commands import add_access_commands  # noqa: PLC0415 (likewise)

        add_access_commands(access)
    add_maintenance_commands(commands)
    get = _entry_command(commands, "get", "print a value; exit status 1 where there is none")
    get.set_defaults(run=_get)
    set_ = _entry_command(commands, "set", "store a value")
    set_.add_argument(
        "value",
        metavar="VALUE",
        nargs="?",
        help="the value; read from standard input where it is left out (put -- before one that begins with -)",
    )
    set_.add_argument("--ttl", type=_parse_seconds, metavar="SECONDS", help="60 to 2592000 (30 days, the default)")
    set_.set_defaults(run=_set)
    delete = _entry_command(commands, "delete", "remove an entry, if there is one")
    delete.set_defaults(run=_delete)
    return parser


class _Version(argparse.Action):
    """Print the version; reading it takes longer than all else that the command line does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # noqa: PLC0415 (see above)

        print(f"aiokv {version('aiokv')}")
        parser.exit()


def _entry_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, help_: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
    command.add_argument("db_name", metavar="DB", help="the namespace")
    command.add_argument("key", metavar="KEY")
    command.add_argument("--url", metavar="URL", help=_URL_HELP)
    return command


def _parse_seconds(text: str) -> int:
    # int() alone would take "6_0" and digits of other scripts.
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError("expected a decimal number of seconds")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    from aiokv.server.command import serve  # noqa: PLC0415 (the other commands need no server)

    return serve(vars(options))


def _get(options: argparse.Namespace) -> int:
    async def run() -> str | None:
        async with AsyncKVStore(options.db_name, url=options.url) as store:
            return await store.get(options.key)

    value = asyncio.run(run())
    if value is None:
        print(f"aiokv: no key {options.key!r} in db {options.db_name!r}, or it has expired", file=sys.stderr)
        return _ABSENT
    # Raw bytes: a pipe gets exactly the stored value, whatever the terminal's encoding.
    if sys.stdout is None:
        raise ValueError("standard output is closed; there is nowhere to write the value")
    sys.stdout.buffer.write(value.encode())
    if sys.stdout.isatty():
        sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    return 0


def _set(options: argparse.Namespace) -> int:
    value = options.value
    if value is None:
        if sys.stdin is None:
            raise ValueError("no VALUE, and standard input is closed")
        try:
            # One byte more than the limit is enough to see that the value is too large.
            data = sys.stdin.buffer.read(MAX_VALUE_BYTES + 1)
            check_value_size(len(data))
            value = data.decode()
        except UnicodeDecodeError:
            raise ValueError("standard input is not UTF-8; encode binary data as text, such as base64") from None

    async def run() -> None:
        async with AsyncKVStore(options.db_name, url=options.url) as store:
            await store.set(options.key, value, options.ttl)

    asyncio.run(run())
    return 0


def _delete(options: argparse.Namespace) -> int:
    async def run() -> None:
        async with AsyncKVStore(options.db_name, url=options.url) as store:
            await store.delete(options.key)

    asyncio.run(run())
    return 0
