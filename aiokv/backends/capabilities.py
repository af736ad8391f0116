"""What a backend may be able to do beyond `get`, `set`, `delete`: many keys at once, listing, claims, news of changes.

Each is a protocol of its own beside `Backend`. `capabilities_of` finds once which of them a backend has; what it lacks, the
store does with the four methods of `Backend`, or refuses with `UnsupportedError`.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from aiokv.backends.base import Backend
from aiokv.backends.watching import Watch
from aiokv.errors import CallError

MAX_BATCH_KEYS: Final = 1_000
"""Most keys of one batch, and most keys of one page of a scan."""

MAX_BATCH_BYTES: Final = 8 * 1024 * 1024
"""Most bytes of UTF-8 of one batch, keys and values together; for `get_many` of its answer."""

MIN_CLAIM_SECONDS: Final = 1.0
MAX_CLAIM_SECONDS: Final = 3_600.0


class Omitted(Enum):
    """The type of `OMITTED`."""

    OMITTED = "omitted"

    def __repr__(self) -> str:
        return self.name


OMITTED: Final = Omitted.OMITTED
"""Outcome of a key that `get_many` has not read because the answer was full; ask for it again."""


class Entry(NamedTuple):
    """One entry of a `set_many`."""

    key: str
    value: str
    ttl_seconds: int


@runtime_checkable
class BatchBackend(Protocol):
    """A backend that takes many keys in one step.

    A batch has at most `MAX_BATCH_KEYS` keys and, but for a batch of one, at most `MAX_BATCH_BYTES`; the caller sees to that.
    A key may come twice: entries apply in their order, so that the last one wins. An outcome stands for each key, in the
    order of the keys; a `CallError` among the outcomes is that key's alone. Where the call itself raises, that holds for
    every key: `maybe_applied` then says whether some of them may be in the store.
    A batch and a single write of one key that do not overlap take effect in their order. Whether others can see a part of a
    batch is told by `batches_are_atomic`.
    """

    @property
    def batches_are_atomic(self) -> bool:
        """Whether a batch is one transaction: others see all of it or nothing, and after a crash all or nothing is there."""
        ...

    async def get_many(self, db_name: str, keys: Sequence[str]) -> Sequence[str | Omitted | CallError | None]:
        """Read values.

        Args:
            db_name: The namespace.
            keys: The keys.

        Returns:
            For each key its value; None where it is absent or has expired; `OMITTED` where the values before it fill the
            answer. The first value is never omitted.

        Raises:
            CallError: No key could be read.
        """
        ...

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Sequence[CallError | None]:
        """Store values, each with a time to live of its own that begins now.

        Args:
            db_name: The namespace.
            entries: The entries.

        Returns:
            For each entry None where it is stored, else its error.

        Raises:
            CallError: No entry is known to be stored; `maybe_applied` is true where some may be.
        """
        ...

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> Sequence[CallError | None]:
        """Delete entries; succeed where there are none.

        Args:
            db_name: The namespace.
            keys: The keys.

        Returns:
            For each key None where it is gone, else its error.

        Raises:
            CallError: No key is known to be gone; `maybe_applied` is true where some may be.
        """
        ...


class KeyInfo(NamedTuple):
    """What a listing tells of an entry."""

    key: str
    expires_at: float
    """Seconds since the epoch by the store's clock."""
    value_bytes: int
    """Size of the value in bytes of UTF-8."""


class Page(NamedTuple):
    """A part of a listing; it may be empty before the end, too."""

    infos: Sequence[KeyInfo]
    cursor: str | None
    """Where the next page begins; None at the end. No listing comes to the same cursor twice."""


class Cleared(NamedTuple):
    """What one step of clearing has done."""

    deleted: int
    """How many entries it deleted, expired ones included."""
    cursor: str | None
    """Where the next step begins; None at the end. No clearing comes to the same cursor twice."""


