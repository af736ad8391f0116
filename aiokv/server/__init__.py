"""The server, for programs that run their own: the wire protocol over any backend."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiokv.server.access import AccessFile
    from aiokv.server.access_file import add_key
    from aiokv.server.options import ServerOptions
    from aiokv.server.quotas import AccountLimits
    from aiokv.server.serve import running_server

_HOMES = {
    "AccessFile": "access",
    "AccountLimits": "quotas",
    "ServerOptions": "options",
    "add_key": "access_file",
    "running_server": "serve",
}
__all__ = ["AccessFile", "AccountLimits", "ServerOptions", "add_key", "running_server"]


if not TYPE_CHECKING:
    # `aiokv serve --help` needs none of these, and what they need is an extra.
    def __getattr__(name: str) -> object:
        if name in _HOMES:
            from importlib import import_module  # noqa: PLC0415

            if name == "running_server":
                from aiokv.server.extra import require_extra  # noqa: PLC0415

                require_extra("aiokv.server.running_server")
            return globals().setdefault(name, getattr(import_module(f"aiokv.server.{_HOMES[name]}"), name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
