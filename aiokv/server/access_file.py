"""An access file on the disk: how it is read, and the edits of `aiokv access`."""

import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from aiokv.errors import ConfigurationError, truncated
from aiokv.limits import check_db_name
from aiokv.server.access_text import (
    ACCOUNT,
    LIMIT_NAMES,
    AccessText,
    Comment,
    Key,
    Limits,
    Line,
    SigningKey,
    hash_of,
    parse_limit,
)
from aiokv.server.private_file import edit_private_file, read_small_file

_FIRST_LINE = "# aiokv access file, version 2. Keep it private."
_FIRST_LINE_OF_VERSION_1 = "# aiokv access file, version 1. Keep it private."
_HEADER = (
    _FIRST_LINE,
    "# One key a line, <account>:sha256:<hash of its secret>; remove a line to revoke its key.",
)
_SHORT_ID = re.compile(r"[0-9a-f]{4,64}")


def read_access_file(path: Path) -> AccessText:
    """Read an access file.

    Args:
        path: The file.

    Returns:
        Its lines.

    Raises:
        ConfigurationError: It is absent, no regular file of at most 16 MiB, cannot be read or is malformed.
    """
    try:
        content = read_small_file(path)
    except OSError as error:
        hint = "; make it with `aiokv access add <account>`" if isinstance(error, FileNotFoundError) else ""
        raise ConfigurationError(f"access file {path} cannot be read: {error.strerror}{hint}") from error
    return _parse_of(path, content)


def add_key(
    path: str | Path,
    account: str,
    *,
    read_only: bool = False,
    operator: bool = False,
    db_patterns: tuple[str, ...] | None = None,
) -> str:
    """Make a key for an account, and add its hash to an access file; make the file where it is absent.

    Args:
        path: The access file; it is made readable by its owner alone.
        account: 1 to 64 letters, digits, `.`, `_` or `-`; an account that has a key gets a second one.
        read_only: Whether the key may only read.
        operator: Whether the key may read `/metrics` and `/status`, too.
        db_patterns: The namespaces that the key may use, `*` standing for any text; None for all of the account's.

    Returns:
        The key, `<account>:<secret>`, which is stored nowhere.

    Raises:
        ConfigurationError: The account's name has other characters, a pattern is none of a namespace, or the file cannot be
            written or is no access file.
    """
    if not ACCOUNT.fullmatch(account):
        raise ConfigurationError(f"account must be 1 to 64 letters, digits, '.', '_' or '-', not {truncated(account)}")
    if db_patterns is not None and not db_patterns:
        raise ConfigurationError("db_patterns must have at least one pattern; None stands for every namespace")
    for pattern in db_patterns or ():
        try:
            check_db_name(pattern)
        except ValueError as error:
            raise ConfigurationError(f"a pattern of namespaces must be what a namespace can be: {error}") from None
    secret = secrets.token_urlsafe(32)
    key = Key(account, hash_of(secret), read_only, operator, db_patterns)

    def append(text: AccessText | None) -> AccessText:
        if text is None:
            text = AccessText((*map(Comment, _HEADER), SigningKey(secrets.token_bytes(32))))
        return AccessText((*text.lines, key))

    _edit(path, append)
    return f"{account}:{secret}"


def revoke_keys(path: str | Path, account: str, short_id: str | None = None) -> tuple[Key, ...]:
    """Remove keys of an account from an access file; its limits stay.

    Args:
        path: The access file.
        account: The account.
        short_id: The first 4 or more digits of the hash of the one key to remove; None removes all keys of the account.

    Returns:
        The keys that were removed.

    Raises:
        ConfigurationError: The account has no such key, or several, or the file cannot be written or is no access file.
    """
    if short_id is not None and not _SHORT_ID.fullmatch(short_id):
        raise ConfigurationError(f"the short id of a key is 4 or more of the digits 0-9a-f, not {truncated(short_id)}")
    revoked: tuple[Key, ...] = ()

    def remove(text: AccessText | None) -> AccessText:
        nonlocal revoked
        text = _present(text)
        revoked = tuple(key for key in text.keys().get(account, ()) if key.key_hash.startswith(short_id or ""))
        if not revoked:
            asked = f"account {truncated(account)}" + (f" and short id {short_id}" if short_id else "")
            raise ConfigurationError(f"it has no key of {asked}; `aiokv access list` shows what there is")
        if short_id is not None and len(revoked) > 1:
            raise ConfigurationError(f"several keys of account {account} begin with {short_id}; give more digits")
        return AccessText(tuple(line for line in text.lines if line not in revoked))

    _edit(path, remove)
    return revoked


def change_limits(path: str | Path, account: str, changes: Mapping[str, str]) -> Limits:
    """Change limits of an account in an access file.

    Args:
        path: The access file.
        account: An account that has a key or limits.
        changes: New limits by their names in the file: a number, `none` for no limit, or `default` for the server's default.
            Bytes and entries may end in k, M or G for thousands, millions and billions.

    Returns:
        The limits that the file gives the account now.

    Raises:
        ConfigurationError: A limit has no such value, the account is unknown, or the file cannot be written or is no access
            file.
    """
    parsed = {name: parse_limit(name, text) for name, text in changes.items() if text != "default"}
    changed = Limits(account, {})

    def change(text: AccessText | None) -> AccessText:
        nonlocal changed
        text = _present(text)
        if account not in text.accounts():
            raise ConfigurationError(f"it has no account {truncated(account)}; `aiokv access list` shows what there is")
        old = text.limits().get(account, Limits(account, {}))
        given = {**old.given, **parsed}
        changed = Limits(
            account, {name: given[name] for name in LIMIT_NAMES if name in given and changes.get(name) != "default"}
        )
        new = (changed,) if changed.given else ()
        if old not in text.lines:
            return AccessText((*text.lines, *new))
        place = text.lines.index(old)
        return AccessText((*text.lines[:place], *new, *text.lines[place + 1 :]))

    _edit(path, change)
    return changed


def _edit(path: str | Path, change: Callable[[AccessText | None], AccessText]) -> None:
    path = Path(path)

    def change_content(content: bytes | None) -> bytes:
        text = None if content is None else _parse_of(path, content)
        try:
            changed = change(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"access file {path} is unchanged: {error}") from None
        return AccessText(tuple(map(_as_version_2, changed.lines))).write()

    try:
        edit_private_file(path, change_content)
    except OSError as error:
        raise ConfigurationError(f"access file {path} cannot be written: {error.strerror}") from error


def _parse_of(path: Path, content: bytes) -> AccessText:
    try:
        return AccessText.parse(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"access file {path} is malformed: {error}") from None


def _present(text: AccessText | None) -> AccessText:
    if text is None:
        raise ConfigurationError("there is no such file; make it with `aiokv access add <account>`")
    return text


def _as_version_2(line: Line) -> Line:
    return Comment(_FIRST_LINE) if line == Comment(_FIRST_LINE_OF_VERSION_1) else line
