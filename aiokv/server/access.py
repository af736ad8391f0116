"""Accounts of the server: keys in an access file, exchanged for short-lived signed tokens, and what each key may do.

Whatever the file says holds within a second, for tokens already issued, too: a token names its key, and what the key may do
is looked up in the file.
"""

import base64
import hmac
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aiokv import clock as process_clock
from aiokv.backends.base import Clock
from aiokv.errors import ConfigurationError, truncated
from aiokv.server.access_file import read_access_file
from aiokv.server.access_text import LIMIT_NAMES, AccessText, Key, hash_of
from aiokv.server.quotas import AccountLimits
from aiokv.server.wrong_keys import WrongKeys

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger("aiokv.server")

TOKEN_LIFETIME_SECONDS = 7_200
"""Two hours: the official client asks for a new token as soon as less than one hour is left."""

_RELOAD_INTERVAL_SECONDS = 1.0
_GRACE_SECONDS = 60.0
_MAX_KNOWN_TOKENS = 10_000
_FINGERPRINT_CHARS = 16
_NO_HASH = "0" * 64
_NO_LIMITS = AccountLimits()


class IssuedToken(NamedTuple):
    """A signed token, the time at which it expires, and the account that it is for."""

    token: str
    expires_at: datetime
    account: str


class Permit(NamedTuple):
    """What a request may do.

    Args:
        account: The account that it acts for.
        read_only: Whether it may only read.
        db_patterns: The namespaces that it may use, `*` standing for any text; None for all of the account's.
    """

    account: str
    read_only: bool = False
    db_patterns: tuple[str, ...] | None = None

    def allows(self, verb: str, db_name: str) -> str | None:
        """Check a call.

        Args:
            verb: `get`, `set`, `delete` or `claim`.
            db_name: The namespace, as the client names it.

        Returns:
            None where the call is allowed, else why it is not, for the answer with status 403.
        """
        if self.read_only and verb != "get":
            return f"this key is read-only: it may get, and not {verb}"
        patterns = self.db_patterns
        # A pattern matches its own text, too, so the names that are given in full need no comparison of patterns.
        if patterns is None or db_name in patterns or any(_matches(pattern, db_name) for pattern in patterns):
            return None
        return f"this key may not use db {truncated(db_name)}, only {truncated(', '.join(patterns))}"


