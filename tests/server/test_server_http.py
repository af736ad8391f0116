"""The server over real HTTP: what it takes, what it refuses, and how it says so."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from urllib.parse import quote

import orjson
import pytest
from helpers import FakeClock
from server_clients import CHUNKED, Connection, SlowBackend, chunk, connected, head, put, serving

from aiokv.backends.memory import MemoryBackend
from aiokv.errors import (
    CallTimeoutError,
    ConfigurationError,
    ConnectError,
    StorageError,
    StorageFullError,
    ThrottledError,
    ValueTooLargeError,
)
from aiokv.server import running_server

MAX_BYTES = 1_900_000
DEFAULT_TTL = 2_592_000
MARKER = "value-never-shown"


class FaultyBackend:
    """A backend of which every call fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def get(self, db_name: str, key: str) -> str | None:  # noqa: ARG002
        raise self._error

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:  # noqa: ARG002
        raise self._error

    async def delete(self, db_name: str, key: str) -> None:  # noqa: ARG002
        raise self._error

    async def aclose(self) -> None:
        """Hold nothing."""


@pytest.fixture
def backend(clock: FakeClock) -> MemoryBackend:
    return MemoryBackend(clock)


@pytest.fixture
async def address(backend: MemoryBackend) -> AsyncGenerator[str]:
    async with running_server(backend, drain_seconds=1) as address:
        yield address


@pytest.fixture
async def client(address: str) -> AsyncGenerator[Connection]:
    async with connected(address) as connection:
        yield connection


@pytest.mark.parametrize("value", ["dark", "", 'a"b\\c\0\n\u2028', "é😀", "a=b&c=%20"])
async def test_value_is_read_back_until_it_is_deleted(client: Connection, value: str) -> None:
    stored = await client.ask(put("/set/db/key", value.encode()))
    assert stored.status == 200
    assert isinstance(orjson.loads(stored.body), dict)
    assert orjson.loads((await client.ask(head("GET", "/get/db/key"))).body) == {"value": value}
    for _ in range(2):
        deleted = await client.ask(head("DELETE", "/delete/db/key"))
        assert deleted.status == 200
        assert isinstance(orjson.loads(deleted.body), dict)
        absent = await client.ask(head("GET", "/get/db/key"))
        assert absent.status == 404
        assert absent.error()


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        *(("a/b", "a/b"), ("a%2Fb", "a/b"), ("a%2fb", "a/b"), ("/a//b/", "/a//b/"), ("a/../b", "a/../b"), ("...", "...")),
        *(("a+b", "a+b"), ("a%2Bb", "a+b"), ("a%20b", "a b"), ("a%2520b", "a%20b"), ("%41%c3%a9", "Aé"), ("%0A", "\n")),
        *(("k?ignored=1", "k"), ("k?a%zz", "k"), ("k%3Fttl=1", "k?ttl=1"), ("k%23x", "k#x"), ("get/db/k", "get/db/k")),
    ],
)
async def test_spelling_of_a_path_names_the_key(client: Connection, backend: MemoryBackend, spelling: str, key: str) -> None:
    assert (await client.ask(put(f"/set/db/{spelling}", b"x"))).status == 200
    assert await backend.get("db", key) == "x"
    assert (await client.ask(head("GET", f"/get/db/{quote(key, safe='')}"))).value() == "x"
    assert (await client.ask(head("DELETE", f"/delete/db/{spelling}"))).status == 200
    assert await backend.get("db", key) is None


@pytest.mark.parametrize(
    "entry",
    [
        *("db/%zz", "db/%", "db/a%4", "db/%ff", "db/%c3", "db/%ed%a0%80", "db/%00", "db/a%00b", "db/", "db"),
        *("/key", "//", "%zz/key", "%ff/key", "%00/key", "./key", "../key", "%2e%2E/key", "a%2Fb/key"),
        *("db/.", "db/..", "db/%2e", "db/%2E.", f"db/{'a' * 7_999}", f"db/{'%C3%A9' * 1_340}", f"{'d' * 8_000}/k"),
    ],
    ids=lambda entry: entry[:20],
)
async def test_bad_name_is_refused(client: Connection, backend: MemoryBackend, entry: str) -> None:
    for request in (head("GET", f"/get/{entry}"), put(f"/set/{entry}", b"x"), head("DELETE", f"/delete/{entry}")):
        answer = await client.ask(request)
        assert answer.status == 400
        assert answer.error()
    assert backend._entries == {}


