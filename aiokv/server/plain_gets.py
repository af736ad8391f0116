"""The short way of a get: bytes in, bytes out, where nothing about the request is new but its key.

A client sends the same headers with every get. Where a request that was parsed, checked and answered before had the same
headers, and this one's first line is plain, its answer follows from a few look-ups. Everything else goes the long way, by
`requests`, `connection` and `service`, which answers the same: a test holds the two against each other.
"""

import re
from asyncio import get_running_loop
from codecs import ascii_decode
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol

import orjson

from aiokv.backends.base import WouldWaitError
from aiokv.server.access import AccessFile
from aiokv.server.answers import Answer
from aiokv.server.budget import SMALL_BYTES
from aiokv.server.quotas import Quotas
from aiokv.server.requests import KnownHeaders
from aiokv.server.statistics import GET, Statistics

# Names that need neither decoding nor a closer look, as `aiokv.wire.parse_entry_path` takes them.
_PLAIN_GET = re.compile(r"GET /get/([A-Za-z0-9][A-Za-z0-9._~-]{0,63})/([A-Za-z0-9][A-Za-z0-9._~:-]{0,499}) HTTP/1\.1\r\n")
_MAX_LEARNT = 512
# Other headers that decide something want a closer look.
_LOOKED_AT = frozenset({b"host", b"authorization"})
_MOST_GATHERED = 64
# Made once: writing out a number costs more than all the rest of a head.
_LENGTHS = tuple(b"%d\r\n\r\n" % length for length in range(1024))
LATER = b""


class Asker(Protocol):
    """A connection that waits for the answer to a plain get."""

    def take_answer(self, answer: bytes) -> None:
        """Send the answer."""
        ...

    def take_long_way(self, data: bytes) -> None:
        """Answer the request in the long way."""
        ...


class PlainGets:
    """Answers gets that are plain.

    Where many reads in one step cost less, those of one turn of the loop are gathered.

    Args:
        get_now: Read a value in this very step, or raise `WouldWaitError`.
        get_all_now: Read several; None where that is no cheaper.
        access: The accounts, or None.
        quotas: Says which account may ask now; None where no account has a rate.
        admits_host: Return whether a Host header is answered.
        answer_fault: Return the answer to an exception of a read.
        absent: The answer where there is no value.
        known_headers: The headers that the parsers remember.
        statistics: Counts each answer.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (what the long way knows)
        self,
        get_now: Callable[[str, str], str | None],
        get_all_now: Callable[[Sequence[tuple[str, str]]], Sequence[str | Exception | None]] | None,
        access: AccessFile | None,
        quotas: Quotas | None,
        admits_host: Callable[[bytes], bool],
        answer_fault: Callable[[Exception], Answer],
        absent: Answer,
        known_headers: KnownHeaders,
        statistics: Statistics,
    ) -> None:
        self._get_now = get_now
        self._get_all_now = get_all_now
        self._access = access
        self._quotas = quotas
        self._admits_host = admits_host
        self._answer_fault = answer_fault
        self._absent = absent
        self._known_headers = known_headers
        self._statistics = statistics
        # The Authorization header of each text of headers that holds nothing else that decides.
        self._learnt: dict[str, str] = {}
        self._gathered: list[tuple[Asker, str, float, tuple[str, str]]] = []
        self._date = self._found_start = self._absent_answer = b""

    def answer(self, data: memoryview, date: bytes, asker: Asker) -> bytes | None:
        """Answer a request.

        Args:
            data: What has arrived on a connection on which nothing is under way.
            date: The Date header's line.
            asker: The connection; its further requests have to wait where the answer comes later.

        Returns:
            The answer; `LATER` where the asker gets it in this turn of the loop or the next; None where the request has to go
            the long way, and nothing has happened.
        """
        try:
            text, _ = ascii_decode(data)
        except UnicodeDecodeError:
            return None
        line = _PLAIN_GET.match(text)
        headers = "" if line is None else text[line.end() :]
        authorization = self._learnt.get(headers)
        if line is None or (authorization is None and (authorization := self._learn(headers)) is None):
            return None
        started = perf_counter()
        db_name, key = line.groups()
        account = ""
        if self._access is not None:
            permit = self._access.permit_of_token(authorization)
            if permit is None or permit.allows("get", db_name) is not None:
                return None
            account = permit.account
            db_name = f"{account}:{db_name}"
        if self._quotas is not None and self._quotas.admit(account):
            return None
        if date is not self._date:
            self._renew(date)
        if self._get_all_now is not None:
            self._gather(asker, text, started, (db_name, key))
            return LATER
        try:
            value: str | Exception | None = self._get_now(db_name, key)
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            value = error
        return self._answer_with(value, started)

    def _answer_with(self, value: str | Exception | None, started: float) -> bytes | None:
        if isinstance(value, str):
            body = orjson.dumps({"value": value})
            size_bytes = len(body)
            if size_bytes > SMALL_BYTES:
                return None
            self._statistics.found(perf_counter() - started, size_bytes)
            length = _LENGTHS[size_bytes] if size_bytes < len(_LENGTHS) else b"%d\r\n\r\n" % size_bytes
            return b"".join((self._found_start, length, body))
        if isinstance(value, WouldWaitError):
            return None
        answer = self._absent if value is None else self._answer_fault(value)
        self._statistics.record(GET, answer.status, perf_counter() - started, 0, len(answer.body))
        return self._absent_answer if value is None else answer.head(self._date, b"", answer.body)

    def _gather(self, asker: Asker, text: str, started: float, name: tuple[str, str]) -> None:
        gathered = self._gathered
        if not gathered:
            get_running_loop().call_soon(self._answer_gathered)
        gathered.append((asker, text, started, name))
        if len(gathered) == _MOST_GATHERED:
            self._answer_gathered()

    def _answer_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        if not gathered or self._get_all_now is None:
            return
        values: Sequence[str | Exception | None]
        try:
            values = self._get_all_now([name for _, _, _, name in gathered])
        except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
            values = [error] * len(gathered)
        for (asker, text, started, _), value in zip(gathered, values, strict=True):
            answer = self._answer_with(value, started)
            if answer is None:
                asker.take_long_way(text.encode())
            else:
                asker.take_answer(answer)

    def _learn(self, headers: str) -> str | None:
        """Return the Authorization header of headers that the long way has accepted, "" where they have none."""
        fields = self._known_headers.get(headers.encode())
        if fields is None or not _LOOKED_AT.issuperset(fields) or not self._admits_host(fields[b"host"]):
            return None
        if len(self._learnt) >= _MAX_LEARNT:
            self._learnt.clear()
        authorization = self._learnt[headers] = fields.get(b"authorization", b"").decode("latin-1")
        return authorization

    def _renew(self, date: bytes) -> None:
        self._date = date
        head = Answer(200, b"").head(date)
        self._found_start = head.removesuffix(b"0\r\n\r\n")
        self._absent_answer = self._absent.head(date, b"", self._absent.body)
