"""Batches over a socket: what they do, what is refused, and what one may take."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import orjson
import pytest
from extension_clients import EXTENSIONS, ask, content, post
from server_clients import CHUNKED, chunk, connected, head, serving

from aiokv.backends.capabilities import Entry, Omitted
from aiokv.backends.memory import MemoryBackend
from aiokv.errors import CallError, CorruptValueError, StorageFullError, UnavailableError, UnsupportedError

MIB = 1024 * 1024


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
async def address(backend: MemoryBackend) -> AsyncGenerator[str]:
    async with serving(backend) as address:
        yield address


async def test_a_thousand_keys_are_set_read_and_deleted(address: str, backend: MemoryBackend) -> None:
    keys = [f"key/{index} ä" for index in range(1_000)]
    async with connected(address) as client:
        entries = [{"key": key, "value": f"value of {key}", "ttl": 60} for key in keys]
        assert content(await client.ask(post("db", {"set": entries}))) == {"done": 1_000}
        assert await backend.get("db", keys[7]) == f"value of {keys[7]}"
        values = content(await client.ask(post("db", {"get": [*keys[:999], "absent"]})))
        assert values == {"values": [*(f"value of {key}" for key in keys[:999]), None]}
        assert content(await client.ask(post("db", {"delete": keys}))) == {"done": 1_000}
        assert await backend.count("db") == 0
        assert content(await client.ask(post("db", {"delete": ["absent"]}))) == {"done": 1}


async def test_a_key_that_comes_twice_gets_the_last_value_and_two_outcomes(address: str) -> None:
    entries = [{"key": "a", "value": "1"}, {"key": "a", "value": "2"}]
    assert content(await ask(address, post("db", {"set": entries}))) == {"done": 2}
    assert content(await ask(address, post("db", {"get": ["a", "a", "b"]}))) == {"values": ["2", "2", None]}


async def test_every_answer_names_the_extensions(address: str) -> None:
    async with connected(address) as client:
        for request in (head("GET", "/get/db/k"), head("GET", "/livez"), head("GET", "/no"), post("db", b"{")):
            assert (await client.ask(request)).headers["aiokv-extensions"] == EXTENSIONS


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"get": []}',
        b'{"get": ["a"], "delete": ["a"]}',
        b'{"get": [5]}',
        b'{"get": ["\\ud800"]}',
        b'{"get": ["\xff"]}',
        b'{"get": [""]}',
        b'{"set": [{"key": "a", "value": "SECRET"}, {"key": "b"}]}',
        b'{"set": [{"key": "a", "value": "SECRET"}, {"key": "b", "value": "SECRET", "ttl": 59}]}',
        b'{"set": [{"key": "a", "value": "SECRET"}, {"key": "..", "value": "SECRET"}]}',
        b'{"get": ' + b"[" * 100_000,
        orjson.dumps({"get": ["a"] * 1_001}),
        orjson.dumps({"set": [{"key": "a", "value": "SECRET"}, {"key": "b", "value": "S" * 1_900_001}]}),
    ],
    ids=lambda body: body[:50].decode("latin-1"),
)
async def test_a_malformed_batch_is_refused_whole(address: str, backend: MemoryBackend, body: bytes) -> None:
    async with connected(address) as client:
        answer = await client.ask(post("db", body))
        assert answer.status == 400
        assert "SECRET" not in answer.error()
        assert await backend.count("db") == 0
        assert (await client.ask(head("GET", "/livez"))).status == 200


async def test_a_body_over_8_mib_is_refused_before_it_comes(address: str) -> None:
    request = head("POST", "/batch/db", f"Content-Length: {8 * MIB + 1}")
    answer = await ask(address, request)
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert "8,388,608" in answer.error()


async def test_a_body_in_chunks_is_taken_up_to_8_mib(address: str) -> None:
    body = orjson.dumps({"set": [{"key": str(index), "value": "v" * MIB} for index in range(7)]})
    pieces = [chunk(body[start : start + MIB]) for start in range(0, len(body), MIB)]
    assert content(await ask(address, head("POST", "/batch/db", CHUNKED), *pieces, chunk(b""))) == {"done": 7}
    answer = await ask(address, head("POST", "/batch/db", CHUNKED), *[chunk(b" " * MIB) for _ in range(9)])
    assert answer.status == 413


async def test_values_beyond_8_mib_are_omitted_but_the_first(address: str, backend: MemoryBackend) -> None:
    for index in range(6):
        await backend.set("db", str(index), "v" * 1_800_000, 60)
    await backend.set("db", "escaped", "\x01" * 1_900_000, 60)
    answer = content(await ask(address, post("db", {"get": [*map(str, range(6)), "absent"]})))
    values = answer["values"]
    assert isinstance(values, list)
    assert [value is None for value in values] == [False] * 4 + [True] * 3
    # The backend stops reading there; whether a key is absent is then not known.
    omitted = answer["omitted"]
    assert isinstance(omitted, list)
    assert set(omitted) >= {4, 5}
    answer = content(await ask(address, post("db", {"get": ["escaped", "0"]})))
    assert (answer["values"], answer["omitted"]) == (["\x01" * 1_900_000, None], [1])


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
async def test_another_method_is_refused(address: str, method: str) -> None:
    answer = await ask(address, head(method, "/batch/db"))
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", ["/batch/", "/batch", "/keys/", "/watch/", "/batches/db"])
async def test_a_path_without_a_namespace_is_none(address: str, path: str) -> None:
    assert (await ask(address, head("POST", path))).status == 404


@pytest.mark.parametrize("db_name", ["..", "%2e", "a/b", "a%2fb", "%00", "%zz", "%ff", "a" * 8_001])
async def test_a_hostile_namespace_is_refused(address: str, db_name: str) -> None:
    assert (await ask(address, post(db_name, {"get": ["a"]}))).status == 400


async def test_a_slow_body_is_given_up() -> None:
    async with serving(MemoryBackend(), grace_seconds=0.2) as address, connected(address) as client:
        await client.send(head("POST", "/batch/db", "Content-Length: 1000"), b'{"get":')
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close")


async def test_bodies_of_batches_are_held_like_those_of_sets() -> None:
    async with serving(MemoryBackend(), max_bytes_in_flight=16 * MIB) as address:
        async with connected(address) as first, connected(address) as second:
            await first.send(head("POST", "/batch/db", f"Content-Length: {8 * MIB}"), b"{")
            await asyncio.sleep(0.05)
            answer = await second.ask(head("POST", "/batch/db", f"Content-Length: {8 * MIB}"))
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        await asyncio.sleep(0.05)
        assert (await ask(address, post("db", {"get": ["a"]}))).status == 200
        large = {"set": [{"key": str(index), "value": "v" * MIB} for index in range(7)]}
        assert (await ask(address, post("db", large))).status == 200


async def test_a_body_with_a_coding_is_refused(address: str) -> None:
    answer = await ask(address, head("POST", "/batch/db", "Content-Encoding: gzip", "Content-Length: 5"))
    assert answer.status == 415


class FaultyBackend(MemoryBackend):
    """A backend that fails for some keys, or for all."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def outcome(self, key: str) -> CallError | None:
        if key == "damaged":
            return CorruptValueError("SECRET")
        if key == "full":
            return StorageFullError("SECRET")
        return UnavailableError("SECRET", maybe_applied=True) if key == "unknown" else None

    async def get_many(self, db_name: str, keys: Sequence[str]) -> list[str | Omitted | CallError | None]:  # type: ignore[override]
        if self.error is not None:
            raise self.error
        values = await super().get_many(db_name, keys)
        return [self.outcome(key) or value for key, value in zip(keys, values, strict=True)]

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> list[CallError | None]:  # type: ignore[override]
        if self.error is not None:
            raise self.error
        await super().set_many(db_name, [entry for entry in entries if self.outcome(entry.key) is None])
        return [self.outcome(entry.key) for entry in entries]


