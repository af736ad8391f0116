"""Credentials, found by themselves, exchanged for a short-lived token that is renewed ahead of its expiry.

Source: the order in which credentials are looked for and the exchange are those of the official client, fal-ai/fal
`projects/fal/src/fal/auth/__init__.py`, `config.py`, `flags.py` and `toolkit/file/providers/fal.py`.
"""

import asyncio
import copy
import importlib.util
import logging
import os
import sys
import time
import tomllib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import orjson
from yarl import URL

from aiokv.backends.http.options import Credentials, check_key_form
from aiokv.backends.http.transport import Answer
from aiokv.errors import (
    AioKVError,
    CallError,
    CallTimeoutError,
    ConfigurationError,
    CredentialsError,
    ResponseError,
    StoreClosedError,
)
from aiokv.wire import TOKEN_PATH, is_loopback, parse_http_date

logger = logging.getLogger("aiokv")

FAL_DOMAINS = ("fal.media", "fal.ai", "fal.run")
DEFAULT_FAL_REST_HOST = "rest.alpha.fal.ai"

_MAX_RENEWAL_MARGIN_SECONDS = 3600.0
_BACKGROUND_RETRY_SECONDS = 10.0
_ASSUMED_LIFETIME_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class KeyCredentials:
    """A key of the form `<id>:<secret>`.

    Args:
        key: The key; never shown by `repr`.
        source: Where it came from, for messages.

    Raises:
        CredentialsError: It is not of that form.
    """

    key: str = field(repr=False)
    source: str = "credentials"

    def __post_init__(self) -> None:
        check_key_form(self.key, self.source)

    async def authorization(self) -> str:
        """Give the header; see `Credentials.authorization`."""
        return f"Key {self.key}"


@dataclass(frozen=True, slots=True)
class FalCredentials:
    """fal's credentials, looked for at each exchange in the order of the official client."""

    async def authorization(self) -> str:
        """Give the header; see `Credentials.authorization`."""
        key = find_fal_key()
        if key is not None:
            return await key.authorization()
        # fal owns the login's token file and its lock; it reads files and calls its authority, so not in this thread.
        return await asyncio.to_thread(_fal_login)


def find_fal_key() -> KeyCredentials | None:
    """Look for a fal key: environment, profile, Colab, in the official client's order.

    Returns:
        The first that is found, or None where there is none or `FAL_FORCE_AUTH_BY_USER=1` asks for the login.

    Raises:
        CredentialsError: What was found first is no key, or the configuration file cannot be read.
    """
    if os.environ.get("FAL_FORCE_AUTH_BY_USER") == "1":
        return None
    if key := os.environ.get("FAL_KEY"):
        return KeyCredentials(key.strip(), "FAL_KEY")
    path = _fal_config_path()
    if key := _fal_profile_key(path):
        return KeyCredentials(key.strip(), f"the key of the active profile in {path}")
    if key := _colab_key():
        return KeyCredentials(key.strip(), "FAL_KEY of Google Colab's user data")
    if "FAL_KEY_ID" in os.environ and "FAL_KEY_SECRET" in os.environ:
        key = f"{os.environ['FAL_KEY_ID'].strip()}:{os.environ['FAL_KEY_SECRET'].strip()}"
        return KeyCredentials(key, "FAL_KEY_ID with FAL_KEY_SECRET")
    return None


def _fal_config_path() -> str:
    # Not Path.expanduser, which raises for a user that does not exist.
    return os.path.expanduser(os.environ.get("FAL_CONFIG_PATH", "~/.fal/config.toml"))  # noqa: PTH111


def _fal_profile_key(path: str) -> str | None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (an empty path is no file, and no folder either)
            config = tomllib.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        # Not chained: the parser's error may quote the file.
        reason = type(error).__name__
    else:
        internal = config.get("__internal__")
        chosen = os.environ.get("FAL_PROFILE") or (internal.get("profile") if isinstance(internal, dict) else None)
        profile = config.get(chosen) if isinstance(chosen, str) else None
        key = profile.get("key") if isinstance(profile, dict) else None
        return key if isinstance(key, str) and key else None
    raise CredentialsError(f"{path} cannot be read as TOML ({reason}); mend it, or set FAL_KEY='<id>:<secret>'")


def _colab_key() -> str | None:
    if "google.colab" not in sys.modules:
        return None
    try:
        from google.colab import userdata  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: PLC0415

        key = userdata.get("FAL_KEY")
    except Exception:  # noqa: BLE001 (Colab raises errors of its own where the user refuses or has no such entry)
        return None
    return key if isinstance(key, str) else None


