"""Credentials: where they are found, which host may see them, and where they are exchanged.

Source: the order of the search and the token endpoint are those of the official client, fal-ai/fal
`projects/fal/src/fal/auth/__init__.py`, `config.py`, `flags.py` and `toolkit/file/providers/fal.py`.
"""

import asyncio
import functools
import importlib.util
import os
import sys
import tomllib
from dataclasses import dataclass, field
from typing import NamedTuple

from yarl import URL

from aiokv.backends.http.options import Credentials, check_key_form
from aiokv.errors import ConfigurationError, CredentialsError
from aiokv.wire import TOKEN_PATH, is_loopback

FAL_DOMAINS = ("fal.media", "fal.ai")
# Below these are the apps of fal's customers, who must not see each other's credentials.
TENANT_DOMAINS = ("fal.run", "gateway.alpha.fal.ai")
DEFAULT_FAL_GRPC_HOST = "api.alpha.fal.ai"
FAL_LOGIN = "the login of `fal auth login`"


@dataclass(frozen=True, slots=True)
class KeyCredentials:
    """A key of the form `<id>:<secret>`.

    Args:
        key: The key; `repr` does not show it.
        source: Where it was found, for messages.

    Raises:
        CredentialsError: It is not of that form.
    """

    key: str = field(repr=False)
    source: str = "the argument credentials"

    def __post_init__(self) -> None:
        check_key_form(self.key, self.source)

    async def authorization(self) -> str:
        """Return the header; see `Credentials.authorization`."""
        return f"Key {self.key}"


@dataclass(frozen=True, slots=True)
class FalCredentials:
    """fal's credentials, looked for at each exchange in the order of the official client."""

    async def authorization(self) -> str:
        """Return the header; see `Credentials.authorization`."""
        return (await find_authorization(self)).header


class Authorization(NamedTuple):
    """An Authorization header for the token endpoint, and where it was found."""

    header: str
    source: str


async def find_authorization(credentials: Credentials) -> Authorization:
    """Fetch the header that is exchanged for a token.

    Args:
        credentials: The credentials that a host may see.

    Returns:
        The header, with its source for messages.

    Raises:
        CredentialsError: There is none.
    """
    if isinstance(credentials, FalCredentials):
        key = find_fal_key()
        if key is None:
            # fal owns the login's token file and its lock. It reads files and calls its authority, so not in this thread.
            return Authorization(await asyncio.to_thread(_fal_login), FAL_LOGIN)
        credentials = key
    source = (
        credentials.source if isinstance(credentials, KeyCredentials) else f"an object of type {type(credentials).__name__}"
    )
    return Authorization(await credentials.authorization(), source)


def find_fal_key() -> KeyCredentials | None:
    """Look for a fal key: environment, profile, Colab, in the official client's order.

    Returns:
        The first one, or None where there is none or `FAL_FORCE_AUTH_BY_USER=1` asks for the login.

    Raises:
        CredentialsError: The first one is no key, or the configuration file cannot be read.
    """
    if os.environ.get("FAL_FORCE_AUTH_BY_USER") == "1":
        return None
    if key := os.environ.get("FAL_KEY"):
        return KeyCredentials(key.strip(), "FAL_KEY")
    path = _fal_config_path()
    if key := _fal_profile_text(path, "key"):
        return KeyCredentials(key.strip(), f"the key of the active profile in {path}")
    if key := _colab_key():
        return KeyCredentials(key.strip(), "FAL_KEY of Google Colab's user data")
    if "FAL_KEY_ID" in os.environ and "FAL_KEY_SECRET" in os.environ:
        key = f"{os.environ['FAL_KEY_ID'].strip()}:{os.environ['FAL_KEY_SECRET'].strip()}"
        return KeyCredentials(key, "FAL_KEY_ID with FAL_KEY_SECRET")
    return None


def _fal_config_path() -> str:
    # Path.expanduser would raise for a user that does not exist.
    return os.path.expanduser(os.environ.get("FAL_CONFIG_PATH", "~/.fal/config.toml"))  # noqa: PTH111


def _fal_profile_text(path: str, name: str) -> str | None:
    """Return a setting of the active profile; None where it is no text, or empty."""
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
        text = profile.get(name) if isinstance(profile, dict) else None
        return text if isinstance(text, str) and text else None
    raise CredentialsError(
        f"{path} cannot be read as TOML ({reason}); repair it, or set FAL_KEY='<id>:<secret>' and FAL_REST_HOST"
    )


def _colab_key() -> str | None:
    return _ask_colab() if "google.colab" in sys.modules else None


@functools.cache
def _ask_colab() -> str | None:
    # Once in a process: Colab may ask the user each time.
    try:
        from google.colab import userdata  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: PLC0415

        key = userdata.get("FAL_KEY")
    except Exception:  # noqa: BLE001 (Colab raises errors of its own where the user refuses or has no such entry)
        return None
    return key if isinstance(key, str) else None


def _fal_login() -> str:
    if importlib.util.find_spec("fal") is None:
        raise CredentialsError(_nothing_found(f"{FAL_LOGIN}: needs the package fal (pip install fal)"))
    try:
        from fal.auth import fetch_auth_credentials  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415

        header: str = fetch_auth_credentials().header_value
    except Exception as error:  # noqa: BLE001 (fal's own; not chained, since its text may hold a secret)
        reason = type(error).__name__
    else:
        return header
    raise CredentialsError(_nothing_found(f"{FAL_LOGIN}: {reason}"))


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
    """Return whether a host is fal's own.

    Args:
        host: A host name.

    Returns:
        True for fal's domains and every name below them, except those where its customers' apps run.
    """
    # A host name may end with the dot of the root.
    host = (host or "").removesuffix(".")
    return _is_in(host, FAL_DOMAINS) and not _is_in(host, TENANT_DOMAINS)


def _is_in(host: str, domains: tuple[str, ...]) -> bool:
    return any(host == domain or host.endswith(f".{domain}") for domain in domains)


def choose_credentials(url: URL, given: "str | Credentials | None") -> Credentials | None:
    """Choose the credentials that a host may see.

    Args:
        url: The store's address.
        given: The program's own: `"<id>:<secret>"`, an object with `authorization`, or None.

    Returns:
        The program's own; else fal's for fal's hosts and `AIOKV_KEY` for any other; None where there are none.

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
    """Return the address where a store's credentials are exchanged.

    Args:
        url: The store's address.

    Returns:
        fal's REST host for fal's stores, else the store's own token endpoint.

    Raises:
        ConfigurationError: `FAL_HOST` or the `host` of fal's active profile does not begin with `api`, or fal's configuration
            file cannot be read.
    """
    if not is_fal_host(url.host):
        return URL(str(url).rstrip("/") + TOKEN_PATH, encoded=True)
    rest_host = os.environ.get("FAL_REST_HOST") or _rest_host_of(_fal_grpc_host())
    return URL(f"https://{rest_host}{TOKEN_PATH}?storage_type=fal-cdn-v3", encoded=True)


def _fal_grpc_host() -> str:
    if host := os.environ.get("FAL_GRPC_HOST"):
        return host
    path = _fal_config_path()
    if host := os.environ.get("FAL_HOST"):
        source = "FAL_HOST"
    else:
        host, source = _fal_profile_text(path, "host"), f"the host of the active profile in {path}"
    if host and not host.startswith("api"):
        raise ConfigurationError(f"{source} must begin with 'api'; set FAL_REST_HOST to name another host for tokens")
    return host or DEFAULT_FAL_GRPC_HOST


def _rest_host_of(host: str) -> str:
    return host.replace("api", "rest", 1) if host.startswith("api") else host