async def test_an_error_of_one_key_is_that_keys_alone() -> None:
    async with serving(FaultyBackend()) as address:
        entries = [{"key": key, "value": "v"} for key in ("a", "full", "b", "unknown")]
        answer = await ask(address, post("db", {"set": entries}))
        assert content(answer) == {
            "done": 2,
            "errors": [
                {
                    "index": 1,
                    "status": 507,
                    "error": "the store has no room left; nothing was stored",
                    "maybe_applied": False,
                },
                {"index": 3, "status": 503, "error": "the store cannot be reached now", "maybe_applied": True},
            ],
        }
        answer = await ask(address, post("db", {"get": ["a", "damaged", "b"]}))
        assert content(answer) == {
            "values": ["v", None, "v"],
            "errors": [{"index": 1, "status": 503, "error": "the stored value is damaged; set it again or delete it"}],
        }


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StorageFullError("SECRET"), 507),
        (UnavailableError("SECRET"), 503),
        (UnsupportedError("SECRET"), 501),
        (ZeroDivisionError("SECRET"), 500),
    ],
)
async def test_an_error_of_the_whole_batch_is_its_answer(error: Exception, status: int) -> None:
    async with serving(FaultyBackend(error)) as address:
        for body in ({"get": ["a"]}, {"set": [{"key": "a", "value": "v"}]}):
            answer = await ask(address, post("db", body))
            assert answer.status == status
            assert "SECRET" not in answer.error()


class PlainBackend:
    """A backend that can do nothing further."""

    def __init__(self) -> None:
        inner = MemoryBackend()
        self.get, self.set, self.delete, self.aclose = inner.get, inner.set, inner.delete, inner.aclose


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/batch/db"),
        ("GET", "/keys/db"),
        ("DELETE", "/keys/db"),
        ("GET", "/count/db"),
        ("PUT", "/claims/db/k?owner=a&seconds=1"),
        ("DELETE", "/claims/db/k?owner=a"),
        ("GET", "/watch/db"),
    ],
)
async def test_what_the_backend_lacks_is_501_and_not_named(method: str, path: str) -> None:
    async with serving(PlainBackend()) as address:
        answer = await ask(address, head(method, path))
        assert answer.status == 501
        assert "aiokv-extensions" not in answer.headers
        assert answer.error()


async def test_a_pipeline_of_batches_is_answered_in_its_order(address: str) -> None:
    async with connected(address) as client:
        requests = [
            post("db", {"set": [{"key": "a", "value": str(index)}]}) + post("db", {"get": ["a"]}) for index in range(20)
        ]
        await client.send(b"".join(requests))
        for index in range(20):
            assert content(await client.answer()) == {"done": 1}
            assert content(await client.answer()) == {"values": [str(index)]}
