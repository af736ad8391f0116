"""Which extensions of the protocol a server has, as its answers say."""

from typing import Final

from multidict import istr

from aiokv.errors import CallError, UnsupportedError
from aiokv.extension_wire import EXTENSIONS_HEADER, parse_extensions
from aiokv.wire import TRANSIENT_STATUSES

EXTENSIONS: Final = istr(EXTENSIONS_HEADER)
"""The header that names a server's extensions, in the form that is quick to look up."""

_OK = 200
# Of a server that does not know the path, the method, or how to do it.
_UNKNOWING_STATUSES = frozenset({404, 405, 501})
# These say nothing of the extension: who asks and how often, and whether the server is well.
_OTHER_STATUSES = frozenset({401, 403, 413}) | TRANSIENT_STATUSES
_ABILITIES = {
    "batch": "take many keys at once",
    "scan": "list, count or clear its keys",
    "claims": "hold claims",
    "watch": "tell of changes",
}


class Extensions:
    """What the answers of one server have said of its extensions.

    Args:
        is_trusted: Whether what they say counts: fal's hosts are never asked.

    Attributes:
        told: The header of the last answer, None where it had none; "" where there was no answer yet, or the last one had none
            but may be a gateway's.
        has_batch: Whether the server takes many keys at once.
        scans_in_order: Whether its last page of keys was in order.
    """

    def __init__(self, *, is_trusted: bool = True) -> None:
        self.told: str | None = ""
        self.has_batch = False
        self.scans_in_order = False
        self._is_trusted = is_trusted
        self._names: frozenset[str] = frozenset()

    @property
    def is_known(self) -> bool:
        """Whether an answer has told, or none is needed."""
        return self.told != "" or not self._is_trusted

    def has(self, extension: str) -> bool:
        """Return whether the last answer named an extension."""
        return extension in self._names

    def learn(self, told: str | None, status: int = _OK) -> None:
        """Take what an answer says.

        Args:
            told: Its header, or None: a server without extensions has taken the place of the other.
            status: Its status.
        """
        self.told = "" if told is None and status in _OTHER_STATUSES else told
        self._names = parse_extensions(told) if self._is_trusted else frozenset()
        self.has_batch = "batch" in self._names

    def check(self, extension: str, status: int, *, write: bool) -> None:
        """Check that an answer to a call of an extension is of a server that has it.

        Args:
            extension: The extension's name in the header.
            status: The status of the answer, whose header `learn` has taken.
            write: Whether the call changes something.

        Raises:
            UnsupportedError: The server lacks it.
        """
        is_named = extension in self._names
        if status in _UNKNOWING_STATUSES:
            self.learn(", ".join(self._names - {extension}) or None)
        elif extension in self._names or status in _OTHER_STATUSES:
            return
        raise unsupported(extension, status, maybe_applied=write and status == _OK, is_named=is_named)


def unsupported(extension: str, status: int | None = None, *, maybe_applied: bool = False, is_named: bool = False) -> CallError:
    """Return the error of a call of an extension that a server lacks.

    Args:
        extension: The extension's name in the header.
        status: The status of its answer, or None where it was not asked.
        maybe_applied: Whether it may have done what it was asked for all the same.
        is_named: Whether its header names the extension, though its status says that it cannot do it.

    Returns:
        The error; it names stores that can.
    """
    named = f"{extension!r} in a header Aiokv-Extensions"
    why = f"it has {named}, but refuses the call with status {status}" if is_named else f"no {named}"
    return UnsupportedError(
        f"this service cannot {_ABILITIES[extension]} ({why}); "
        "stores that can: `aiokv serve` of this version, sqlite:///, memory://, redis://",
        status=status,
        maybe_applied=maybe_applied,
    )
