"""`Caller`: sends commands to the primaries of their keys, and tries again what failed, until it succeeds or time is up."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import redis.exceptions as theirs

from aiokv import telemetry
from aiokv.backends.base import is_patient
from aiokv.backends.http.retry import RetryPolicy, has_backoff
from aiokv.backends.redis.errors import CONNECTING, UNCOPIED, Meaning, call_error, meaning_of, unreached
from aiokv.backends.redis.nodes import Node, NodeError, pack
from aiokv.backends.redis.topology import Topology, named_address
from aiokv.backends.redis.urls import CLUSTER
from aiokv.errors import CallError, CallTimeoutError, ConnectError, RejectedError, StoreClosedError, UnavailableError

logger = logging.getLogger("aiokv")

_ASKING: Final = pack(b"ASKING")
# A call that takes longer is no reason to give it up, but one to look whether its server is still the primary.
_STALL_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.5
# Waits stop growing there: a failover takes a few seconds, and the call should go on soon after it.
_GROWING_WAITS: Final = 5
_MOST_REDIRECTIONS: Final = 8
# Another attempt that would end later than that after too few replicas were first met is not made: one that was only late
# has come back by then, and whoever waits behind a server has given up its own attempt soon after.
_LACK_SECONDS: Final = 3.5


class Command(NamedTuple):
    """One command for one key, or several for one server that are sent together.

    Args:
        verb: What errors call it.
        db_name: The namespace.
        key: The key.
        slot: The slot whose primary gets it.
        packed: The command as it is sent.
        write: Whether it changes anything.
        reply_count: How many commands `packed` has; of several the result is the list of their replies.
        repack: Makes `packed` for a later attempt, from the seconds since the call's start.
    """

    verb: str
    db_name: str
    key: str
    slot: int
    packed: bytes
    write: bool = False
    reply_count: int = 1
    repack: Callable[[float], bytes] | None = None


class _Failure(NamedTuple):
    """Why one command of an attempt failed; `redirected` is where to send it next, and whether just this once."""

    error: CallError
    meaning: Meaning | None
    redirected: tuple[Node, bool] | None = None


class Durability(NamedTuple):
    """How many replicas must have a write, and how many seconds they may take."""

    replicas: int = 0
    seconds: float = 1.0


class Caller:
    """Sends commands; belongs to one event loop.

    Args:
        topology: The servers.
    """

    def __init__(self, topology: Topology) -> None:
        self.is_closed = False
        self._topology = topology
        self._loop = asyncio.get_running_loop()
        self._watching: asyncio.TimerHandle | None = None
        self._under_way = 0

    def now(self) -> float:
        """Return the loop's time."""
        return self._loop.time()

    def close(self) -> None:
        """Refuse further commands, and further attempts of those under way."""
        self.is_closed = True
        if self._watching is not None:
            self._watching.cancel()

    async def run_one(self, command: Command, policy: RetryPolicy, durability: Durability | None = None) -> Any:
        """Run one command.

        Args:
            command: The command.
            policy: How long it may take.
            durability: For a write: which replicas must have it, or None.

        Returns:
            The server's reply.

        Raises:
            CallError: It failed.
        """
        (result,) = await self.run([command], policy, durability)
        if isinstance(result, CallError):
            raise result from None
        return result

    async def run(self, commands: Sequence[Command], policy: RetryPolicy, durability: Durability | None = None) -> list[Any]:
        """Run commands, those of one server in their order and in one go.

        Args:
            commands: The commands.
            policy: How long they may take.
            durability: For writes: which replicas must have them, or None.

        Returns:
            For each command the server's reply, or a `CallError` where it failed for good.
        """
        started = self._loop.time()
        if not self._under_way and self._watching is None:
            self._watching = self._loop.call_later(_LOOK_SECONDS, self._look)
        self._under_way += 1
        try:
            return await _Run(self, self._topology, commands, policy, durability, started).run()
        finally:
            self._under_way -= 1

    def _look(self) -> None:
        """Look for other primaries where a server takes its time: it may be cut off, and answer never."""
        self._watching = None
        if self._under_way:
            self._watching = self._loop.call_later(_LOOK_SECONDS, self._look)
            if any(node.stalled_for() > _STALL_SECONDS for node in self._topology.nodes()):
                self._topology.refresh_soon()