def _fal_login() -> str:
    if importlib.util.find_spec("fal") is None:
        raise CredentialsError(_nothing_found("the login of `fal auth login`: needs the package fal (pip install fal)"))
    try:
        from fal.auth import fetch_auth_credentials  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415

        header: str = fetch_auth_credentials().header_value
    except Exception as error:  # noqa: BLE001 (whatever fal raises; not chained, since its text is not ours to vouch for)
        reason = type(error).__name__
    else:
        return header
    raise CredentialsError(_nothing_found(f"the login of `fal auth login`: {reason}"))


def _nothing_found(login: str) -> str:
    looked = [
        "the environment's FAL_KEY",
        f"the key of the active profile in {_fal_config_path()}",
        "FAL_KEY of Google Colab's user data",
        "the environment's FAL_KEY_ID with FAL_KEY_SECRET",
    ]
    if os.environ.get("FAL_FORCE_AUTH_BY_USER") == "1":
        looked = ["no key, since FAL_FORCE_AUTH_BY_USER=1 rules keys out"]
    lines = "".join(f"\n  - {place}" for place in [*looked, login])
    return (
        f"no credentials for fal's service were found. Looked for:{lines}\n"
        "Set FAL_KEY='<id>:<secret>', run `fal auth login`, or pass credentials='<id>:<secret>'. "
        "To go on without fal, set AIOKV_URL=sqlite:///kv.db (a file) or AIOKV_URL=memory://."
    )


def is_fal_host(host: str | None) -> bool:
    """Say whether a host belongs to fal.

    Args:
        host: A host name.

    Returns:
        True for fal's own domains and what stands below them.
    """
    # A name may end with the root's dot.
    host = (host or "").removesuffix(".")
    return any(host == domain or host.endswith(f".{domain}") for domain in FAL_DOMAINS)


def choose_credentials(url: URL, given: "str | Credentials | None") -> Credentials | None:
    """Decide what credentials a host is to see.

    Args:
        url: The store's address.
        given: What the program passed: `"<id>:<secret>"`, an object with `authorization`, or None.

    Returns:
        The given ones; else fal's own for fal's hosts and `AIOKV_KEY` for any other; None where there are none.

    Raises:
        CredentialsError: They are malformed, or would travel over plain HTTP to another machine.
    """
    chosen: Credentials | None
    if isinstance(given, str):
        chosen = KeyCredentials(given.strip())
    elif given is not None:
        chosen = given
    elif is_fal_host(url.host):
        chosen = FalCredentials()
    else:
        key = os.environ.get("AIOKV_KEY")
        chosen = KeyCredentials(key.strip(), "AIOKV_KEY") if key else None
    if chosen is not None and url.scheme != "https" and not is_loopback(url.host):
        raise CredentialsError(
            f"credentials must not travel over plain HTTP to {url.host}: use an https:// URL, "
            "a loopback address, or no credentials (unset AIOKV_KEY)"
        )
    return chosen


def token_url(url: URL) -> URL:
    """Give the address where a store's credentials are exchanged.

    Args:
        url: The store's address.

    Returns:
        fal's REST host for fal's stores, else the store's own token endpoint.

    Raises:
        ConfigurationError: `FAL_HOST` is set and does not begin with `api`.
    """
    if not is_fal_host(url.host):
        return URL(str(url).rstrip("/") + TOKEN_PATH, encoded=True)
    rest_host = os.environ.get("FAL_REST_HOST")
    if not rest_host:
        host = os.environ.get("FAL_HOST")
        if host and not host.startswith("api"):
            raise ConfigurationError("FAL_HOST must begin with 'api'; set FAL_REST_HOST to name another host")
        rest_host = host.replace("api", "rest", 1) if host else DEFAULT_FAL_REST_HOST
    return URL(f"https://{rest_host}{TOKEN_PATH}?storage_type=fal-cdn-v3", encoded=True)


@dataclass(frozen=True, slots=True)
class Token:
    """A short-lived token.

    Args:
        header: The Authorization header of the calls; never shown by `repr`.
        lifetime_seconds: How long it had to live when it was received.
    """

    header: str = field(repr=False)
    lifetime_seconds: float