async def test_longest_key_is_stored(client: Connection) -> None:
    path = f"db/{'a' * 7_998}"
    assert (await client.ask(put(f"/set/{path}?ttl={DEFAULT_TTL}", b"x"))).status == 200
    assert (await client.ask(head("GET", f"/get/{path}"))).value() == "x"


@pytest.mark.parametrize(
    ("query", "seconds"),
    [("", DEFAULT_TTL), ("?", DEFAULT_TTL), ("?x=1", DEFAULT_TTL), ("?ttl=60", 60), ("?x=1&ttl=2592000", DEFAULT_TTL)],
)
async def test_value_lives_as_long_as_its_ttl(client: Connection, clock: FakeClock, query: str, seconds: int) -> None:
    assert (await client.ask(put(f"/set/db/key{query}", b"x"))).status == 200
    clock.advance(seconds - 1)
    assert (await client.ask(head("GET", "/get/db/key"))).value() == "x"
    clock.advance(1)
    assert (await client.ask(head("GET", "/get/db/key"))).status == 404


async def test_token_for_everybody_expires_by_the_clock_of_the_package(
    client: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiokv.clock.now", lambda: 1_000_000.0)
    answer = await client.ask(head("POST", "/storage/auth/token", "Content-Length: 0"))
    assert answer.status == 200
    assert orjson.loads(answer.body)["expires_at"] == "1970-01-12T15:46:40+00:00"


@pytest.mark.parametrize(
    "query",
    [
        *("ttl=59", "ttl=0", "ttl=2592001", "ttl=6_0", "ttl= 60", "ttl=%2060", "ttl=60%20", "ttl=-60", "ttl=+60", "ttl=60.0"),
        *("ttl=6e1", "ttl=0x60", "ttl=", "ttl", "ttl=60&ttl=60", "ttl=60&x=1&ttl=120", "ttl=" + "9" * 400, "ttl=٦٠", "ttl=६०"),
        *("ttl=" + quote("٦٠"), "ttl=%36%30"),
    ],
    ids=lambda query: ascii(query[:20]),
)
async def test_bad_ttl_is_refused_and_nothing_stored(client: Connection, backend: MemoryBackend, query: str) -> None:
    answer = await client.ask(put(f"/set/db/key?{query}".encode(), b"x"))
    assert answer.status == 400
    assert answer.error()
    assert backend._entries == {}


async def test_body_of_exactly_the_limit_is_stored(client: Connection) -> None:
    body = b"v" * (MAX_BYTES - 2) + "é".encode()
    pieces = [chunk(body[start : start + 100_000]) for start in range(0, MAX_BYTES, 100_000)]
    assert (await client.ask(put("/set/db/declared", body))).status == 200
    assert (await client.ask(head("PUT", "/set/db/chunked", CHUNKED), *pieces, chunk(b""))).status == 200
    for key in ("declared", "chunked"):
        assert (await client.ask(head("GET", f"/get/db/{key}"))).value() == body.decode()


@pytest.mark.parametrize("expectation", [(), ("Expect: 100-continue",)])
@pytest.mark.parametrize("size", [MAX_BYTES + 1, 1_000_000_000])
async def test_declared_body_over_the_limit_is_refused_before_it_is_sent(
    client: Connection, size: int, expectation: tuple[str, ...]
) -> None:
    answer = await client.ask(head("PUT", "/set/db/key", f"Content-Length: {size}", *expectation))
    assert answer.status == 413
    assert "1,900,000" in answer.error()
    assert answer.headers["connection"] == "close"


async def test_body_over_the_limit_is_refused_while_it_streams(client: Connection, backend: MemoryBackend) -> None:
    answer = await client.ask(head("PUT", "/set/db/key", CHUNKED), chunk(b"v" * MAX_BYTES), b"1\r\nv")
    assert answer.status == 413
    assert "1,900,000" in answer.error()
    assert backend._entries == {}


async def test_body_that_is_not_utf8_is_refused_and_the_old_value_kept(client: Connection) -> None:
    await client.ask(put("/set/db/key", b"old"))
    for body in (b"ok\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80"):
        answer = await client.ask(put("/set/db/key", body))
        assert answer.status == 400
        assert "UTF-8" in answer.error()
    assert (await client.ask(head("GET", "/get/db/key"))).value() == "old"


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("deflate", 415), ("x, gzip", 415), ("Identity", 200)])
async def test_content_encoding_is_refused_and_never_decoded(client: Connection, encoding: str, status: int) -> None:
    answer = await client.ask(put("/set/db/key", b"plain", f"Content-Encoding: {encoding}"))
    assert answer.status == status
    if status != 200:
        assert answer.error()
    assert (await client.ask(head("GET", "/get/db/key"))).status == (200 if status == 200 else 404)


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "text/plain; charset=latin-1"]
)
async def test_body_is_stored_verbatim_whatever_its_type(client: Connection, content_type: str) -> None:
    await client.ask(put("/set/db/key", "a=b&c=%20+é".encode(), f"Content-Type: {content_type}"))
    assert (await client.ask(head("GET", "/get/db/key"))).value() == "a=b&c=%20+é"


