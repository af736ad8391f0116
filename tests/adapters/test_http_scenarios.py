"""Two requests for one URL: what came back first, what is asked then, and whether the origin is asked again.

The cases are those of cache-tests.fyi that can apply to a client's cache, in our own words. Where hishel decides otherwise, the
case says so and is expected to fail, so that a release of hishel that changes it is noticed.
"""

from typing import Any

import pytest
from aiohttp import web
from http_origin import Client, Origin, client_of, http_date

from aiokv import AsyncKVStore
from aiokv.testing import MovableClock

HIT, ASKED, VALIDATED = "hit", "miss", "revalidated"
Pairs = list[tuple[str, str]]


class Case:
    """One case: headers are `Name: value` lines, where `@N` is a date N seconds ahead."""

    def __init__(  # noqa: PLR0913 (a table)
        self,
        name: str,
        expected: str,
        *response: str,
        after: float = 0,
        first: tuple[str, ...] = (),
        second: tuple[str, ...] = (),
        status: int = 200,
        differs: str = "",
    ) -> None:
        self.name = name
        self.expected = expected
        self.response = response
        self.after = after
        self.first = first
        self.second = second
        self.status = status
        self.differs = differs


def pairs_of(lines: tuple[str, ...]) -> Pairs:
    pairs = [tuple(line.split(": ", 1)) for line in lines]
    return [(name, http_date(int(value[1:])) if value.startswith("@") else value) for name, value in pairs]


LENIENT = "hishel takes dates that are not of HTTP's form"
OF_REQUEST = "hishel looks at no request directive but no-cache"
NOT_NORMALISED = "hishel compares the headers that Vary names as they are"

