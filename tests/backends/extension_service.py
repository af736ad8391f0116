"""A service with the protocol's extensions over memory, which a test can make old, slow or lying."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from urllib.parse import parse_qsl, unquote, urlsplit

from aiohttp import web
from helpers import no_wait
from yarl import URL

from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.options import HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.watching import Changed, Lost
from aiokv.batch_wire import Fault, outcomes_body, parse_batch, values_body
from aiokv.claim_wire import claim_body, parse_claim_query, released_body
from aiokv.errors import CallError
from aiokv.event_wire import ALIVE, EVENT_STREAM, RETRY, changed_event, lost_event
from aiokv.extension_wire import (
    EXTENSIONS_HEADER,
    cleared_body,
    count_body,
    page_body,
    parse_listing_query,
    restore_cursor,
)
from aiokv.testing import ScriptedService
from aiokv.wire import error_body, value_body

ALL = "batch, scan, claims, renew, watch"

Override = Callable[[web.BaseRequest], Awaitable[web.StreamResponse | None]]


class ExtensionService:
    """Answers requests over a memory backend; counts them by method and first word of the path."""

    def __init__(self, extensions: str | None = ALL) -> None:
        self.backend = MemoryBackend()
        self.extensions = extensions
        # Whether a step of clearing names the next one.
        self.gives_cursors = True
        self.asked: list[str] = []
        self.bodies: list[bytes] = []
        # May answer in place of the service; one that returns None lets it answer.
        self.override: Override | None = None
        # What becomes of single keys of a batch.
        self.faults: dict[str, Fault] = {}
        self.last_event_ids: list[str | None] = []
        # Set to end the streams.
        self.ends_watches = asyncio.Event()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = urlsplit(request.raw_path).path
        kind = f"{request.method} {path.split('/')[1]}"
        self.asked.append(kind)
        self.bodies.append(await request.read())
        if self.override is not None:
            response = await self.override(request)
            if response is not None:
                return response
        return await self.serve(request)

    def respond(self, status: int, body: bytes, **headers: str) -> web.Response:
        if self.extensions is not None:
            headers[EXTENSIONS_HEADER] = self.extensions
        return web.Response(status=status, body=body, headers=headers)

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        parts = urlsplit(request.raw_path)
        _, word, db_name, *rest = [unquote(part) for part in parts.path.split("/")]
        query = dict(parse_qsl(parts.query))
        key = "/".join(rest)
        name = {"batch": "batch", "keys": "scan", "count": "scan", "claims": "claims", "watch": "watch"}.get(word)
        if name is not None and (self.extensions is None or name not in self.extensions):
            return self.respond(404, error_body("no such path"))
        if word == "batch":
            return await self._batch(db_name, await request.read())
        if word == "watch":
            return await self._watch(request, db_name)
        if word in {"get", "set", "delete"}:
            return await self._entry(request, word, db_name, key, query)
        return await self._other(request.method, word, db_name, key, parts.query)

    async def _entry(
        self, request: web.BaseRequest, word: str, db_name: str, key: str, query: dict[str, str]
    ) -> web.StreamResponse:
        if word == "get":
            value = await self.backend.get(db_name, key)
            return self.respond(404, error_body("absent")) if value is None else self.respond(200, value_body(value))
        if word == "set":
            await self.backend.set(db_name, key, (await request.read()).decode(), int(query["ttl"]))
        else:
            await self.backend.delete(db_name, key)
        return self.respond(200, b"{}")

    async def _other(self, method: str, word: str, db_name: str, key: str, raw_query: str) -> web.StreamResponse:
        if word == "claims":
            return await self._claim(method, db_name, key, raw_query)
        try:
            prefix, cursor, limit = parse_listing_query(raw_query, db_name)
            if word == "count":
                return self.respond(200, count_body(await self.backend.count(db_name, prefix)))
            if cursor is not None:
                cursor = restore_cursor(cursor, prefix)
            if method == "DELETE":
                cleared = await self.backend.clear(db_name, prefix, cursor, limit)
                body = cleared_body(cleared, prefix) if self.gives_cursors else b'{"deleted":%d}' % cleared.deleted
                return self.respond(200, body)
            page = await self.backend.scan(db_name, prefix, cursor, limit)
        except ValueError as error:
            return self.respond(400, error_body(str(error)))
        return self.respond(200, page_body(page, prefix, is_ordered=self.backend.scans_in_order))

    async def _claim(self, method: str, db_name: str, key: str, raw_query: str) -> web.StreamResponse:
        if method == "PUT":
            owner, seconds, is_renewal = parse_claim_query(raw_query, has_seconds=True)
            if is_renewal and "renew" not in (self.extensions or ""):
                return self.respond(400, error_body("the query may hold owner, seconds, each once"))
            ask = self.backend.renew if is_renewal else self.backend.claim
            outcome = await ask(db_name, key, owner, seconds)
            return self.respond(200 if outcome.is_held else 409, claim_body(outcome))
        owner = parse_claim_query(raw_query, has_seconds=False).owner
        return self.respond(200, released_body(was_held=await self.backend.release(db_name, key, owner)))

    async def _batch(self, db_name: str, body: bytes) -> web.StreamResponse:
        try:
            batch = parse_batch(body, db_name)
        except ValueError as error:
            return self.respond(400, error_body(str(error)))
        if batch.verb == "get":
            faults = {index: self.faults[key] for index, key in enumerate(batch.keys) if key in self.faults}
            values = [None if key in self.faults else await self.backend.get(db_name, key) for key in batch.keys]
            return self.respond(200, values_body(values, faults))
        keys = [entry.key for entry in batch.entries] if batch.verb == "set" else list(batch.keys)
        faults = {index: self.faults[key] for index, key in enumerate(keys) if key in self.faults}
        for entry in batch.entries:
            if entry.key not in self.faults:
                await self.backend.set(db_name, *entry)
        for key in batch.keys if batch.verb == "delete" else ():
            if key not in self.faults:
                await self.backend.delete(db_name, key)
        return self.respond(200, outcomes_body(len(keys), faults))

    async def _watch(self, request: web.BaseRequest, db_name: str) -> web.StreamResponse:
        self.last_event_ids.append(request.headers.get("Last-Event-ID"))
        headers = {"Content-Type": EVENT_STREAM, EXTENSIONS_HEADER: self.extensions or ""}
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(RETRY)
        number = 0
        async with self.backend.watch(db_name) as watch:
            ending = asyncio.create_task(self.ends_watches.wait())
            try:
                while not ending.done():
                    next_event = asyncio.ensure_future(anext(watch))
                    await asyncio.wait([next_event, ending], return_when=asyncio.FIRST_COMPLETED)
                    if not next_event.done():
                        next_event.cancel()
                        break
                    event = next_event.result()
                    number += 1
                    if isinstance(event, Changed):
                        await response.write(changed_event(event, f"e{number}"))
                    else:
                        await response.write(lost_event(f"e{number}") if isinstance(event, Lost) else ALIVE)
            finally:
                ending.cancel()
        await response.write_eof()
        return response


def single_requests(service: ExtensionService) -> int:
    """Return how many requests for one key have come."""
    return sum(kind.split()[1] in {"get", "set", "delete"} for kind in service.asked)


@contextlib.asynccontextmanager
async def connected(
    service: ExtensionService,
    *,
    policy: RetryPolicy | None = None,
    options: HttpOptions | None = None,
    is_known: bool = True,
    through: Callable[[str], str] | None = None,
) -> AsyncGenerator[RemoteBackend]:
    """Run a service, and connect a backend that knows what it can, unless a test wants to see it find out."""
    async with ScriptedService(handler=service.answer) as scripted:
        backend = RemoteBackend(
            URL(scripted.url if through is None else through(scripted.url)), policy=policy, options=options, sleep=no_wait
        )
        try:
            if is_known:
                await backend.get("db", "whether batches are taken")
                service.asked.clear()
                service.bodies.clear()
            yield backend
        finally:
            service.ends_watches.set()
            await backend.aclose()


def code_of(error: object) -> int | None:
    """Return the status of an error, of None where it is none."""
    return error.status if isinstance(error, CallError) else None
