"""`Target`: which values a store means, as one hashable object."""

import os
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, final, overload

# Of this process alone: a digest cannot be compared with one from elsewhere, nor guessed from a list of keys.
_DIGEST_KEY: Final = os.urandom(32)


@final
class Target:
    """The values that a store means: where they live, in which namespace, seen with which credentials.

    Two targets are equal where their stores read and write the same values with the same credentials. A target keeps no
    secret: of a text it keeps a digest that only this process can make.

    Args:
        url: The canonical URL; for a backend object, any text that describes it.
        db_name: The namespace.
        credentials: A text, an object that counts by its identity, or None for those of the environment.
        backend: The backend object that stands in place of the URL and counts by its identity, or None.
    """

    __slots__ = ("_hash", "connection", "db_name", "url")

    url: str
    """The canonical URL: all ways to write one address give one text."""
    db_name: str
    """The namespace."""
    connection: tuple[object, ...]
    """The target without its namespace, hashable: stores of one loop with equal ones can share a backend."""

    def __init__(self, url: str, db_name: str, credentials: object = None, backend: object = None) -> None:
        connection = (
            url,
            _digest(credentials) if isinstance(credentials, str) else _by_identity(credentials),
            _by_identity(backend),
        )
        for name, value in (("url", url), ("db_name", db_name), ("connection", connection)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_hash", hash((db_name, connection)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Target):
            return NotImplemented
        return self is other or (self.db_name == other.db_name and self.connection == other.connection)

    def __hash__(self) -> int:
        return self._hash  # type: ignore[no-any-return,attr-defined]

    def __repr__(self) -> str:
        credentials = "" if self.connection[1] is None else ", credentials='***'"
        return f"Target({self.url!r}, db_name={self.db_name!r}{credentials})"

    def __setattr__(self, name: str, _: object) -> NoReturn:
        raise AttributeError(f"a Target cannot be changed ({name})")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Target cannot be changed ({name})")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Target counts in its own process only; pickle the store instead")


if TYPE_CHECKING:

    class _HasTarget(Protocol):
        def _find_target(self) -> Target: ...


class TargetAttribute:
    """An attribute that is computed by `_find_target` at its first use, and again after `delattr`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    if TYPE_CHECKING:

        @overload
        def __get__(self, store: None, owner: type) -> "TargetAttribute": ...
        @overload
        def __get__(self, store: _HasTarget, owner: type | None = None) -> Target: ...

    def __get__(self, store: "_HasTarget | None", owner: type | None = None) -> "TargetAttribute | Target":
        if store is None:
            return self
        target = store._find_target()  # noqa: SLF001 (of the protocol above)
        # No data descriptor: from here on Python finds the attribute of the instance first. Not by way of `__dict__`, whose use
        # makes every later attribute of the object slower.
        setattr(store, self._name, target)
        return target


class _Identity:
    """An object that counts by its identity, held so that no other object gets the same one."""

    __slots__ = ("_held",)

    def __init__(self, held: object) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._held is other._held

    def __hash__(self) -> int:
        return id(self._held)


def _by_identity(held: object) -> _Identity | None:
    return None if held is None else _Identity(held)


def _digest(text: str) -> bytes:
    import hashlib  # noqa: PLC0415 (costly to import)

    # White space around a key does not count where it is used, either.
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16, key=_DIGEST_KEY).digest()