async def test_body_that_trickles_is_given_up_on(backend: MemoryBackend) -> None:
    async with serving(backend, grace_seconds=0.2, min_bytes_per_second=1_000) as address, connected(address) as client:
        await client.send(head("PUT", "/set/db/key", "Content-Length: 100"))
        answering = asyncio.create_task(client.answer())
        while not answering.done():
            await client.send(b"v")
            await asyncio.sleep(0.05)
        assert (await answering).status == 408
        assert (await answering).error()
        assert (await answering).headers["connection"] == "close"
    assert backend._entries == {}


@pytest.mark.parametrize("sent", [b"", b"GET /get/db/k", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET /li"])
async def test_connection_whose_head_never_ends_is_closed(backend: MemoryBackend, sent: bytes) -> None:
    async with serving(backend, head_timeout_seconds=0.2, idle_timeout_seconds=0.2) as address, connected(address) as client:
        await client.send(sent)
        assert len((await client.rest()).split(b"HTTP/1.")) == 1 + sent.count(b"\r\n\r\n")


@pytest.mark.parametrize(
    "body",
    [head("PUT", "/set/db/key", "Content-Length: 10") + b"cut", head("PUT", "/set/db/key", CHUNKED) + chunk(b"cut")],
    ids=["declared", "chunked"],
)
async def test_client_that_leaves_during_its_body_stores_nothing_and_is_no_error(
    address: str, backend: MemoryBackend, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    async with connected(address) as client:
        await client.send(body)
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.05)
    assert backend._entries == {}
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_malformed_chunk_is_refused(client: Connection, backend: MemoryBackend) -> None:
    answer = await client.ask(head("PUT", "/set/db/key", CHUNKED), chunk(b"v"), b"zz\r\nv\r\n0\r\n\r\n")
    assert answer.status == 400
    assert answer.error()
    assert await client.rest() == b""
    assert backend._entries == {}


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        *(("PUT", "/get/db/key", "GET"), ("HEAD", "/get/db/key", "GET"), ("GET", "/set/db/key", "PUT")),
        *(("POST", "/set/db/key", "PUT"), ("GET", "/delete/db/key", "DELETE"), ("OPTIONS", "/delete/db/key", "DELETE")),
        *(("GET", "/storage/auth/token", "POST"), ("POST", "/livez", "GET"), ("POST", "/readyz", "GET")),
    ],
)
async def test_wrong_method_is_told_the_right_one(
    client: Connection, backend: MemoryBackend, method: str, target: str, allowed: str
) -> None:
    await backend.set("db", "key", "kept", 60)
    await client.send(head(method, target, "Connection: close"))
    raw_head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert raw_head.startswith(b"HTTP/1.1 405 ")
    assert f"\r\nAllow: {allowed}\r\n".encode() in raw_head + b"\r\n"
    assert body == b"" if method == "HEAD" else list(orjson.loads(body)) == ["error"]
    assert await backend.get("db", "key") == "kept"


