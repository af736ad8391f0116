"""The service without a socket: what a request may do, and what it is answered with."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime

import orjson

from aiokv import clock
from aiokv.backends.base import Backend, GatheringBackend, ImmediateBackend, QueueingBackend, WouldWaitError
from aiokv.batch_wire import MAX_BATCH_BODY_BYTES
from aiokv.errors import (
    CallError,
    ConfigurationError,
    CorruptValueError,
    StorageFullError,
    UnsupportedError,
    ValueTooLargeError,
)
from aiokv.limits import DEFAULT_TTL_SECONDS, MAX_VALUE_BYTES
from aiokv.server.access import TOKEN_LIFETIME_SECONDS, AccessFile
from aiokv.server.answers import (
    ABSENT,
    DONE,
    RETRY_SOON,
    Answer,
    no_room,
    refusal,
    too_fast,
    too_large,
    unauthorized,
    wrong_method,
)
from aiokv.server.budget import SMALL_BYTES, Budget
from aiokv.server.extensions import EXTENSION_VERBS, NO_EXTENSION, Extensions
from aiokv.server.log_limit import LogLimit
from aiokv.server.options import ServerOptions
from aiokv.server.origins import check_host, check_origin
from aiokv.server.quotas import AccountLimits, Quotas
from aiokv.server.readiness import Readiness
from aiokv.server.requests import BODY_VERBS, Request
from aiokv.wire import METHODS, TOKEN_PATH, Verb, parse_entry_path, parse_ttl_query, value_body

logger = logging.getLogger("aiokv.server")

# Of what is no set, the body is thrown away as it comes.
_MAX_OTHER_BODY_BYTES = 64 * 1024
_MAX_KNOWN_HOSTS = 64
_VERBS: dict[bytes, tuple[Verb, bytes]] = {
    b"get": ("get", METHODS["get"].encode()),
    b"set": ("set", METHODS["set"].encode()),
    b"delete": ("delete", METHODS["delete"].encode()),
}
_TOKEN_PATH = TOKEN_PATH.encode()
_UNKNOWN = Answer(0, b"")

Result = Answer | Coroutine[None, None, Answer]
Page = Callable[[], Result]


class Service:
    """The wire protocol over a backend.

    A request is admitted when its head has arrived, before a byte of its body is read, and answered when it is complete.

    Args:
        backend: The store of the values; the caller opens and closes it.
        access: The accounts, each with stores of its own. None takes any credentials or none, and answers only requests that a
            program of this machine sent of its own accord: a web page that leads here is refused.
        options: The bounds.

    Attributes:
        budget: The bytes in flight.
        readiness: What `/readyz` says.
        extensions: Batches, listings, claims and watches.
        pages: Further paths, each with what answers a GET of it, and whether it is for operators alone.
    """

    def __init__(self, backend: Backend, access: AccessFile | None = None, options: ServerOptions | None = None) -> None:
        options = options or ServerOptions()
        self._backend = backend
        self.get_now = backend.get_now if isinstance(backend, ImmediateBackend) else None
        self.get_all_now = backend.get_all_now if isinstance(backend, GatheringBackend) else None
        self.set_soon = backend.set_soon if isinstance(backend, QueueingBackend) else None
        self.access = access
        self.budget = Budget(options.max_bytes_in_flight, is_shared=access is not None)
        self.readiness = Readiness(backend, access)
        self.pages: dict[bytes, tuple[Page, bool]] = {
            b"/livez": (lambda: DONE, False),
            b"/readyz": (self.readiness.answer, False),
        }
        defaults = AccountLimits(options.requests_per_second, options.max_stored_bytes, options.max_stored_entries)
        self.quotas = Quotas(
            (lambda _: defaults) if access is None else access.limits_of, backend=backend, of_all=access is None
        )
        self._has_rates = access is not None or options.requests_per_second is not None
        self.extensions = Extensions(backend, access, self.quotas, options, self.answer_fault)
        self._known_hosts: dict[bytes, Answer | None] = {}
        self._log_limit = LogLimit()

    def admit(self, request: Request, address: str) -> Answer | None:
        """Look at a head, and take the room that the request's body needs.

        Args:
            request: A request without its body; gets its verb, names and account.
            address: The client's address.

        Returns:
            None where the body may come, else the answer, which leaves the body unread. Call `release` in either case.
        """
        path, _, query = request.target.partition(b"?")
        fields = request.fields
        host = fields.get(b"host", b"")
        if path[:1] != b"/":
            # The absolute form, which a server must accept too (RFC 9112 section 3.2.2); its host counts.
            authority, slash, rest = path.partition(b"://")[2].partition(b"/")
            path, host = slash + rest or path, authority or host
            request.target, fields[b"host"] = path, host
        refused = self._known_hosts.get(host, _UNKNOWN)
        if refused is _UNKNOWN:
            refused = self._check_host(host)
        if refused is None and self.access is None and (b"origin" in fields or b"sec-fetch-site" in fields):
            refused = check_origin(fields)
        if refused is not None:
            return refused
        verb, _, entry = path[1:].partition(b"/")
        known = _VERBS.get(verb)
        if known is not None and entry:
            request.verb, method = known
            if request.method != method:
                return wrong_method(method)
            refused = self._admit_entry(request, entry, query)
        else:
            refused = self._admit_other(request, path, query, address)
        if refused is None and (request.content_length != 0 or request.verb == "set"):
            refused = self._admit_body(request)
        return refused

    def release(self, request: Request) -> None:
        """Give back what a request holds; once it is answered or its connection is gone.

        Args:
            request: The request; a second time does nothing.
        """
        if request.held_bytes:
            self.budget.give_back(request.account, request.held_bytes)
            request.held_bytes = 0

    def hold_more(self, request: Request, size_bytes: int) -> Answer | None:
        """Take room for a piece of a body whose length was not declared, or that is thrown away.

        Args:
            request: The request.
            size_bytes: The size of the piece.

        Returns:
            None, or the answer where the body is too long or there is no room.
        """
        limit_bytes = _limit_of(request)
        if request.received_bytes > limit_bytes:
            return too_large(None, limit_bytes)
        if request.verb not in BODY_VERBS:
            return None
        if not self.budget.take(request.account, size_bytes, is_large=request.received_bytes > SMALL_BYTES):
            return no_room()
        request.held_bytes += size_bytes
        return None

    def hold_answer(self, request: Request, answer: Answer) -> Answer:
        """Take room for a large answer, until `release`.

        Args:
            request: The request.
            answer: Its answer.

        Returns:
            The answer, or another one where there is no room.
        """
        if not self.budget.take(request.account, len(answer.body), is_large=True):
            # Closed: a pipeline of such requests would cost a large read for each small refusal.
            message = "the server holds as many bytes as it may; come again"
            return refusal(503, message, RETRY_SOON, closes=True, reason="bytes_in_flight")
        request.held_bytes = len(answer.body)
        return answer

    def answer(self, request: Request) -> Result:
        """Answer a request that was admitted and is complete.

        Args:
            request: The request.

        Returns:
            The answer, or a coroutine that returns it where it has to be waited for. Neither raises.
        """
        if request.verb == "get" and self.get_now is not None:
            try:
                value = self.get_now(request.db_name, request.key)
                return ABSENT if value is None else Answer(200, value_body(value))
            except WouldWaitError:
                pass
            except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
                return self.answer_fault(error)
        if request.verb == "other":
            return self._page(request)
        if request.verb == "token":
            return self._token(request)
        if request.verb in EXTENSION_VERBS:
            return self.extensions.answer(request)
        return self._perform(request)

    def begin_set(self, request: Request, done: Callable[[Request, Answer], None]) -> Result | None:
        """Answer a set that was admitted and is complete.

        Args:
            request: The request.
            done: Called with the request and its answer, where this returns None, and after it has.

        Returns:
            The answer, a coroutine that returns it, or None where `done` gets it. None of it raises.
        """
        value = self._take_value(request)
        if isinstance(value, Answer):
            return value
        if self.set_soon is None:
            return self._set(request, value)

        def stored(error: Exception | None) -> None:
            self._count_no_more(request)
            done(request, DONE if error is None else self.answer_fault(error))

        try:
            self.set_soon(request.db_name, request.key, value, request.ttl_seconds, stored)
        except WouldWaitError:
            return self._set(request, value)
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            self._count_no_more(request)
            return self.answer_fault(error)
        return None

    def admits_host(self, host: bytes) -> bool:
        """Return whether requests for a host are answered."""
        return self._check_host(host) is None

    def owner_of(self, verb: Verb, db_name: str, authorization: str) -> tuple[str, str]:
        """Find whose a call is, where there are accounts.

        Args:
            verb: The call.
            db_name: The namespace, as the client names it.
            authorization: The Authorization header.

        Returns:
            The account, and the namespace with the account included; "" for both where the call is not allowed.
        """
        permit = None if self.access is None else self.access.permit_of_token(authorization)
        if permit is None or permit.allows(verb, db_name) is not None:
            return "", ""
        return permit.account, f"{permit.account}:{db_name}"

    def wait_seconds(self, account: str) -> float:
        """Take one request from an account's rate; return 0.0, or after how many seconds there is one to take."""
        return self.quotas.admit(account) if self._has_rates else 0.0

    def _check_host(self, host: bytes) -> Answer | None:
        refused = check_host(host, only_loopback=self.access is None)
        if len(self._known_hosts) >= _MAX_KNOWN_HOSTS:
            self._known_hosts.clear()
        self._known_hosts[host] = refused
        return refused

    def _admit_entry(self, request: Request, entry: bytes, query: bytes) -> Answer | None:
        permit = None
        if self.access is not None:
            authorization = request.fields.get(b"authorization", b"").decode("latin-1")
            permit = self.access.permit_of_token(authorization)
            if permit is None:
                return unauthorized()
            request.account = permit.account
        if self._has_rates and (wait_seconds := self.quotas.admit(request.account)):
            return too_fast(wait_seconds)
        try:
            db_name, request.key = parse_entry_path(entry.decode("utf-8", "surrogateescape"))
            if request.verb == "set":
                request.ttl_seconds = parse_ttl_query(query.decode("utf-8", "surrogateescape")) or DEFAULT_TTL_SECONDS
        except ValueError as error:
            return refusal(400, str(error))
        request.db_name = db_name
        if permit is not None:
            if reason := permit.allows(request.verb, db_name):
                return refusal(403, reason, reason="forbidden")
            # The prefix ends at the first ":", since no account holds one.
            request.db_name = f"{request.account}:{db_name}"
        return None

    def _admit_other(self, request: Request, path: bytes, query: bytes, address: str) -> Answer | None:
        if path == _TOKEN_PATH:
            request.verb, request.key = "token", address
            if request.method != b"POST":
                return wrong_method(b"POST")
            return None
        if path not in self.pages:
            if (refused := self.extensions.admit(request, path, query)) is not NO_EXTENSION:
                return refused
            pages = ", ".join((*self.extensions.paths, *(page.decode() for page in self.pages)))
            return refusal(404, f"no such path; known: /get/, /set/, /delete/ with {{db_name}}/{{key}}, {pages}")
        request.verb, request.key = "other", address
        if request.method != b"GET":
            return wrong_method(b"GET")
        return None

    def _admit_body(self, request: Request) -> Answer | None:
        limit_bytes = _limit_of(request)
        encoding = request.fields.get(b"content-encoding")
        if encoding is not None and encoding.lower() != b"identity":
            return refusal(415, "the body must be sent without Content-Encoding")
        size_bytes = request.content_length
        if size_bytes is None:
            return self._check_quota(request, 0)
        if size_bytes > limit_bytes:
            return too_large(size_bytes, limit_bytes)
        if refused := self._check_quota(request, size_bytes):
            return refused
        if size_bytes and request.verb in BODY_VERBS:
            if not self.budget.take(request.account, size_bytes, is_large=size_bytes > SMALL_BYTES):
                return no_room()
            request.held_bytes = size_bytes
        return None

    def _check_quota(self, request: Request, size_bytes: int) -> Answer | None:
        if request.verb != "set":
            return None
        reason = self.quotas.check_set(request.account, request.db_name, request.key, size_bytes)
        return None if reason is None else refusal(507, reason, reason="quota")

    async def _perform(self, request: Request) -> Answer:
        try:
            if request.verb == "get":
                found = await self._backend.get(request.db_name, request.key)
                return ABSENT if found is None else Answer(200, value_body(found))
            if request.verb == "delete":
                await self._backend.delete(request.db_name, request.key)
                return DONE
            value = self._take_value(request)
            return value if isinstance(value, Answer) else await self._set(request, value)
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            return self.answer_fault(error)

    async def _set(self, request: Request, value: str) -> Answer:
        try:
            await self._backend.set(request.db_name, request.key, value, request.ttl_seconds)
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            return self.answer_fault(error)
        finally:
            self._count_no_more(request)
        return DONE

    def _take_value(self, request: Request) -> str | Answer:
        """Take the value out of the request, or refuse it."""
        body, request.body = request.body, b""
        # Again: others may have been admitted meanwhile.
        if refused := self._check_quota(request, len(body)):
            return refused
        try:
            value = body.decode()
        except UnicodeDecodeError as error:
            # The answer is made outside, so that nothing is chained to this error, which holds the value.
            wrong_at = error.start
        else:
            request.counted_bytes = self.quotas.begin_set(request.account, len(body))
            return value
        return refusal(400, f"the value is not UTF-8, from byte {wrong_at} on; encode binary data as text, such as base64")

    def _count_no_more(self, request: Request) -> None:
        if request.counted_bytes is not None:
            self.quotas.end_set(request.account, request.counted_bytes)
            request.counted_bytes = None

    def answer_fault(self, error: Exception) -> Answer:
        """Make the answer to what a backend raised, and log it.

        Args:
            error: The exception.

        Returns:
            The answer.
        """
        if isinstance(error, ValueTooLargeError):
            return refusal(413, error.reason)
        if not isinstance(error, CallError | ConfigurationError):
            self._log_limit.exception(logger, type(error).__name__, "a request failed", error)
            return refusal(500, "internal error")
        # Not the whole error, which names the key.
        what = f"{error.verb}: {error.reason}" if isinstance(error, CallError) else str(error)
        self._log_limit.error(logger, type(error).__name__, what)
        if isinstance(error, StorageFullError):
            return refusal(507, "the store has no room left; nothing was stored", reason="disk")
        if isinstance(error, UnsupportedError):
            return refusal(501, "the store of this server cannot do that")
        if isinstance(error, CorruptValueError):
            # It stays so until it is written again: no use in coming back.
            return refusal(503, "the stored value is damaged; set it again or delete it")
        return refusal(503, "the store cannot be reached now", RETRY_SOON)

    def _page(self, request: Request) -> Result:
        page, is_for_operators = self.pages[request.target.partition(b"?")[0]]
        if not is_for_operators or self.access is None:
            return self._show(page)
        address = request.key
        if self.access.is_operator(request.fields.get(b"authorization", b"").decode("latin-1"), address):
            return self._show(page)
        refused = refusal(
            401,
            "this page is for operators; make a key with `aiokv access add ID --operator`, and send it as user and password",
            b'WWW-Authenticate: Basic realm="aiokv"\r\n',
            reason="unauthorized",
        )
        wait_seconds = self.access.delay_of(address)
        return _answer_later(refused, wait_seconds) if wait_seconds else refused

    def _show(self, page: Page) -> Result:
        try:
            result = page()
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            return self.answer_fault(error)
        return result if isinstance(result, Answer) else self._finish(result)

    async def _finish(self, showing: Coroutine[None, None, Answer]) -> Answer:
        try:
            return await showing
        except Exception as error:  # noqa: BLE001 (likewise)
            return self.answer_fault(error)

    def _token(self, request: Request) -> Result:
        if self.access is None:
            # The service accepts any token. Some clients need one before they send a request.
            expires_at = datetime.fromtimestamp(int(clock.now()) + TOKEN_LIFETIME_SECONDS, UTC)
            return _token_answer(request, secrets.token_urlsafe(32), expires_at)
        issued = self.access.issue_token(request.fields.get(b"authorization", b"").decode("latin-1"), request.key)
        wait_seconds = self.access.delay_of(request.key)
        if issued is not None:
            # First: the body was taken in nobody's name.
            self.release(request)
            request.account = issued.account
            return _token_answer(request, issued.token, issued.expires_at)
        refused = refusal(
            401,
            "the key is not known here; expected 'Authorization: Key <id>:<secret>'",
            b"WWW-Authenticate: Key\r\n",
            reason="unauthorized",
        )
        return _answer_later(refused, wait_seconds) if wait_seconds else refused


def _token_answer(request: Request, token: str, expires_at: datetime) -> Answer:
    scheme = "https" if request.is_tls else "http"
    body = {
        "token": token,
        "token_type": "Bearer",
        "base_url": f"{scheme}://{request.fields.get(b'host', b'').decode('latin-1')}",
        "expires_at": expires_at.isoformat(timespec="seconds"),
    }
    return Answer(200, orjson.dumps(body))


async def _answer_later(answer: Answer, wait_seconds: float) -> Answer:
    # One wait for each connection: others that stand behind it would hold it for hours.
    answer.closes = True
    await asyncio.sleep(wait_seconds)
    return answer


def _limit_of(request: Request) -> int:
    if request.verb == "batch":
        return MAX_BATCH_BODY_BYTES
    return MAX_VALUE_BYTES if request.verb == "set" else _MAX_OTHER_BODY_BYTES
