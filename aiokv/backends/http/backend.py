"""A store behind HTTP: fal's service, or `aiokv serve`."""

import asyncio
import contextlib
import copy
import re
from collections.abc import Awaitable, Callable
from typing import Generic, Self, TypeVar

from yarl import URL

from aiokv.backends.capabilities import MAX_BATCH_KEYS, Capabilities, ClaimOutcome, Cleared, Page
from aiokv.backends.http.batches import Batches
from aiokv.backends.http.batching import GetGroups, Group, close_groups
from aiokv.backends.http.calls import Call
from aiokv.backends.http.extensions import EXTENSIONS, unsupported
from aiokv.backends.http.hedge import HedgePolicy, Hedger
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.http.stream import Stream
from aiokv.backends.http.transport import Answer, Timeouts
from aiokv.backends.http.watching import Watches
from aiokv.backends.watching import Watch
from aiokv.claim_wire import claim_path, parse_claim, parse_released
from aiokv.errors import CallError, RejectedError, ResponseError, TransportError, UnsupportedError
from aiokv.event_wire import EVENT_STREAM, LAST_EVENT_ID
from aiokv.extension_wire import (
    MAX_EXTENSION_ANSWER_BYTES,
    Listing,
    count_path,
    keys_path,
    parse_cleared,
    parse_count,
    parse_page,
    watch_path,
)
from aiokv.wire import TRANSIENT_STATUSES

T = TypeVar("T")

_OK = 200
_BAD_REQUEST = 400
_UNAUTHORIZED = 401
_CONFLICT = 409
_SERVER_ERRORS = 500
# A step of clearing by a server that gives no cursors, and how many entries the steps may still delete.
_UNGUIDED = re.compile(r"unguided:([0-9]{1,30})")
_MAX_UNGUIDED_STEPS = 100
# What such a server says of itself may be wrong, and nothing else shows that its steps lead anywhere.
_MAX_UNGUIDED_ENTRIES = 10_000_000


