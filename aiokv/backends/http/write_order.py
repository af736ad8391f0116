"""The order of writes: a write of an entry waits for the earlier ones of the same entry, those in batches too."""

import asyncio
from collections.abc import Iterable, Sequence

Entry = tuple[str, str]
"""A namespace and a key."""


class Turn:
    """The place of one write, or of one batch of writes, in the order.

    Args:
        entries: What it writes.
        ended: Done once the write has ended, and so have all before it.

    Attributes:
        previous: Those of the earlier writes that it has to wait for.
    """

    __slots__ = ("ended", "entries", "previous")

    def __init__(
        self, entries: Sequence[Entry], ended: "asyncio.Future[None]", previous: "Sequence[asyncio.Future[None]]"
    ) -> None:
        self.entries = entries
        self.ended = ended
        self.previous = previous

    async def come(self, timeout: float) -> bool:  # noqa: ASYNC109 (of the wait alone)
        """Wait for the earlier writes.

        Args:
            timeout: Seconds.

        Returns:
            Whether all have ended.
        """
        if not self.previous:
            return True
        return not (await asyncio.wait(self.previous, timeout=timeout))[1]


class WriteOrder:
    """The order of the writes of one event loop.

    All entries of a batch get their place in one step. So of two batches that share entries one is before the other in all of
    these, and they never wait for each other.

    Attributes:
        last: The end of the last write of each entry, which the next one waits for.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.last: dict[Entry, asyncio.Future[None]] = {}

    def enter(self, entry: Entry) -> Turn:
        """Take a place behind all earlier writes of the same entry.

        Args:
            entry: The entry.

        Returns:
            The place; give it to `leave`, in any case.
        """
        previous = self.last.get(entry)
        ended = self.last[entry] = self._loop.create_future()
        return Turn((entry,), ended, () if previous is None else (previous,))

    def enter_all(self, db_name: str, keys: Iterable[str]) -> Turn:
        """Take a place behind all earlier writes of the same entries.

        Args:
            db_name: The namespace.
            keys: Different keys.

        Returns:
            The place; give it to `leave`, in any case.
        """
        entries = [(db_name, key) for key in keys]
        # Each once: a batch before may have written many of the keys.
        previous = {self.last[entry]: None for entry in entries if entry in self.last}
        ended = self._loop.create_future()
        self.last.update(dict.fromkeys(entries, ended))
        return Turn(entries, ended, list(previous))

    def leave(self, turn: Turn) -> None:
        """End a write, or its wait: later writes go on once the earlier ones that it waited for have ended, too.

        Args:
            turn: What `enter` returned.
        """
        if not turn.previous:
            self._end(turn)
            return
        waiting = {previous for previous in turn.previous if not previous.done()}
        if not waiting:
            self._end(turn)
            return

        # We gave up, but earlier writes still run: later writes must wait for them.
        def one_ended(previous: "asyncio.Future[None]") -> None:
            waiting.discard(previous)
            if not waiting:
                self._end(turn)

        for previous in list(waiting):
            previous.add_done_callback(one_ended)

    def _end(self, turn: Turn) -> None:
        turn.ended.set_result(None)
        last = self.last
        for entry in turn.entries:
            if last.get(entry) is turn.ended:
                del last[entry]
