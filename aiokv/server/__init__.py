"""The server, for programs that run their own: the wire protocol over any backend."""

from aiokv.server.access import AccessFile, add_key
from aiokv.server.app import Service
from aiokv.server.serve import running_server

__all__ = ["AccessFile", "Service", "add_key", "running_server"]
