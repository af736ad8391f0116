"""`Watcher`: tells of changes by the servers' client tracking in broadcasting mode.

Tracking rather than keyspace notifications: it belongs to a connection, so a new primary tells of changes as soon as it is
connected to. Notifications depend on a setting of each server, which a replica may lack when it becomes the primary, and which
many hosted services do not let a client change; and they are silent about FLUSHALL.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import redis.exceptions as theirs
from redis.asyncio.connection import AbstractConnection

from aiokv.backends.redis.errors import call_error, meaning_of
from aiokv.backends.redis.names import entry_prefix
from aiokv.backends.redis.nodes import Node, NodeError, drop, pack
from aiokv.backends.redis.topology import Topology
from aiokv.backends.redis.urls import CLUSTER, SENTINEL
from aiokv.backends.watching import HEARTBEAT_SECONDS, Absence, Alive, Changed, Lost, Watch

logger = logging.getLogger("aiokv")

_BEAT_SECONDS: Final = 1.0
# A heartbeat that was answered later than that says nothing of the last `HEARTBEAT_SECONDS`.
_PROMPT_SECONDS: Final = HEARTBEAT_SECONDS - _BEAT_SECONDS / 2
_UNANSWERED_SECONDS: Final = 4.0
_BACKOFF_SECONDS: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
# Namespaces that nobody watches any more, whose changes are still sent, before all is begun anew.
_MOST_STALE: Final = 64


class _Push(NamedTuple):
    """What a server tells by itself: the keys that have changed, None for all."""

    keys: Sequence[bytes] | None


class _EndedError(Exception):
    """Continuity is lost: the servers have to be connected to anew."""

    def __init__(self, reason: str = "the connection broke") -> None:
        super().__init__(reason)


class Watcher:
    """The watches of one backend, fed by one connection to each primary; belongs to one event loop.

    Args:
        topology: The servers.
        host: Names them in the log, without a secret.
    """

    def __init__(self, topology: Topology, host: str) -> None:
        self._topology = topology
        self._absence = Absence(logger, host)
        self._watches: dict[str, set[Watch]] = {}
        # Those that have not been told yet that changes are being told of.
        self._new: set[Watch] = set()
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def watch(self, db_name: str) -> Watch:
        """Begin a watch.

        Args:
            db_name: The namespace.

        Returns:
            The watch.
        """

        def forget(watch: Watch) -> None:
            watches = self._watches.get(db_name, set())
            watches.discard(watch)
            if not watches:
                self._watches.pop(db_name, None)
            self._wanted.set()

        watch = Watch(forget)
        if self._is_closed:
            watch.close()
            return watch
        self._watches.setdefault(db_name, set()).add(watch)
        self._new.add(watch)
        self._wanted.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return watch

    async def aclose(self) -> None:
        """End every watch and close the connections."""
        self._is_closed = True
        for watch in self._all():
            watch.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _all(self) -> list[Watch]:
        return [watch for watches in self._watches.values() for watch in watches]

    async def _run(self) -> None:
        failures, was_there = 0, False
        while self._watches:
            session = _Session(self._topology, self._watches, self._new, self._wanted)
            try:
                await session.run()
            except _EndedError as ended:
                was_there = was_there or session.is_established
                failures = 0 if session.is_established else failures + 1
                if not was_there:
                    self._absence.warn(str(ended))
            except Exception as error:  # noqa: BLE001 (whatever it is, those who watch must know)
                for watch in self._all():
                    watch.fail(error)
                return
            finally:
                await session.aclose()
            if session.is_established:
                session.tell_all(Lost())
            await asyncio.sleep(_BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)])
            await self._topology.refresh()


class _Session:
    """A time of continuity: connections to all primaries, each of which tells of every change."""

    def __init__(self, topology: Topology, watches: dict[str, set[Watch]], new: set[Watch], wanted: asyncio.Event) -> None:
        self.is_established = False
        self._topology = topology
        self._watches = watches
        self._new = new
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._version = -1
        # Each namespace whose changes are told of, by what its keys begin with.
        self._tracked: dict[bytes, str] = {}
        self._links: list[_Link] = []

    async def run(self) -> None:
        """Tell the watches until continuity is lost, or nobody watches.

        Raises:
            _EndedError: Continuity is lost.
            CallError: The servers refuse what is needed.
        """
        if not self._topology.is_known:
            await self._topology.refresh()
        self._version = self._topology.version
        nodes = [shard.node for shard in self._topology.shards()]
        if not nodes and self._topology.refusal is not None:
            raise call_error(theirs.ResponseError(), self._topology.refusal, write=False)
        if not nodes or self._topology.uncovered():
            raise _EndedError("nobody tells of a primary" if not nodes else "the cluster has slots without a primary")
        links = await asyncio.gather(*(_Link.open(node, self._take) for node in nodes), return_exceptions=True)
        self._links = [link for link in links if isinstance(link, _Link)]
        for failure in links:
            if isinstance(failure, BaseException):
                raise failure
        while self._watches:
            # From now on, not from the beat before: one that a new watch brings forward must not put off those to come.
            beat_at = self._loop.time() + _BEAT_SECONDS
            self._wanted.clear()
            await self._track()
            await self._beat()
            self._greet()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(max(beat_at, self._loop.time() + _BEAT_SECONDS / 10)):
                    await self._wait_for_news()

    async def aclose(self) -> None:
        """Close the connections."""
        for link in self._links:
            await link.aclose()

    def tell_all(self, event: Lost | Alive) -> None:
        """Tell every watch that is not new."""
        for watches in list(self._watches.values()):
            for watch in list(watches):
                if watch not in self._new:
                    watch.notify(event)

    async def _wait_for_news(self) -> None:
        """Wait until a namespace is to be watched, or a connection breaks."""
        wanted = self._loop.create_task(self._wanted.wait())
        try:
            await asyncio.wait([wanted, *(link.reading for link in self._links)], return_when=asyncio.FIRST_COMPLETED)
        finally:
            wanted.cancel()
        for link in self._links:
            link.check()

    async def _track(self) -> None:
        """Ask every server to tell of the changes of each namespace that is watched."""
        if len(self._tracked) - len(self._watches) > _MOST_STALE:
            raise _EndedError
        for db_name in list(self._watches):
            prefix = entry_prefix(db_name)
            if prefix in self._tracked:
                continue
            question = pack(b"CLIENT", b"TRACKING", b"ON", b"BCAST", b"PREFIX", prefix)
            for reply in await self._ask_all(question):
                if isinstance(reply, Exception):
                    meaning = meaning_of(reply, was_sent=True)
                    if meaning.is_transient:
                        raise _EndedError(meaning.reason)
                    raise call_error(reply, meaning, write=False)
            self._tracked[prefix] = db_name

    def _greet(self) -> None:
        """Tell the new watches that changes are being told of from now on."""
        self.is_established = True
        for watch in list(self._new):
            if any(watch in self._watches.get(db_name, ()) for db_name in self._tracked.values()):
                watch.notify(Lost())
                self._new.discard(watch)
            elif watch.is_closed:
                self._new.discard(watch)

    async def _beat(self) -> None:
        """Make sure that every server is there and still a primary, and say so to the watches."""
        kind = self._topology.kind
        started = self._loop.time()
        question = {CLUSTER: pack(b"CLUSTER", b"INFO"), SENTINEL: pack(b"ROLE")}.get(kind, pack(b"PING"))
        replies = await self._ask_all(question)
        if kind == CLUSTER:
            facts = [bytes(reply) if isinstance(reply, bytes) else str(reply).encode() for reply in replies]
            if not all(b"cluster_state:ok" in fact for fact in facts):
                # The server may be cut off from the others, and know nothing of a failover.
                raise _EndedError("the cluster is not well")
        elif kind == SENTINEL:
            if any(not isinstance(reply, list) or reply[0] != b"master" for reply in replies):
                raise _EndedError("the server is no primary")
        elif any(isinstance(reply, Exception) for reply in replies):
            raise _EndedError
        # The servers may all be well, and one of them no primary any more without knowing it yet: so others are asked, too.
        await self._topology.refresh(is_forced=True)
        if self._topology.version != self._version:
            raise _EndedError("the primaries have changed")
        if not self.is_established:
            # What was told before belongs to another time.
            self.tell_all(Lost())
        elif self._loop.time() - started <= _PROMPT_SECONDS and not self._topology.outage.seconds():
            self.tell_all(Alive())

    async def _ask_all(self, question: bytes) -> list[Any]:
        try:
            async with asyncio.timeout(_UNANSWERED_SECONDS):
                return list(await asyncio.gather(*(link.ask(question) for link in self._links)))
        except TimeoutError:
            raise _EndedError("no answer in time") from None

    def _take(self, wire_key: bytes | None, *, is_delete: bool = False) -> None:
        """Tell the watches of a change."""
        if wire_key is None:
            self.tell_all(Lost())
            return
        # A namespace in a key has no slash.
        head, slash, key = wire_key.partition(b"/")
        try:
            changed = Changed(key.decode(), is_delete)
        except UnicodeDecodeError:
            # Another program's: no call of ours could name it.
            return
        for watch in list(self._watches.get(self._tracked.get(head + slash, ""), ())):
            if watch not in self._new:
                watch.notify(changed)


Taker = Callable[..., None]


class _Link:
    """A connection to one primary, which answers questions and tells of changes in one order."""

    def __init__(self, connection: AbstractConnection, take: Taker) -> None:
        self._connection = connection
        self._take = take
        self._loop = asyncio.get_running_loop()
        # Who waits for the replies that are to come, in their order.
        self._waiting: deque[Callable[[Any], None]] = deque()
        # redis-py offers this through its own cache alone.
        parser: Any = connection._parser  # noqa: SLF001
        parser.set_invalidation_push_handler(_as_push)
        self.reading: asyncio.Task[None] = self._loop.create_task(self._read())

    @classmethod
    async def open(cls, node: Node, take: Taker) -> "_Link":
        """Connect to a server."""
        try:
            connection = await node.connect()
        except NodeError as error:
            meaning = meaning_of(error.cause, was_sent=False)
            if meaning.is_transient:
                raise _EndedError(meaning.reason) from None
            raise call_error(error.cause, meaning, write=False) from None
        return cls(connection, take)

    def check(self) -> None:
        """Raise where the connection is broken."""
        if self.reading.done():
            raise _EndedError

    async def ask(self, question: bytes) -> Any:
        """Send a command and wait for its reply; an error reply is returned."""
        self.check()
        answer: asyncio.Future[Any] = self._loop.create_future()
        await self._send(question, [lambda reply: None if answer.done() else answer.set_result(reply)])
        await asyncio.wait([answer, self.reading], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise _EndedError
        return answer.result()

    async def aclose(self) -> None:
        """Close the connection."""
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)
        await drop(self._connection)

    async def _send(self, packed: bytes, waiting: Sequence[Callable[[Any], None]]) -> None:
        # In one step with the sending, so that the replies find those who wait for them.
        self._waiting.extend(waiting)
        try:
            await self._connection.send_packed_command([packed], check_health=False)
        except (OSError, theirs.RedisError):
            raise _EndedError from None

    async def _read(self) -> None:
        """Hand on what comes, until the connection breaks."""
        while True:
            try:
                reply: Any = await self._connection.read_response(push_request=True)
            except theirs.ResponseError as error:
                reply = error
            except (OSError, theirs.RedisError):
                return
            if isinstance(reply, _Push):
                try:
                    await self._look_at(reply.keys)
                except _EndedError:
                    return
            elif self._waiting:
                self._waiting.popleft()(reply)

    async def _look_at(self, keys: Sequence[bytes] | None) -> None:
        """Ask whether keys that have changed are gone; the answers come before that of any later question."""
        if keys is None:
            self._take(None)
        elif keys:
            await self._send(b"".join([pack(b"EXISTS", key) for key in keys]), [self._taker(key) for key in keys])

    def _taker(self, key: bytes) -> Callable[[Any], None]:
        return lambda reply: self._take(key, is_delete=reply == 0)


async def _as_push(response: Sequence[Any]) -> _Push:
    return _Push(response[1])
