"""The keys of one namespace in memory, in the order in which they were added, for scans whose cursor is a number."""

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

_CHUNK_BITS: Final = 6
_CHUNK_KEYS: Final = 1 << _CHUNK_BITS


class Account:
    """What the namespaces of an account hold."""

    __slots__ = ("entries", "name", "value_bytes")

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries = 0
        self.value_bytes = 0


class Namespace:
    """The keys of a namespace; each gets the next number when it is added and keeps it until it is removed.

    So a scan that goes on after a number meets every key that was there before it began exactly once. Keys lie in chunks of 64
    numbers. A chunk is dropped when its last key goes, so that memory and the length of a walk follow the number of keys.

    Args:
        account: The account that the namespace counts for.
        first: The first number.
    """

    __slots__ = ("_chunks", "_ids", "account", "entries", "next_number")

    def __init__(self, account: Account, first: int) -> None:
        self.account = account
        self.entries = 0
        # Numbers begin with a chunk.
        self.next_number = -(-first // _CHUNK_KEYS) * _CHUNK_KEYS
        self._chunks: dict[int, list[str | None]] = {}
        # The chunks in the order of their numbers.
        self._ids: list[int] = []

    def add(self, key: str) -> int:
        """Add a key that is not there.

        Args:
            key: The key.

        Returns:
            Its number.
        """
        number = self.next_number
        self.next_number = number + 1
        self.entries += 1
        if number % _CHUNK_KEYS:
            self._chunks[number >> _CHUNK_BITS].append(key)
        else:
            self._chunks[number >> _CHUNK_BITS] = [key]
            self._ids.append(number >> _CHUNK_BITS)
        return number

    def remove(self, number: int) -> None:
        """Remove a key.

        Args:
            number: What `add` returned.
        """
        self.entries -= 1
        chunk_id = number >> _CHUNK_BITS
        chunk = self._chunks[chunk_id]
        chunk[number % _CHUNK_KEYS] = None
        if any(chunk) or "" in chunk:
            return
        del self._chunks[chunk_id]
        position = bisect_left(self._ids, chunk_id)
        del self._ids[position]
        if position == len(self._ids):
            # It may have been the chunk that is being filled.
            self.next_number = max(self.next_number, (chunk_id + 1) << _CHUNK_BITS)

    def walk(self, first: int) -> Iterator[tuple[int, str]]:
        """Walk over the keys; none may be added or removed meanwhile.

        Args:
            first: The number to begin with, whether or not it is there.

        Yields:
            Each number and its key, in the order of the numbers.
        """
        position = bisect_left(self._ids, first >> _CHUNK_BITS)
        for index in range(position, len(self._ids)):
            chunk_id = self._ids[index]
            start = chunk_id << _CHUNK_BITS
            for number, key in enumerate(self._chunks[chunk_id], start):
                if key is not None and number >= first:
                    yield number, key
