"""For a while: call cached functions as if they were not, or compute everything anew."""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Literal

Mode = Literal["use", "bypass", "refresh"]

cache_mode: ContextVar[Mode] = ContextVar("aiokv_cache_mode", default="use")


@contextlib.contextmanager
def cache_bypass() -> Generator[None]:
    """Call cached functions as if they were not: nothing is read, nothing is stored, in this context and its tasks."""
    token = cache_mode.set("bypass")
    try:
        yield
    finally:
        cache_mode.reset(token)


@contextlib.contextmanager
def cache_refresh() -> Generator[None]:
    """Compute anew whatever cached functions are called in this context, and store it for everybody."""
    token = cache_mode.set("refresh")
    try:
        yield
    finally:
        cache_mode.reset(token)