class AccessFile:
    """The accounts of an access file, which is read again when it changes.

    Args:
        path: The file.
        clock: Returns the present as seconds since the epoch; None takes `aiokv.clock.now`, looked up at each use.
        default_limits: The limits of accounts where the file gives none.

    Raises:
        ConfigurationError: The file is absent or malformed, or the package that signs tokens is not installed.
    """

    def __init__(self, path: str | Path, clock: Clock | None = None, *, default_limits: AccountLimits = _NO_LIMITS) -> None:
        self._path = Path(path)
        self._clock = clock
        self._default_limits = default_limits
        self._jwt = _import_jwt()
        self._wrong_keys = WrongKeys()
        # The tokens whose signature was checked, each with its permit and the time at which it expires.
        self._known_tokens: dict[str, tuple[Permit, float]] = {}
        self._signing_key = b""
        self._keys: Mapping[str, tuple[Key, ...]] = {}
        self._limits: Mapping[str, AccountLimits] = {}
        self._next_check = process_clock.monotonic() + _RELOAD_INTERVAL_SECONDS
        self._failing_since: float | None = None
        self._next_failure_line = 0.0
        self._stamp = self._read_stamp()
        # Two writes in one tick of the file system's clock leave one stamp: a new stamp is trusted after a second look.
        self._is_settled = False
        self._take(read_access_file(self._path))
        self._warn_where_open_to_others()

    @property
    def wrong_keys(self) -> int:
        """How many wrong keys were offered since the start."""
        return self._wrong_keys.count

    def issue_token(self, authorization: str, address: str = "") -> IssuedToken | None:
        """Exchange a key for a token; count, and log now and then, where the key is wrong.

        Args:
            authorization: The Authorization header, `Key <account>:<secret>`.
            address: The address of the caller.

        Returns:
            The token, or None where the key is wrong: then let the caller wait for `delay_of` its address.
        """
        self._reload_if_changed()
        scheme, _, credentials = authorization.partition(" ")
        if scheme.lower() != "key":
            return None
        key = self._find_key(credentials, address)
        if key is None:
            return None
        expires_at = int(self._now()) + TOKEN_LIFETIME_SECONDS
        claims = {"sub": key.account, "key": key.key_hash[:_FINGERPRINT_CHARS], "exp": expires_at}
        token: str = self._jwt.encode(claims, self._signing_key, algorithm="HS256")
        return IssuedToken(token, datetime.fromtimestamp(expires_at, UTC), key.account)

    def permit_of_token(self, authorization: str) -> Permit | None:
        """Return what the bearer of a token may do now.

        Args:
            authorization: The Authorization header, `Bearer <token>`.

        Returns:
            The permit, or None where the token is forged or expired, or its key was revoked.
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
        permit, expires_at = known
        return permit if self._now() < expires_at else None

    def is_operator(self, authorization: str, address: str = "") -> bool:
        """Check whether a caller may read `/metrics` and `/status`; a wrong key counts as in `issue_token`.

        Args:
            authorization: The Authorization header, `Key <account>:<secret>` or `Basic <base64 of that>`.
            address: The address of the caller.

        Returns:
            True where it bears a key with the flag `operator`.
        """
        self._reload_if_changed()
        scheme, _, credentials = authorization.partition(" ")
        if scheme.lower() == "basic":
            credentials = _decode_basic(credentials)
        elif scheme.lower() != "key":
            return False
        key = self._find_key(credentials, address)
        return key is not None and key.operator

    def delay_of(self, address: str) -> float:
        """Return how long the answer to a wrong key should wait.

        Args:
            address: The address of the caller.

        Returns:
            0.1 seconds after the first wrong key of the address, doubling up to 5 seconds; 0.0 ten minutes after the last.
        """
        return self._wrong_keys.delay_of(address)

    def limits_of(self, account: str) -> AccountLimits:
        """Return the limits of an account: those of the file, and the defaults where it has none.

        Args:
            account: The account.

        Returns:
            The limits.
        """
        return self._limits.get(account, self._default_limits)

    def has_stored_quotas(self) -> bool:
        """Return whether an account has a limit of what it stores."""
        return any(
            limits.max_stored_bytes is not None or limits.max_stored_entries is not None
            for limits in (self._default_limits, *self._limits.values())
        )

    def reload(self) -> None:
        """Read the file now, and log where it cannot be used; without this it is looked at once a second, while calls come."""
        self._next_check = self._next_failure_line = 0.0
        self._is_settled = False
        self._reload_if_changed()

    def health(self) -> str | None:
        """Check whether the file can be used; its last good version stays in force.

        Returns:
            None, or the reason once the file has been unreadable or malformed for a minute.
        """
        self._reload_if_changed()
        if self._failing_since is None or process_clock.monotonic() - self._failing_since < _GRACE_SECONDS:
            return None
        return "the access file is unreadable or malformed; its last good version is in force, and the log says more"

    def _now(self) -> float:
        return process_clock.now() if self._clock is None else self._clock()

    def _verify(self, authorization: str) -> tuple[Permit, float] | None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.isascii():
            return None
        try:
            claims = self._jwt.decode(
                token,
                self._signing_key,
                algorithms=["HS256"],
                # `permit_of_token` checks the expiry at each call, by our own clock.
                options={"require": ["sub", "key", "exp"], "verify_exp": False},
            )
        except self._jwt.InvalidTokenError:
            return None
        account, fingerprint, expires_at = claims["sub"], claims["key"], claims["exp"]
        for key in self._keys.get(account, ()):
            if key.key_hash[:_FINGERPRINT_CHARS] == fingerprint:
                return Permit(account, key.read_only, key.db_patterns), float(expires_at)
        return None

    def _find_key(self, credentials: str, address: str) -> Key | None:
        account, _, secret = credentials.partition(":")
        offered = hash_of(secret)
        keys = self._keys.get(account, ())
        # Compare every hash, and one for an unknown account too, so that the time taken reveals nothing.
        matches = [hmac.compare_digest(offered, key_hash) for key_hash in [key.key_hash for key in keys] or [_NO_HASH]]
        if keys and any(matches):
            return keys[matches.index(True)]
        self._wrong_keys.add(account if keys else None, address)
        return None

    def _reload_if_changed(self) -> None:
        now = process_clock.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + _RELOAD_INTERVAL_SECONDS
        stamp = self._read_stamp()
        is_same = stamp == self._stamp
        if is_same and self._is_settled:
            return
        try:
            text = read_access_file(self._path)
        except ConfigurationError as error:
            # The file may be half edited: its last good version stays in force.
            self._note_failure(error, now)
            return
        self._failing_since = None
        self._stamp, self._is_settled = stamp, is_same
        self._take(text)
        if not is_same:
            self._warn_where_open_to_others()

    def _note_failure(self, error: ConfigurationError, now: float) -> None:
        # The same file may come back: it is read again before it counts as usable.
        self._is_settled = False
        if self._failing_since is None:
            self._failing_since, self._next_failure_line = now, 0.0
        if now >= self._next_failure_line:
            self._next_failure_line = now + _GRACE_SECONDS
            logger.error("access file not reloaded: %s", error)

    def _take(self, text: AccessText) -> None:
        self._signing_key = text.signing_key
        self._keys = text.keys()
        self._limits = {
            account: self._default_limits._replace(**{LIMIT_NAMES[name]: value for name, value in limits.given.items()})
            for account, limits in text.limits().items()
        }
        self._known_tokens.clear()

    def _warn_where_open_to_others(self) -> None:
        if self._stamp is not None and self._stamp[-1] & 0o077:
            logger.warning("access file %s can be read by others, who could sign tokens with it; chmod 600 it", self._path)

    def _read_stamp(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev, status.st_mode


def _matches(pattern: str, name: str) -> bool:
    """Compare a name with a pattern in which `*` is any text; in time linear in both, for any pattern."""
    first, *others = pattern.split("*")
    if not others:
        return name == pattern
    *middles, last = others
    if len(name) < len(first) + len(last) or not (name.startswith(first) and name.endswith(last)):
        return False
    place, end = len(first), len(name) - len(last)
    for middle in middles:
        found = name.find(middle, place, end)
        if found < 0:
            return False
        place = found + len(middle)
    return True


def _decode_basic(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode("utf-8", "surrogateescape")
    except ValueError:
        return ""


def _import_jwt() -> "ModuleType":
    try:
        import jwt  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ConfigurationError("an access file needs the package that signs tokens: pip install 'aiokv[server]'") from error
    return jwt
