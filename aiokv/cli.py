"""The command line: serve a store, make keys, and get, set and delete from a shell."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from aiokv.errors import AioKVError
from aiokv.limits import MAX_VALUE_BYTES, check_value_size
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
    "the store: https://host, http://127.0.0.1:8787, sqlite:///kv.db, memory:// (default: AIOKV_URL, else fal's service)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: 0 done, 1 the key is absent, 2 failed.
    """
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aiokv", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser(
        "serve",
        help="serve a store over HTTP",
        description="Serve a store over HTTP until SIGTERM or Ctrl-C. One line on standard error gives the address once "
        "connections are accepted.",
    )
    serve.add_argument("--store", metavar="URL", default="sqlite:///kv.db", help="where values live (default: %(default)s)")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8787, help="port to bind, 0 for a free one (default: %(default)s)")
    serve.add_argument(
        "--access-file",
        metavar="F",
        help="the accounts, made by `aiokv access add`; without it the server binds to loopback and lets everybody in",
    )
    serve.add_argument("--tls-cert", metavar="F", help="PEM certificate chain; without it the server speaks plain HTTP")
    serve.add_argument("--tls-key", metavar="F", help="PEM key of the certificate, where --tls-cert does not hold it")
    serve.set_defaults(run=_serve)

    access = commands.add_parser(
        "access",
        help="make keys for `aiokv serve --access-file`",
        description="Make keys for `aiokv serve --access-file`. Each account sees stores of its own. The file is text, one key "
        "a line; it keeps hashes of the secrets and the key that signs tokens, so keep it private.",
    )
    access_commands = access.add_subparsers(required=True, metavar="command")
    add = access_commands.add_parser(
        "add",
        help="make a key for an account",
        description="Make a key for an account and print it, once; the file keeps a hash only. An account that has a key "
        "gets a second one. To revoke a key, remove its line from the file; a running server notices.",
    )
    add.add_argument("account", metavar="ID", help="1 to 64 letters, digits, '.', '_' or '-'; its stores are its own")
    add.add_argument("--access-file", metavar="F", required=True, help="the access file; made where it is absent")
    add.set_defaults(run=_access_add)

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
    from aiokv.server.serve import serve  # noqa: PLC0415 (the other commands need no server)

    asyncio.run(
        serve(
            options.store,
            host=options.host,
            port=options.port,
            access_file=options.access_file,
            tls_cert=options.tls_cert,
            tls_key=options.tls_key,
        )
    )
    return 0


def _access_add(options: argparse.Namespace) -> int:
    from aiokv.server.access import add_key  # noqa: PLC0415 (likewise)

    key = add_key(options.access_file, options.account)
    print(key)
    print(
        f"aiokv: this key of {options.account} is shown once and stored nowhere; clients pass it as AIOKV_KEY",
        file=sys.stderr,
    )
    return 0


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
