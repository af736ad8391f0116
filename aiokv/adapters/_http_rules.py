"""HTTP responses as hishel sees them, which decides by RFC 9111 what may be stored and served.

What stands here only prepares what hishel looks at, and it looks at little: it takes no `Age` header into account, and knows no
`stale-while-revalidate` and `stale-if-error`. So a response that had an age on arrival is shown to it with an older `Date`, and
whether a response is within such a window is counted here.
"""

import re
import uuid
from collections.abc import Iterable
from email.utils import formatdate
from typing import Any, Final, Literal

from hishel import CacheMiss, CacheOptions, Entry, FromCache, Headers, IdleClient, NeedRevalidation, Request, Response

from aiokv import clock
from aiokv.adapters._http_entries import Pairs, StoredResponse, directives, read_seconds, stale_seconds, time_of

ENTRY_ID: Final = uuid.UUID(int=1)
"""The id of the one entry that hishel is shown at a time."""

_FIRST_SECONDS: Final = re.compile(r"\s*([0-9]+)\s*(?:,|$)", re.ASCII).match
# A stored one would undo what the origin has set since. `Age` is counted anew.
_NEVER_STORED: Final = frozenset({"set-cookie", "set-cookie2", "age"})
# A `Connection` header that names one of these, as no origin should, does not make a response fresher.
_NEEDED: Final = frozenset({"cache-control", "date", "expires", "vary"})


def as_received(headers: Pairs, now: float) -> tuple[Pairs, int]:
    """Prepare the headers of a response that has just come.

    Args:
        headers: Its headers.
        now: Seconds since the epoch.

    Returns:
        What is stored of them, with a `Date` in any case, and the seconds of age on arrival that this does not show.
    """
    left_out = _NEVER_STORED
    for name, value in headers:
        if name.lower() == "connection":
            # RFC 9111, section 3.1: what it names counts for this connection alone.
            left_out |= {option.strip().lower() for option in value.split(",")} - _NEEDED
    kept = tuple([pair for pair in headers if pair[0].lower() not in left_out])
    dates = [value for name, value in kept if name.lower() == "date"]
    date = time_of(dates[0]) if dates else None
    if date is None:
        kept = (*[pair for pair in kept if pair[0].lower() != "date"], ("Date", formatdate(now, usegmt=True)))
        date = int(now)
    ages = [value for name, value in headers if name.lower() == "age"]
    match = _FIRST_SECONDS(ages[0]) if ages else None
    age = read_seconds(match[1]) if match else 0
    # Where the origin's clock is ahead, this turns its dates back.
    return kept, max(0, age - (int(now) - date))


