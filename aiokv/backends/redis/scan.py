"""`Scanner`: lists, counts and clears the keys of a namespace, one primary after the other."""

import asyncio
import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Self

from aiokv.backends.capabilities import Cleared, KeyInfo, Page, mark_partly_cleared
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.redis.calls import Caller, Command, Durability
from aiokv.backends.redis.names import entry_key, entry_prefix, pattern_of
from aiokv.backends.redis.nodes import pack
from aiokv.backends.redis.topology import SLOTS, Topology, slot_of
from aiokv.backends.redis.urls import CLUSTER
from aiokv.errors import CallError, CorruptValueError, ResponseError
from aiokv.limits import MAX_TTL_SECONDS

# So many steps make a page, whether they found anything or not.
_STEPS: Final = 16
# A step of clearing ends after that many seconds or calls of SCAN, even where it found nothing to delete.
_CLEAR_SECONDS: Final = 0.5
_CLEAR_SCANS: Final = 256
# The server stands still for each SCAN; so many keys take it a few milliseconds.
_MOST_SCANNED_AT_ONCE: Final = 5_000
_RUN_ID_CHARS: Final = 12
_HASH_CHARS: Final = 8
_CURSOR = re.compile(r"([0-9]{1,5})\.([0-9a-f]{0,12})\.([0-9]{1,20})(?:\.([A-Za-z0-9_-]*))?")
_CLEARING_CURSOR = re.compile(r"([0-9]{1,12})/(.*)")
_MAX_SCANNED: Final = 2**64 - 1


class _Place(NamedTuple):
    """Where a listing stands.

    Args:
        first_slot: The lowest slot of the primary that is being listed, by which a failover's new primary is known.
        run_id: Names the run of the server that made `scanned`: another one has its keys in another order.
        scanned: The server's own cursor.
        seen: Hashes of the keys that `scanned` leads to and that have been shown already.
    """

    first_slot: int = 0
    run_id: str = ""
    scanned: int = 0
    seen: tuple[str, ...] = ()

    @classmethod
    def parse(cls, cursor: str | None) -> Self:
        """Read a cursor."""
        if cursor is None:
            return cls()
        found = _CURSOR.fullmatch(cursor)
        if found is None or int(found[1]) >= SLOTS or int(found[3]) > _MAX_SCANNED:
            raise ValueError("cursor is not one of a listing of this store; begin with cursor=None")
        seen = found[4] or ""
        return cls(
            int(found[1]),
            found[2],
            int(found[3]),
            tuple(seen[start : start + _HASH_CHARS] for start in range(0, len(seen), _HASH_CHARS)),
        )

    def __str__(self) -> str:
        text = f"{self.first_slot}.{self.run_id}.{self.scanned}"
        return f"{text}.{''.join(self.seen)}" if self.seen else text


class _Step(NamedTuple):
    """What one SCAN has found; `run_id` and `now` are the server's."""

    first_slot: int
    run_id: str
    now: float
    scanned: int
    keys: list[str]