@pytest.mark.parametrize(
    "target", ["/", "*", "/get", "/get/", "/GET/db/key", "//get/db/key", "/nope/db/key", "/livez/", "/g%65t/d/k"]
)
async def test_unknown_path_is_not_found(client: Connection, target: str) -> None:
    answer = await client.ask(head("OPTIONS" if target == "*" else "GET", target))
    assert answer.status == 404
    assert all(page in answer.error() for page in ("/livez", "/readyz", "/metrics", "/status", "/openapi.json"))


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /get/db/a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /get/db/a\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        head("GET", "/get/db/" + "a" * 9_000),
        head("GET", "/livez", "X: " + "a" * 9_000),
        head("GET", "/livez", *(f"X{number}: a" for number in range(200))),
        put("/set/db/key", b"abc", "Content-Length: 4"),
        head("PUT", "/set/db/key", "Content-Length: -1"),
        head("PUT", "/set/db/key", "Content-Length: 3", CHUNKED) + chunk(b"abc") + chunk(b""),
    ],
    ids=lambda sent: ascii(sent[:30]),
)
async def test_what_is_not_http_gets_a_json_error_and_is_cut_off(client: Connection, sent: bytes) -> None:
    answer = await client.ask(sent)
    assert answer.status == 400
    assert answer.error()
    assert await client.rest() == b""


async def test_expectation_is_answered_before_the_body(client: Connection) -> None:
    interim = await client.ask(head("PUT", "/set/db/key", "Content-Length: 3", "Expect: 100-continue"))
    assert interim.status == 100
    assert (await client.ask(b"abc")).status == 200
    assert (await client.ask(head("GET", "/get/db/key"))).value() == "abc"


async def test_client_of_http_1_0_gets_no_interim_answer(client: Connection) -> None:
    request = put("/set/db/key", b"abc", "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert (await client.ask(request)).status == 200


async def test_refused_expectation_closes_the_connection(client: Connection) -> None:
    answer = await client.ask(head("PUT", "/set/db/key?ttl=1", "Content-Length: 3", "Expect: 100-continue"))
    assert answer.status == 400
    assert answer.headers.get("connection") == "close", "the next request would be read as the body that was not sent"


async def test_absolute_target_is_routed_and_its_host_checked(client: Connection, address: str) -> None:
    await client.ask(put(f"{address}/set/db/key?ttl=60", b"x"))
    assert (await client.ask(head("GET", "http://localhost/get/db/key"))).value() == "x"
    assert (await client.ask(head("GET", "http://evil.example/get/db/key", host="evil.example"))).status == 403


async def test_pipelined_requests_are_answered_in_order(client: Connection) -> None:
    writes = [put("/set/db/key", b"%d" % number) + head("GET", "/get/db/key") for number in range(50)]
    await client.send(*writes)
    for number in range(50):
        assert (await client.answer()).status == 200
        assert (await client.answer()).value() == str(number)


async def test_body_of_a_refused_request_is_not_taken_for_the_next_one(client: Connection, backend: MemoryBackend) -> None:
    await backend.set("db", "key", "kept", 60)
    smuggled = head("DELETE", "/delete/db/key")
    for refused in ("/set/db/key?ttl=1", "/set/db/%zz", "/get/db/key", "/nope"):
        assert (await client.ask(put(refused, smuggled))).status >= 400
    assert (await client.ask(head("GET", "/get/db/key"))).value() == "kept"


async def test_probes_tell_whether_the_backend_answers(client: Connection) -> None:
    for path in ("/livez", "/readyz", "/readyz?verbose"):
        assert (await client.ask(head("GET", path))).status == 200
    async with running_server(FaultyBackend(StorageError("broken"))) as address, connected(address) as other:
        assert (await other.ask(head("GET", "/livez"))).status == 200
        answer = await other.ask(head("GET", "/readyz"))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.error()


@pytest.mark.parametrize(
    ("make", "status"),
    [
        *((kind, 503) for kind in (StorageError, ConnectError, ThrottledError, CallTimeoutError, ConfigurationError)),
        (StorageFullError, 507),
        *((kind, 500) for kind in (RuntimeError, ValueError, TimeoutError, ConnectionResetError)),
    ],
)
async def test_fault_of_the_backend_is_named_without_its_text(make: Callable[[str], Exception], status: int) -> None:
    async with running_server(FaultyBackend(make("inner-text"))) as address, connected(address) as client:
        for request in (head("GET", "/get/db/key"), put("/set/db/key", b"x"), head("DELETE", "/delete/db/key")):
            answer = await client.ask(request)
            assert answer.status == status
            assert "inner-text" not in answer.error()
            assert "Traceback" not in answer.error()
            assert answer.headers.get("retry-after") == ("1" if status == 503 else None)


async def test_value_that_the_backend_finds_too_large_is_refused_as_such() -> None:
    async with running_server(FaultyBackend(ValueTooLargeError("over"))) as address, connected(address) as client:
        assert (await client.ask(put("/set/db/key", b"x"))).status == 413


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8787", "127.9.9.9", "[::1]", "[::1]:1")),
        *((host, 403) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "10.0.0.1")),
    ],
)
async def test_only_a_loopback_name_is_answered_without_an_access_file(client: Connection, host: str, status: int) -> None:
    for request in (head("GET", "/livez", host=host), head("POST", "/storage/auth/token", host=host)):
        answer = await client.ask(request)
        assert answer.status == status
        if status == 403:
            assert answer.error()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.com"])
