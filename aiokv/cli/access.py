"""`aiokv access`: make, list and revoke keys, and limit accounts."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from aiokv.cli.terminal import binary_output, naming, print_message

if TYPE_CHECKING:
    from aiokv.server.access_text import Limits

_DESCRIPTION = """\
Make, list and revoke keys for `aiokv serve --access-file`, and limit accounts.

Each account sees stores of its own; several keys of one account share them. The file is text, one key a line; it keeps hashes
of the secrets and the key that signs tokens, so every command that writes it makes it readable by its owner alone. A running
server follows the file within a second, without a restart, for tokens already issued, too.

  export AIOKV_ACCESS_FILE=access
  aiokv access add alice                          a key that may do everything in alice's stores
  aiokv access add alice --read-only --db 'c-*'   a second key, which may only get, from namespaces that begin with c-
  aiokv access limit alice --requests-per-second 100 --max-bytes 2G
  aiokv access list
  aiokv access revoke alice --key 1a2b3c4d
"""

_ADD_DESCRIPTION = """\
Make a key for an account and print it, once; the file keeps a hash only. An account that has a key gets a second one, so that
keys can be rotated: add one, give it to the clients, revoke the old one. To change what a key may do, edit the words that
follow it in the file. An operator's key is sent by Basic, the id as user and the secret as password: curl -u "$KEY" URL/metrics
"""

_REVOKE_DESCRIPTION = """\
Remove the keys of an account, or one of them. Tokens that were issued for a key end with it. The account's limits stay, and so
does what it has stored, until it expires or a new key of the account deletes it.
"""

_LIMIT_DESCRIPTION = """\
Limit what an account may use. A limit that is not named here stays as it is; `none` lifts it, also where the server has a
default, and `default` takes the server's default again. Bytes are sizes as for `aiokv serve`, such as 64MiB or 2G; entries may
end in k, M or G for thousands, millions and billions. A request past its rate gets 429 with the seconds to wait. A set past a
quota of bytes or entries gets 507 with the name of the quota; gets and deletes go on.
"""


def add_access(access: argparse.ArgumentParser) -> None:
    """Add the commands of `access`.

    Args:
        access: The parser of `access`; each parsed command has a function `run`.
    """
    access.description = _DESCRIPTION
    access_commands = access.add_subparsers(required=True, metavar="command")
    file_default = os.environ.get("AIOKV_ACCESS_FILE") or None

    def add_command(name: str, help_: str, description: str, *, takes_account: bool = True) -> argparse.ArgumentParser:
        command = access_commands.add_parser(name, help=help_, description=description)
        if takes_account:
            command.add_argument("account", metavar="ID", help="the account: 1 to 64 letters, digits, '.', '_' or '-'")
        command.add_argument(
            "--access-file",
            metavar="F",
            default=file_default,
            help="the access file (default: AIOKV_ACCESS_FILE)",
        )
        return command

    add = add_command("add", "make a key for an account", _ADD_DESCRIPTION)
    add.add_argument("--read-only", action="store_true", help="the key may get, and neither set nor delete")
    add.add_argument(
        "--db",
        metavar="PATTERN",
        action="append",
        help="the key may use only namespaces of this name, in which * stands for any text; give it once for each pattern",
    )
    add.add_argument(
        "--operator",
        action="store_true",
        help="the key may read /metrics and /status, too, sent by Basic as `curl -u KEY` does; give it an account of its own",
    )
    add.set_defaults(run=_add)

    list_ = add_command(
        "list",
        "show accounts, their limits, and their keys",
        "Show each account with its limits, and below it its keys: a short id, by which `aiokv access revoke --key` takes it, "
        "and what the key may do. The short id is the beginning of the hash, and opens nothing.",
        takes_account=False,
    )
    list_.set_defaults(run=_list)

    revoke = add_command("revoke", "remove the keys of an account, or one of them", _REVOKE_DESCRIPTION)
    revoke.add_argument("--key", metavar="SHORT_ID", help="the one key to remove, by the short id of `aiokv access list`")
    revoke.set_defaults(run=_revoke)

    limit = add_command("limit", "limit what an account may use", _LIMIT_DESCRIPTION)
    limit.add_argument(
        "--requests-per-second", metavar="N", help="requests a second in each worker process, such as 100 or 0.5"
    )
    limit.add_argument("--max-bytes", metavar="SIZE", help="bytes of values stored, such as 64MiB, 1.9MB, 2G or 5000")
    limit.add_argument("--max-entries", metavar="N", help="entries stored, such as 10k")
    limit.set_defaults(run=_limit)


def _add(options: argparse.Namespace) -> int:
    from aiokv.server.access_file import add_key, revoke_keys  # noqa: PLC0415 (`--help` needs no server)
    from aiokv.server.access_text import hash_of, short_id_of  # noqa: PLC0415 (likewise)

    # It refuses one that is closed.
    binary_output()
    patterns = None if options.db is None else tuple(options.db)
    key = add_key(
        _file_of(options),
        options.account,
        read_only=options.read_only,
        operator=options.operator,
        db_patterns=patterns,
    )
    key_hash = hash_of(key.partition(":")[2])
    try:
        with naming("standard output"):
            print(key, flush=True)
    except OSError:
        revoke_keys(_file_of(options), options.account, key_hash)
        print_message("the key could not be shown, so it was revoked at once")
        raise
    print_message(
        f"this key of {options.account} is shown once and stored nowhere; clients pass it as AIOKV_KEY. Its short id is "
        f"{short_id_of(key_hash)}. A running server takes it within a second; other keys of the account "
        "and their tokens go on working"
    )
    return 0


def _list(options: argparse.Namespace) -> int:
    from aiokv.server.access_file import read_access_file  # noqa: PLC0415 (likewise)

    file = _file_of(options)
    text = read_access_file(Path(file))
    keys, limits = text.keys(), text.limits()
    for account in text.accounts():
        print(f"{account}  {_describe(limits.get(account))}")
        for key in keys.get(account, ()):
            print(f"  {key.short_id}  {key.flags() or 'everything'}")
        if account not in keys:
            print("  no key")
    if not text.accounts():
        print_message(f"access file {file} has no key; make one with `aiokv access add <account>`")
    return 0


def _revoke(options: argparse.Namespace) -> int:
    from aiokv.server.access_file import revoke_keys  # noqa: PLC0415 (likewise)

    revoked = revoke_keys(_file_of(options), options.account, options.key)
    names = ", ".join(key.short_id for key in revoked)
    print_message(
        f"revoked of {options.account}: {names}. Within a second a running server refuses "
        f"{'it and the tokens issued for it' if len(revoked) == 1 else 'them and the tokens issued for them'}. "
        "The account's limits stay, and what it stored stays until it expires"
    )
    return 0


def _limit(options: argparse.Namespace) -> int:
    from aiokv.server.access_file import change_limits  # noqa: PLC0415 (likewise)
    from aiokv.server.access_text import LIMIT_NAMES  # noqa: PLC0415 (likewise)

    given = {name: getattr(options, name.replace("-", "_")) for name in LIMIT_NAMES}
    changes = {name: text for name, text in given.items() if text is not None}
    if not changes:
        raise ValueError(f"no limit is named; give one or more of --{', --'.join(LIMIT_NAMES)}")
    limits = change_limits(_file_of(options), options.account, changes)
    print_message(
        f"limits of {options.account}: {_describe(limits)}. A running server applies them within a second, to tokens already "
        "issued, too. Nothing that is stored is deleted"
    )
    return 0


def _file_of(options: argparse.Namespace) -> str:
    if not options.access_file:
        raise ValueError("no access file is named; pass --access-file F, or set AIOKV_ACCESS_FILE")
    return str(options.access_file)


def _describe(limits: "Limits | None") -> str:
    return limits.settings() if limits is not None and limits.given else "limits of the server's defaults"
