"""Calls of a service: what is sent, how often, with which token, in which order; the answers and errors they end with."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from yarl import URL

from aiokv.backends.http.answers import check_absent, error_of, id_of_request, is_good, refused_exchange, secrets_of
from aiokv.backends.http.availability import availability_of
from aiokv.backends.http.credentials import choose_credentials, find_authorization, is_fal_host, token_url
from aiokv.backends.http.extensions import EXTENSIONS, Extensions
from aiokv.backends.http.hedge import Hedger
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import QUOTA_TOKENS, SUCCESS_TOKENS, RetryPolicy, quota_of, retry
from aiokv.backends.http.room import LARGE_BYTES
from aiokv.backends.http.tokens import Token, TokenSource, parse_token
from aiokv.backends.http.transport import Answer, Request, Timeouts, Transport
from aiokv.backends.http.write_order import Turn, WriteOrder
from aiokv.errors import CallError, CallTimeoutError, ResponseError
from aiokv.telemetry import TokenRenewed, detached
from aiokv.wire import (
    METHODS,
    Verb,
    check_done_body,
    entry_path,
    parse_value_body,
    ttl_query,
)

_OK = 200
_UNAUTHORIZED = 401
_FORBIDDEN = 403
_NOT_FOUND = 404
# Reads that may be sent a second time where they are late.
_HEDGED = frozenset({"get", "get_many"})


class Call(Request):
    """One call: what is sent, and what its errors name.

    Args:
        verb: The name of the call.
        db_name: The namespace.
        key: The key; of a listing the prefix.
        url: The address, percent-encoded.
        method: The HTTP method.
        write: Whether it changes something.
        body: The request's body.
        values: What no error may repeat, though an answer may echo it.
    """

    content_type = "text/plain; charset=utf-8"
    extension = ""
    other_status = _OK

    def __init__(  # noqa: PLR0913, PLR0917 (what a call is)
        self,
        verb: str,
        db_name: str,
        key: str,
        url: URL,
        method: str,
        write: bool,  # noqa: FBT001 (made in few places)
        body: bytes | None = None,
        values: tuple[str, ...] = (),
    ) -> None:
        # Not by the base class's: that would be one more call.
        self.verb = verb
        self.db_name = db_name
        self.key = key
        self.url = url
        self.method = method
        self.write = write
        self.body = body
        self.values = values

    def parse(self, answer: Answer, _calls: "Calls", _header: str | None) -> Any:
        """Make the result of the call of an answer that has status 200 or `other_status`.

        Args:
            answer: The answer.
            _calls: Know what no message may repeat.
            _header: The Authorization header of the call.

        Returns:
            The value of a get, None for a set and a delete.

        Raises:
            ValueError: It is no such answer.
        """
        if not self.write:
            return parse_value_body(answer.body)
        check_done_body(answer.body)
        return None


class Calls:
    """The calls of one service over a pooled session; belongs to one event loop.

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
        self.host = url.authority
        self.sleep = sleep
        self._credentials = choose_credentials(url, credentials)
        self._token_url = token_url(url)
        self._tokens = TokenSource(clock) if self._credentials is not None else None
        self._transport = Transport(options or HttpOptions())
        self.loop = asyncio.get_running_loop()
        self._quota = quota_of(self.host)
        self._availability = availability_of(url)
        self._writes = WriteOrder()
        self._last_writes = self._writes.last
        self.is_fal = is_fal_host(url.host)
        self.extensions = Extensions(is_trusted=not self.is_fal)
        self._hedger: Hedger | None = None
        self.policy = policy or RetryPolicy()
        self._timeouts = Timeouts(self.policy)

    def get_call(self, db_name: str, key: str) -> Call:
        """Make a get.

        Args:
            db_name: The namespace.
            key: The key.

        Returns:
            The call.
        """
        # Encoded here: yarl would drop "." segments and decode what it thinks safe.
        url = self._url.with_path(self._prefix + entry_path("get", db_name, key), encoded=True)
        return Call("get", db_name, key, url, "GET", False)

    def entry_call(self, verb: Verb, db_name: str, key: str, value: str | None = None, ttl_seconds: int = 0) -> Call:
        """Make a get, set or delete.

        Args:
            verb: Which of them.
            db_name: The namespace.
            key: The key.
            value: The value of a set.
            ttl_seconds: Its time to live.

        Returns:
            The call.
        """
        url = self._url.with_path(self._prefix + entry_path(verb, db_name, key), encoded=True)
        if value is None:
            return Call(verb, db_name, key, url, METHODS[verb], verb != "get")
        return Call(verb, db_name, key, url.with_query(ttl_query(ttl_seconds)), "PUT", True, value.encode(), (value,))

    def extension_url(self, path_and_query: str) -> URL:
        """Return the address of a call of an extension, of its percent-encoded path and query."""
        return URL(f"{self._url.scheme}://{self._url.raw_authority}{self._prefix}{path_and_query}", encoded=True)

    async def write(self, call: Call) -> None:
        """Write after the earlier write of the same entry has ended; otherwise the earlier one might land last.

        Args:
            call: A set or a delete.

        Raises:
            CallError: It failed.
        """
        started = self.loop.time()
        turn = self._writes.enter((call.db_name, call.key))
        try:
            if turn.previous:
                await self.wait_for_turn(turn, call.verb, call.db_name, call.key, started)
            await self.run(call, started)
        finally:
            self._writes.leave(turn)

    async def wait_for_turn(self, turn: Turn, verb: str, db_name: str, key: str, started: float) -> None:
        """Wait until the earlier writes of the same entries have ended.

        Args:
            turn: The place in the order.
            verb: What waits.
            db_name: The namespace.
            key: The key; "" for many.
            started: When it began.

        Raises:
            CallTimeoutError: They had not ended by the call's deadline.
        """
        if not await turn.come(started + self.policy.total_timeout - self.loop.time()):
            raise CallTimeoutError(
                "an earlier write of this key was under way until the deadline; nothing was sent",
                verb=verb,
                db_name=db_name,
                key=key,
                host=self.host,
                elapsed=self.loop.time() - started,
                transient=False,
            )

    async def run(self, call: Call, started: float, attempt: Callable[[Call, float], Awaitable[Any]] | None = None) -> Any:
        """Send a call until it is answered, refused, or out of attempts or time.

        Args:
            call: The call.
            started: The loop's time at which it began.
            attempt: Makes one attempt, given the call and its deadline; None for `attempt`.

        Returns:
            What `call.parse` makes of the answer; the value of a get, None for a set and a delete.

        Raises:
            CallError: It failed.
        """
        send = self.attempt if attempt is None else attempt
        deadline = started + self.policy.total_timeout
        try:
            try:
                value = await send(call, deadline)
            except CallError as error:
                first_error = error
            else:
                if self._quota.tokens < QUOTA_TOKENS:
                    self._quota.refund(SUCCESS_TOKENS)
                return value
            again = partial(send, call, deadline)
            return await retry(first_error, again, self.policy, deadline, self._quota, self.sleep)
        except CallError as error:
            error.elapsed = self.loop.time() - started
            raise

    async def attempt(self, call: Call, deadline: float) -> Any:
        """Send a call once; where its token is refused, renew that and send the call once more.

        Args:
            call: The call.
            deadline: The loop's time by which it must be answered.

        Returns:
            As for `run`.

        Raises:
            CallError: It failed.
        """
        try:
            header = self._tokens.current(self._exchange) if self._tokens is not None else None
            if header is None and self._tokens is not None:
                header = await self._new_header(deadline)
            answer = await self._send(call, header, deadline)
            if answer.status == _UNAUTHORIZED and header is not None:
                header = await self._new_header(deadline, refused=header)
                answer = await self._send(call, header, deadline)
            if answer.headers.get(EXTENSIONS) != self.extensions.told:
                self.extensions.learn(answer.headers.get(EXTENSIONS), answer.status)
            if call.extension:
                self.extensions.check(call.extension, answer.status, write=call.write)
            if answer.status in {_OK, call.other_status}:
                return self._parse_answer(call, answer, header)
            if answer.status == _NOT_FOUND and call.verb == "get":
                check_absent(answer)
                return None
            raise self._refused_call(call, answer, header)
        except CallError as error:
            error.verb, error.db_name, error.key, error.host = call.verb, call.db_name, call.key, self.host
            raise

    async def _send(self, call: Call, header: str | None, deadline: float) -> Answer:
        headers = {} if header is None else {"Authorization": header}
        if call.body is not None:
            headers["Content-Type"] = call.content_type
            if call.write and len(call.body) > LARGE_BYTES:
                return await self._transport.request_large(call, headers, self._timeouts, deadline, self._availability)
        if self._hedger is None or call.verb not in _HEDGED:
            return await self._transport.request(call, headers, self._timeouts, deadline, self._availability)
        send = partial(self._transport.request, call, headers, self._timeouts, deadline, self._availability)
        return await self._hedger.first_of(send, is_good=is_good, may_hedge=lambda: not self._transport.busy)

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
        started = self.loop.time()
        try:
            token = await self._exchange_unobserved()
        except BaseException as error:
            observed.notify(TokenRenewed(str(self._token_url), self.loop.time() - started, error))
            raise
        observed.notify(TokenRenewed(str(self._token_url), self.loop.time() - started, None))
        return token

    async def _exchange_unobserved(self) -> Token:
        """Exchange the credentials for a token, with the retries of any call."""
        if self._credentials is None:
            raise AssertionError("a token source exists only where credentials do")
        deadline = self.loop.time() + self.policy.total_timeout
        try:
            async with asyncio.timeout_at(deadline):
                authorization, source = await find_authorization(self._credentials)
        except TimeoutError as error:
            raise CallTimeoutError(
                f"the credentials were not found within {self.policy.total_timeout:g} s "
                f"(`authorization` of {type(self._credentials).__name__})",
                transient=False,
            ) from error
        headers = {"Authorization": authorization, "Content-Type": "application/json"}

        host, secrets = availability_of(self._token_url), secrets_of(authorization)

        async def attempt() -> Token:
            request = Request("POST", self._token_url, b"{}", write=True)
            answer = await self._transport.request(request, headers, self._timeouts, deadline, host)
            if answer.status != _OK:
                raise refused_exchange(answer, authorization, source)
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
            return await retry(first_error, attempt, self.policy, deadline, quota, self.sleep)
        except CallError as error:
            # Final for the call that waits for the token: the exchange has had its attempts, and the call was not sent.
            error.reason = f"the token exchange at {self._token_url.authority} failed: {error.reason}"
            error.transient = False
            error.maybe_applied = False
            raise

    def _parse_answer(self, call: Call, answer: Answer, header: str | None) -> Any:
        """Return the result of a call that succeeded; check the 200 of a write."""
        try:
            return call.parse(answer, self, header)
        except ValueError as error:
            reason = str(error)
        if answer.status != _OK:
            raise self._refused_call(call, answer, header)
        # Not tried again: the next answer would be the same.
        request_id = id_of_request(answer, self.secrets_of_call(call, header))
        raise ResponseError(reason, status=answer.status, request_id=request_id, maybe_applied=call.write)

    def secrets_of_call(self, call: Call, header: str | None) -> tuple[str, ...]:
        """Return what an answer may echo, and no message may repeat.

        Args:
            call: The call.
            header: Its Authorization header.

        Returns:
            The token, the secrets of the credentials, and the call's values.
        """
        of_credentials = () if self._tokens is None else self._tokens.secrets
        return (*secrets_of(header), *of_credentials, *call.values)

    def _refused_call(self, call: Call, answer: Answer, header: str | None) -> CallError:
        error = error_of(answer, self.secrets_of_call(call, header), write=call.write)
        if answer.status in {_UNAUTHORIZED, _FORBIDDEN}:
            if header is None or self._tokens is None:
                error.reason += "; no credentials were sent: pass credentials='<id>:<secret>' or set AIOKV_KEY"
            else:
                error.reason += (
                    f"; the credentials ({self._tokens.source}) were exchanged for a token, and the service refused the call "
                    "with it: check that they may use this store"
                )
        return error
