"""`Budget`: how many bytes of bodies and answers one process holds at once, shared so that nobody starves."""

SMALL_BYTES = 64 * 1024
"""What is at most this large may use the part of the budget that is kept from larger ones."""


class Budget:
    """Bytes in flight, of all and of each account.

    A quarter is kept for small bodies, so that many large ones do not shut them out; with several accounts, one account may
    hold half.

    Args:
        limit_bytes: Bytes held at once.
        is_shared: Whether there are several accounts.
    """

    __slots__ = ("_held_by", "_limit_bytes", "_limit_of_account_bytes", "_limit_of_large_bytes", "held_bytes")

    def __init__(self, limit_bytes: int, *, is_shared: bool) -> None:
        self._limit_bytes = limit_bytes
        self._limit_of_large_bytes = limit_bytes * 3 // 4
        self._limit_of_account_bytes = limit_bytes // 2 if is_shared else limit_bytes
        self._held_by: dict[str, int] = {}
        self.held_bytes = 0
        """Bytes held now."""

    def take(self, account: str, size_bytes: int, *, is_large: bool) -> bool:
        """Hold bytes, where there is room.

        Args:
            account: Whose they are.
            size_bytes: How many.
            is_large: Whether they belong to something over `SMALL_BYTES`.

        Returns:
            Whether they are held; what is larger than its share is held where nothing else of its kind is.
        """
        held_by_account = self._held_by.get(account, 0)
        limit_bytes = self._limit_of_large_bytes if is_large else self._limit_bytes
        if self.held_bytes and (self.held_bytes + size_bytes > limit_bytes):
            return False
        if held_by_account and held_by_account + size_bytes > self._limit_of_account_bytes:
            return False
        self.held_bytes += size_bytes
        self._held_by[account] = held_by_account + size_bytes
        return True

    def give_back(self, account: str, size_bytes: int) -> None:
        """Let go of bytes that are held.

        Args:
            account: Whose they are.
            size_bytes: How many.
        """
        self.held_bytes -= size_bytes
        # An account that holds nothing has no item: not even while it has empty bodies under way.
        left = self._held_by.get(account, 0) - size_bytes
        if left:
            self._held_by[account] = left
        else:
            self._held_by.pop(account, None)

    def held_by(self, account: str) -> int:
        """Return the bytes that an account holds now."""
        return self._held_by.get(account, 0)
