"""A set or delete on its way to the store."""

import asyncio
from asyncio import get_running_loop
from collections.abc import Callable


class Write:
    """A set or a delete that has not landed yet.

    Args:
        key: The key.
        text: What is set; None for a delete.
        ttl_seconds: For how long, whole seconds.
        generation: When it was decided on: of two writes the later one is to stay.
        begin: Returns whether it may be written, and keeps older writes from that.
        may_stay: Returns whether nothing newer has begun.
        is_decisive: Whether it waits for what other loops of the process are still setting, so that nothing older stays.
        distrust: Called where older entries than this write may be in the store, or soon will be: it was decisive and gave way
            to a later one that is still under way, or it landed too late and cannot be deleted again.
    """

    __slots__ = (
        "_landed",
        "begin",
        "distrust",
        "generation",
        "is_decisive",
        "is_done",
        "key",
        "may_stay",
        "previous",
        "text",
        "ttl_seconds",
    )

    def __init__(  # noqa: PLR0913, PLR0917 (what is written, and in which order)
        self,
        key: str,
        text: str | None,
        ttl_seconds: int,
        generation: int,
        begin: Callable[[], bool],
        may_stay: Callable[[], bool],
        is_decisive: bool,  # noqa: FBT001
        distrust: Callable[[], None],
    ) -> None:
        self.key = key
        self.text = text
        self.ttl_seconds = ttl_seconds
        self.generation = generation
        self.begin = begin
        self.may_stay = may_stay
        self.is_decisive = is_decisive
        self.distrust = distrust
        self.previous: Write | None = None
        self.is_done = False
        self._landed: asyncio.Future[None] | None = None

    def landed(self) -> "asyncio.Future[None]":
        """Return a future of the write's own loop that is done once it has landed or failed; not to be cancelled."""
        if self._landed is None:
            self._landed = get_running_loop().create_future()
            if self.is_done:
                self._landed.set_result(None)
        return self._landed

    def end(self) -> None:
        """Let those that wait go on."""
        self.is_done = True
        self.previous = None
        if self._landed is not None and not self._landed.done():
            self._landed.set_result(None)
