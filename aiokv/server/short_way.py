"""The short way of gets and sets: bytes in, bytes out, where nothing about a request is new but its names and its value.

A client sends the same headers with each of its requests. Where a request has headers that were parsed and accepted before,
and its first line is plain, its answer follows from a few look-ups. Everything else goes the long way, by `requests`,
`connection` and `service`, which answers the same: tests hold the two against each other.
"""

import re
from asyncio import get_running_loop
from codecs import ascii_decode
from collections.abc import Sequence
from time import perf_counter
from typing import Final, Protocol, TypeVar

import orjson

from aiokv.backends.base import WouldWaitError
from aiokv.limits import DEFAULT_TTL_SECONDS, MAX_TTL_SECONDS, MIN_TTL_SECONDS
from aiokv.server.answers import ABSENT, DONE, Answer
from aiokv.server.budget import SMALL_BYTES
from aiokv.server.requests import MalformedRequestError, Request, RequestParser
from aiokv.server.service import Service
from aiokv.server.statistics import GET, SET, Statistics

T = TypeVar("T", str, bytes)

# Names that need neither decoding nor a closer look, as `aiokv.wire.parse_entry_path` takes them.
_NAMES = r"([A-Za-z0-9][A-Za-z0-9._~-]{0,63})/([A-Za-z0-9][A-Za-z0-9._~:-]{0,499})"
_PLAIN_GET = re.compile(rf"GET /get/{_NAMES} HTTP/1\.1\r\n")
_PLAIN_SET = re.compile(rf"PUT /set/{_NAMES}(?:\?ttl=([1-9][0-9]{{1,6}}))? HTTP/1\.1(?=\r\n)".encode())
_LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]{1,5})\r\n", re.IGNORECASE)
_MAX_LEARNT = 512
_MAX_SEEN = 4096
_MAX_HEADERS_BYTES = 1024
# Other headers that decide something want a closer look.
_OF_GETS = frozenset({b"host", b"authorization"})
_OF_SETS = frozenset({*_OF_GETS, b"content-length"})
_CLIENT_LEFT = 499
_MOST_GATHERED = 64
# Made once: writing out a number costs more than all the rest of a head.
_LENGTHS = tuple(b"%d\r\n\r\n" % length for length in range(1024))

LATER: Final = b""
"""The asker gets its answer in this turn of the loop or in one to come."""


class Asker(Protocol):
    """A connection that waits for an answer."""

    def take_answer(self, answer: bytes) -> bool:
        """Send the answer; return whether the client is still there."""
        ...

    def take_long_way(self, data: bytes) -> None:
        """Answer the request in the long way."""
        ...

    def abort(self) -> None:
        """Cut the connection: no answer will come."""
        ...


