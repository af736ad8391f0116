"""A store on Redis or Valkey."""

import asyncio
import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from aiokv.backends.capabilities import (
    MAX_BATCH_BYTES,
    MAX_BATCH_KEYS,
    OMITTED,
    ClaimOutcome,
    Cleared,
    Entry,
    Omitted,
    Page,
)
from aiokv.backends.http.options import Credentials
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.http.write_order import WriteOrder
from aiokv.backends.redis.calls import Caller, Command, Durability
from aiokv.backends.redis.names import PROBE, claim_key, entry_key
from aiokv.backends.redis.nodes import ConnectionSettings, NodeError, pack
from aiokv.backends.redis.options import REPLICATED, RedisOptions
from aiokv.backends.redis.scan import Scanner, delete_command
from aiokv.backends.redis.topology import Shard, Topology, slot_of
from aiokv.backends.redis.urls import RedisUrl, choose_login
from aiokv.backends.redis.watch import Watcher
from aiokv.backends.watching import Watch
from aiokv.errors import CallError, CallTimeoutError, CorruptValueError

# A batch of so few keys is read without asking for the sizes first.
_FEW_KEYS: Final = 4
_HEALTH_SECONDS: Final = 2.0

_CLAIM: Final = b"""local owner = redis.call('GET', KEYS[1])
if not owner then
  redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2])
elseif owner == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
else
  return {0, redis.call('PTTL', KEYS[1])}
end
return {1, tonumber(ARGV[2])}"""
_RENEW: Final = b"""local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return {1, tonumber(ARGV[2])}
elseif owner then
  return {0, redis.call('PTTL', KEYS[1])}
end
return {2, 0}"""
_HELD, _FREE = 1, 2
_RELEASE: Final = b"""if redis.call('GET', KEYS[1]) == ARGV[1] then
  return redis.call('UNLINK', KEYS[1])
end
return 0"""