@runtime_checkable
class ScanBackend(Protocol):
    """A backend that lists the keys of a namespace.

    A listing survives writes: an entry that is there from the first page to the last comes exactly once, with the expiry
    and size of some moment in between. One that is set, deleted or expires meanwhile comes at most once if it is never deleted
    and set again, else any number of times. Entries that have expired are not listed.
    """

    @property
    def scans_in_order(self) -> bool:
        """Whether keys come in the order of their code points."""
        ...

    async def scan(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Page:
        """List keys; one page takes a bounded time.

        Args:
            db_name: The namespace.
            prefix: What the keys begin with; "" for all.
            cursor: That of the page before, with the same namespace and prefix; None for the first page. It stays good for
                as long as the store is there, in every process.
            limit: Most keys of the page, from 1 to `MAX_BATCH_KEYS`.

        Returns:
            The page.

        Raises:
            ValueError: The cursor is not one of this backend's.
            CallError: The keys could not be read.
        """
        ...

    async def count(self, db_name: str, prefix: str = "") -> int:
        """Count the entries that a listing would show.

        Args:
            db_name: The namespace.
            prefix: What the keys begin with; "" for all.

        Returns:
            Their number at some moment of the call; under writes, close to it.

        Raises:
            CallError: They could not be counted.
        """
        ...

    async def clear(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Cleared:
        """Delete some entries; one call takes a bounded time.

        The steps from `cursor=None` to a cursor of None delete every entry that was there when they began and was not deleted
        by others. An entry that is set meanwhile may go or stay. The steps come to their end however fast others write.

        Args:
            db_name: The namespace.
            prefix: What the keys begin with; "" for all.
            cursor: That of the step before, with the same namespace and prefix; None for the first step.
            limit: Most entries to delete, from 1 to `MAX_BATCH_KEYS`.

        Returns:
            How many were deleted, and where the next step begins. A step may delete fewer than `limit`, or nothing, before
            the end: a cursor of None alone is the end.

        Raises:
            ValueError: The cursor is not one of this backend's.
            CallError: `maybe_applied` is true where some may be gone.
        """
        ...


def mark_partly_cleared(error: CallError) -> None:
    """Let the error of a clear say that some entries are gone all the same.

    Args:
        error: The error; its `maybe_applied` becomes true.
    """
    if not error.maybe_applied:
        error.maybe_applied = True
        error.reason = f"{error.reason.removesuffix('; nothing was sent')}; other entries were deleted before"


class ClaimOutcome(NamedTuple):
    """Who holds a claim after a call for it."""

    is_held: bool
    """Whether the caller's owner holds it."""
    seconds_left: float
    """How long the holder, whoever that is, keeps it unless it is renewed or released; 0.0 where a renewal found no holder."""
    is_new: bool = False
    """Whether the owner did not hold it before. Backends that tell it let their server bound the claims of an account."""


@runtime_checkable
class ClaimBackend(Protocol):
    """A backend whose claims exclude one another: at any moment at most one owner holds the claim of a key.

    Claims are apart from values: a claim of a key neither shows in `get` and listings nor hinders `set`. A claim ends by
    itself, so that a holder that dies blocks nobody for longer than it asked for. The store's clock counts, so a holder should
    count from before it asked.
    """

    async def claim(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Take a claim that nobody holds, or renew one's own: in both cases it then lasts `seconds` from now.

        Args:
            db_name: The namespace.
            key: What is claimed, of the form of a key.
            owner: Who claims, different from everybody else, such as 128 random bits in hexadecimal: 1 to 128 ASCII letters,
                digits, `-` and `_`. It is a secret like a key: who knows it can release the claim.
            seconds: From `MIN_CLAIM_SECONDS` to `MAX_CLAIM_SECONDS`.

        Returns:
            Whether the owner holds it, and for how long its holder does.

        Raises:
            CallError: `maybe_applied` is true where the claim may be held all the same; asking again by the same owner is safe.
        """
        ...

    async def renew(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Renew a claim that its owner still holds: it then lasts `seconds` from now. Otherwise nothing changes.

        So a renewal that arrives late, after the release or the end of the claim, takes nothing.

        Args:
            db_name: The namespace.
            key: What is claimed.
            owner: Who claimed it.
            seconds: As for `claim`.

        Returns:
            Whether the owner holds it, and for how long its holder does. `is_new` is false.

        Raises:
            CallError: `maybe_applied` is true where the claim may be renewed all the same.
        """
        ...

    async def release(self, db_name: str, key: str, owner: str) -> bool:
        """Give a claim back.

        Args:
            db_name: The namespace.
            key: What is claimed.
            owner: Who claimed it.

        Returns:
            Whether the owner held it until now.

        Raises:
            CallError: `maybe_applied` is true where it may be free all the same.
        """
        ...


@runtime_checkable
class WatchBackend(Protocol):
    """A backend that tells of changes."""

    def watch(self, db_name: str) -> Watch:
        """Watch a namespace.

        What comes is told by `aiokv.backends.watching`: first `Lost`, once changes are being told of; then each change of a
        key in the order in which it was committed; `Lost` again wherever changes may be missing. Expiry is no change. What this
        process changed itself is told like any other change. The watch ends by `aclose`, of the watch or of the backend.

        Args:
            db_name: The namespace.

        Returns:
            The watch; it begins at once or with the first `anext`.
        """
        ...


class Capabilities(NamedTuple):
    """What a backend can do beyond `Backend`; None where it cannot."""

    batch: BatchBackend | None = None
    scan: ScanBackend | None = None
    claim: ClaimBackend | None = None
    watch: WatchBackend | None = None


_METHODS: dict[str, tuple[str, ...]] = {
    "batch": ("get_many", "set_many", "delete_many", "batches_are_atomic"),
    "scan": ("scan", "count", "clear", "scans_in_order"),
    "claim": ("claim", "renew", "release"),
    "watch": ("watch",),
}


def capabilities_of(backend: object) -> Capabilities:
    """Find what a backend can do beyond `Backend`.

    A class that overrides `get`, `set` or `delete` of the class that its batches come from has no batches, since those would
    go past its own methods.

    Args:
        backend: Any backend. One that wraps another names what the other has by an attribute `capabilities`.

    Returns:
        The backend itself, or what it names, for each capability that is there.
    """
    named = getattr(backend, "capabilities", None)
    if isinstance(named, Capabilities):
        return named
    kind = type(backend)
    found: dict[str, Any] = {
        name: backend for name, methods in _METHODS.items() if all(hasattr(kind, method) for method in methods)
    }
    if "batch" in found and any(_is_overridden(kind, *pair) for pair in _BATCH_OF.items()):
        del found["batch"]
    return Capabilities(**found)


_BATCH_OF = {"get": "get_many", "set": "set_many", "delete": "delete_many"}


def _is_overridden(kind: type, method: str, batch: str) -> bool:
    """Return whether a class has another method than the one beside which the batches that it inherits were written."""
    owner = next((base for base in kind.__mro__ if batch in vars(base)), kind)
    beside = getattr(owner, method, None)
    # A class that has batches alone is meant for any methods.
    return beside not in {None, getattr(Backend, method), getattr(kind, method, None)}