class _Run:
    """The attempts of a few commands that are under way together."""

    def __init__(  # noqa: PLR0913, PLR0917 (all that decides about them)
        self,
        caller: Caller,
        topology: Topology,
        commands: Sequence[Command],
        policy: RetryPolicy,
        durability: Durability | None,
        started: float,
    ) -> None:
        self._caller = caller
        self._topology = topology
        self._commands = commands
        self._policy = policy
        self._durability = durability
        self._loop = asyncio.get_running_loop()
        self._started = started
        self._deadline = started + policy.total_timeout
        self._results: list[Any] = [None] * len(commands)
        self._redirected: dict[int, tuple[Node, bool]] = {}
        self._maybe_applied: set[int] = set()
        # Why the attempt before failed.
        self._reasons: dict[int, str] = {}
        self._attempts = 0
        self._redirections = 0

    async def run(self) -> list[Any]:
        pending = list(range(len(self._commands)))
        while pending:
            self._attempts += 1
            if self._attempts > 1:
                telemetry.attempted(self._attempts)
            failures = await self._attempt(pending)
            pending = await self._sort_out(failures) if failures else []
        return self._results

    async def _sort_out(self, failures: dict[int, _Failure]) -> list[int]:
        """Return which commands to send again, once it is time to; note the errors of the others."""
        again: list[int] = []
        wait_seconds, waits = 0.0, False
        for index, failure in failures.items():
            error = failure.error
            if error.maybe_applied:
                self._maybe_applied.add(index)
            if failure.redirected is not None and self._redirections < _MOST_REDIRECTIONS:
                self._redirected[index] = failure.redirected
                again.append(index)
            elif self._is_worth_another_try(index, failure):
                waits = True
                again.append(index)
            else:
                self._fail(index, error)
        if again:
            self._redirections += not waits
        if waits:
            first = failures[again[0]].error
            wait_seconds = self._policy.wait_seconds(min(self._attempts, _GROWING_WAITS), first) if has_backoff() else 0.0
            if self._loop.time() + wait_seconds >= self._deadline:
                for index in again:
                    self._fail(index, failures[index].error)
                return []
            self._reasons.update((index, failures[index].error.reason) for index in again)
            self._notify(wait_seconds, first)
            await asyncio.sleep(wait_seconds)
            if any((meaning := failures[index].meaning) is not None and meaning.is_elsewhere for index in again):
                await self._refresh()
        return again

    def _is_worth_another_try(self, index: int, failure: _Failure) -> bool:
        error, attempts = failure.error, self._policy.attempts
        if not error.transient or attempts == 1 or self._caller.is_closed:
            return False
        if not is_patient.get() and failure.meaning in CONNECTING:
            return False
        # The time decides, not the number of attempts: a failover outlasts four of them.
        if (not is_patient.get() or not has_backoff()) and self._attempts >= attempts:
            return False
        node = self._topology.node_of(self._commands[index].slot)
        if failure.meaning is UNCOPIED and node is not None and self._durability is not None:
            return node.lack.seconds() + self._durability.seconds < _LACK_SECONDS
        outage = self._topology.outage if node is None else node.outage
        # A server that has been away for longer than a call waits is not waited for by the next one.
        return outage.seconds() < self._policy.total_timeout

    def _notify(self, wait_seconds: float, error: CallError) -> None:
        logger.log(
            logging.WARNING if self._attempts == 1 else logging.DEBUG,
            "retrying in %.2f s after attempt %d: %s",
            wait_seconds,
            self._attempts,
            error,
        )
        telemetry.retried(self._attempts, wait_seconds, error)

    def _fail(self, index: int, error: CallError) -> None:
        if self._caller.is_closed:
            error = StoreClosedError("the store was closed while the call was under way", maybe_applied=error.maybe_applied)
            self._name(index, error, None)
        before = self._reasons.get(index, error.reason)
        if isinstance(error, CallTimeoutError) and before != error.reason:
            # The last attempt may have had no time for more than to be late.
            error.reason += f"; the attempt before: {before}"
        error.attempts = self._attempts
        error.elapsed = self._loop.time() - self._started
        if index in self._maybe_applied and not error.maybe_applied:
            # This attempt may say that nothing was stored; it cannot speak for an earlier one.
            error.reason += "; an earlier attempt may have been applied"
            error.maybe_applied = True
        self._results[index] = error

    def _name(self, index: int, error: CallError, node: Node | None) -> CallError:
        command = self._commands[index]
        error.verb, error.db_name, error.key = command.verb, command.db_name, command.key
        error.host = "" if node is None else node.host
        return error

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._topology.refresh()
        except TimeoutError:
            return

    async def _attempt(self, pending: Sequence[int]) -> dict[int, _Failure]:
        """Send the commands once; note the replies of those that succeed."""
        if self._caller.is_closed:
            return {index: _Failure(self._name(index, StoreClosedError(""), None), None) for index in pending}
        if not self._topology.is_known:
            await self._refresh()
        failures: dict[int, _Failure] = {}
        groups: dict[tuple[Node, bool], list[int]] = {}
        for index in pending:
            redirected = self._redirected.pop(index, None)
            node, asking = redirected or (self._topology.node_of(self._commands[index].slot), False)
            if node is None:
                failures[index] = _Failure(self._name(index, self._nowhere(), None), unreached())
            else:
                groups.setdefault((node, asking), []).append(index)
        if len(groups) == 1:
            (((node, asking), indices),) = groups.items()
            await self._send(node, indices, failures, asking=asking)
        elif groups:
            async with asyncio.TaskGroup() as group:
                for (node, asking), indices in groups.items():
                    group.create_task(self._send(node, indices, failures, asking=asking))
        return failures

    def _nowhere(self) -> CallError:
        if self._topology.is_known:
            return UnavailableError("no server of the cluster is the primary of the key now", transient=True)
        if self._topology.refusal is not None:
            return call_error(theirs.ResponseError(), self._topology.refusal, write=False)
        return ConnectError("no server that the URL names has told who the primary is; nothing was sent")

    async def _send(self, node: Node, indices: Sequence[int], failures: dict[int, _Failure], *, asking: bool) -> None:
        """Send the commands of one server."""
        elapsed = self._loop.time() - self._started if self._attempts > 1 else 0.0
        parts: list[bytes] = []
        # Which of the replies are those of a command.
        places: list[slice] = []
        reply_count = 0
        for index in indices:
            command = self._commands[index]
            if asking:
                parts.append(_ASKING)
                reply_count += 1
            parts.append(command.packed if not elapsed or command.repack is None else command.repack(elapsed))
            places.append(slice(reply_count, reply_count + command.reply_count))
            reply_count += command.reply_count
        durability = self._durability
        if durability is not None:
            parts.append(pack(b"WAIT", b"%d" % durability.replicas, b"%d" % (durability.seconds * 1000)))
        deadline = min(self._loop.time() + self._policy.attempt_timeout, self._deadline)
        broken: NodeError | None = None
        try:
            replies = await node.run(b"".join(parts), reply_count + (durability is not None), deadline)
        except NodeError as error:
            broken, replies = error, list(error.replies)
        copies = replies[reply_count] if len(replies) > reply_count else None
        has_copies = durability is None or (isinstance(copies, int) and copies >= durability.replicas)
        found = {
            index: self._judge(index, replies[place], broken, node, has_copies=has_copies)
            for place, index in zip(places, indices, strict=True)
        }
        failures.update({index: failure for index, failure in found.items() if failure is not None})
        failed = [each for each in found.values() if each is not None]
        if any(each.error.transient and each.redirected is None and each.meaning is not UNCOPIED for each in failed):
            node.outage.failed()
        else:
            node.outage.ended()
        if any(each.meaning is UNCOPIED for each in failed):
            node.lack.failed()
        elif durability is not None and has_copies:
            node.lack.ended()

    def _judge(
        self, index: int, found: Sequence[Any], broken: NodeError | None, node: Node, *, has_copies: bool
    ) -> _Failure | None:
        """Note the result of a command that has succeeded; return the failure of another one."""
        refusal = next((reply for reply in found if isinstance(reply, Exception)), None)
        if refusal is not None:
            return self._failure(index, refusal, node, was_sent=True)
        if broken is not None and (len(found) < self._commands[index].reply_count or not has_copies):
            return self._failure(index, broken.cause, node, was_sent=broken.was_sent)
        if not has_copies:
            return _Failure(self._name(index, _uncopied(self._durability), node), UNCOPIED)
        self._results[index] = found[0] if len(found) == 1 else found
        return None

    def _failure(self, index: int, cause: BaseException, node: Node, *, was_sent: bool) -> _Failure:
        write = self._commands[index].write
        meaning = meaning_of(cause, was_sent=was_sent)
        error = self._name(index, call_error(cause, meaning, write=write), node)
        if not isinstance(cause, theirs.AskError):
            return _Failure(error, meaning)
        if self._topology.kind != CLUSTER:
            reason = "the server is a node of a cluster; write redis+cluster://host:port"
            return _Failure(self._name(index, RejectedError(reason), node), None)
        if isinstance(cause, theirs.MovedError):
            return _Failure(error, meaning, (self._topology.moved(cause, node), False))
        return _Failure(error, meaning, (self._topology.node_at(named_address(cause, node)), True))


def _uncopied(durability: Durability | None) -> CallError:
    replicas = 0 if durability is None else durability.replicas
    reason = f"the primary has the write, but not {replicas} of its replicas within the time allowed"
    return UNCOPIED.kind(reason, maybe_applied=True)