class ShortWay:
    """Answers plain gets and sets.

    Where many reads in one step cost less, those of one turn of the loop are gathered.

    Args:
        service: What the long way asks.
        statistics: Counts each answer.
    """

    def __init__(self, service: Service, statistics: Statistics) -> None:
        self._service = service
        self._statistics = statistics
        self._admission = service.admission
        self._access = service.access
        self._has_rates = service.admission.has_rates
        self._get_now = service.get_now
        self._get_all_now = service.get_all_now
        # The Authorization header of headers that hold nothing else that decides, None for other headers. Those of sets are
        # without the digits of the length.
        self._learnt_of_gets: dict[str, str | None] = {}
        self._learnt_of_sets: dict[bytes, str | None] = {}
        self._seen: set[int] = set()
        self._gathered: list[tuple[Asker, str, str, float, tuple[str, str]]] = []
        self._date = self._found_start = self._absent = self._done = b""

    def answer(self, data: memoryview, date: bytes, asker: Asker) -> bytes | None:
        """Answer a request.

        Args:
            data: What has arrived on a connection on which nothing is under way.
            date: The Date header's line.
            asker: The connection. Where the answer comes later, its further requests have to wait.

        Returns:
            The answer, `LATER`, or None where the request has to go the long way.
        """
        if date is not self._date:
            self._renew(date)
        if data[0] == b"G"[0]:
            return None if self._get_now is None else self._get(data, asker)
        return self._set(data, asker) if data[0] == b"P"[0] else None

    def _get(self, data: memoryview, asker: Asker) -> bytes | None:
        try:
            text, _ = ascii_decode(data)
        except UnicodeDecodeError:
            return None
        line = _PLAIN_GET.match(text)
        headers = "" if line is None else text[line.end() :]
        authorization = self._learnt_of_gets.get(headers)
        if line is None or (authorization is None and (authorization := self._learn_get(headers)) is None):
            return None
        started = perf_counter()
        db_name, key = line.groups()
        account = ""
        if self._access is not None:
            account, db_name = self._admission.owner_of("get", db_name, authorization)
        if not db_name or (self._has_rates and self._admission.quotas.admit(account)):
            return None
        if self._get_all_now is not None:
            self._gather(asker, text, account, started, (db_name, key))
            return LATER
        try:
            value: str | Exception | None = self._get_now(db_name, key)  # type: ignore[misc]  # there: see `answer`
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            value = error
        return self._answer_with(value, account, started)

    def _answer_with(self, value: str | Exception | None, account: str, started: float) -> bytes | None:
        if isinstance(value, str):
            body = orjson.dumps({"value": value})
            size_bytes = len(body)
            if size_bytes > SMALL_BYTES:
                self._count_no_more(account)
                return None
            self._statistics.found.add(perf_counter() - started, 0, size_bytes)
            length = _LENGTHS[size_bytes] if size_bytes < len(_LENGTHS) else b"%d\r\n\r\n" % size_bytes
            return b"".join((self._found_start, length, body))
        if isinstance(value, WouldWaitError):
            self._count_no_more(account)
            return None
        answer = ABSENT if value is None else self._service.answer_fault(value)
        self._statistics.record(GET, answer.status, perf_counter() - started, 0, len(answer.body))
        return self._absent if value is None else answer.head(self._date, b"", answer.body)

    def _count_no_more(self, account: str) -> None:
        """Take back that a request was counted: the long way counts it again."""
        if self._has_rates:
            self._admission.quotas.give_back(account)

    def _gather(self, asker: Asker, text: str, account: str, started: float, name: tuple[str, str]) -> None:
        if not self._gathered:
            get_running_loop().call_soon(self._answer_gathered)
        self._gathered.append((asker, text, account, started, name))

    def _answer_gathered(self) -> None:
        gathered, self._gathered = self._gathered[:_MOST_GATHERED], self._gathered[_MOST_GATHERED:]
        if self._gathered:
            get_running_loop().call_soon(self._answer_gathered)
        if self._get_all_now is None:
            return
        values: Sequence[str | Exception | None]
        try:
            values = self._get_all_now([name for _, _, _, _, name in gathered])
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            values = [error] * len(gathered)
        for (asker, text, account, started, _), value in zip(gathered, values, strict=True):
            try:
                answer = self._answer_with(value, account, started)
                if answer is None:
                    asker.take_long_way(text.encode())
                else:
                    asker.take_answer(answer)
            except Exception as fault:  # noqa: BLE001 (one must not keep the others waiting)
                asker.abort()
                get_running_loop().call_exception_handler({"message": "a get could not be answered", "exception": fault})

    def _set(self, data: memoryview, asker: Asker) -> bytes | None:
        set_soon, quotas, budget = self._service.set_soon, self._admission.quotas, self._admission.budget
        plain = None if set_soon is None else self._parse_set(bytes(data))
        if plain is None or set_soon is None:
            return None
        account, db_name, key, value, size_bytes, ttl_seconds = plain
        if quotas.check_set(account, db_name, key, size_bytes) is not None:
            return None
        if self._has_rates and quotas.admit(account):
            return None
        if not budget.take(account, size_bytes, is_large=False):
            return None
        started = perf_counter()
        counted_set: int | None = None

        def done(error: Exception | None) -> None:
            budget.give_back(account, size_bytes)
            if counted_set is not None:
                quotas.end_set(account, counted_set)
            self._answer_set(error, asker, started, size_bytes)

        try:
            set_soon(db_name, key, value, ttl_seconds, done)
        except WouldWaitError:
            budget.give_back(account, size_bytes)
            self._count_no_more(account)
            return None
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            # In the loop's next step, as every other end of a set.
            get_running_loop().call_soon(done, error)
        counted_set = quotas.begin_set(account, size_bytes, (db_name, key))
        return LATER

    def _answer_set(self, error: Exception | None, asker: Asker, started: float, size_bytes: int) -> None:
        if error is None and asker.take_answer(self._done):
            self._statistics.stored.add(perf_counter() - started, size_bytes, len(DONE.body))
            return
        answer = DONE if error is None else self._service.answer_fault(error)
        is_sent = error is not None and asker.take_answer(answer.head(self._date, b"", answer.body))
        status, bytes_out = (answer.status, len(answer.body)) if is_sent else (_CLIENT_LEFT, 0)
        self._statistics.record(SET, status, perf_counter() - started, size_bytes, bytes_out)
        if answer.reason:
            self._statistics.refused(answer.reason)  # type: ignore[arg-type]  # a fault's reason is a known one

    def _parse_set(self, sent: bytes) -> tuple[str, str, str, str, int, int] | None:
        """Return account, namespace, key, value, its bytes and time to live of a set that is plain, whole and allowed."""
        line = _PLAIN_SET.match(sent)
        body_start = sent.find(b"\r\n\r\n") + 4
        length = None if line is None else _LENGTH.search(sent, line.end(), body_start)
        size_bytes = len(sent) - body_start
        if line is None or length is None or int(length[1]) != size_bytes:
            return None
        headers = sent[line.end() : length.start(1)] + sent[length.end(1) : body_start]
        authorization = self._learnt_of_sets.get(headers)
        if authorization is None and (authorization := self._learn_set(sent[line.end() :], headers)) is None:
            return None
        ttl_seconds = DEFAULT_TTL_SECONDS if line[3] is None else int(line[3])
        db_name, account = line[1].decode(), ""
        if self._access is not None:
            account, db_name = self._admission.owner_of("set", db_name, authorization)
        if not db_name or not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
            return None
        try:
            value = sent[body_start:].decode()
        except UnicodeDecodeError:
            return None
        return account, db_name, line[2].decode(), value, size_bytes, ttl_seconds

    def _learn_get(self, headers: str) -> str | None:
        return self._learn(self._learnt_of_gets, headers, b"GET / HTTP/1.1\r\n" + headers.encode(), _OF_GETS)

    def _learn_set(self, headers_and_body: bytes, headers: bytes) -> str | None:
        return self._learn(self._learnt_of_sets, headers, b"PUT / HTTP/1.1" + headers_and_body, _OF_SETS)

    def _learn(self, learnt: dict[T, str | None], headers: T, sent: bytes, allowed: frozenset[bytes]) -> str | None:
        """Return the Authorization header of headers that the long way accepts, "" where they have none; None for others."""
        # Headers that come once are not worth a look.
        if headers in learnt or not self._has_seen(hash(headers)):
            return None
        if len(learnt) >= _MAX_LEARNT:
            learnt.clear()
        fields = self._fields_of(sent, allowed) if len(headers) <= _MAX_HEADERS_BYTES else None
        learnt[headers] = None if fields is None else fields.get(b"authorization", b"").decode("latin-1")
        return learnt[headers]

    def _has_seen(self, headers_hash: int) -> bool:
        if headers_hash in self._seen:
            return True
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen.add(headers_hash)
        return False

    def _fields_of(self, sent: bytes, allowed: frozenset[bytes]) -> dict[bytes, bytes] | None:
        """Parse what should be one whole request that says no more than usual."""
        told = _Told()
        parser = RequestParser(told, len(sent))
        try:
            parser.feed(sent)
        except MalformedRequestError:
            return None
        finally:
            parser.close()
        if not parser.is_fresh or len(told.requests) != 1 or not told.requests[0].keep_alive:
            return None
        fields = told.requests[0].fields
        return fields if allowed.issuperset(fields) and self._admission.admits_host(fields[b"host"]) else None

    def _renew(self, date: bytes) -> None:
        self._date = date
        self._found_start = Answer(200, b"").head(date).removesuffix(b"0\r\n\r\n")
        self._absent = ABSENT.head(date, b"", ABSENT.body)
        self._done = DONE.head(date, b"", DONE.body)


class _Told:
    """What a parser told of."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def head_received(self, request: Request) -> None:
        self.requests.append(request)

    def body_received(self, data: bytes) -> None:
        pass

    def request_received(self) -> None:
        pass
