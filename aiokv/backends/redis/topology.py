"""`Topology`: which server is the primary of a key now."""

import asyncio
import contextlib
import random
from binascii import crc_hqx
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Final, NamedTuple

import redis.exceptions as theirs

from aiokv.backends.redis.errors import Meaning, refusal_of
from aiokv.backends.redis.nodes import ConnectionSettings, Node, NodeError, Outage, pack
from aiokv.backends.redis.urls import CLUSTER, SENTINEL, SINGLE, Address, RedisUrl, login_of_environment

SLOTS: Final = 16_384
_ASK_SECONDS: Final = 0.7
_MOST_ASKED: Final = 6
# A look at the cluster is good for so long: hundreds of calls that fail at once ask once.
_MIN_SECONDS_BETWEEN: Final = 0.1
_SENTINEL_CONNECTIONS: Final = 4


class Shard(NamedTuple):
    """A primary, and the lowest of its slots, by which its place in an order outlives a failover."""

    first_slot: int
    node: Node


class _View(NamedTuple):
    """What one node says of the cluster: `epoch` counts failovers, `ranges` are first slot, last slot, addresses."""

    is_ok: bool
    epoch: int
    ranges: list[tuple[int, int, list[Address]]]


def slot_of(key: bytes) -> int:
    """Return the slot of a key of this backend.

    Args:
        key: A key that begins with an empty hash tag, so that the whole of it counts.

    Returns:
        From 0 to 16,383.
    """
    return crc_hqx(key, 0) % SLOTS