def parse_token(answer: Answer) -> Token:
    """Read a token endpoint's answer.

    Args:
        answer: Its 200.

    Returns:
        The token; its life is measured on the server's own clock where the answer bears a Date.

    Raises:
        ResponseError: The answer is not what PROTOCOL says of a token.
    """
    try:
        body = orjson.loads(answer.body)
        token_type, token = body["token_type"], body["token"]
        header = f"{token_type} {token}"
        expires_at = datetime.fromisoformat(body["expires_at"])
        usable = isinstance(token_type, str) and isinstance(token, str) and token_type and token
        if not (usable and header.isascii() and header.isprintable()) or expires_at.tzinfo is None:
            raise ValueError  # noqa: TRY301 (one reason for all that a token can lack)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        # Not chained: the cause may hold the token.
        header, expires_at = "", datetime.now(UTC)
    if not header:
        raise ResponseError("the token endpoint's answer has no usable token, token_type and expires_at (ISO 8601, zone)")
    return Token(header, (expires_at - _server_time(answer)).total_seconds())


def _server_time(answer: Answer) -> datetime:
    return parse_http_date(answer.headers.get("Date", "")) or datetime.now(UTC)


Exchange = Callable[[], Awaitable[Token]]


class TokenSource:
    """Hold one token for all calls of a session, and renew it: once for all that wait, and ahead of its expiry.

    A token is renewed in the background once less than a fifth of its life, at most an hour, is left.

    Args:
        clock: Gives a monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._header: str | None = None
        self._expires_at = 0.0
        self._renew_at = float("-inf")
        self._flight: asyncio.Task[None] | None = None

    def current(self, exchange: Exchange) -> str | None:
        """Give the header for a call now, and begin a renewal in the background where it is due.

        Args:
            exchange: Fetches a token, with whatever retries it wants.

        Returns:
            The header, or None where there is no token that is alive.
        """
        now = self._clock()
        if now < self._renew_at:
            return self._header
        if self._header is None or now >= self._expires_at:
            return None
        self._join_flight(exchange)
        return self._header

    async def renewed(self, exchange: Exchange, refused: str | None = None) -> str:
        """Wait for a token.

        Args:
            exchange: Fetches it, with whatever retries it wants.
            refused: The header that the service has just refused, or None where there was none to send.

        Returns:
            The header of a living token other than `refused`, or of the one that the exchange gave anew.

        Raises:
            CallError: The exchange failed.
            CredentialsError: There are no credentials to exchange.
        """
        header = self.current(exchange)
        if header is not None and header != refused:
            return header
        joined = self._flight is not None and not self._flight.done()
        flight = self._join_flight(exchange)
        try:
            # Shielded: a caller that is cancelled leaves the renewal to the others.
            await asyncio.shield(flight)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not flight.cancelled() or (task is not None and task.cancelling()):
                raise
            raise StoreClosedError("the store was closed while its token was fetched") from None
        except CallError as error:
            if joined and isinstance(error, CallTimeoutError):
                # The time that ran out was of whoever began it, perhaps long ago; this call has its own.
                return await self.renewed(exchange, refused)
            # Each waiting call fills in its own facts.
            raise copy.copy(error) from error
        if self._header is None:
            raise ResponseError("the token endpoint gave no token")
        return self._header

    async def aclose(self) -> None:
        """Cancel a renewal that is under way."""
        if self._flight is not None and not self._flight.done():
            self._flight.cancel()
            await asyncio.wait([self._flight])

    def _join_flight(self, exchange: Exchange) -> "asyncio.Task[None]":
        if self._flight is None or self._flight.done():
            self._flight = asyncio.create_task(self._renew(exchange), name="aiokv token renewal")
            self._flight.add_done_callback(_retrieve)
        return self._flight

    async def _renew(self, exchange: Exchange) -> None:
        try:
            token = await exchange()
        except Exception as error:
            # While the old token lives, calls go on with it, and the next try waits a little.
            self._renew_at = min(self._clock() + _BACKGROUND_RETRY_SECONDS, self._expires_at)
            if self._clock() < self._expires_at:
                # Nobody may be waiting for it, so nobody else would say so.
                reason = error if isinstance(error, AioKVError) else type(error).__name__
                logger.warning("token renewal failed, the old token goes on: %s", reason)
            raise
        # A token that is dead on arrival means that clocks disagree: it is used until it is refused.
        lifetime = token.lifetime_seconds if token.lifetime_seconds > 0 else _ASSUMED_LIFETIME_SECONDS
        now = self._clock()
        self._header = token.header
        self._expires_at = now + lifetime
        self._renew_at = self._expires_at - min(lifetime / 5, _MAX_RENEWAL_MARGIN_SECONDS)
        logger.debug("a token for %.0f s", lifetime)


def _retrieve(flight: "asyncio.Task[None]") -> None:
    # A renewal that nobody waited for must not be reported as an exception never retrieved.
    if not flight.cancelled():
        flight.exception()
