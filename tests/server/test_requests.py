"""Requests out of bytes, whatever pieces the bytes come in."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokv.server.requests import KnownHeaders, MalformedRequestError, Request, RequestParser

HEAD_BYTES = 16 * 1024


class Seen:
    """A sink that keeps what it was told."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.bodies: list[bytes] = []
        self.complete = 0

    def head_received(self, request: Request) -> None:
        self.requests.append(request)
        self.bodies.append(b"")

    def body_received(self, data: bytes) -> None:
        self.bodies[-1] += data

    def request_received(self) -> None:
        self.complete += 1


def parse(*pieces: bytes) -> Seen:
    seen = Seen()
    parser = RequestParser(seen, HEAD_BYTES)
    for piece in pieces:
        parser.feed(piece)
    return seen


def refused(*pieces: bytes) -> tuple[int, str]:
    with pytest.raises(MalformedRequestError) as caught:
        parse(*pieces)
    return caught.value.status, caught.value.reason


def request(line: str = "GET / HTTP/1.1", *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join((line, "Host: a", *headers, "", "")).encode() + body


STREAM = (
    request("GET /get/db/k HTTP/1.1", "Authorization: Bearer t", "X-Other: 1")
    + request("PUT /set/db/k?ttl=60 HTTP/1.1", "Content-Length: 5", body=b"value")
    + request("PUT /set/db/k HTTP/1.1", "Transfer-Encoding: chunked", body=b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nX: y\r\n\r\n")
    + request("DELETE /delete/db/k HTTP/1.1", "Connection: close")
)


@given(cuts=st.lists(st.integers(min_value=1, max_value=len(STREAM) - 1), unique=True).map(sorted))
def test_requests_are_the_same_however_their_bytes_are_cut(cuts: list[int]) -> None:
    seen = parse(*(STREAM[start:end] for start, end in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)))
    assert [(one.method, one.target, one.keep_alive, one.content_length) for one in seen.requests] == [
        (b"GET", b"/get/db/k", True, 0),
        (b"PUT", b"/set/db/k?ttl=60", True, 5),
        (b"PUT", b"/set/db/k", True, None),
        (b"DELETE", b"/delete/db/k", False, 0),
    ]
    assert seen.bodies == [b"", b"value", b"abcde", b""]
    assert seen.complete == 4
    assert seen.requests[0].fields == {b"host": b"a", b"authorization": b"Bearer t"}


@pytest.mark.parametrize("spelling", ["authorization", "AUTHORIZATION", "AuThOrIzAtIoN"])
def test_header_counts_however_it_is_spelt(spelling: str) -> None:
    assert parse(request("GET / HTTP/1.1", f"{spelling}: x")).requests[0].fields[b"authorization"] == b"x"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /\r\n\r\n", 505),
        (request("GET / HTTP/2.0"), 505),
        (request("GET / HTTP/1.2"), 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (request("CONNECT a:1 HTTP/1.1"), 501),
        (request("get / HTTP/1.1"), 400),
        (request("GET /a\0b HTTP/1.1"), 400),
        (request("GET / HTTP/1.1", " folded"), 400),
        (request("GET / HTTP/1.1", "Host: b"), 400),
        (request("GET / HTTP/1.1", "Authorization: a", "authorization: b"), 400),
        (request("GET / HTTP/1.1", "X : a"), 400),
        (request("GET / HTTP/1.1").replace(b"\r\n", b"\n"), 400),
        (request("PUT / HTTP/1.1", "Content-Length: +3"), 400),
        (request("PUT / HTTP/1.1", "Content-Length: 3", "Content-Length: 3"), 400),
        (request("PUT / HTTP/1.1", "Content-Length: 3, 3"), 400),
        (request("PUT / HTTP/1.1", "Content-Length: 3", "Transfer-Encoding: chunked"), 400),
        (request("PUT / HTTP/1.0", "Transfer-Encoding: chunked"), 400),
        (request("PUT / HTTP/1.1", "Transfer-Encoding: gzip"), 501),
        (request("PUT / HTTP/1.1", "Transfer-Encoding: gzip, chunked"), 501),
        (request("PUT / HTTP/1.1", "Transfer-Encoding: chunked, chunked"), 400),
        (request("PUT / HTTP/1.1", "Transfer-Encoding: identity"), 501),
        (request("PUT / HTTP/1.1", "Transfer-Encoding: chunked", body=b"3 \r\nabc\r\n0\r\n\r\n"), 400),
        (request("PUT / HTTP/1.1", "Transfer-Encoding: chunked", body=b"3\nabc\r\n0\r\n\r\n"), 400),
        (request("PUT / HTTP/1.1", "Transfer-Encoding: chunked", body=b"0\r\nHost: b\r\n\r\n"), 400),
        (request("PUT / HTTP/1.1", "Transfer-Encoding: chunked", body=b"0\r\nContent-Length: 9\r\n\r\n"), 400),
    ],
    ids=lambda value: ascii(value[:60]) if isinstance(value, bytes) else str(value),
)
def test_what_two_parsers_could_read_in_two_ways_is_refused(sent: bytes, status: int) -> None:
    assert refused(sent)[0] == status
    assert refused(*(sent[at : at + 1] for at in range(len(sent))))[0] == status


