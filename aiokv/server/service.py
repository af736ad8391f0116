"""The service without a socket: what a request may do, and what it is answered with."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime

import orjson

from aiokv import clock
from aiokv.backends.base import Backend, GatheringBackend, ImmediateBackend, QueueingBackend, UncopiedError, WouldWaitError
from aiokv.errors import (
    CallError,
    ConfigurationError,
    CorruptValueError,
    StorageFullError,
    UnsupportedError,
    ValueTooLargeError,
)
from aiokv.server.access import TOKEN_LIFETIME_SECONDS, AccessFile
from aiokv.server.admission import Admission
from aiokv.server.answers import (
    ABSENT,
    DONE,
    RETRY_SOON,
    Answer,
    refusal,
    wrong_method,
)
from aiokv.server.extensions import EXTENSION_VERBS, NO_EXTENSION, Extensions
from aiokv.server.log_limit import LogLimit
from aiokv.server.options import ServerOptions
from aiokv.server.readiness import Readiness
from aiokv.server.requests import Request
from aiokv.wire import METHODS, NO_SUCH_PATH, TOKEN_PATH, Verb, value_body

logger = logging.getLogger("aiokv.server")

_VERBS: dict[bytes, tuple[Verb, bytes]] = {
    b"get": ("get", METHODS["get"].encode()),
    b"set": ("set", METHODS["set"].encode()),
    b"delete": ("delete", METHODS["delete"].encode()),
}
_TOKEN_PATH = TOKEN_PATH.encode()

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
        access: The accounts.
        admission: What keeps requests out, and what they hold.
        get_now: Of `ImmediateBackend`; None where the backend is none.
        get_all_now: Of `GatheringBackend`, likewise.
        set_soon: Of `QueueingBackend`, likewise.
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
        self.admission = Admission(backend, access, options)
        self.readiness = Readiness(backend, access)
        self.pages: dict[bytes, tuple[Page, bool]] = {
            b"/livez": (lambda: DONE, False),
            b"/readyz": (self.readiness.answer, False),
        }
        self.extensions = Extensions(backend, access, self.admission.quotas, options, self.answer_fault)
        self._log_limit = LogLimit()

    def admit(self, request: Request, address: str) -> Answer | None:
        """Look at a head, and take the room that the request's body needs.

        Args:
            request: A request without its body; gets its verb, names and account.
            address: The client's address.

        Returns:
            None where the body may come, else the answer, which leaves the body unread. Call `admission.release` in any case.
        """
        path, _, query = request.target.partition(b"?")
        host = request.fields.get(b"host", b"")
        if path[:1] != b"/":
            # The absolute form, which a server must accept too (RFC 9112 section 3.2.2); its host counts.
            authority, slash, rest = path.partition(b"://")[2].partition(b"/")
            path, host = slash + rest or path, authority or host
            request.target, request.fields[b"host"] = path, host
        if refused := self.admission.check_origin(request, host):
            return refused
        verb, _, entry = path[1:].partition(b"/")
        known = _VERBS.get(verb)
        if known is not None and entry:
            request.verb, method = known
            if request.method != method:
                return wrong_method(method)
            refused = self.admission.admit_entry(request, entry, query)
        else:
            refused = self._admit_other(request, path, query, address)
        if refused is None and (request.content_length != 0 or request.verb == "set"):
            refused = self.admission.admit_body(request)
        return refused

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
            return refusal(404, f"{NO_SUCH_PATH}, /set/, /delete/ with {{db_name}}/{{key}}, {pages}")
        request.verb, request.key = "other", address
        if request.method != b"GET":
            return wrong_method(b"GET")
        return None

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
        if refused := self.admission.check_quota(request, len(body)):
            return refused
        try:
            value = body.decode()
        except UnicodeDecodeError as error:
            # The answer is made outside, so that nothing is chained to this error, which holds the value.
            wrong_at = error.start
        else:
            request.counted_set = self.admission.quotas.begin_set(request.account, len(body), (request.db_name, request.key))
            return value
        return refusal(400, f"the value is not UTF-8, from byte {wrong_at} on; encode binary data as text, such as base64")

    def _count_no_more(self, request: Request) -> None:
        if request.counted_set is not None:
            self.admission.quotas.end_set(request.account, request.counted_set)
            request.counted_set = None

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
        told = error.reason if isinstance(error, UncopiedError) else "the store cannot be reached now"
        return refusal(503, told, RETRY_SOON)

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
            self.admission.release(request)
            request.account = issued.account
            return _token_answer(request, issued.token, issued.expires_at)
        is_key = request.fields.get(b"authorization", b"").lower().startswith(b"key ")
        refused = refusal(
            401,
            "the key is unknown here or was revoked" if is_key else "expected a key: 'Authorization: Key <id>:<secret>'",
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
