"""Accounts of the server: keys in an access file, exchanged for short-lived signed tokens.

The file is text: first a line with the key that signs tokens, then one key a line, `<account>:sha256:<hash>`. To revoke a key
and its tokens, remove its line. An account with two lines has two keys, so keys can be rotated. A secret is 256 random bits,
so a plain hash protects it as well as a slow one.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aiokv import clock as process_clock
from aiokv.backends.base import Clock
from aiokv.errors import ConfigurationError

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger("aiokv.server")

TOKEN_LIFETIME_SECONDS = 7_200
"""Two hours: the official client asks for a new token as soon as less than one hour is left."""

_HEADER = (
    "# aiokv access file, version 1. Keep it private.\n"
    "# One key a line, <account>:sha256:<hash of its secret>; remove a line to revoke its key.\n"
)
_SIGNING_LINE = re.compile(r"!signing-key ([0-9a-f]{64})")
_KEY_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):sha256:([0-9a-f]{64})")
_ACCOUNT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RELOAD_INTERVAL_SECONDS = 1.0
_MAX_KNOWN_TOKENS = 10_000
_FINGERPRINT_CHARS = 16
_NO_HASH = "0" * 64


class IssuedToken(NamedTuple):
    """A signed token, and the time at which it expires."""

    token: str
    expires_at: datetime


def add_key(path: str | Path, account: str) -> str:
    """Make a key for an account, and add its hash to an access file; make the file where it is absent.

    Args:
        path: The access file; a new one is readable by its owner alone.
        account: 1 to 64 letters, digits, `.`, `_` or `-`; an account that has a key gets a second one.

    Returns:
        The key, `<account>:<secret>`, which is stored nowhere.

    Raises:
        ConfigurationError: The account's name has other characters, or the file cannot be written or is no access file.
    """
    if not _ACCOUNT.fullmatch(account):
        raise ConfigurationError(f"account must be 1 to 64 letters, digits, '.', '_' or '-', not {account[:100]!r}")
    path = Path(path)
    secret = secrets.token_urlsafe(32)
    try:
        _make_if_absent(path)
        _parse(path)
        # An editor may have left the last line without a line break.
        separator = "" if path.read_bytes().endswith(b"\n") else "\n"
        # Append in one write, so that two calls at once both add their line.
        with path.open("a", encoding="ascii") as file:
            file.write(f"{separator}{account}:sha256:{_hash(secret)}\n")
    except OSError as error:
        raise ConfigurationError(f"access file {path} cannot be written: {error.strerror}") from error
    return f"{account}:{secret}"


def _make_if_absent(path: Path) -> None:
    if path.exists():
        return
    # Write a temporary file and link it into place: nobody reads half a file, and of two processes one wins.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{_HEADER}!signing-key {secrets.token_hex(32)}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink()


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _parse(path: Path) -> tuple[bytes, dict[str, tuple[str, ...]]]:
    """Return the signing key of an access file, and the hashes of each account."""
    signing_key: bytes | None = None
    accounts: dict[str, tuple[str, ...]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigurationError(
            f"access file {path} cannot be read: {error.strerror}; make it with `aiokv access add <account>`"
        ) from error
    except UnicodeDecodeError:
        raise ConfigurationError(f"access file {path} is not text; make one with `aiokv access add <account>`") from None
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if match := _SIGNING_LINE.fullmatch(text):
            signing_key = bytes.fromhex(match[1])
        elif match := _KEY_LINE.fullmatch(text):
            accounts[match[1]] = (*accounts.get(match[1], ()), match[2])
        else:
            # The message does not show the line, which may hold a secret.
            raise ConfigurationError(f"access file {path}, line {number}: expected <account>:sha256:<64 hex digits>")
    if signing_key is None:
        raise ConfigurationError(f"access file {path} has no !signing-key line; make one with `aiokv access add <account>`")
    return signing_key, accounts


class AccessFile:
    """The accounts of an access file, which is read again when it changes.

    Args:
        path: The file.
        clock: Returns the present as seconds since the epoch; None takes `aiokv.clock.now`, looked up at each use.

    Raises:
        ConfigurationError: The file is absent or malformed, or the package that signs tokens is not installed.
    """

    def __init__(self, path: str | Path, clock: Clock | None = None) -> None:
        self._path = Path(path)
        self._clock = clock
        self._jwt = _import_jwt()
        self._stamp = self._read_stamp()
        self._signing_key, self._accounts = _parse(self._path)
        if self._path.stat().st_mode & 0o077:
            logger.warning("access file %s can be read by others, who could sign tokens with it; chmod 600 it", self._path)
        self._next_check = process_clock.monotonic() + _RELOAD_INTERVAL_SECONDS
        # The tokens whose signature was checked, each with its account and the time at which it expires.
        self._known_tokens: dict[str, tuple[str, float]] = {}

    def issue_token(self, authorization: str) -> IssuedToken | None:
        """Exchange a key for a token.

        Args:
            authorization: The Authorization header, `Key <account>:<secret>`.

        Returns:
            The token, or None where the key is wrong.
        """
        found = self._find_key(authorization)
        if found is None:
            return None
        account, key_hash = found
        expires_at = int(self._now()) + TOKEN_LIFETIME_SECONDS
        claims = {"sub": account, "key": key_hash[:_FINGERPRINT_CHARS], "exp": expires_at}
        token: str = self._jwt.encode(claims, self._signing_key, algorithm="HS256")
        return IssuedToken(token, datetime.fromtimestamp(expires_at, UTC))

    def account_of_token(self, authorization: str) -> str | None:
        """Return the account of a token.

        Args:
            authorization: The Authorization header, `Bearer <token>`.

        Returns:
            The account, or None where the token is forged or expired, or its key was revoked.
        """
        self._reload_if_changed()
        known = self._known_tokens.get(authorization)
        if known is None:
            known = self._verify(authorization)
            if known is None:
                return None
            if len(self._known_tokens) >= _MAX_KNOWN_TOKENS:
                self._known_tokens.clear()
            self._known_tokens[authorization] = known
        account, expires_at = known
        return account if self._now() < expires_at else None

    def _now(self) -> float:
        return process_clock.now() if self._clock is None else self._clock()

    def _verify(self, authorization: str) -> tuple[str, float] | None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.isascii():
            return None
        try:
            claims = self._jwt.decode(
                token,
                self._signing_key,
                algorithms=["HS256"],
                # `account_of_token` checks the expiry at each call, by our own clock.
                options={"require": ["sub", "key", "exp"], "verify_exp": False},
            )
        except self._jwt.InvalidTokenError:
            return None
        account, fingerprint, expires_at = claims["sub"], claims["key"], claims["exp"]
        hashes = self._accounts.get(account, ())
        if not any(key_hash[:_FINGERPRINT_CHARS] == fingerprint for key_hash in hashes):
            return None
        return account, float(expires_at)

    def _find_key(self, authorization: str) -> tuple[str, str] | None:
        self._reload_if_changed()
        scheme, _, key = authorization.partition(" ")
        account, _, secret = key.partition(":")
        offered = _hash(secret)
        hashes = self._accounts.get(account, ())
        # Compare every hash, and one for an unknown account too, so that the time taken reveals nothing.
        matches = [hmac.compare_digest(offered, key_hash) for key_hash in hashes or (_NO_HASH,)]
        if scheme.lower() != "key" or not hashes or not any(matches):
            return None
        return account, offered

    def _reload_if_changed(self) -> None:
        now = process_clock.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + _RELOAD_INTERVAL_SECONDS
        stamp = self._read_stamp()
        if stamp == self._stamp:
            return
        try:
            signing_key, accounts = _parse(self._path)
        except ConfigurationError as error:
            # The file may be half edited: its last good version stays in force.
            logger.error("access file not reloaded: %s", error)  # noqa: TRY400 (the message says all)
            return
        self._stamp, self._signing_key, self._accounts = stamp, signing_key, accounts
        self._known_tokens.clear()

    def _read_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _import_jwt() -> "ModuleType":
    try:
        import jwt  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ConfigurationError("an access file needs the package that signs tokens: pip install 'aiokv[server]'") from error
    return jwt
