"""`Room`: how many bytes of large bodies one pool sends at once, so that a burst of them waits here and not at the server."""

import asyncio
from collections import deque

from aiokv.errors import PoolTimeoutError

LARGE_BYTES = 64 * 1024
"""What is larger waits for room. A server keeps a part of its own bound for bodies up to this size."""


class Room:
    """Bytes that may be under way, given out in the order in which they were asked for.

    A server refuses what it has no room for. A client that sends all it has would spend its retries on that, and fail.

    Args:
        size_bytes: Bytes at once; a body that is larger goes when no other does.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = self._free_bytes = size_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size_bytes: int, deadline: float) -> None:
        """Wait for room and take it.

        Args:
            size_bytes: The size of a body.
            deadline: The event loop's time by which there must be room.

        Raises:
            PoolTimeoutError: There was none until then; nothing was taken.
        """
        if not self._waiting and self._fits(size_bytes):
            self._free_bytes -= size_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                # Its turn came at the same moment.
                self.give_back(size_bytes)
            else:
                self._let_in()
            if isinstance(error, TimeoutError):
                raise PoolTimeoutError(
                    f"other large values of this process were under way until the deadline, at most {self._size_bytes:,} bytes "
                    "at once; set fewer at once, allow more time, or look for a slow server"
                ) from None
            raise

    def give_back(self, size_bytes: int) -> None:
        """Give room back, and let in who waits for it.

        Args:
            size_bytes: What was taken.
        """
        self._free_bytes += size_bytes
        self._let_in()

    def _let_in(self) -> None:
        # One that has left is the first to go, and takes nothing.
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            size_bytes, turn = self._waiting.popleft()
            if not turn.done():
                self._free_bytes -= size_bytes
                turn.set_result(None)

    def _fits(self, size_bytes: int) -> bool:
        return size_bytes <= self._free_bytes or self._free_bytes == self._size_bytes
