"""`Extensions`: what the service answers beyond get, set and delete, where its backend can: batches, listings, claims, watches.

`docs/protocol.md` describes them for clients.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

import orjson

from aiokv.backends.base import Backend
from aiokv.backends.capabilities import Entry, ScanBackend, capabilities_of
from aiokv.batch_wire import Batch, Fault, outcomes_body, parse_batch, values_body
from aiokv.claim_wire import claim_body, parse_claim_query, released_body
from aiokv.errors import CallError
from aiokv.event_wire import is_event_id
from aiokv.extension_wire import (
    EXTENSIONS_HEADER,
    check_no_query,
    cleared_body,
    count_body,
    extensions_of,
    page_body,
    parse_db_path,
    parse_listing_query,
    restore_cursor,
)
from aiokv.server.access import AccessFile, Permit
from aiokv.server.answers import Answer, refusal, too_fast, unauthorized, wrong_method
from aiokv.server.options import ServerOptions
from aiokv.server.quotas import Quotas
from aiokv.server.requests import Request
from aiokv.server.watches import Watches
from aiokv.wire import parse_entry_path

EXTENSION_VERBS: Final = frozenset({"batch", "keys", "claims", "watch"})
"""The verbs of the requests that `Extensions` answers."""

NO_EXTENSION: Final = Answer(0, b"")
"""What `Extensions.admit` returns for a path that is none of its own."""

# For each first segment: the verb, the methods, and the ability that the backend needs.
_ROUTES: Mapping[bytes, tuple[str, tuple[bytes, ...], str]] = {
    b"batch": ("batch", (b"POST",), "batch"),
    b"keys": ("keys", (b"GET", b"DELETE"), "scan"),
    b"count": ("keys", (b"GET",), "scan"),
    b"claims": ("claims", (b"PUT", b"DELETE"), "claim"),
    b"watch": ("watch", (b"GET",), "watch"),
}
# A count that takes longer would end after its client has given up.
_COUNT_SECONDS = 8.0
# Each may hold 8 MiB of values and as much of an answer.
_MAX_READS_AT_ONCE = 8


class Extensions:
    """The extensions of one process's server.

    Args:
        backend: The store of the values.
        access: The accounts, or None.
        quotas: What an account may use.
        options: The bounds.
        answer_fault: Logs an error of the backend, and makes the answer of it.

    Attributes:
        header: The line of the header that every answer bears; b"" where the backend has no extension.
        paths: The beginnings of the paths that the backend has the ability for.
        watches: The watches under way.
    """

    def __init__(
        self,
        backend: Backend,
        access: AccessFile | None,
        quotas: Quotas,
        options: ServerOptions,
        answer_fault: Callable[[Exception], Answer],
    ) -> None:
        capabilities = capabilities_of(backend)
        self._capabilities = capabilities if options.max_watches else capabilities._replace(watch=None)
        self._access = access
        self._quotas = quotas
        self._answer_fault = answer_fault
        names = extensions_of(self._capabilities)
        has = self._capabilities._asdict()
        self.paths = [f"/{segment.decode()}/" for segment, (_, _, ability) in _ROUTES.items() if has[ability] is not None]
        self.header = f"{EXTENSIONS_HEADER}: {names}\r\n".encode() if names else b""
        most = options.max_watches
        most_of_account = options.max_watches_per_account
        if most_of_account is None:
            most_of_account = most if access is None else max(1, most // 2)
        self.watches = Watches(self._capabilities.watch, most, most_of_account, answer_fault)
        self._reads = asyncio.Semaphore(_MAX_READS_AT_ONCE)
        self._key_counts: Counter[str] = Counter()

    def admit(self, request: Request, path: bytes, query: bytes) -> Answer | None:
        """Look at the head of a request that is no get, set or delete of one key.

        Args:
            request: The request; gets its verb, names and account.
            path: The path of its target.
            query: The query of its target.

        Returns:
            None where its body may come, `NO_EXTENSION` where the path is none of an extension's, else the refusal.
        """
        segment, _, rest = path[1:].partition(b"/")
        route = _ROUTES.get(segment)
        if route is None or not rest:
            return NO_EXTENSION
        request.verb, methods, ability = route
        if request.method not in methods:
            return wrong_method(b", ".join(methods))
        return (
            self._admit_account(request)
            or self._check_ability(request, ability)
            or self._admit_names(request, segment, rest, query)
        )

    def answer(self, request: Request) -> Coroutine[None, None, Answer]:
        """Answer a request that was admitted and is complete.

        Args:
            request: The request.

        Returns:
            A coroutine that returns the answer, for a watch a `Watcher`, and does not raise.
        """
        answering: Mapping[str, Callable[[Request], Coroutine[None, None, Answer]]] = {
            "batch": self._batch,
            "keys": self._keys,
            "claims": self._claims,
            "watch": self._watch,
        }
        return self._finish(answering[request.verb](request))

    def take_key_counts(self) -> Mapping[str, int]:
        """Return how many keys were in batches since the last call, by verb."""
        counts, self._key_counts = self._key_counts, Counter()
        return counts

    def _admit_account(self, request: Request) -> Answer | None:
        if self._access is not None:
            permit = self._permit_of(request)
            if permit is None:
                return unauthorized()
            request.account = permit.account
        wait_seconds = self._quotas.admit(request.account)
        return too_fast(wait_seconds) if wait_seconds else None

    def _check_ability(self, request: Request, ability: str) -> Answer | None:
        if getattr(self._capabilities, ability) is None:
            return refusal(501, f"the store of this server has no {ability}: see the header {EXTENSIONS_HEADER} of its answers")
        if request.verb == "watch" and request.is_http_1_0:
            return refusal(505, "a watch needs HTTP/1.1")
        return None

    def _admit_names(self, request: Request, segment: bytes, rest: bytes, query: bytes) -> Answer | None:
        try:
            self._parse(request, segment, rest, query)
        except ValueError as error:
            return refusal(400, str(error))
        if self._access is None:
            return None
        # Of a batch, what it does is known only once its body is there.
        verb = "get" if request.method in {b"GET", b"POST"} else "claim" if request.verb == "claims" else "delete"
        refused = self._forbid(request, verb, request.db_name)
        request.db_name = f"{request.account}:{request.db_name}"
        return refused

    def _permit_of(self, request: Request) -> Permit | None:
        if self._access is None:
            return Permit("")
        return self._access.permit_of_token(request.fields.get(b"authorization", b"").decode("latin-1"))

    def _parse(self, request: Request, segment: bytes, rest: bytes, query: bytes) -> None:
        """Parse the names, and the query for the answer."""
        path, text = rest.decode("utf-8", "surrogateescape"), query.decode("utf-8", "surrogateescape")
        if segment == b"claims":
            request.db_name, request.key = parse_entry_path(path)
            request.parsed = parse_claim_query(text, has_seconds=request.method == b"PUT")
            return
        db_name = request.db_name = parse_db_path(path)
        if segment == b"keys":
            is_clear = request.method == b"DELETE"
            request.parsed = "clear" if is_clear else "scan", parse_listing_query(text, db_name)
        elif segment == b"count":
            request.parsed = "count", parse_listing_query(text, db_name, allowed=("prefix",))
        else:
            check_no_query(text)

    def _forbid(self, request: Request, verb: str, db_name: str) -> Answer | None:
        """Check what the request may do now."""
        permit = self._permit_of(request)
        if permit is None:
            return unauthorized()
        reason = permit.allows(verb, db_name)
        return None if reason is None else refusal(403, reason, reason="forbidden")

    def _client_name(self, request: Request) -> str:
        """Return the namespace as the client names it."""
        return request.db_name if self._access is None else request.db_name[len(request.account) + 1 :]

    async def _finish(self, answering: Coroutine[None, None, Answer]) -> Answer:
        try:
            return await answering
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            return self._answer_fault(error)

    async def _batch(self, request: Request) -> Answer:
        body, request.body = request.body, b""
        db_name = self._client_name(request)
        try:
            batch = parse_batch(body, db_name)
        except ValueError as error:
            return refusal(400, str(error))
        del body
        count = len(batch.keys) or len(batch.entries)
        self._quotas.charge(request.account, count - 1)
        if batch.verb != "get" and (refused := self._forbid(request, batch.verb, db_name)):
            return refused
        self._key_counts[batch.verb] += count
        if batch.verb == "get":
            return await self._get_many(request, batch.keys)
        return await self._write_many(request, batch, count)

    async def _get_many(self, request: Request, keys: Sequence[str]) -> Answer:
        backend = self._capabilities.batch
        assert backend is not None  # noqa: S101 (admitted)
        async with self._reads:
            outcomes = await backend.get_many(request.db_name, keys)
            errors = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, CallError)}
            faults = self._faults(errors)
            values = [None if isinstance(outcome, CallError) else outcome for outcome in outcomes]
            _check_count(values, keys)
            return Answer(200, values_body(values, faults))

    async def _write_many(self, request: Request, batch: Batch, count: int) -> Answer:
        backend = self._capabilities.batch
        assert backend is not None  # noqa: S101 (admitted)
        faults: dict[int, Fault] = {}
        if batch.verb == "delete":
            outcomes = await backend.delete_many(request.db_name, batch.keys)
            _check_count(outcomes, batch.keys)
            places: Sequence[int] = range(count)
        else:
            entries, held = self._take_room(request, batch.entries, faults)
            places = [index for index in range(count) if index not in faults]
            try:
                outcomes = await backend.set_many(request.db_name, entries) if entries else ()
            finally:
                for number in held:
                    self._quotas.end_set(request.account, number)
            _check_count(outcomes, entries)
        faults |= self._faults({index: error for index, error in zip(places, outcomes, strict=True) if error is not None})
        return Answer(200, outcomes_body(count, dict(sorted(faults.items()))))

    def _take_room(
        self, request: Request, entries: Sequence[Entry], faults: dict[int, Fault]
    ) -> tuple[Sequence[Entry], Sequence[int]]:
        """Return the entries for which there is room, and what they count for the quota until they are stored."""
        account, quotas = request.account, self._quotas
        if not quotas.has_quota(account):
            return entries, ()
        reasons, numbers = quotas.begin_batch(
            account, request.db_name, [(entry.key, len(entry.value.encode())) for entry in entries]
        )
        faults.update((index, Fault(507, reason)) for index, reason in reasons.items())
        taken = [entry for index, entry in enumerate(entries) if index not in reasons]
        return taken, [number for number in numbers if number is not None]

    async def _keys(self, request: Request) -> Answer:
        backend = self._capabilities.scan
        assert backend is not None  # noqa: S101 (admitted)
        what, listing = request.parsed
        if what == "count":
            return await self._count(backend, request.db_name, listing.prefix)
        try:
            cursor = None if listing.cursor is None else restore_cursor(listing.cursor, listing.prefix)
            if what == "clear":
                cleared = await backend.clear(request.db_name, listing.prefix, cursor, listing.limit)
                return Answer(200, cleared_body(cleared, listing.prefix))
            page = await backend.scan(request.db_name, listing.prefix, cursor, listing.limit)
        except ValueError as error:
            if listing.cursor is None or isinstance(error, CallError):
                raise
        else:
            return Answer(200, page_body(page, listing.prefix, is_ordered=backend.scans_in_order))
        return refusal(400, "after is no cursor of this store; begin again without it")

    async def _count(self, backend: ScanBackend, db_name: str, prefix: str) -> Answer:
        bound = asyncio.timeout(_COUNT_SECONDS)
        try:
            async with bound:
                return Answer(200, count_body(await backend.count(db_name, prefix)))
        except TimeoutError:
            if not bound.expired():
                raise
        return refusal(
            503, f"the store has too many keys to count them in {_COUNT_SECONDS:g} s; list them in pages: GET /keys/"
        )

    async def _claims(self, request: Request) -> Answer:
        backend = self._capabilities.claim
        assert backend is not None  # noqa: S101 (admitted)
        owner, seconds, is_renewal = request.parsed
        if request.method == b"DELETE":
            was_held = await backend.release(request.db_name, request.key, owner)
            return Answer(200, released_body(was_held=was_held))
        if is_renewal:
            # It adds nothing, so that no quota is asked.
            outcome = await backend.renew(request.db_name, request.key, owner, seconds)
            return Answer(200 if outcome.is_held else 409, claim_body(outcome))
        reason = self._quotas.check_claim(request.account)
        # Those under way count, too. Nothing of it is a value.
        counted = self._quotas.begin_set(request.account, 0)
        try:
            outcome = await backend.claim(request.db_name, request.key, owner, seconds)
        finally:
            if counted is not None:
                self._quotas.end_set(request.account, counted)
        if reason and outcome.is_new:
            # Only now is it known that it was no renewal, which must always go on.
            await backend.release(request.db_name, request.key, owner)
            return refusal(507, reason, reason="quota")
        return Answer(200 if outcome.is_held else 409, claim_body(outcome))

    async def _watch(self, request: Request) -> Answer:
        event_id = request.fields.get(b"last-event-id", b"").decode("latin-1")
        return self.watches.open(
            request.account,
            request.db_name,
            event_id if is_event_id(event_id) else "",
            lambda: self._forbid(request, "get", self._client_name(request)) is None,
        )

    def _faults(self, errors: Mapping[int, CallError]) -> dict[int, Fault]:
        faults: dict[int, Fault] = {}
        for index, error in errors.items():
            answer = self._answer_fault(error)
            faults[index] = Fault(answer.status, orjson.loads(answer.body)["error"], error.maybe_applied)
        return faults


def _check_count(outcomes: Sequence[Any], keys: Sequence[Any]) -> None:
    if len(outcomes) != len(keys):
        raise RuntimeError(f"the backend has {len(outcomes):,} outcomes for {len(keys):,} keys")