async def test_server_without_an_access_file_refuses_other_addresses_than_loopback(host: str) -> None:
    with pytest.raises(ConfigurationError, match="access file"):
        await running_server(MemoryBackend(), host=host).__aenter__()


@pytest.mark.parametrize("port", [None, -1, 65_536], ids=["taken", "negative", "too large"])
async def test_port_that_cannot_be_bound_is_named(address: str, port: int | None) -> None:
    port = int(address.rpartition(":")[2]) if port is None else port
    with pytest.raises(ConfigurationError, match=str(port)):
        await running_server(MemoryBackend(), port=port).__aenter__()


async def test_request_under_way_is_finished_when_the_server_stops() -> None:
    backend = SlowBackend()
    await backend.set("db", "key", "x", 60)
    async with contextlib.AsyncExitStack() as stack:
        async with running_server(backend, drain_seconds=5) as address:
            client = await stack.enter_async_context(connected(address))
            await client.send(head("GET", "/get/db/key"))
            await backend.begun.wait()
            asyncio.get_running_loop().call_later(0.1, backend.let_go.set)
        assert (await client.answer()).value() == "x"


async def test_value_appears_in_no_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = MARKER.encode()
    requests = [
        put("/set/db/key?ttl=1", body),
        put("/set/db/key", body + b"\xff"),
        put("/set/db/key", body, "Content-Encoding: gzip"),
        put("/set/db/%zz", body),
        put("/set/db/key", body),
        head("PUT", "/set/db/key", CHUNKED) + chunk(body) + b"zz\r\n" + body,
        head("PUT", "/set/db/key", CHUNKED) + chunk(body) + chunk(b"v" * MAX_BYTES),
        head("PUT", "/set/db/key", "Content-Length: 100") + body,
        put("/set/db/key", body, "Content-Length: 4"),
        body + b"\r\n\r\n",
    ]
    async with contextlib.AsyncExitStack() as stack:
        for error in (StorageError("broken"), StorageFullError("full"), RuntimeError("unforeseen")):
            address = await stack.enter_async_context(serving(FaultyBackend(error), grace_seconds=0.05))
            for request in requests:
                async with connected(address) as client:
                    assert MARKER not in (await client.ask(request)).error()
    assert len(caplog.records) >= 3
    assert all(MARKER not in logging.Formatter().format(record) for record in caplog.records)