class RedisBackend:
    """A client of Redis or Valkey; belongs to one event loop.

    A value is a key with an expiry of its own, counted by the server's clock from the moment at which the set arrives. A failed
    call is tried again until `policy.total_timeout` is over, however often that is; `policy.attempts=1` sends it once.
    A listing shows a key again where the server has shrunk its table meanwhile, a primary has failed over, or keys have moved
    between nodes; while keys move, it may miss some of them.

    Args:
        url: What the store's URL says.
        credentials: `"<user>:<password>"`, or None for those of the environment.
        policy: Timeouts and waits.
        options: Durability and connections.

    Raises:
        CredentialsError: The credentials are malformed.
    """

    batches_are_atomic = False
    """A batch is no transaction: its keys are on many nodes."""
    scans_in_order = False

    def __init__(
        self,
        url: RedisUrl,
        *,
        credentials: str | Credentials | None = None,
        policy: RetryPolicy | None = None,
        options: RedisOptions | None = None,
    ) -> None:
        options = options or RedisOptions()
        self._policy = policy or RetryPolicy()
        self._durability = _durability_of(options)
        login = choose_login(credentials)
        settings = ConnectionSettings(login, url.is_tls, url.database, self._policy.connect_timeout, options.ca_file)
        self._loop = asyncio.get_running_loop()
        self._topology = Topology(url, settings, options.max_connections)
        self._caller = Caller(self._topology)
        self._order = WriteOrder()
        self._watcher = Watcher(self._topology, str(url))

    def with_options(self, policy: RetryPolicy, options: RedisOptions) -> Self:
        """Return a backend with other options that shares this one's connections and order of writes.

        Args:
            policy: Timeouts and waits.
            options: Durability; the connections stay as they are.

        Returns:
            The other one; closing either closes both.
        """
        other = copy.copy(self)
        other.__dict__.update(_policy=policy, _durability=_durability_of(options))
        return other

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        reply = await self._caller.run_one(_read_command(db_name, key), self._policy)
        value = _decode(reply, db_name, key)
        if isinstance(value, CallError):
            raise value
        return value

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        await self._write([_set_command(db_name, Entry(key, value, ttl_seconds))])

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        await self._write([delete_command(db_name, key)])

    async def get_many(self, db_name: str, keys: Sequence[str]) -> Sequence[str | Omitted | CallError | None]:
        """Read values; see `BatchBackend.get_many`."""
        started = self._loop.time()
        unique = list(dict.fromkeys(keys))
        outcomes: dict[str, str | Omitted | CallError | None] = {}
        if len(unique) > _FEW_KEYS:
            sizes = await self._caller.run([_read_command(db_name, key, b"STRLEN") for key in unique], self._policy)
            room = MAX_BATCH_BYTES
            for key, size in zip(unique, sizes, strict=True):
                if isinstance(size, CallError):
                    outcomes[key] = size
                    continue
                room -= size + len(key)
                if room < 0 and key != unique[0]:
                    outcomes[key] = OMITTED
        wanted = [key for key in unique if key not in outcomes]
        replies = await self._caller.run([_read_command(db_name, key) for key in wanted], self._left(started))
        outcomes.update((key, _decode(reply, db_name, key)) for key, reply in zip(wanted, replies, strict=True))
        return [outcomes[key] for key in keys]

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Sequence[CallError | None]:
        """Store values; see `BatchBackend.set_many`."""
        last = {entry.key: entry for entry in entries}
        outcomes = await self._write_many({key: _set_command(db_name, entry) for key, entry in last.items()})
        return [outcomes[entry.key] for entry in entries]

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> Sequence[CallError | None]:
        """Delete entries; see `BatchBackend.delete_many`."""
        outcomes = await self._write_many({key: delete_command(db_name, key) for key in keys})
        return [outcomes[key] for key in keys]

    async def scan(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Page:
        """List keys; see `ScanBackend.scan`."""
        return await self._scanner(db_name, prefix, "scan").page(cursor, limit)

    async def count(self, db_name: str, prefix: str = "") -> int:
        """Count entries, which looks at every key of the servers; see `ScanBackend.count`."""
        return await self._scanner(db_name, prefix, "count").count()

    async def clear(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Cleared:
        """Delete some entries; see `ScanBackend.clear`. The steps together look once at every key of the servers.

        One step takes about half a second at most, and may delete nothing. The first step deletes fewer than `limit`
        entries only at the end, or where its time is over.
        """
        return await self._scanner(db_name, prefix, "clear").clear(cursor, limit)

    async def claim(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Take or renew a claim; see `ClaimBackend.claim`. A failover can lose it: see the documentation."""
        return await self._claim(_CLAIM, db_name, key, owner, seconds)

    async def renew(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Renew a claim; see `ClaimBackend.renew`."""
        return await self._claim(_RENEW, db_name, key, owner, seconds)

    async def release(self, db_name: str, key: str, owner: str) -> bool:
        """Give a claim back; see `ClaimBackend.release`."""
        wire_key = claim_key(db_name, key)
        packed = pack(b"EVAL", _RELEASE, b"1", wire_key, owner.encode())
        command = Command("release", db_name, key, slot_of(wire_key), packed, write=True)
        return bool(await self._caller.run_one(command, self._policy, self._durability))

    def watch(self, db_name: str) -> Watch:
        """Watch a namespace; see `WatchBackend.watch`.

        What the server drops by itself, as it expires or is evicted, is told as a delete. `is_delete` says whether the key was
        gone when the server was asked, right after the change. Changes of different keys come in no order.
        """
        return self._watcher.watch(db_name)

    async def health(self) -> str | None:
        """Set a key on every primary, and on the replicas that a write needs; see `CheckedBackend.health`."""
        await self._topology.refresh()
        shards = self._topology.shards()
        if not shards and self._topology.refusal is not None:
            return self._topology.refusal.reason
        if not shards:
            return "no server that the URL names answers"
        uncovered = self._topology.uncovered()
        if uncovered:
            return f"{uncovered:,} of the cluster's slots have no primary"
        problems = await asyncio.gather(*map(self._probe, shards))
        return next(filter(None, problems), None)

    async def aclose(self) -> None:
        """Finish the writes under way and close every connection; see `Backend.aclose`."""
        try:
            await self._watcher.aclose()
            if self._order.last:
                await asyncio.wait(set(self._order.last.values()), timeout=self._policy.total_timeout)
        finally:
            self._caller.close()
            await self._topology.aclose()

    async def _write(self, commands: Sequence[Command]) -> None:
        (error,) = await self._run_writes(commands)
        if error is not None:
            raise error

    async def _write_many(self, commands: Mapping[str, Command]) -> dict[str, CallError | None]:
        outcomes = await self._run_writes(list(commands.values()))
        return dict(zip(commands, outcomes, strict=True))

    async def _run_writes(self, commands: Sequence[Command]) -> list[CallError | None]:
        """Write after the earlier writes of the same keys have ended; otherwise an earlier one might land last."""
        if not commands:
            return []
        started = self._loop.time()
        turn = self._order.enter_all(commands[0].db_name, [command.key for command in commands])
        try:
            if not await turn.come(self._policy.total_timeout):
                return [self._overdue(command, started) for command in commands]
            results = await self._caller.run(commands, self._left(started), self._durability)
            return [result if isinstance(result, CallError) else None for result in results]
        finally:
            self._order.leave(turn)

    async def _claim(self, script: bytes, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        milliseconds = b"%d" % max(1, round(seconds * 1000))
        wire_key = claim_key(db_name, key)
        packed = pack(b"EVAL", script, b"1", wire_key, owner.encode(), milliseconds)
        command = Command("claim", db_name, key, slot_of(wire_key), packed, write=True)
        holds, left = await self._caller.run_one(command, self._policy, self._durability)
        return ClaimOutcome(holds == _HELD, 0.0 if holds == _FREE else max(int(left), 1) / 1000)

    def _scanner(self, db_name: str, prefix: str, verb: str) -> Scanner:
        return Scanner(self._caller, self._topology, self._policy, self._durability, db_name, prefix, verb)

    def _overdue(self, command: Command, started: float) -> CallError:
        return CallTimeoutError(
            "an earlier write of this key was under way until the deadline; nothing was sent",
            verb=command.verb,
            db_name=command.db_name,
            key=command.key,
            elapsed=self._loop.time() - started,
            transient=False,
        )

    def _left(self, started: float) -> RetryPolicy:
        """Return the policy for what is left of a call's time."""
        elapsed = self._loop.time() - started
        # Hardly any time has passed where nothing had to be waited for.
        return self._policy if elapsed < 0.01 else self._policy.within(max(self._policy.total_timeout - elapsed, 0.001))  # noqa: PLR2004

    async def _probe(self, shard: Shard) -> str | None:
        node = shard.node
        key = next(
            key
            for number in itertools.count()
            if self._topology.node_of(slot_of(key := PROBE + b"%d" % number)) in {node, None}
        )
        packed, durability = pack(b"SET", key, b"", b"PX", b"1000"), self._durability
        if durability is not None:
            milliseconds = round(min(durability.seconds, _HEALTH_SECONDS / 2) * 1000)
            packed += pack(b"WAIT", b"%d" % durability.replicas, b"%d" % max(milliseconds, 1))
        try:
            reply, *copies = await node.ask(packed, 1 if durability is None else 2, _HEALTH_SECONDS)
        except NodeError:
            return f"the server {node.host} does not answer"
        refusal = next((each for each in (reply, *copies) if isinstance(each, Exception)), None)
        if refusal is not None:
            return f"the server {node.host} takes no writes ({type(refusal).__name__})"
        if durability is not None and copies[0] < durability.replicas:
            return f"{copies[0]} of {durability.replicas} replicas of the server {node.host} have the write"
        return None


def _durability_of(options: RedisOptions) -> Durability | None:
    return Durability(options.replicas, options.replication_timeout) if options.durability == REPLICATED else None


def _read_command(db_name: str, key: str, name: bytes = b"GET") -> Command:
    wire_key = entry_key(db_name, key)
    return Command("get", db_name, key, slot_of(wire_key), pack(name, wire_key))


def _set_command(db_name: str, entry: Entry) -> Command:
    wire_key, value = entry_key(db_name, entry.key), entry.value.encode()

    def packed(elapsed: float) -> bytes:
        # Relative, by the server's clock, which need not agree with ours; what earlier attempts took is taken off.
        return pack(b"SET", wire_key, value, b"PX", b"%d" % max(1, round((entry.ttl_seconds - elapsed) * 1000)))

    return Command("set", db_name, entry.key, slot_of(wire_key), packed(0.0), write=True, repack=packed)


def _decode(reply: Any, db_name: str, key: str) -> str | CallError | None:
    if not isinstance(reply, bytes):
        return reply  # type: ignore[no-any-return]  # None, or the error of the call
    try:
        return reply.decode()
    except UnicodeDecodeError:
        # Not chained: it holds the value.
        reason = "the value is not text: another program has set it"
    return CorruptValueError(reason, verb="get", db_name=db_name, key=key)