class Topology:
    """The servers of one store; belongs to one event loop.

    Args:
        url: The store's URL.
        settings: How connections to the servers are made.
        max_connections: For each server.

    Raises:
        CredentialsError: The environment names a user of the sentinels without a password.
    """

    def __init__(self, url: RedisUrl, settings: ConnectionSettings, max_connections: int) -> None:
        self.kind = url.kind
        self.version = 0
        """Grows with every change of the primaries."""
        self.outage = Outage()
        """Lasts while nobody tells who the primaries are."""
        self.refusal: Meaning | None = None
        """Why a server will not tell who the primaries are, and never will; None where another one tells, or may later."""
        self._url = url
        self._settings = settings
        self._max_connections = max_connections
        self._loop = asyncio.get_running_loop()
        self._nodes: dict[Address, Node] = {}
        self._slots: list[Node | None] = []
        self._primary: Node | None = None
        self._sentinels: list[Node] = []
        self._epoch = 0
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -1.0
        self._tasks: set[asyncio.Task[None]] = set()
        if url.kind == SINGLE:
            self._primary = self._node(url.hosts[0])
        elif url.kind == SENTINEL:
            theirs_ = settings._replace(login=login_of_environment("AIOKV_REDIS_SENTINEL"), database=0)
            self._sentinels = [Node(address, theirs_, _SENTINEL_CONNECTIONS) for address in url.hosts]

    @property
    def is_known(self) -> bool:
        """Whether the primaries have been found once."""
        return bool(self._primary or self._slots)

    def node_of(self, slot: int) -> Node | None:
        """Return the primary of a slot.

        Args:
            slot: What `slot_of` returns.

        Returns:
            The server, or None where it has none.
        """
        return self._slots[slot] if self._slots else self._primary

    def node_at(self, address: Address) -> Node:
        """Return the server at an address that another one has named.

        Args:
            address: Host and port.

        Returns:
            The server.
        """
        return self._node(address)

    def shards(self) -> list[Shard]:
        """Return the primaries, in the order of their lowest slots; of one that is no cluster the only one."""
        if not self._slots:
            return [] if self._primary is None else [Shard(0, self._primary)]
        found: dict[Address, Shard] = {}
        for slot, node in enumerate(self._slots):
            if node is not None and node.address not in found:
                found[node.address] = Shard(slot, node)
        return list(found.values())

    def nodes(self) -> list[Node]:
        """Return every server that is known."""
        return list(self._nodes.values())

    def uncovered(self) -> int:
        """Return how many slots have no primary."""
        return sum(node is None for node in self._slots)

    def moved(self, error: theirs.MovedError, asked: Node) -> Node:
        """Take note of a key's new primary, and look at the whole cluster in the background.

        Args:
            error: The answer of a server that is not the key's primary any more.
            asked: That server.

        Returns:
            The primary.
        """
        node = self._node(named_address(error, asked))
        if self._slots:
            self._slots[error.slot_id] = node
        self.refresh_soon()
        return node

    def refresh_soon(self) -> None:
        """Look for the primaries in the background."""
        self.run(self.refresh())

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task in the background until it ends, or until `aclose`.

        Args:
            work: What it does; it must not fail.
        """
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def refresh(self, *, is_forced: bool = False) -> None:
        """Look for the primaries, with all others that want to know; where nobody answers, nothing changes.

        Args:
            is_forced: Whether a look that began earlier does not do.
        """
        if self.kind == SINGLE:
            return
        if is_forced:
            await self._join()
        elif self.is_known and self._loop.time() - self._refreshed_at < _MIN_SECONDS_BETWEEN:
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = self._loop.create_task(self._refresh())
        await self._join()

    async def aclose(self) -> None:
        """Close every connection."""
        tasks = [*self._tasks, *([self._refreshing] if self._refreshing is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node in [*self._nodes.values(), *self._sentinels]:
            await node.retire()

    async def _join(self) -> None:
        """Wait for the look that is under way, if there is one."""
        if self._refreshing is not None and not self._refreshing.done():
            # Shielded: one that gives up takes nothing from the others.
            await asyncio.shield(self._refreshing)

    def _node(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = Node(address, self._settings, self._max_connections)
        return node

    async def _refresh(self) -> None:
        try:
            if self.kind == CLUSTER:
                await self._refresh_cluster()
            else:
                await self._refresh_sentinels()
        finally:
            self._refreshed_at = self._loop.time()

    async def _refresh_cluster(self) -> None:
        known = list(self._nodes.values())
        random.shuffle(known)
        asked = [*known[: _MOST_ASKED - 2], *map(self._node, random.sample(self._url.hosts, min(2, len(self._url.hosts))))]
        if not known:
            asked = [self._node(address) for address in self._url.hosts[:_MOST_ASKED]]
        found = await _ask_all([_view_of(node) for node in dict.fromkeys(asked)])
        views = [view for view in found if isinstance(view, _View)]
        self._note(found, is_found=bool(views))
        if not views:
            return
        best = max(views, key=lambda view: (view.is_ok, view.epoch))
        # A server that was cut off from the others does not know of their failovers; alone it is not believed.
        if best.epoch < self._epoch and len(views) == 1:
            return
        self._epoch = best.epoch
        await self._take_view(best)

    def _note(self, found: Sequence[object], *, is_found: bool) -> None:
        refusals = [answer for answer in found if isinstance(answer, Meaning)]
        self.refusal = refusals[0] if refusals and not is_found else None
        if is_found:
            self.outage.ended()
        else:
            self.outage.failed()

    async def _take_view(self, view: _View) -> None:
        slots: list[Node | None] = [None] * SLOTS
        named: set[Address] = set(self._url.hosts)
        for first, last, addresses in view.ranges:
            named.update(addresses)
            slots[first : last + 1] = [self._node(addresses[0])] * (last + 1 - first)
        before = {shard.node for shard in self.shards()}
        if slots != self._slots:
            self._slots = slots
            self.version += 1
        after = {shard.node for shard in self.shards()}
        for node in before - after:
            # What is under way there is refused or lost; it is tried again at the new primary.
            node.outage.ended()
            await node.drop_all()
        for address in self._nodes.keys() - named:
            await self._nodes.pop(address).retire()

    async def _refresh_sentinels(self) -> None:
        question = pack(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._url.service.encode())

        async def ask(sentinel: Node) -> Address | Meaning | None:
            with contextlib.suppress(ValueError):
                try:
                    (reply,) = await sentinel.ask(question, 1, _ASK_SECONDS)
                except NodeError as error:
                    return refusal_of(error.cause)
                if isinstance(reply, Exception):
                    return refusal_of(reply)
                if isinstance(reply, list):
                    host, port = reply
                    return host.decode(), int(port)
            return None

        found = await _ask_all([ask(node) for node in self._sentinels])
        answers = Counter(answer for answer in found if answer is not None and not isinstance(answer, Meaning))
        self._note(found, is_found=bool(answers))
        if not answers:
            return
        # A sentinel that was cut off from the others names the old primary.
        primary = self._node(answers.most_common(1)[0][0])
        before, self._primary = self._primary, primary
        if primary is not before:
            self.version += 1
            if before is not None:
                await before.drop_all()


def named_address(error: theirs.AskError, asked: Node) -> Address:
    """Return the address that a redirection names.

    Args:
        error: The redirection.
        asked: The server that has answered with it.

    Returns:
        Host and port; a server that does not know its host names none, and means the one that was asked.
    """
    return error.host or asked.address[0], error.port


async def _ask_all(questions: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    return list(await asyncio.gather(*questions))


async def _view_of(node: Node) -> _View | Meaning | None:
    try:
        slots, info = await node.ask(pack(b"CLUSTER", b"SLOTS") + pack(b"CLUSTER", b"INFO"), 2, _ASK_SECONDS)
        refused = next((reply for reply in (slots, info) if isinstance(reply, Exception)), None)
        if refused is not None:
            return refusal_of(refused)
        facts = dict(line.split(":", 1) for line in _text(info).splitlines() if ":" in line)
        ranges = [
            (int(first), int(last), [_address(entry, node) for entry in servers])
            for first, last, *servers in slots
            # A primary whose host is not known yet cannot be asked.
            if _text(servers[0][0] or b"") != "?"
        ]
    except NodeError as error:
        return refusal_of(error.cause)
    except (ValueError, TypeError, IndexError):
        return None
    return _View(facts.get("cluster_state") == "ok", int(facts.get("cluster_current_epoch", 0)), ranges) if ranges else None


def _address(entry: Sequence[Any], asked: Node) -> Address:
    return _text(entry[0] or b"") or asked.address[0], int(entry[1])


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw
