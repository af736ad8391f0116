"""The command line: use, fill, measure and serve a store from a shell."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from aiokv.cli.terminal import Parser, is_full, naming, print_message
from aiokv.errors import AioKVError, BatchError, CallError, UnsupportedError

WRONG_USAGE = 2
FAILED = 3
INTERRUPTED = 130

_DESCRIPTION = """\
An expiring key-value store over HTTP.

  aiokv serve                              serve kv.db of this folder at http://127.0.0.1:8787
  export AIOKV_URL=http://127.0.0.1:8787   name the store; without it fal's service is used
  aiokv set settings theme dark --ttl 3600
  aiokv get settings theme
  aiokv ping                               can it be reached, and if not, what fails
  aiokv export --db settings -o settings.jsonl
  aiokv import settings.jsonl --db settings
"""

_EPILOG = """\
Exit status: 0 done, 1 the key is absent (or damage was found, or rows were left out), 2 wrong usage, 3 the store or a file
failed, 130 interrupted. Secrets go by the environment alone (AIOKV_KEY), since `ps` shows command lines.
"""


# Of each command its help, its module, and the function there that adds its arguments to a parser. Plain tuples, since to make
# a class of named ones takes as long as all of the parser.
_COMMANDS = {
    "get": ("print a value; exit status 1 where there is none", "entries", "add_get"),
    "set": ("store a value", "entries", "add_set"),
    "delete": ("remove an entry, if there is one", "entries", "add_delete"),
    "ttl": ("print how many seconds an entry has left", "entries", "add_ttl"),
    "list": ("list the keys of a namespace", "entries", "add_list"),
    "clear": ("delete all entries of a namespace", "entries", "add_clear"),
    "import": ("store the rows of a file, and go on where an earlier run stopped", "importing", "add_import"),
    "export": ("write the entries of a namespace as rows for `aiokv import`", "exporting", "add_export"),
    "ping": ("try whether a store can be reached, step by step", "probe", "add_ping"),
    "bench": ("measure how long gets and sets of a store take", "load", "add_bench"),
    "top": ("show what a server does now", "top", "add_top"),
    "serve": ("serve a store over HTTP", "serving", "add_serve"),
    "access": ("make, list and revoke keys for `aiokv serve --access-file`, and limit accounts", "access", "add_access"),
    "backup": ("copy a store's SQLite file while it is served", "maintenance", "add_backup"),
    "check": ("look for damage in a store's SQLite file", "maintenance", "add_check"),
    "completion": ("write a script by which a shell completes commands", "completion", "add_completion"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: 0 done, 1 the key is absent, 2 wrong usage, 3 the store or a file failed, 130 interrupted.
    """
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except (AioKVError, ValueError, TypeError) as error:
        print_message(error)
        return _status_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.filename is None and error.errno == errno.ENOSPC:
            # All files of commands name themselves.
            error.filename = "standard output"
        if not isinstance(error, BrokenPipeError):
            print_message(error)
        if sys.stdout is not None:
            # Else the interpreter would flush the rest at its end, and print a second error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _run(arguments: Sequence[str]) -> int:
    parser = make_parser(arguments[0] if arguments else "")
    try:
        options, unknown = parser.parse_known_args(arguments)
    finally:
        # The help and the version, too.
        _flush()
    if unknown:
        parser.error(_refuse(arguments[0], unknown))
    import logging  # noqa: PLC0415 (after the arguments: `--help` needs none of it)

    logging.basicConfig(format="aiokv: %(message)s", level=logging.WARNING)
    _check_url(getattr(options, "url", None))
    status = int(options.run(options))
    _flush()
    return status


def _flush() -> None:
    if sys.stdout is not None:
        with naming("standard output"):
            sys.stdout.flush()


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        command: The command that gets its arguments, since to add those of all takes long; None for all of them.

    Returns:
        The parser; each parsed command has a function `run`.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="aiokv", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (help_, module, add) in _COMMANDS.items():
        is_meant = command in {name, None}
        own = commands.add_parser(name, help=help_, formatter_class=raw, allow_abbrev=name != "serve", add_help=is_meant)
        if is_meant:
            own.description = f"{help_[0].upper()}{help_[1:]}."
            getattr(import_module(f"aiokv.cli.{module}"), add)(own)
    return parser


class _Version(argparse.Action):
    """Print the version; reading it takes longer than all else that the command line does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # noqa: PLC0415 (see above)

        print(f"aiokv {version('aiokv')}")
        parser.exit()


def _refuse(command: str, unknown: Sequence[str]) -> str:
    """Return the message of arguments that no command takes."""
    if command == "set":
        # They may be words of the value, which no message repeats.
        return (
            f"{len(unknown)} unrecognized argument{'s' * (len(unknown) > 1)}: quote a value of several words, or pipe it in; "
            "for the options see `aiokv set --help`"
        )
    message = f"unrecognized arguments: {' '.join(unknown)}"
    if command != "serve":
        return message
    from aiokv.server.options import nearest_flag  # noqa: PLC0415 (only for this message)

    near = next(filter(None, map(nearest_flag, unknown)), None)
    return f"{message}; did you mean {near}?" if near else message


def _check_url(url: str | None) -> None:
    """Refuse a URL that shows a secret to everybody who runs `ps`."""
    # In any form, since one with a slash too few or too many shows them as well.
    if url is not None and "@" in url and not re.match("(sqlite|memory):", url, re.IGNORECASE):
        variable = "AIOKV_REDIS_PASSWORD" if url.lower().startswith(("redis", "valkey")) else "AIOKV_KEY"
        raise ValueError(
            f"a URL on the command line must not hold credentials, since `ps` shows them to every user of this machine; "
            f"set {variable} in the environment, and change the secret that was just shown"
        )


def _status_of(error: Exception) -> int:
    if is_full(error.__cause__):
        # Whatever error tells of it.
        return FAILED
    # What the same command would meet again, however well the store is, is wrong usage.
    is_usage = isinstance(error, ValueError | UnsupportedError) or not isinstance(error, CallError | BatchError)
    return WRONG_USAGE if is_usage else FAILED