def test_request_without_a_host_is_refused_and_of_http_1_0_taken() -> None:
    assert refused(b"GET / HTTP/1.1\r\n\r\n")[0] == 400
    old = parse(b"GET / HTTP/1.0\r\n\r\n").requests[0]
    assert (old.is_http_1_0, old.keep_alive) == (True, False)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET / HTTP/1.1\r\nHost: a\r\n", *(b"X%d: %s\r\n" % (number, b"a" * 1_000) for number in range(20))],
        [b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: ", *([b"a" * 1_000] * 20)],
        [b"GET /", *([b"a" * 4_000] * 5)],
        [b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x" * 100, *([b"x" * 4_000] * 5)],
    ],
    ids=["many headers", "one value", "target", "name"],
)
def test_head_without_an_end_is_refused_before_it_is_large(pieces: list[bytes]) -> None:
    status, reason = refused(*pieces)
    assert status in {400, 431}
    assert reason == "head_too_large"
    taken = 0
    parser = RequestParser(Seen(), HEAD_BYTES)
    with contextlib.suppress(MalformedRequestError):
        for piece in pieces:
            parser.feed(piece)
            taken += len(piece)
    assert taken <= HEAD_BYTES


def test_offer_of_another_protocol_is_ignored_and_ends_the_connection() -> None:
    offer = request("GET /a HTTP/1.1", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAA")
    seen = parse(offer)
    assert [(one.target, one.keep_alive) for one in seen.requests] == [(b"/a", False)]
    assert seen.complete == 1


OFFER = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAA")


@pytest.mark.parametrize(
    "sent",
    [
        request("PUT /set/db/k HTTP/1.1", *OFFER, "Content-Length: 5", body=b"value"),
        request("PUT /set/db/k HTTP/1.1", *OFFER, "Transfer-Encoding: chunked", body=b"2\r\nva\r\n3\r\nlue\r\n0\r\n\r\n"),
    ],
    ids=["declared", "chunked"],
)
def test_body_behind_an_offer_of_another_protocol_is_whole_however_it_is_cut(sent: bytes) -> None:
    for cut in range(1, len(sent)):
        seen = parse(sent[:cut], sent[cut:])
        assert (seen.bodies, seen.complete, seen.requests[0].keep_alive) == ([b"value"], 1, False)
    assert parse(*(sent[at : at + 1] for at in range(len(sent)))).bodies == [b"value"]


@given(data=st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    chunked = request("PUT / HTTP/1.1", "Transfer-Encoding: chunked", body=data)
    for sent in (data, b"GET /" + data, request()[:-2] + data, chunked):
        with contextlib.suppress(MalformedRequestError):
            RequestParser(Seen(), HEAD_BYTES).feed(sent)


# Each request in one piece, as it is fed where a look-up takes the place of parsing.
REPEATED = (
    request("GET /get/db/k HTTP/1.1", "Authorization: Bearer t"),
    request("GET /get/db/other HTTP/1.1", "Authorization: Bearer t"),
    request("PUT /set/db/k?ttl=60 HTTP/1.1", "Content-Length: 5", body=b"value"),
    request("PUT /set/db/k?ttl=70 HTTP/1.1", "Content-Length: 5", body=b"other"),
    request("DELETE /delete/db/k HTTP/1.1", "Authorization: Bearer t"),
)


def count_parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    parsed: list[bytes] = []
    parse_anew = RequestParser._parse

    def parse_and_count(parser: RequestParser, data: bytes) -> None:
        parsed.append(bytes(data))
        parse_anew(parser, data)

    monkeypatch.setattr(RequestParser, "_parse", parse_and_count)
    return parsed


def test_headers_that_come_again_are_looked_up_and_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = count_parsed(monkeypatch)
    seen = parse(*REPEATED, *REPEATED)
    sets = list(REPEATED[2:4])
    assert parsed == [REPEATED[0], *sets, *sets]
    told = [(one.method, one.target, one.fields, one.content_length, one.keep_alive) for one in seen.requests]
    assert told[:5] == told[5:]
    assert told[1][1] == b"/get/db/other"
    assert seen.bodies == [b"", b"", b"value", b"other", b""] * 2
    assert seen.complete == 10


@pytest.mark.parametrize(
    "sent",
    [
        request("GET /get/db/k HTTP/1.0"),
        request("GET /get/db/k HTTP/1.1", "Connection: close"),
        request("GET /get/db/k HTTP/1.1", "Connection: upgrade", "Upgrade: h2c"),
        request("PUT /set/db/k HTTP/1.1", "Content-Length: 1", "Expect: 100-continue", body=b"v"),
        request("PUT /set/db/k HTTP/1.1", "Transfer-Encoding: chunked", body=b"1\r\nv\r\n0\r\n\r\n"),
        request("GET /get/db/a HTTP/1.1", f"X-Long: {'x' * 2000}"),
        request("GET /get/db/a HTTP/1.1") + request("GET /get/db/b HTTP/1.1"),
        request("PUT /set/db/k HTTP/1.1", "Content-Length: 1", body=b"v"),
        request("GET /get/db/k HTTP/1.1", "Content-Length: 1", body=b"v"),
        request("GET /get/db/k?x HTTP/1.1"),
        request("POST /storage/auth/token HTTP/1.1"),
        request("GET http://a/get/db/k HTTP/1.1"),
    ],
)
def test_request_that_says_more_than_usual_is_parsed_each_time(sent: bytes) -> None:
    known: KnownHeaders = {}
    RequestParser(Seen(), HEAD_BYTES, known).feed(sent)
    assert not known


@pytest.mark.parametrize("begin", [b"G", b"GET /get/db/k HTTP/1.1\r\nHost: a\r\nX-Y: ", b"\r\n\r\nX"])
def test_known_headers_inside_another_request_are_not_taken_for_one(begin: bytes) -> None:
    known: KnownHeaders = {}
    RequestParser(Seen(), HEAD_BYTES, known).feed(REPEATED[0])
    seen, ours = Seen(), RequestParser(Seen(), HEAD_BYTES)
    theirs = RequestParser(seen, HEAD_BYTES, known)
    outcomes = []
    for parser in (ours, theirs):
        with contextlib.suppress(MalformedRequestError):
            parser.feed(begin)
            parser.feed(REPEATED[0])
            outcomes.append("parsed")
    assert len(outcomes) in {0, 2}
    assert [one.target for one in seen.requests] == [one.target for one in ours._sink.requests]  # type: ignore[attr-defined]


def test_known_headers_with_anything_behind_them_are_parsed() -> None:
    whole = REPEATED[0]
    seen = parse(whole, whole + whole, whole + whole[:-1], whole[-1:], whole)
    assert [one.target for one in seen.requests] == [b"/get/db/k"] * 6
    assert seen.complete == 6


def test_remembered_headers_stay_few() -> None:
    known: KnownHeaders = {}
    parser = RequestParser(Seen(), HEAD_BYTES, known)
    for number in range(2000):
        parser.feed(request("GET /get/db/k HTTP/1.1", f"X-Number: {number}"))
    assert 0 < len(known) <= 512


@given(st.lists(st.tuples(st.sampled_from(REPEATED), st.booleans()), max_size=12), st.binary(max_size=8))
def test_requests_are_the_same_whether_their_headers_are_known_or_not(order: list[tuple[bytes, bool]], junk: bytes) -> None:
    pieces = [piece for sent, cut in order for piece in ((sent[:-3], sent[-3:]) if cut else (sent,))] + [junk + REPEATED[0]]
    known: KnownHeaders = {}
    for sent in REPEATED:
        RequestParser(Seen(), HEAD_BYTES, known).feed(sent)
    told = []
    for heads in (known, {}):
        seen = Seen()
        parser = RequestParser(seen, HEAD_BYTES, heads)
        status = 0
        try:
            for piece in pieces:
                if not heads:
                    # Byte by byte nothing can be looked up.
                    for at in range(len(piece)):
                        parser.feed(piece[at : at + 1])
                else:
                    parser.feed(piece)
        except MalformedRequestError as error:
            status = error.status
        told.append((status, seen.complete, seen.bodies, [(one.method, one.target, one.fields) for one in seen.requests]))
    assert told[0] == told[1]
