"""A store behind HTTP: fal's service, or `aiokv serve`."""

import asyncio
import copy
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, Self

from yarl import URL

from aiokv.backends.http.availability import availability_of
from aiokv.backends.http.credentials import choose_credentials, find_authorization, token_url
from aiokv.backends.http.hedge import HedgePolicy, Hedger
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import QUOTA_TOKENS, SUCCESS_TOKENS, RetryPolicy, quota_of, retry
from aiokv.backends.http.tokens import Token, TokenSource, parse_token
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
    redact,
    ttl_query,
)

_OK = 200
_UNAUTHORIZED = 401
_FORBIDDEN = 403
_NOT_FOUND = 404


class _Call(NamedTuple):
    """One get, set or delete: what is sent, and what its errors name."""

    verb: Verb
    db_name: str
    key: str
    url: URL
    body: bytes | None = None
    # No error may repeat it, though an answer may echo it.
    value: str = ""


class RemoteBackend:
    """A client of the service's protocol over a pooled session; belongs to one event loop.

    Args:
        url: The service's address, `http(s)://host[:port][/prefix]`.
        credentials: `"<id>:<secret>"`, an object with `authorization`, or None for those of the environment.
        policy: Attempts, timeouts and waits.
        options: The pooled session.
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
        self._availability = availability_of(url)
        # The last write of each entry, which the next one waits for.
        self._last_writes: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._hedgers: dict[HedgePolicy, Hedger] = {}
        self._hedger: Hedger | None = None
        self._policy = policy or RetryPolicy()
        self._timeouts = Timeouts(self._policy)

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
        other.__dict__.update(_policy=policy, _timeouts=Timeouts(policy), _hedger=hedger)
        return other

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        return await self._run(self._call("get", db_name, key), self._loop.time())

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        await self._write(self._call("set", db_name, key, query=ttl_query(ttl_seconds), value=value))

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        await self._write(self._call("delete", db_name, key))

    async def aclose(self) -> None:
        """Close every connection; see `Backend.aclose`."""
        try:
            if self._tokens is not None:
                await self._tokens.aclose()
            for hedger in list(self._hedgers.values()):
                await hedger.aclose()
        finally:
            # Also where this task is cancelled: no other could close it.
            await self._transport.aclose()

    def _call(
        self, verb: Verb, db_name: str, key: str, *, query: dict[str, str] | None = None, value: str | None = None
    ) -> _Call:
        # Encoded here: yarl would drop "." segments and decode what it thinks safe.
        url = self._url.with_path(self._prefix + entry_path(verb, db_name, key), encoded=True)
        if value is None:
            return _Call(verb, db_name, key, url)
        return _Call(verb, db_name, key, url.with_query(query), value.encode(), value)

    async def _write(self, call: _Call) -> None:
        """Write after the earlier write of the same entry has ended; otherwise the earlier one might land last."""
        started = self._loop.time()
        entry = (call.db_name, call.key)
        previous = self._last_writes.get(entry)
        ended = self._last_writes[entry] = self._loop.create_future()
        try:
            if previous is not None:
                await self._wait_for(previous, call, started)
            await self._run(call, started)
        finally:
            if previous is None or previous.done():
                self._end_write(entry, ended)
            else:
                # We gave up, but the earlier write still runs: later writes must wait for it.
                previous.add_done_callback(lambda _: self._end_write(entry, ended))

    def _end_write(self, entry: tuple[str, str], ended: "asyncio.Future[None]") -> None:
        ended.set_result(None)
        if self._last_writes.get(entry) is ended:
            del self._last_writes[entry]

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

    async def _run(self, call: _Call, started: float) -> str | None:
        """Send a call until it is answered, refused, or out of attempts or time; return the value of a get."""
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
        """Send a call once; where its token is refused, renew that and send the call once more."""
        try:
            header = self._tokens.current(self._exchange) if self._tokens is not None else None
            if header is None and self._tokens is not None:
                header = await self._new_header(deadline)
            answer = await self._send(call, header, deadline)
            if answer.status == _UNAUTHORIZED and header is not None:
                header = await self._new_header(deadline, refused=header)
                answer = await self._send(call, header, deadline)
            if answer.status == _OK:
                return self._parse_answer(call, answer, header)
            if answer.status == _NOT_FOUND and call.verb == "get":
                return None
            raise self._refused_call(call, answer, header)
        except CallError as error:
            error.verb, error.db_name, error.key, error.host = call.verb, call.db_name, call.key, self._host
            raise

    async def _send(self, call: _Call, header: str | None, deadline: float) -> Answer:
        headers = {} if header is None else {"Authorization": header}
        if call.body is not None:
            headers["Content-Type"] = "text/plain; charset=utf-8"
        if self._hedger is None or call.verb != "get":
            return await self._transport.request(
                METHODS[call.verb], call.url, headers, call.body, self._timeouts, deadline, self._availability
            )
        send = partial(self._transport.request, "GET", call.url, headers, None, self._timeouts, deadline, self._availability)
        return await self._hedger.first_of(send, is_good=_is_good, may_hedge=lambda: not self._transport.busy)

    async def _new_header(self, deadline: float, refused: str | None = None) -> str | None:
        if self._tokens is None:
            return None
        try:
            async with asyncio.timeout_at(deadline):
                return await self._tokens.wait_for_token(self._exchange, refused)
        except TimeoutError as error:
            if isinstance(error, CallError):
                raise
            raise CallTimeoutError(
                f"the token exchange at {self._token_url.authority} did not end before the deadline", transient=False
            ) from error

    async def _exchange(self) -> Token:
        """Exchange the credentials for a token, and notify the observer of the call that needs it."""
        observed = detached()
        if observed is None:
            return await self._exchange_unobserved()
        started = self._loop.time()
        try:
            token = await self._exchange_unobserved()
        except BaseException as error:
            observed.notify(TokenRenewed(str(self._token_url), self._loop.time() - started, error))
            raise
        observed.notify(TokenRenewed(str(self._token_url), self._loop.time() - started, None))
        return token

    async def _exchange_unobserved(self) -> Token:
        """Exchange the credentials for a token, with the retries of any call."""
        if self._credentials is None:
            raise AssertionError("a token source exists only where credentials do")
        deadline = self._loop.time() + self._policy.total_timeout
        try:
            async with asyncio.timeout_at(deadline):
                authorization, source = await find_authorization(self._credentials)
        except TimeoutError as error:
            raise CallTimeoutError(
                f"the credentials were not found within {self._policy.total_timeout:g} s "
                f"(`authorization` of {type(self._credentials).__name__})",
                transient=False,
            ) from error
        headers = {"Authorization": authorization, "Content-Type": "application/json"}

        host, secrets = availability_of(self._token_url), _secrets_of(authorization)

        async def attempt() -> Token:
            answer = await self._transport.request("POST", self._token_url, headers, b"{}", self._timeouts, deadline, host)
            if answer.status != _OK:
                raise _refused_exchange(answer, authorization, source)
            return parse_token(answer, source, secrets)

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
            # Final for the call that waits for the token: the exchange has had its attempts, and the call was not sent.
            error.reason = f"the token exchange at {self._token_url.authority} failed: {error.reason}"
            error.transient = False
            error.maybe_applied = False
            raise

    def _parse_answer(self, call: _Call, answer: Answer, header: str | None) -> str | None:
        """Return the value of a get's 200; check the 200 of a write."""
        write = call.verb != "get"
        try:
            if not write:
                return parse_value_body(answer.body)
            check_done_body(answer.body)
        except ValueError as error:
            reason = str(error)
        else:
            return None
        # Not tried again: the next answer would be the same.
        request_id = _request_id(answer, self._secrets(call, header))
        raise ResponseError(reason, status=answer.status, request_id=request_id, maybe_applied=write)

    def _secrets(self, call: _Call, header: str | None) -> tuple[str, ...]:
        """Return what an answer may echo, and no message may repeat."""
        of_credentials = () if self._tokens is None else self._tokens.secrets
        return (*_secrets_of(header), *of_credentials, call.value)

    def _refused_call(self, call: _Call, answer: Answer, header: str | None) -> CallError:
        error = _error_of(answer, self._secrets(call, header), write=call.verb != "get")
        if answer.status in {_UNAUTHORIZED, _FORBIDDEN}:
            if header is None or self._tokens is None:
                error.reason += "; no credentials were sent: pass credentials='<id>:<secret>' or set AIOKV_KEY"
            else:
                error.reason += (
                    f"; the credentials ({self._tokens.source}) were exchanged for a token, and the service refused the call "
                    "with it: check that they may use this store"
                )
        return error


