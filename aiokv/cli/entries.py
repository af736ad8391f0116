"""`aiokv get`, `set`, `delete`, `ttl`, `list` and `clear`: entries of a namespace, from a shell."""

import argparse
import asyncio
import math
import sys

from aiokv import clock
from aiokv.backends.capabilities import KeyInfo
from aiokv.cli.terminal import binary_input, binary_output, is_terminal, print_message, printable
from aiokv.limits import MAX_VALUE_BYTES, check_value_size
from aiokv.store import AsyncKVStore

_ABSENT = 1
_STDIN = "-"

_URL_HELP = (
    "the store: https://host, http://127.0.0.1:8787, sqlite:///kv.db, redis://host, memory:// "
    "(default: AIOKV_URL, else fal's service)"
)


def add_url(parser: argparse.ArgumentParser) -> None:
    """Add `--url`.

    Args:
        parser: That of a command.
    """
    parser.add_argument("--url", metavar="URL", help=_URL_HELP)


def add_get(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `get`.

    Args:
        parser: That of the command.
    """
    parser.epilog = (
        "example: aiokv get settings theme\n\nThe value comes as it is stored, without a line feed behind it in a pipe."
    )
    _add_entry(parser)
    parser.set_defaults(run=_get)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `set`.

    Args:
        parser: That of the command.
    """
    parser.epilog = (
        "examples: aiokv set settings theme dark --ttl 3600\n          aiokv set reports today - < report.json\n\n"
        "A value on the command line is seen in `ps`: pipe secrets in."
    )
    _add_entry(parser)
    parser.add_argument(
        "value",
        metavar="VALUE",
        nargs="?",
        help="the value; - or left out: it is read from standard input (put -- before one that begins with -)",
    )
    parser.add_argument("--ttl", type=_parse_seconds, metavar="SECONDS", help="60 to 2592000 (30 days, the default)")
    parser.set_defaults(run=_set)


def add_delete(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `delete`.

    Args:
        parser: That of the command.
    """
    parser.epilog = "example: aiokv delete settings theme"
    _add_entry(parser)
    parser.set_defaults(run=_delete)


def add_ttl(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ttl`.

    Args:
        parser: That of the command.
    """
    parser.epilog = (
        "example: aiokv ttl settings theme\n\nExit status 1 where there is no such key. The store must be able to list."
    )
    _add_entry(parser)
    parser.set_defaults(run=_ttl)


def add_list(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `list`.

    Args:
        parser: That of the command.
    """
    parser.epilog = (
        "examples: aiokv list settings\n          aiokv list settings user: --json | jq -r .key\n\n"
        "A line has the key, the seconds left and the bytes of the value, with tabs between. In the key, what cannot be\n"
        'printed is written as \\n, \\x1b and so on; --json writes it exactly: {"key": ..., "ttl": ..., "bytes": ...}.'
    )
    _add_namespace(parser, "list the keys that begin with this alone")
    parser.add_argument("--json", action="store_true", help="write a JSON object a line")
    parser.set_defaults(run=_list)


def add_clear(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `clear`.

    Args:
        parser: That of the command.
    """
    parser.epilog = "examples: aiokv clear settings\n          aiokv clear settings user: --yes"
    _add_namespace(parser, "delete the keys that begin with this alone")
    parser.add_argument("--yes", action="store_true", help="do not ask; needed where standard input is no terminal")
    parser.set_defaults(run=_clear)


def _add_entry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("db_name", metavar="DB", help="the namespace")
    parser.add_argument("key", metavar="KEY")
    add_url(parser)


def _add_namespace(parser: argparse.ArgumentParser, help_: str) -> None:
    parser.add_argument("db_name", metavar="DB", help="the namespace")
    parser.add_argument("prefix", metavar="PREFIX", nargs="?", default="", help=help_)
    add_url(parser)


def _parse_seconds(text: str) -> int:
    # int() alone would take "6_0" and digits of other scripts.
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError("expected a decimal number of seconds")
    return int(text)


def _get(options: argparse.Namespace) -> int:
    async def run() -> str | None:
        async with AsyncKVStore(options.db_name, url=options.url) as store:
            return await store.get(options.key)

    value = asyncio.run(run())
    if value is None:
        return _report_absent(options)
    output = binary_output()
    output.write(value.encode())
    if output.isatty():
        output.write(b"\n")
    output.flush()
    return 0


def _set(options: argparse.Namespace) -> int:
    value = _read_value() if options.value in {None, _STDIN} else options.value

    async def run() -> None:
        async with AsyncKVStore(options.db_name, url=options.url) as store:
            await store.set(options.key, value, options.ttl)

    asyncio.run(run())
    return 0


def _read_value() -> str:
    # One byte more than the limit is enough to see that the value is too large.
    data = binary_input().read(MAX_VALUE_BYTES + 1)
    check_value_size(len(data))
    try:
        return data.decode()
    except UnicodeDecodeError:
        # Not chained: the error holds the value.
        pass
    raise ValueError("standard input is not UTF-8; encode binary data as text, such as base64")


def _delete(options: argparse.Namespace) -> int:
    async def run() -> None:
        async with AsyncKVStore(options.db_name, url=options.url) as store:
            await store.delete(options.key)

    asyncio.run(run())
    return 0


def _ttl(options: argparse.Namespace) -> int:
    async def run() -> KeyInfo | None:
        async with AsyncKVStore(options.db_name, url=options.url) as store:
            keys = store.keys(options.key)
            try:
                async for info in keys:
                    if info.key == options.key:
                        return info
            finally:
                await keys.aclose()
            return None

    info = asyncio.run(run())
    if info is None:
        return _report_absent(options)
    print(seconds_left(info))
    return 0


def _list(options: argparse.Namespace) -> int:
    output = binary_output()

    async def run() -> None:
        import orjson  # noqa: PLC0415 (few commands need it)

        async with AsyncKVStore(options.db_name, url=options.url) as store:
            async for info in store.keys(options.prefix):
                left = seconds_left(info)
                if options.json:
                    line = orjson.dumps({"key": info.key, "ttl": left, "bytes": info.value_bytes})
                else:
                    line = f"{printable(info.key)}\t{left}\t{info.value_bytes}".encode()
                output.write(line + b"\n")

    try:
        asyncio.run(run())
    finally:
        output.flush()
    return 0


def seconds_left(info: KeyInfo) -> int:
    """Return how long an entry still lives by this machine's clock, in seconds, rounded up; 0 or more.

    Args:
        info: What a listing says of it.
    """
    return max(0, math.ceil(info.expires_at - clock.now()))


def _clear(options: argparse.Namespace) -> int:
    if not options.yes and not (is_terminal(sys.stdin) and sys.stderr is not None):
        raise ValueError("clear deletes for good, and standard input is no terminal to ask at; add --yes")

    async def run(*, is_counting: bool) -> int:
        async with AsyncKVStore(options.db_name, url=options.url) as store:
            return await (store.count if is_counting else store.clear)(options.prefix)

    # Asked outside the loop, which would keep an interrupt until the answer is there.
    if not options.yes and not _ask(options, asyncio.run(run(is_counting=True))):
        print_message("nothing was deleted")
    else:
        print_message(f"deleted {_entries(asyncio.run(run(is_counting=False)))}")
    return 0


def _ask(options: argparse.Namespace, count: int) -> bool:
    which = f" with keys that begin with {printable(options.prefix)}" if options.prefix else ""
    question = f"Delete {_entries(count)} of {printable(options.db_name)}{which}? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count:,} entries"


def _report_absent(options: argparse.Namespace) -> int:
    print_message(f"no key {options.key!r} in db {options.db_name!r}, or it has expired")
    return _ABSENT