class Scanner:
    """Goes through the keys of a namespace that have a prefix.

    A server cannot be asked for the keys of a namespace: it goes through all of its keys and leaves the others out.

    Args:
        caller: Sends the commands.
        topology: The servers.
        policy: How long one step may take.
        durability: Which replicas must have a deletion.
        db_name: The namespace.
        prefix: What the keys begin with.
        verb: What errors call the call.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (all that a listing needs to know)
        self,
        caller: Caller,
        topology: Topology,
        policy: RetryPolicy,
        durability: Durability | None,
        db_name: str,
        prefix: str,
        verb: str = "scan",
    ) -> None:
        self._caller = caller
        self._topology = topology
        self._policy = policy
        self._durability = durability
        self._db_name = db_name
        self._verb = verb
        self._pattern = pattern_of(db_name, prefix)
        self._skipped_bytes = len(entry_prefix(db_name))

    async def page(self, cursor: str | None, limit: int) -> Page:
        """List some keys.

        Args:
            cursor: As for `ScanBackend.scan`.
            limit: As for `ScanBackend.scan`.

        Returns:
            The page.

        Raises:
            ValueError: The cursor is of another form.
            CallError: The servers could not be asked.
        """
        place: _Place | None = _Place.parse(cursor)
        infos: dict[str, KeyInfo] = {}
        is_narrow, wide = False, 0
        for _ in range(_STEPS):
            if place is None or limit - len(infos) <= limit // 8:
                break
            is_narrow = is_narrow or bool(place.seen)
            # Fewer than there is room for: a step can find more than it was asked for, and those must not be lost.
            usual = max(1, (limit - len(infos)) * 3 // 4)
            step = await self._step(place, 1 if is_narrow else max(wide, usual))
            if step.run_id != place.run_id and place.scanned:
                # The order of the keys is another one since the server was started anew, or has failed over.
                place = _Place(step.first_slot, step.run_id)
                continue
            keys = [key for key in dict.fromkeys(step.keys) if not place.seen or _hash(key) not in place.seen]
            room = limit - len(infos)
            if len(keys) <= room:
                infos.update(await self._describe(keys, step.now))
                place, is_narrow = self._after(step), False
                # Among many keys of others, larger parts are sooner through.
                wide = 0 if keys else min(2 * max(wide, usual), _MOST_SCANNED_AT_ONCE)
            elif wide > usual:
                wide = 0
            elif infos:
                break
            elif not is_narrow:
                is_narrow = True
            else:
                shown = keys[:room]
                infos.update(await self._describe(shown, step.now))
                place = _Place(step.first_slot, step.run_id, place.scanned, (*place.seen, *map(_hash, shown)))
                break
        return Page(list(infos.values()), None if place is None else str(place))

    async def count(self) -> int:
        """Count the keys.

        Returns:
            Their number.

        Raises:
            CallError: The servers could not be asked.
        """
        await self._find_servers()
        return sum(await asyncio.gather(*(self._count(shard.first_slot) for shard in self._topology.shards())))

    async def clear(self, cursor: str | None, limit: int) -> Cleared:
        """Delete some keys, in one pass over the servers.

        Each step gets further, however fast others set keys: what they set behind the place of the pass stays.

        Args:
            cursor: As for `ScanBackend.clear`.
            limit: As for `ScanBackend.clear`.

        Returns:
            How many were deleted, and where the next step begins.

        Raises:
            ValueError: The cursor is of another form.
            CallError: A server could not be asked, or a key not be deleted.
        """
        number, place_text = 0, None
        if cursor is not None:
            found = _CLEARING_CURSOR.fullmatch(cursor)
            number, place_text = (0, "") if found is None else (int(found[1]), found[2])
        clearing = _Clearing(_Place.parse(place_text), limit, is_filled=cursor is None)
        until = self._caller.now() + _CLEAR_SECONDS
        try:
            for _ in range(_CLEAR_SCANS):
                await self._clear_some(clearing)
                if clearing.is_full or clearing.place is None or self._caller.now() >= until:
                    break
        except CallError as error:
            if clearing.deleted:
                mark_partly_cleared(error)
            raise
        # Numbered, since the place may be that of the step before.
        return Cleared(clearing.deleted, None if clearing.place is None else f"{number + 1}/{clearing.place}")

    async def _clear_some(self, clearing: "_Clearing") -> None:
        """Delete what one SCAN finds, or a part of it where the step has no room for all."""
        place, room = clearing.place or _Place(), clearing.room
        step = await self._step(place, 1 if clearing.is_narrow else clearing.count)
        if step.run_id != place.run_id and place.scanned:
            clearing.place = _Place(step.first_slot, step.run_id)
            return
        keys = list(dict.fromkeys(step.keys))
        if len(keys) <= room:
            clearing.deleted += await self._delete(keys)
            clearing.go_on(self._after(step), len(keys))
        elif not clearing.is_narrowed():
            # Even the smallest part has too many: a few keys, since a table grows with them.
            clearing.deleted += await self._delete(keys[:room])
            clearing.place, clearing.is_full = _Place(step.first_slot, step.run_id, place.scanned), True

    async def _count(self, first_slot: int) -> int:
        place, count = _Place(first_slot), 0
        while True:
            step = await self._step(place, _MOST_SCANNED_AT_ONCE)
            if step.run_id != place.run_id and place.scanned:
                place, count = _Place(step.first_slot, step.run_id), 0
                continue
            count += len(set(step.keys))
            if not step.scanned:
                return count
            place = _Place(step.first_slot, step.run_id, step.scanned)

    def _after(self, step: _Step) -> _Place | None:
        """Return the place that follows a step; None after the last one of the last primary."""
        if step.scanned:
            return _Place(step.first_slot, step.run_id, step.scanned)
        later = [shard.first_slot for shard in self._topology.shards() if shard.first_slot > step.first_slot]
        return _Place(later[0]) if later else None

    async def _find_servers(self) -> None:
        if not self._topology.is_known:
            # Any call waits for them, and fails as it should.
            await self._caller.run_one(self._command(0, pack(b"PING")), self._policy)

    async def _step(self, place: _Place, count: int) -> _Step:
        await self._find_servers()
        first_slot = place.first_slot
        slots = [shard.first_slot for shard in self._topology.shards()]
        if first_slot not in slots:
            # The slots have been dealt out anew.
            first_slot = next((slot for slot in slots if slot >= first_slot), first_slot)
            place = _Place(first_slot)
        packed = (
            pack(b"INFO", b"server")
            + pack(b"TIME")
            + pack(b"SCAN", b"%d" % place.scanned, b"MATCH", self._pattern, b"COUNT", b"%d" % count)
        )
        info, (seconds, microseconds), (scanned, raw) = await self._caller.run_one(
            self._command(first_slot, packed, 3), self._policy
        )
        found = re.search(rb"run_id:([0-9a-f]+)", info if isinstance(info, bytes) else str(info).encode())
        if found is None:
            raise ResponseError("the server does not name its run", verb=self._verb, db_name=self._db_name)
        run_id = found[1][:_RUN_ID_CHARS].decode()
        now = int(seconds) + int(microseconds) / 1e6
        return _Step(first_slot, run_id, now, int(scanned), list(self._texts(raw)))

    def _command(self, slot: int, packed: bytes, reply_count: int = 1) -> Command:
        return Command(self._verb, self._db_name, "", slot, packed, reply_count=reply_count)

    def _texts(self, raw: Iterable[bytes]) -> Iterable[str]:
        for wire_key in raw:
            try:
                yield wire_key[self._skipped_bytes :].decode()
            except UnicodeDecodeError:
                # Another program's: no call of ours could name it.
                continue

    async def _describe(self, keys: Sequence[str], now: float) -> dict[str, KeyInfo]:
        commands = []
        for key in keys:
            wire_key = entry_key(self._db_name, key)
            packed = pack(b"PTTL", wire_key) + pack(b"STRLEN", wire_key)
            commands.append(Command(self._verb, self._db_name, key, slot_of(wire_key), packed, reply_count=2))
        infos: dict[str, KeyInfo] = {}
        for key, result in zip(keys, await self._caller.run(commands, self._policy), strict=True):
            if isinstance(result, CorruptValueError):
                # Another program's list or set; no value of ours.
                continue
            if isinstance(result, CallError):
                raise result
            milliseconds, size = result
            if milliseconds == -1:
                # Another program has taken its expiry away.
                milliseconds = MAX_TTL_SECONDS * 1000
            if milliseconds >= 0:
                infos[key] = KeyInfo(key, round(now + milliseconds / 1000, 3), size)
        return infos

    async def _delete(self, keys: Sequence[str]) -> int:
        if not keys:
            return 0
        if self._topology.kind == CLUSTER:
            commands = [delete_command(self._db_name, key)._replace(verb=self._verb) for key in keys]
        else:
            # One command, which a node of a cluster would not take, costs a small part of many.
            packed = pack(b"UNLINK", *(entry_key(self._db_name, key) for key in keys))
            commands = [Command(self._verb, self._db_name, "", 0, packed, write=True)]
        results = await self._caller.run(commands, self._policy, self._durability)
        error = next((result for result in results if isinstance(result, CallError)), None)
        if error is None:
            return sum(results)
        if any(not isinstance(result, CallError) or result.maybe_applied for result in results):
            mark_partly_cleared(error)
        raise error


class _Clearing:
    """One step of clearing: where it stands and what it has done.

    Attributes:
        place: Where it stands; None at the end.
        count: How many keys the next SCAN is asked for.
        deleted: How many entries it has deleted.
        is_narrow: Whether the next SCAN is asked for the smallest part, since a larger one held too many keys.
        is_full: Whether the step ends here.
    """

    def __init__(self, place: _Place, limit: int, *, is_filled: bool) -> None:
        self.place: _Place | None = place
        self.deleted = 0
        self.is_narrow = False
        self.is_full = False
        self._limit = limit
        # A client that does not know cursors takes a step that is not filled for the end.
        self._enough_room = 0 if is_filled else limit // 8
        self.count = self._usual_count()

    @property
    def room(self) -> int:
        """How many more entries may be deleted."""
        return self._limit - self.deleted

    def go_on(self, place: _Place | None, found: int) -> None:
        """Take the next place, behind a SCAN that has found so many keys."""
        self.place, self.is_narrow = place, False
        # Among many keys of others, larger parts are sooner through; a part with too many of ours is asked for again.
        self.count = self._usual_count() if found else min(2 * self.count, _MOST_SCANNED_AT_ONCE)
        self.is_full = self.room <= self._enough_room

    def is_narrowed(self) -> bool:
        """Ask for less after a SCAN with too many keys, or end the step; return False where there is no less."""
        usual = self._usual_count()
        if self.is_narrow:
            return False
        if self.count > usual:
            self.count = usual
        elif self.deleted and self._enough_room:
            self.is_full = True
        else:
            self.is_narrow = True
        return True

    def _usual_count(self) -> int:
        # Fewer than there is room for: a SCAN can find more than it was asked for.
        return max(1, self.room * 3 // 4)


def delete_command(db_name: str, key: str) -> Command:
    """Return the command that deletes an entry.

    Args:
        db_name: The namespace.
        key: The key.

    Returns:
        The command; its reply is 1 where there was an entry, else 0.
    """
    wire_key = entry_key(db_name, key)
    return Command("delete", db_name, key, slot_of(wire_key), pack(b"UNLINK", wire_key), write=True)


def _hash(key: str) -> str:
    return base64.urlsafe_b64encode(hashlib.blake2b(key.encode(), digest_size=6).digest()).decode()