def _refused_exchange(answer: Answer, authorization: str, source: str) -> CallError:
    error = _error_of(answer, _secrets_of(authorization), write=False)
    if answer.status in {_UNAUTHORIZED, _FORBIDDEN}:
        error.reason += f"; the credentials were refused: check {source}"
    return error


def _secrets_of(header: str | None) -> tuple[str, ...]:
    # The header's second word is the token or the key, and a key's second half is the secret.
    secret = (header or "").partition(" ")[2]
    return (secret, secret.partition(":")[2])


def _error_of(answer: Answer, secrets: tuple[str, ...], *, write: bool) -> CallError:
    detail = error_detail(answer.body, secrets)
    if answer.headers.get("Location"):
        detail += "; redirects are not followed, name the final address"
    error = error_for_status(
        answer.status, detail, retry_after=parse_retry_after(answer.headers.get("Retry-After")), write=write
    )
    error.request_id = _request_id(answer, secrets)
    return error


def _is_good(answer: Answer) -> bool:
    """Return whether a read's answer makes a second one needless."""
    return answer.status in {_OK, _NOT_FOUND}


def _request_id(answer: Answer, secrets: tuple[str, ...]) -> str | None:
    request_id = answer.headers.get("X-Fal-Request-Id") or answer.headers.get("X-Request-Id")
    return printable(redact(request_id, secrets)) if request_id else None
