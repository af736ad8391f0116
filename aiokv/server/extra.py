"""What the server needs beside the base package."""

from importlib.util import find_spec

from aiokv.errors import ConfigurationError

_PACKAGES = ("httptools", "jwt", "prometheus_client")


def require_extra(what: str) -> None:
    """Check that the extra `server` is installed.

    Args:
        what: What needs it, such as `aiokv serve`.

    Raises:
        ConfigurationError: A package of it is missing; the message has the command that adds it.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"{what} needs packages that are not installed ({', '.join(missing)}): pip install 'aiokv[server]'"
        )
