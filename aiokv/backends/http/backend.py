"""A store behind HTTP: fal's service, or a server of one's own."""

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, Self

from yarl import URL

from aiokv.backends.http.auth import Token, TokenSource, choose_credentials, parse_token, token_url
from aiokv.backends.http.hedge import HedgePolicy, Hedger
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import QUOTA_TOKENS, SUCCESS_TOKENS, RetryPolicy, quota_of, retry
from aiokv.backends.http.transport import Answer, Timeouts, Transport
from aiokv.errors import CallError, CallTimeoutError, ResponseError
from aiokv.telemetry import TokenRenewed, detached
from aiokv.wire import (
    METHODS,
    Verb,
    check_done_body,
    entry_path,
    error_detail,
    error_for_status,
    parse_retry_after,
    parse_value_body,
    printable,
    ttl_query,
)

_OK = 200
_UNAUTHORIZED = 401
_NOT_FOUND = 404


class _Call(NamedTuple):
    """One get, set or delete, as it goes out and as its errors name it."""

    verb: Verb
    db_name: str
    key: str
    url: URL
    body: bytes | None = None
    # What an answer must not echo into an error.
    value: str = ""


class RemoteBackend:
    """Speak the service's protocol over a pooled session; belongs to one event loop.

    Args:
        url: The service's address, `http(s)://host[:port][/prefix]`.
        credentials: `"<id>:<secret>"`, an object with `authorization`, or None for what the host is entitled to.
        policy: Attempts, timeouts and waits.
        options: The pooled session.
        sleep: Waits between attempts; `asyncio.sleep` but for tests.
        clock: Gives a monotonic time in seconds, for the life of tokens.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._prefix = url.raw_path.rstrip("/")
        self._host = url.authority
        self._sleep = sleep
        self._credentials = choose_credentials(url, credentials)
        self._token_url = token_url(url)
        self._tokens = TokenSource(clock) if self._credentials is not None else None
        self._transport = Transport(options or HttpOptions())
        self._loop = asyncio.get_running_loop()
        self._quota = quota_of(self._host)
        # The last write of each entry: the next one comes after it.
        self._writing: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._hedgers: dict[HedgePolicy, Hedger] = {}
        self._hedger: Hedger | None = None
        self._policy = policy or RetryPolicy()
        self._timeouts = Timeouts(self._policy)

    def with_options(self, policy: RetryPolicy, hedge: HedgePolicy | None) -> Self:
        """Give a backend that shares this one's connections, token and order of writes, and goes by other options.

        Args:
            policy: Attempts, timeouts and waits.
            hedge: When reads are sent a second time; None never.

        Returns:
            The other one; to close either closes both.
        """
        other = copy.copy(self)
        hedger = None if hedge is None else self._hedgers.setdefault(hedge, Hedger(hedge))
        other.__dict__.update(_policy=policy, _timeouts=Timeouts(policy), _hedger=hedger)
        return other

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        return await self._made(self._call("get", db_name, key), self._loop.time())

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        await self._written(self._call("set", db_name, key, query=ttl_query(ttl_seconds), value=value))

    async def delete(self, db_name: str, key: str) -> None:
        """Remove an entry; see `Backend.delete`."""
        await self._written(self._call("delete", db_name, key))

    async def aclose(self) -> None:
        """Close every connection; see `Backend.aclose`."""
        try:
            if self._tokens is not None:
                await self._tokens.aclose()
            for hedger in list(self._hedgers.values()):
                await hedger.aclose()
        finally:
            # Also where whoever closes is cancelled: nobody else could.
            await self._transport.aclose()

    def _call(
        self, verb: Verb, db_name: str, key: str, *, query: dict[str, str] | None = None, value: str | None = None
    ) -> _Call:
        # Encoded by us: yarl would drop "." segments and decode what it thinks safe.
        url = self._url.with_path(self._prefix + entry_path(verb, db_name, key), encoded=True)
        if value is None:
            return _Call(verb, db_name, key, url)
        return _Call(verb, db_name, key, url.with_query(query), value.encode(), value)

    async def _written(self, call: _Call) -> None:
        """Write once the write of the same entry before it is through, or that one might come last."""
        started = self._loop.time()
        entry = (call.db_name, call.key)
        previous = self._writing.get(entry)
        through = self._writing[entry] = self._loop.create_future()
        try:
            if previous is not None:
                await self._wait_for(previous, call, started)
            await self._made(call, started)
        finally:
            if previous is None or previous.done():
                self._let_pass(entry, through)
            else:
                # Whoever gives up waiting lets nobody overtake the one that is still under way.
                previous.add_done_callback(lambda _: self._let_pass(entry, through))

    def _let_pass(self, entry: tuple[str, str], through: "asyncio.Future[None]") -> None:
        through.set_result(None)
        if self._writing.get(entry) is through:
            del self._writing[entry]

    async def _wait_for(self, previous: "asyncio.Future[None]", call: _Call, started: float) -> None:
        await asyncio.wait([previous], timeout=self._policy.total_timeout)
        if not previous.done():
            raise CallTimeoutError(
                "an earlier write of this key was under way until the deadline; nothing was sent",
                verb=call.verb,
                db_name=call.db_name,
                key=call.key,
                host=self._host,
                elapsed=self._loop.time() - started,
                transient=False,
            )

    async def _made(self, call: _Call, started: float) -> str | None:
        """Send a call until it is answered, refused, or out of attempts or time; give the value of a get."""
        deadline = started + self._policy.total_timeout
        try:
            try:
                value = await self._attempt(call, deadline)
            except CallError as error:
                first_error = error
            else:
                if self._quota.tokens < QUOTA_TOKENS:
                    self._quota.refund(SUCCESS_TOKENS)
                return value
            again = partial(self._attempt, call, deadline)
            return await retry(first_error, again, self._policy, deadline, self._quota, self._sleep)
        except CallError as error:
            error.elapsed = self._loop.time() - started
            raise

    async def _attempt(self, call: _Call, deadline: float) -> str | None:
        """Send a call once; where its token is refused, renew that and send it once more."""
        try:
            header = self._tokens.current(self._exchange) if self._tokens is not None else None
            if header is None and self._tokens is not None:
                header = await self._new_header(deadline)
            answer = await self._send(call, header, deadline)
            if answer.status == _UNAUTHORIZED and header is not None:
                header = await self._new_header(deadline, refused=header)
                answer = await self._send(call, header, deadline)
            if answer.status == _OK:
                return _parsed(answer, write=call.verb != "get")
            if answer.status == _NOT_FOUND and call.verb == "get":
                return None
            raise self._refusal(answer, header, secrets=(call.value,), write=call.verb != "get")
        except CallError as error:
            error.verb, error.db_name, error.key, error.host = call.verb, call.db_name, call.key, self._host
            raise

    async def _send(self, call: _Call, header: str | None, deadline: float) -> Answer:
        headers = {} if header is None else {"Authorization": header}
        if call.body is not None:
            headers["Content-Type"] = "text/plain; charset=utf-8"
        if self._hedger is None or call.verb != "get":
            return await self._transport.request(METHODS[call.verb], call.url, headers, call.body, self._timeouts, deadline)
        send = partial(self._transport.request, "GET", call.url, headers, None, self._timeouts, deadline)
        return await self._hedger.first_of(send, is_good=_is_good, may_hedge=lambda: not self._transport.busy)

    async def _new_header(self, deadline: float, refused: str | None = None) -> str | None:
        if self._tokens is None:
            return None
        try:
            async with asyncio.timeout_at(deadline):
                return await self._tokens.renewed(self._exchange, refused)
        except TimeoutError as error:
            if isinstance(error, CallError):
                raise
            raise CallTimeoutError("no token in time", transient=False) from error

    async def _exchange(self) -> Token:
        """Exchange the credentials for a token, and tell of it whoever watches the call that needs it."""
        watched = detached()
        if watched is None:
            return await self._exchanged()
        started = self._loop.time()
        try:
            token = await self._exchanged()
        except BaseException as error:
            watched.tell(TokenRenewed(str(self._token_url), self._loop.time() - started, error))
            raise
        watched.tell(TokenRenewed(str(self._token_url), self._loop.time() - started, None))
        return token

    async def _exchanged(self) -> Token:
        """Exchange the credentials for a token, with the retries of any call."""
        if self._credentials is None:
            raise AssertionError("a token source exists only where credentials do")
        deadline = self._loop.time() + self._policy.total_timeout
        try:
            async with asyncio.timeout_at(deadline):
                authorization = await self._credentials.authorization()
        except TimeoutError as error:
            raise CallTimeoutError("the credentials were not given in time", transient=False) from error
        headers = {"Authorization": authorization, "Content-Type": "application/json"}

        async def attempt() -> Token:
            answer = await self._transport.request("POST", self._token_url, headers, b"{}", self._timeouts, deadline)
            if answer.status != _OK:
                raise self._refusal(answer, headers["Authorization"])
            return parse_token(answer)

        quota = quota_of(self._token_url.authority)
        try:
            try:
                token = await attempt()
            except CallError as error:
                first_error = error
            else:
                quota.refund(SUCCESS_TOKENS)
                return token
            return await retry(first_error, attempt, self._policy, deadline, quota, self._sleep)
        except CallError as error:
            # To the call that waits for the token this is final: the exchange has had its attempts, and nothing was stored.
            error.reason = f"exchanging credentials for a token at {self._token_url.authority}: {error.reason}"
            error.transient = False
            error.maybe_applied = False
            raise

    def _refusal(self, answer: Answer, header: str | None, *, secrets: tuple[str, ...] = (), write: bool = False) -> CallError:
        # The header's second word is the token or the key, and a key's second half is the secret.
        token = (header or "").partition(" ")[2]
        detail = error_detail(answer.body, (token, token.partition(":")[2], *secrets))
        if answer.status == _UNAUTHORIZED:
            detail += "; check the credentials" if header else "; pass credentials='<id>:<secret>' or set AIOKV_KEY"
        elif answer.headers.get("Location"):
            detail += "; redirects are not followed, name the final address"
        error = error_for_status(
            answer.status,
            detail,
            retry_after=parse_retry_after(answer.headers.get("Retry-After")),
            write=write,
        )
        error.request_id = _request_id(answer)
        return error


def _is_good(answer: Answer) -> bool:
    """Say whether a read's answer is worth not waiting for another."""
    return answer.status in {_OK, _NOT_FOUND}


def _parsed(answer: Answer, *, write: bool) -> str | None:
    """Read a 200: the value of a get, nothing of a write."""
    try:
        if not write:
            return parse_value_body(answer.body)
        check_done_body(answer.body)
    except ValueError as error:
        reason = str(error)
    else:
        return None
    # Never asked for again: what answered once so will do so again.
    raise ResponseError(reason, status=answer.status, request_id=_request_id(answer), maybe_applied=write)


def _request_id(answer: Answer) -> str | None:
    request_id = answer.headers.get("X-Fal-Request-Id") or answer.headers.get("X-Request-Id")
    return printable(request_id) if request_id else None