class RemoteBackend(Batches):
    """A client of the service's protocol over a pooled session; belongs to one event loop.

    Args:
        url: The service's address, `http(s)://host[:port][/prefix]`.
        credentials: `"<id>:<secret>"`, an object with `authorization`, or None for those of the environment.
        policy: Attempts, timeouts and waits.
        options: The pooled session, and whether gets travel together.
        sleep: Waits between attempts; `asyncio.sleep` but for tests.
        clock: Returns a monotonic time in seconds, for the life of tokens; None takes `aiokv.clock.monotonic`.

    Raises:
        ConfigurationError: The options cannot work.
        CredentialsError: The credentials are malformed or would travel in the clear.
    """

    def __init__(  # noqa: PLR0913 (the seams that a test moves)
        self,
        url: URL,
        *,
        credentials: str | Credentials | None = None,
        policy: RetryPolicy | None = None,
        options: HttpOptions | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] | None = None,
    ) -> None:
        options = options or HttpOptions()
        super().__init__(url, credentials=credentials, policy=policy, options=options, sleep=sleep, clock=clock)
        self._hedgers: dict[HedgePolicy, Hedger] = {}
        self._watches = Watches()
        self._batches_gets = options.batching
        # Those of the backends of `with_options`, too.
        self._running_groups: set[Group] = set()
        self._groups = GetGroups(self._running_groups)

    def with_options(self, policy: RetryPolicy, hedge: HedgePolicy | None) -> Self:
        """Return a backend with other options that shares this one's connections, token and order of writes.

        Args:
            policy: Attempts, timeouts and waits.
            hedge: When reads are sent a second time; None never.

        Returns:
            The other one; closing either closes both.
        """
        other = copy.copy(self)
        hedger = None if hedge is None else self._hedgers.setdefault(hedge, Hedger(hedge))
        other.__dict__.update(
            policy=policy, _timeouts=Timeouts(policy), _hedger=hedger, _groups=GetGroups(self._running_groups)
        )
        return other

    @property
    def capabilities(self) -> Capabilities:
        """What may be asked of the service beyond get, set and delete; the service may still lack it."""
        return Capabilities() if self.is_fal else Capabilities(batch=self, scan=self, claim=self, watch=self)

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        groups = self._groups
        if groups.under_way and self.extensions.has_batch and self._batches_gets:
            return await groups.get(self, db_name, key)
        groups.under_way += 1
        try:
            value: str | None = await self.run(self.get_call(db_name, key), self.loop.time())
        finally:
            groups.under_way -= 1
        return value

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        await self.write(self.entry_call("set", db_name, key, value, ttl_seconds))

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        await self.write(self.entry_call("delete", db_name, key))

    @property
    def scans_in_order(self) -> bool:
        """Whether the last page of a listing was in the order of the code points; False before the first one."""
        return self.extensions.scans_in_order

    async def scan(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Page:
        """List keys; see `ScanBackend.scan`."""
        listing = Listing(prefix, cursor, limit)
        url = self.extension_url(keys_path(db_name, listing))
        call = _ExtensionCall("scan", "scan", db_name, prefix, "GET", url, lambda answer: parse_page(answer.body, listing))
        page, is_ordered = await self._ask_with_cursor(call, cursor)
        self.extensions.scans_in_order = is_ordered
        return page

    async def count(self, db_name: str, prefix: str = "") -> int:
        """Count entries; see `ScanBackend.count`."""
        url = self.extension_url(count_path(db_name, prefix))
        return await self._ask(
            _ExtensionCall("scan", "count", db_name, prefix, "GET", url, lambda answer: parse_count(answer.body))
        )

    async def clear(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Cleared:
        """Delete some entries; see `ScanBackend.clear`: of an attempt whose answer was lost, what it deleted is not counted."""
        unguided = _UNGUIDED.fullmatch(cursor or "")
        listing = Listing(prefix, None if unguided else cursor, limit)
        url = self.extension_url(keys_path(db_name, listing))
        call = _ExtensionCall(
            "scan", "clear", db_name, prefix, "DELETE", url, lambda answer: parse_cleared(answer.body, listing)
        )
        cleared = await self._ask_with_cursor(call, cursor)
        if isinstance(cleared, Cleared):
            return cleared
        if cleared < limit:
            return Cleared(cleared, None)
        # Such a server may say for ever that there is more. Expired entries are deleted and not counted.
        if unguided:
            left = int(unguided[1])
        else:
            left = min(2 * await self.count(db_name, prefix) + _MAX_UNGUIDED_STEPS * limit, _MAX_UNGUIDED_ENTRIES)
        if left < limit:
            reason = (
                "the server says that it has deleted far more entries than it had, or ten million: others write as fast, "
                "or it is at fault; where it had so many, clear again"
            )
            raise self._named(TransportError(reason, maybe_applied=True, transient=False), call)
        return Cleared(cleared, f"unguided:{left - limit}")

    async def claim(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Take or renew a claim; see `ClaimBackend.claim`."""
        return await self._ask(self._claim_call(db_name, key, owner, seconds))

    async def renew(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Renew a claim; see `ClaimBackend.renew`. A server that does not know renewals takes the claim where it is free."""
        call = self._claim_call(db_name, key, owner, seconds, is_renewal=True)
        if not self.extensions.is_known:
            await self._make_sure(call, self.loop.time())
        if self.extensions.has("renew"):
            try:
                return await self._ask(call)
            except RejectedError as error:
                # Another server, without it, has taken the place of the one that has named it.
                if error.status != _BAD_REQUEST or self.extensions.has("renew"):
                    raise
        return await self.claim(db_name, key, owner, seconds)

    async def release(self, db_name: str, key: str, owner: str) -> bool:
        """Give a claim back; see `ClaimBackend.release`: False, too, where an attempt whose answer was lost gave it back."""
        url = self.extension_url(claim_path(db_name, key, owner))
        return await self._ask(
            _ExtensionCall("claims", "release", db_name, key, "DELETE", url, lambda answer: parse_released(answer.body), owner)
        )

    def watch(self, db_name: str) -> Watch:
        """Watch a namespace; see `WatchBackend.watch`."""
        return self._watches.begin(self, db_name)

    async def aclose(self) -> None:
        """Close every connection; see `Backend.aclose`."""
        try:
            await self._watches.aclose()
            await close_groups(self._running_groups)
            if self._tokens is not None:
                await self._tokens.aclose()
            for hedger in list(self._hedgers.values()):
                await hedger.aclose()
        finally:
            # Also where this task is cancelled: no other could close it.
            await self._transport.aclose()

    async def open_watch(self, db_name: str, last_event_id: str) -> Stream:
        """Open a stream of the changes of a namespace; where its token is refused, renew that and ask once more.

        Args:
            db_name: The namespace.
            last_event_id: The event after which it shall go on; "" for none.

        Returns:
            The stream.

        Raises:
            CallError: There is none; it is transient where there may be one later.
        """
        call = Call("watch", db_name, "", self.extension_url(watch_path(db_name)), "GET", write=False)
        try:
            if self.is_fal:
                raise unsupported("watch")
            deadline = self.loop.time() + self.policy.total_timeout
            header = self._tokens.current(self._exchange) if self._tokens is not None else None
            if header is None:
                header = await self._header_for_watch(deadline)
            stream = await self._open_stream(call, header, last_event_id)
            if stream.status == _UNAUTHORIZED and header is not None:
                stream.close()
                header = await self._header_for_watch(deadline, refused=header)
                stream = await self._open_stream(call, header, last_event_id)
            try:
                await self._check_stream(call, stream, header)
            except BaseException:
                stream.close()
                raise
        except CallError as error:
            error.verb, error.db_name, error.host = call.verb, db_name, self.host
            raise
        return stream

    async def _header_for_watch(self, deadline: float, refused: str | None = None) -> str | None:
        try:
            return await self._new_header(deadline, refused)
        except CallError as error:
            # The exchange has had its attempts; a watch may ask again later, unless the credentials are wrong.
            error.transient = error.status is None or error.status >= _SERVER_ERRORS or error.status in TRANSIENT_STATUSES
            raise

    async def _open_stream(self, call: Call, header: str | None, last_event_id: str) -> Stream:
        headers = {"Accept": EVENT_STREAM} if header is None else {"Accept": EVENT_STREAM, "Authorization": header}
        if last_event_id:
            headers[LAST_EVENT_ID] = last_event_id
        return await self._transport.open_stream(call, headers, self._timeouts, self._availability)

    async def _check_stream(self, call: Call, stream: Stream, header: str | None) -> None:
        answer = Answer(stream.status, stream.headers, b"")
        self.extensions.learn(answer.headers.get(EXTENSIONS), answer.status)
        self.extensions.check("watch", answer.status, write=False)
        if answer.status != _OK:
            with contextlib.suppress(CallError):
                answer = answer._replace(body=await stream.read(self._timeouts.attempt_seconds))
            raise self._refused_call(call, answer, header)
        if answer.headers.get("Content-Type", "").partition(";")[0].strip().lower() != EVENT_STREAM:
            raise ResponseError(f"the answer is no {EVENT_STREAM}", status=_OK)

    def _claim_call(
        self, db_name: str, key: str, owner: str, seconds: float, *, is_renewal: bool = False
    ) -> "_ExtensionCall[ClaimOutcome]":
        url = self.extension_url(claim_path(db_name, key, owner, seconds, is_renewal=is_renewal))
        return _ExtensionCall(
            *("claims", "claim", db_name, key, "PUT", url),
            lambda answer: parse_claim(answer.body, is_held=answer.status == _OK),
            owner,
        )

    async def _ask_with_cursor(self, call: "_ExtensionCall[T]", cursor: str | None) -> T:
        try:
            return await self._ask(call)
        except RejectedError as error:
            if cursor is None or error.status != _BAD_REQUEST:
                raise
            raise ValueError(f"cursor must be that of the page before, or of the step before: {error.reason}") from error

    async def _ask(self, call: "_ExtensionCall[T]") -> T:
        started = self.loop.time()
        if self.is_fal:
            raise self._named(unsupported(call.extension), call)
        if call.write and not self.extensions.has(call.extension):
            await self._make_sure(call, started)
        result: T = await self.run(call, started)
        return result

    async def _make_sure(self, call: "_ExtensionCall[T]", started: float) -> None:
        """Raise unless the server has a write's extension: another server might do what it is asked, and not say so."""
        if not self.extensions.is_known:
            try:
                await self.run(self._question(call), started)
            except UnsupportedError:
                raise
            except CallError as error:
                # A refusal, too, tells what the server has.
                if not self.extensions.is_known:
                    self._named(error, call)
                    raise
        if not self.extensions.has(call.extension):
            raise self._named(unsupported(call.extension), call)

    def _question(self, call: "_ExtensionCall[T]") -> Call:
        """Make a read whose answer tells of the extension that a write needs."""
        if call.extension == "claims":
            return self.get_call(call.db_name, call.key)
        url = self.extension_url(keys_path(call.db_name, Listing(call.key, None, 1)))
        return _ExtensionCall(call.extension, call.verb, call.db_name, call.key, "GET", url, lambda _: None)

    def _named(self, error: CallError, call: Call) -> CallError:
        error.verb, error.db_name, error.key, error.host = call.verb, call.db_name, call.key, self.host
        return error


class _ExtensionCall(Call, Generic[T]):
    """A call of an extension, whose answer a function parses."""

    max_answer_bytes = MAX_EXTENSION_ANSWER_BYTES

    def __init__(  # noqa: PLR0913, PLR0917 (what a call is)
        self,
        extension: str,
        verb: str,
        db_name: str,
        key: str,
        method: str,
        url: URL,
        parse: Callable[[Answer], T],
        owner: str = "",
    ) -> None:
        # Who claims is a secret like a key.
        super().__init__(verb, db_name, key, url, method, method != "GET", values=(owner,) if owner else ())
        self.extension = extension
        self.other_status = _CONFLICT if verb == "claim" else _OK
        self._parse = parse

    def parse(self, answer: Answer, _calls: object, _header: object) -> T:
        """Return what the function makes of the answer."""
        return self._parse(answer)