def as_lists(headers: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return headers as hishel takes them.

    Args:
        headers: Names and values.
    """
    lists: dict[str, Any] = {}
    for name, value in headers:
        lists.setdefault(name.lower(), []).append(value)
    return lists


class Views:
    """Requests and responses as hishel sees them, and what it says of them.

    Args:
        is_shared: Whether the cache is a shared one.
    """

    def __init__(self, *, is_shared: bool) -> None:
        self._is_shared = is_shared
        self.options = CacheOptions(shared=is_shared)
        self._stale_options = CacheOptions(shared=is_shared, allow_stale=True)

    def entry(self, request: Request, stored: StoredResponse, younger_seconds: int = 0) -> Entry:
        """Return a stored response as an entry.

        Args:
            request: The request that it may answer.
            stored: The response.
            younger_seconds: By how much it is to seem younger than it is.
        """
        lists = as_lists(stored.headers)
        shift = younger_seconds - stored.extra_age
        if shift:
            # Both, since `Expires` counts from `Date`.
            for name in ("date", "expires"):
                time = time_of(lists[name][0]) if name in lists else None
                if time is not None:
                    lists[name] = [formatdate(max(0, time + shift), usegmt=True)]
        chosen_by = Request(request.method, request.url, Headers(stored.vary))
        return Entry(ENTRY_ID, chosen_by, Response(stored.status, Headers(lists)))

    def decide(self, request: Request, stored: StoredResponse | None) -> Any:
        """Return hishel's first state: `FromCache`, `NeedRevalidation` or `CacheMiss`.

        Args:
            request: The request.
            stored: What is stored for it.
        """
        return IdleClient(self.options).next(request, [] if stored is None else [self.entry(request, stored)])

    def ask(self, request: Request, stored: StoredResponse | None) -> Any:
        """Return the state in which the origin is asked: `NeedRevalidation` or `CacheMiss`.

        Args:
            request: The request.
            stored: What is stored for it, no longer fresh.
        """
        state = self.decide(request, stored)
        if isinstance(state, NeedRevalidation) and stored is not None:
            # With its own dates, since they are merged with those of a 304.
            state.revalidating_entries = [self.entry(request, stored, stored.extra_age)]
        # It was stale a moment ago, and is fresh where the clock has gone back.
        return CacheMiss(request=request, options=self.options) if isinstance(state, FromCache) else state

    def ask_without_answer(self, method: str, url: str) -> Any:
        """Return the state in which a request is sent that no stored response can answer.

        Args:
            method: Its method.
            url: Its URL.
        """
        # To delete what there may be needs no look at it.
        entry = Entry(ENTRY_ID, Request("GET", url), Response(200))
        return IdleClient(self.options).next(Request(method, url), [entry])

    def fresh_age(self, request: Request, stored: StoredResponse) -> str | None:
        """Return the `Age` of a response that may answer a request as it is, or None where it may not.

        Args:
            request: The request.
            stored: The response.
        """
        state = self.decide(request, stored)
        return state.entry.response.headers["age"] if isinstance(state, FromCache) else None

    def confirmation(self, received: Pairs, *, is_authorized: bool) -> Literal["keep", "leave", "drop"]:
        """Return what a 304 does to the stored response that it confirms to one request.

        Args:
            received: The headers of the 304.
            is_authorized: Whether the request bears `Authorization`: the 304 may then be for its user alone.
        """
        found = directives(", ".join([value for name, value in received if name.lower() == "cache-control"]))
        if "no-store" in found or (self._is_shared and "private" in found):
            return "drop"
        may_share = not found.keys().isdisjoint({"public", "s-maxage", "must-revalidate"})
        return "leave" if self._is_shared and is_authorized and not may_share else "keep"

    def stale_age(self, request: Request, stored: StoredResponse, window_seconds: int) -> str | None:
        """Return the `Age` of a stale response that may still be served for so many seconds, or None where it may not.

        Args:
            request: The request.
            stored: The response.
            window_seconds: How long after its freshness.
        """
        if window_seconds <= 0 or (self._is_shared and _forbids_stale(stored)):
            return None
        if stale_seconds(stored, is_shared=self._is_shared) >= window_seconds:
            return None
        # The response may forbid it, as by `must-revalidate`.
        state = IdleClient(self._stale_options).next(request, [self.entry(request, stored)])
        return state.entry.response.headers["age"] if isinstance(state, FromCache) else None


def _forbids_stale(stored: StoredResponse) -> bool:
    """Return whether a shared cache must not serve a response stale, by RFC 9111, sections 5.2.2.8 and 5.2.2.10."""
    return not directives(stored.header("cache-control")).keys().isdisjoint({"proxy-revalidate", "s-maxage"})


def freshen(stored: StoredResponse, merged: Headers, received: Pairs, extra_age: int) -> StoredResponse:
    """Return a response that a 304 has confirmed.

    Args:
        stored: The response.
        merged: Its headers, as hishel has merged them with those of the 304.
        received: The headers of the 304, for their spelling.
        extra_age: That of the 304.
    """
    spelled = {name.lower(): name for name, _ in (*received, *stored.headers)}
    pairs = tuple(
        [
            (spelled.get(name, name), value)
            for name in merged
            for value in merged.get_list(name) or ()
            if name not in _NEVER_STORED
        ]
    )
    return StoredResponse(
        stored.status, stored.reason, pairs, stored.body, stored.vary, stored.is_decoded, clock.now(), extra_age
    )
