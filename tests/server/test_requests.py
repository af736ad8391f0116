"""Requests out of bytes, whatever pieces the bytes come in."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokv.server.requests import MalformedRequestError, Request, RequestParser

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
