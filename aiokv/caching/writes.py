"""A set or delete on its way to the store."""

import asyncio
from asyncio import get_running_loop

from aiokv.caching.generations import Generations, Place


class Write:
    """A set or a delete that has not landed yet.

    Args:
        generations: Those of the function.
        place: Target and key.
        generation: When it was decided on: of two writes the later one is to stay.
        started: When the computation of the result began, or that of what a delete is for, in seconds since the epoch.
        text: What is set; None for a delete.
        ttl_seconds: For how long, whole seconds.
        is_decisive: Whether it replaces what is stored whatever that is. It waits for what other loops of the process are still
            setting, so that nothing older stays.
    """

    # Most writes end without these.
    previous: "Write | None" = None
    is_done = False
    _landed: "asyncio.Future[None] | None" = None

    def __init__(  # noqa: PLR0913, PLR0917 (what is written, and in which order)
        self,
        generations: Generations,
        place: Place,
        generation: int,
        started: float,
        text: str | None,
        ttl_seconds: int,
        is_decisive: bool,  # noqa: FBT001
    ) -> None:
        self.place = place
        self.key = place[1]
        self.generation = generation
        self.text = text
        self.ttl_seconds = ttl_seconds
        self.is_decisive = is_decisive
        self._generations = generations
        self._started = started

    def begin(self) -> bool:
        """Return whether it may be written, and keep older writes from that."""
        if self.is_decisive:
            return self._generations.begin(self.place, self.generation)
        return self._generations.is_current(self.place, self.generation)

    def may_stay(self) -> bool:
        """Return whether nothing newer has begun."""
        if self.is_decisive:
            return self._generations.is_latest(self.place, self.generation)
        return self._generations.is_current(self.place, self.generation)

    def distrust(self) -> None:
        """Let nothing older than this write be served.

        Such may be in the store, or soon will be: this write gave way to a later one that is still under way, or it landed too
        late and cannot be deleted again.
        """
        self._generations.distrust(self.place, self._started)

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