CASES = [
    # Freshness.
    Case("no freshness, no validator", ASKED),
    Case("max-age", HIT, "Cache-Control: max-age=3600", after=3599),
    Case("max-age, stale", ASKED, "Cache-Control: max-age=3600", after=3600),
    Case("max-age of 0", ASKED, "Cache-Control: max-age=0"),
    Case("max-age of 2147483647", HIT, "Cache-Control: max-age=2147483647"),
    Case("max-age beyond 32 bits", HIT, "Cache-Control: max-age=99999999999"),
    Case("negative max-age", ASKED, "Cache-Control: max-age=-3600"),
    Case("max-age in capitals", HIT, "Cache-Control: MaX-aGe=3600"),
    Case("max-age in quotes", HIT, 'Cache-Control: max-age="3600"'),
    Case("max-age in single quotes", ASKED, "Cache-Control: max-age='3600'"),
    Case("max-age with zeros in front", HIT, "Cache-Control: max-age=003600"),
    Case("max-age beside an unknown directive", HIT, 'Cache-Control: foobar="a, max-age=0", max-age=3600'),
    Case("max-age within a quoted argument", ASKED, 'Cache-Control: extension="max-age=3600"'),
    Case("max-age over Expires", HIT, "Cache-Control: max-age=3600", "Expires: @-10"),
    Case("max-age of 0 over Expires", ASKED, "Cache-Control: max-age=0", "Expires: @3600"),
    Case("max-age over an Expires that is no date", HIT, "Cache-Control: max-age=3600", "Expires: 0"),
    Case("s-maxage over max-age", HIT, "Cache-Control: max-age=1, s-maxage=3600", after=10),
    Case("s-maxage of 0 over max-age", ASKED, "Cache-Control: max-age=3600, s-maxage=0"),
    Case("s-maxage over Expires", HIT, "Cache-Control: s-maxage=3600", "Expires: @-10"),
    Case("max-age in two lines", HIT, "Cache-Control: foo", "Cache-Control: max-age=3600"),
    Case("unknown directive with an argument like no-store", HIT, "Cache-Control: foo=no-store, max-age=3600"),
    Case("Expires", HIT, "Expires: @3600"),
    Case("Expires in the past", ASKED, "Expires: @-3600"),
    Case("Expires now", ASKED, "Expires: @0"),
    Case("Expires of 0", ASKED, "Expires: 0"),
    Case("Expires that is no date", ASKED, "Expires: foo"),
    Case("Expires with an old Date", ASKED, "Date: @-3700", "Expires: @-50"),
    Case("Expires far ahead", HIT, "Expires: Thu, 18 Aug 2050 02:01:18 GMT"),
    Case("Expires of the old form of dates", HIT, "Expires: Thursday, 18-Aug-50 02:01:18 GMT"),
    Case("Expires of C's form of dates", HIT, "Expires: Thu Aug  8 02:01:18 2050"),
    Case("Expires without GMT", ASKED, "Expires: Thu, 18 Aug 2050 02:01:18 UTC", differs=LENIENT),
    Case("Expires without a comma", ASKED, "Expires: Thu 18 Aug 2050 02:01:18 GMT", differs=LENIENT),
    Case("Expires with an hour of one digit", ASKED, "Expires: Thu, 18 Aug 2050 2:01:18 GMT", differs=LENIENT),
    Case("Date long ago", ASKED, "Date: @-4000", "Cache-Control: max-age=3600"),
    Case("Last-Modified", HIT, "Last-Modified: @-100000", after=9000),
    Case("Last-Modified, past a tenth of its age", VALIDATED, "Last-Modified: @-1000", after=200),
    Case("Last-Modified of a status without rules", ASKED, "Last-Modified: @-100000", status=201),
    # Age on arrival.
    Case("Age that leaves some freshness", HIT, "Cache-Control: max-age=3600", "Age: 1800"),
    Case("Age that leaves none", ASKED, "Cache-Control: max-age=3600", "Age: 7200"),
    Case("Age with a stale Expires", ASKED, "Expires: @3600", "Age: 7200"),
    Case("Age that is no number", HIT, "Cache-Control: max-age=3600", "Age: abc"),
    Case("Age below 0", HIT, "Cache-Control: max-age=3600", "Age: -7200"),
    Case("Age with a point", HIT, "Cache-Control: max-age=3600", "Age: 7200.0"),
    Case("Age of 2147483648", ASKED, "Cache-Control: max-age=3600", "Age: 2147483648"),
    Case("Age of two values, the first old", ASKED, "Cache-Control: max-age=3600", "Age: 7200, 0"),
    Case("Age of two values, the first young", HIT, "Cache-Control: max-age=3600", "Age: 0, 7200"),
    Case("Age in two lines, the first old", ASKED, "Cache-Control: max-age=3600", "Age: 7200", "Age: 0"),
    # Response directives.
    Case("no-store", ASKED, "Cache-Control: no-store"),
    Case("no-store in capitals", ASKED, "Cache-Control: No-StOrE"),
    Case("no-store beside max-age", ASKED, "Cache-Control: max-age=10000, no-store", "Expires: @10000"),
    Case("no-cache", ASKED, "Cache-Control: no-cache"),
    Case("no-cache in capitals", ASKED, "Cache-Control: No-CaChE, max-age=10000"),
    Case("no-cache with a validator", VALIDATED, "Cache-Control: max-age=10000, no-cache", 'ETag: "a"'),
    Case("private", ASKED, "Cache-Control: private, max-age=3600"),
    Case("must-revalidate while fresh", HIT, "Cache-Control: max-age=100, must-revalidate"),
    Case("must-revalidate when stale", VALIDATED, "Cache-Control: max-age=1, must-revalidate", 'ETag: "a"', after=3),
    Case("immutable while fresh", HIT, "Cache-Control: max-age=100, immutable"),
    Case("Pragma of a response", HIT, "Cache-Control: max-age=100", "Pragma: no-cache"),
    Case(
        "must-understand of a known status",
        HIT,
        "Cache-Control: max-age=100, no-store, must-understand",
        differs="hishel takes no account of must-understand",
    ),
    # Status codes.
    *[
        Case(f"{status} with freshness", HIT, "Cache-Control: max-age=100", status=status)
        for status in (200, 203, 299, 404, 410, 499, 500, 503)
    ],
    *[Case(f"{status} when stale", ASKED, "Cache-Control: max-age=2", status=status, after=3) for status in (200, 404, 500)],
    # Vary.
    Case("Vary, equal", HIT, "Cache-Control: max-age=100", "Vary: Foo", first=("Foo: 1",), second=("Foo: 1",)),
    Case("Vary, unequal", ASKED, "Cache-Control: max-age=100", "Vary: Foo", first=("Foo: 1",), second=("Foo: 2",)),
    Case("Vary, left out first", ASKED, "Cache-Control: max-age=100", "Vary: Foo", second=("Foo: 1",)),
    Case("Vary, left out then", ASKED, "Cache-Control: max-age=100", "Vary: Foo", first=("Foo: 1",)),
    Case("Vary, another header differs", HIT, "Cache-Control: max-age=100", "Vary: Foo", first=("Bar: 1",), second=("Bar: 2",)),
    Case(
        "Vary of three, in another order",
        HIT,
        "Cache-Control: max-age=100",
        "Vary: Foo, Bar, Baz",
        first=("Foo: 1", "Bar: 2"),
        second=("Bar: 2", "Foo: 1"),
    ),
    Case(
        "Vary in two lines",
        ASKED,
        "Cache-Control: max-age=100",
        "Vary: Foo",
        "Vary: Bar",
        first=("Bar: 1",),
        second=("Bar: 2",),
    ),
    Case("Vary with empty members", HIT, "Cache-Control: max-age=100", "Vary: , Foo, ,", first=("Foo: 1",), second=("Foo: 1",)),
    Case("Vary: *", ASKED, "Cache-Control: max-age=100", "Vary: *"),
    Case("Vary: * in a list", ASKED, "Cache-Control: max-age=100", "Vary: Foo, *"),
    Case(
        "Vary, one value in two lines",
        HIT,
        "Cache-Control: max-age=100",
        "Vary: Foo",
        first=("Foo: 1, 2",),
        second=("Foo: 1", "Foo: 2"),
    ),
    Case(
        "Vary, spaces",
        HIT,
        "Cache-Control: max-age=100",
        "Vary: Foo",
        first=("Foo: 1,2",),
        second=("Foo: 1, 2",),
        differs=NOT_NORMALISED,
    ),
    Case(
        "Vary, languages in another order",
        HIT,
        "Cache-Control: max-age=100",
        "Vary: Accept-Language",
        first=("Accept-Language: en, de",),
        second=("Accept-Language: de, en",),
        differs=NOT_NORMALISED,
    ),
    # Credentials.
    Case("Authorization", ASKED, "Cache-Control: max-age=100", first=("Authorization: a",)),
    *[
        Case(f"Authorization and {control}", HIT, f"Cache-Control: max-age=100, {control}", first=("Authorization: a",))
        for control in ("public", "s-maxage=100", "must-revalidate")
    ],
    Case("Cookie", HIT, "Cache-Control: max-age=100", second=("Cookie: a=b",)),
    # Request directives.
    Case("no-cache", ASKED, "Cache-Control: max-age=100", second=("Cache-Control: no-cache",)),
    Case("no-cache with an ETag", VALIDATED, "Cache-Control: max-age=100", 'ETag: "a"', second=("Cache-Control: no-cache",)),
    Case(
        "no-cache with Last-Modified",
        VALIDATED,
        "Cache-Control: max-age=100",
        "Last-Modified: @-900",
        second=("Cache-Control: no-cache",),
    ),
    Case("max-age=0", ASKED, "Cache-Control: max-age=100", second=("Cache-Control: max-age=0",), differs=OF_REQUEST),
    Case("min-fresh", ASKED, "Cache-Control: max-age=100", second=("Cache-Control: min-fresh=200",), differs=OF_REQUEST),
    Case("max-stale", HIT, "Cache-Control: max-age=1", after=3, second=("Cache-Control: max-stale=100",), differs=OF_REQUEST),
    # Validation.
    Case("ETag when stale", VALIDATED, "Cache-Control: max-age=1", 'ETag: "a"', after=3),
    Case("weak ETag when stale", VALIDATED, "Cache-Control: max-age=1", 'ETag: W/"a"', after=3),
    Case("ETag of odd text when stale", VALIDATED, "Cache-Control: max-age=1", 'ETag: "a,\\b c"', after=3),
    Case("Last-Modified when stale", VALIDATED, "Cache-Control: max-age=1", "Last-Modified: @-900", after=3),
    # Other windows.
    Case("stale-while-revalidate", "stale", "Cache-Control: max-age=1, stale-while-revalidate=3600", 'ETag: "a"', after=3),
    Case(
        "stale-while-revalidate, too late",
        VALIDATED,
        "Cache-Control: max-age=1, stale-while-revalidate=4",
        'ETag: "a"',
        after=6,
    ),
    # Headers of the request that are no part of it.
    Case("Range", ASKED, "Cache-Control: max-age=100", second=("Range: bytes=0-1",)),
    Case("If-None-Match of the caller", HIT, "Cache-Control: max-age=100", 'ETag: "a"', second=('If-None-Match: "b"',)),
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.xfail(reason=case.differs, strict=True)] if case.differs else [])
        for case in CASES
    ],
)
async def test_second_request(client: Client, moved: MovableClock, case: Case) -> None:
    response = pairs_of(case.response)
    if "date" not in {name.lower() for name, _ in response}:
        response.append(("Date", http_date()))
    validators = {value for name, value in response if name in {"ETag", "Last-Modified"}}

    def answer(request: web.Request) -> web.StreamResponse:
        conditions = {request.headers.get("If-None-Match"), request.headers.get("If-Modified-Since")}
        is_same = bool(validators & conditions)
        made = web.Response(status=304) if is_same else web.Response(status=case.status, text=f"{len(client.origin.requests)}")
        for name, value in response:
            made.headers.add(name, value if name != "Date" or len(client.origin.requests) == 1 else http_date())
        return made

    client.origin.answers["/"] = answer

    async def ask(lines: tuple[str, ...]) -> Any:
        async with client.session.get(client.origin.base, headers=pairs_of(lines)) as got:
            return (await got.text()), got

    text, _ = await ask(case.first)
    assert text == "1"
    moved.advance(case.after)
    from aiokv.adapters.aiohttp_client import outcome_of  # noqa: PLC0415 (where hishel is absent, the tests are skipped)

    text, got = await ask(case.second)
    assert outcome_of(got) == case.expected
    assert text == ("2" if case.expected == ASKED else "1")
    if case.expected in {HIT, "stale"}:
        assert int(got.headers["Age"]) >= case.after


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "M-SEARCH"])
@pytest.mark.parametrize(("status", "expected"), [(200, ASKED), (302, ASKED), (404, HIT), (503, HIT)])
async def test_request_between_two_others(store: AsyncKVStore, origin: Origin, method: str, status: int, expected: str) -> None:
    origin.says("/", Cache_Control="max-age=100")
    async with client_of(store, origin) as client:
        await client.get("/")
        origin.says("/", status=status, Location="/elsewhere")
        async with client.session.request(method, origin.base, allow_redirects=False):
            pass
        origin.says("/", Cache_Control="max-age=100")
        assert (await client.get("/"))[0] == expected
