"""Extensions behind accounts: isolation, what a key may do, rates, quotas, and what figures and logs show."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import orjson
import pytest
from extension_clients import EXTENSIONS, LOST, ask, bearer, content, post, watching
from helpers import FakeClock, served_process
from server_clients import connected, head, put

from aiokv.backends.base import Backend
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.sqlite import SqliteBackend
from aiokv.backends.watching import Changed
from aiokv.server import AccessFile, AccountLimits, running_server
from aiokv.server.access_file import revoke_keys
from aiokv.server.options import ServerOptions


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access"


@pytest.fixture
def alice(path: Path) -> str:
    return bearer(path, "alice")


@pytest.fixture
def bob(path: Path, alice: str) -> str:
    assert alice
    return bearer(path, "bob")


@pytest.fixture
def reader(path: Path, bob: str) -> str:
    assert bob
    return bearer(path, "alice", read_only=True)


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
async def address(path: Path, backend: MemoryBackend, reader: str) -> AsyncGenerator[str]:
    assert reader
    async with running_server(backend, access=AccessFile(path), drain_seconds=1) as address:
        yield address


REQUESTS = [
    post("db", {"get": ["k"]}),
    post("db", {"set": [{"key": "k", "value": "v"}]}),
    post("db", {"delete": ["k"]}),
    head("GET", "/keys/db"),
    head("DELETE", "/keys/db"),
    head("GET", "/count/db"),
    head("PUT", "/claims/db/k?owner=me&seconds=5"),
    head("DELETE", "/claims/db/k?owner=me"),
    head("GET", "/watch/db"),
]
READS = {0, 3, 5, 8}


def with_header(request: bytes, header: str) -> bytes:
    return request.replace(b"\r\n", b"\r\n" + header.encode() + b"\r\n", 1)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request[:24].decode())
async def test_without_a_good_token_nothing_is_done(address: str, request_: bytes) -> None:
    for request in (request_, with_header(request_, "Authorization: Bearer wrong")):
        answer = await ask(address, request)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.headers["aiokv-extensions"] == EXTENSIONS


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=lambda number: REQUESTS[number][:24].decode())
async def test_a_read_only_key_reads_alone(reader: str, backend: MemoryBackend, address: str, number: int) -> None:
    await backend.set("alice:db", "k", "v", 60)
    request = with_header(REQUESTS[number], reader)
    if number == len(REQUESTS) - 1:
        async with watching(address, "db", reader) as stream:
            assert stream.status == 200
        return
    answer = await ask(address, request)
    assert answer.status == (200 if number in READS else 403)
    assert await backend.get("alice:db", "k") == "v"


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request[:24].decode())
async def test_a_key_for_some_namespaces_uses_no_other(path: Path, backend: MemoryBackend, request_: bytes) -> None:
    token = bearer(path, "alice", db_patterns=("cache-*",))
    async with running_server(backend, access=AccessFile(path), drain_seconds=1) as address:
        assert (await ask(address, with_header(request_, token))).status == 403
        if b"/watch/" not in request_:
            allowed = with_header(request_, token).replace(b"/db", b"/cache-1", 1)
            assert (await ask(address, allowed)).status == 200


async def test_accounts_see_nothing_of_each_other(address: str, alice: str, bob: str, backend: MemoryBackend) -> None:
    async with connected(address) as client, watching(address, "db", bob) as stream:
        assert await stream.next() == LOST
        entries = [{"key": "k", "value": "v"}]
        assert content(await client.ask(post("db", {"set": entries}, alice))) == {"done": 1}
        assert content(await client.ask(head("PUT", "/claims/db/job?owner=me&seconds=5", alice)))["held"] is True
        # Names that look like another account's, or like one's own.
        for db_name in ("db", "alice:db", "bob:alice:db", "bob:db"):
            assert content(await client.ask(post(db_name, {"get": ["k"]}, bob))) == {"values": [None]}
            assert content(await client.ask(head("GET", f"/keys/{db_name}", bob)))["keys"] == []
            assert content(await client.ask(head("GET", f"/count/{db_name}", bob))) == {"count": 0}
            assert content(await client.ask(head("DELETE", f"/keys/{db_name}", bob))) == {"deleted": 0, "next": None}
            assert content(await client.ask(post(db_name, {"delete": ["k"]}, bob))) == {"done": 1}
        assert content(await client.ask(head("PUT", "/claims/db/job?owner=you&seconds=5", bob)))["held"] is True
        assert await backend.get("alice:db", "k") == "v"
        assert content(await client.ask(post("bob:db", {"set": entries}, bob))) == {"done": 1}
        assert await backend.get("bob:bob:db", "k") == "v"
        assert content(await client.ask(post("db", {"set": entries}, bob))) == {"done": 1}
        assert await stream.next() == Changed("k")


async def test_a_cursor_of_another_account_shows_only_ones_own_keys(
    address: str, alice: str, bob: str, backend: MemoryBackend
) -> None:
    for account in ("alice", "bob"):
        for index in range(3):
            await backend.set(f"{account}:db", f"{account}-{index}", "v", 60)
    cursor = content(await ask(address, head("GET", "/keys/db?limit=1", alice)))["next"]
    answer = await ask(address, head("GET", f"/keys/db?after={str(cursor).replace(':', '%3A')}", bob))
    assert b"alice" not in answer.body


async def test_a_batch_is_charged_a_token_for_each_key(path: Path, alice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(5_000.0)
    access = AccessFile(path, default_limits=AccountLimits(10.0))
    async with running_server(MemoryBackend(), access=access, drain_seconds=1) as address, connected(address) as client:
        monkeypatch.setattr("aiokv.clock.monotonic", clock)
        get = head("GET", "/get/db/k", alice)
        assert (await client.ask(get)).status == 404
        clock.advance(10)
        assert (await client.ask(post("db", {"get": ["k"] * 30}, alice))).status == 200
        answer = await client.ask(get)
        assert (answer.status, answer.headers["retry-after"]) == (429, "3")
        assert (await client.ask(post("db", {"get": ["k"]}, alice))).status == 429
        clock.advance(2.05)
        assert (await client.ask(get)).status == 429
        clock.advance(0.1)
        assert (await client.ask(get)).status == 404


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (AccountLimits(None, None, 12), [0, 1]),
        (AccountLimits(None, 1_020, None), [0, 1]),
        (AccountLimits(None, 1_015, None), [0, 3]),
    ],
)
async def test_entries_beyond_the_quota_get_their_own_refusal(
    path: Path, alice: str, limits: AccountLimits, expected: list[int]
) -> None:
    backend = MemoryBackend()
    for index in range(10):
        await backend.set("alice:db", f"old-{index}", "v" * 100, 60)
    access = AccessFile(path, default_limits=limits)
    async with running_server(backend, access=access, drain_seconds=1) as address, connected(address) as client:
        values = ["v" * 10, "v" * 10, "v" * 10, "v" * 4]
        entries = [{"key": f"new-{index}", "value": value} for index, value in enumerate(values)]
        answer = content(await client.ask(post("db", {"set": entries}, alice)))
        errors = answer["errors"]
        assert isinstance(errors, list)
        stored = [index for index in range(4) if await backend.get("alice:db", f"new-{index}") is not None]
        assert stored == expected
        assert {error["index"] for error in errors} == {0, 1, 2, 3} - set(expected)
        assert {(error["status"], error["maybe_applied"]) for error in errors} == {(507, False)}
        assert answer["done"] == len(expected)
        # What is no larger can be replaced, and deletes are never refused.
        smaller = [{"key": "old-1", "value": "v"}]
        assert content(await client.ask(post("db", {"set": smaller}, alice))) == {"done": 1}
        assert content(await client.ask(post("db", {"delete": ["old-2"]}, alice))) == {"done": 1}
        assert content(await client.ask(post("db", {"set": [{"key": "again", "value": "v"}]}, alice))) == {"done": 1}


async def test_claims_are_renewed_at_the_quota_and_refused_far_beyond_it(path: Path, alice: str) -> None:
    access = AccessFile(path, default_limits=AccountLimits(None, None, 1))
    async with running_server(MemoryBackend(), access=access, drain_seconds=1) as address, connected(address) as client:
        assert (await client.ask(put("/set/db/k", b"v", alice))).status == 200
        statuses = [
            (await client.ask(head("PUT", f"/claims/db/job-{index}?owner=me&seconds=60", alice))).status for index in range(20)
        ]
        assert statuses == [200] * 16 + [507] * 4
        assert (await client.ask(put("/set/db/other", b"v", alice))).status == 507
        assert (await client.ask(head("DELETE", "/claims/db/job-0?owner=me", alice))).status == 200
        assert (await client.ask(head("PUT", "/claims/db/job-1?owner=me&seconds=60", alice))).status == 200
        assert (await client.ask(head("PUT", "/claims/db/job-1?owner=me&seconds=60&renew=1", alice))).status == 200


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_every_claim_that_was_granted_can_be_renewed_and_no_more_are_granted_at_once(
    path: Path, alice: str, tmp_path: Path, kind: str
) -> None:
    backend: Backend = MemoryBackend() if kind == "memory" else SqliteBackend(tmp_path / "kv.db")
    await backend.get("db", "k")
    options = ServerOptions(max_stored_entries=8, max_connections_per_address=None)
    accounts = AccessFile(path, default_limits=AccountLimits(max_stored_entries=8))
    async with running_server(backend, access=accounts, options=options) as address:

        async def claim(index: int) -> int:
            async with connected(address) as client:
                return (await client.ask(head("PUT", f"/claims/db/job-{index}?owner=me&seconds=60", alice))).status

        granted = [index for index, status in enumerate(await asyncio.gather(*map(claim, range(60)))) if status == 200]
        assert len(granted) <= 8 + 16 + 1
        assert [await claim(index) for index in granted] == [200] * len(granted)
        more = [await claim(index) for index in range(60, 90)]
        assert 507 in more
        assert 200 not in more[more.index(507) :]
        # What was refused is held by nobody.
        refused = 60 + more.index(507)
        async with connected(address) as client:
            answer = await client.ask(head("DELETE", f"/claims/db/job-{refused}?owner=me", alice))
        assert content(answer) == {"released": False}
    await backend.aclose()


async def test_a_watch_ends_when_its_key_is_revoked(path: Path, alice: str) -> None:
    access = AccessFile(path)
    async with running_server(MemoryBackend(), access=access, drain_seconds=1) as address:
        async with watching(address, "db", alice) as stream:
            assert await stream.next() == LOST
            revoke_keys(path, "alice")
            assert await stream.next() is None
        async with watching(address, "db", alice) as stream:
            assert stream.status == 401


async def test_an_account_has_a_share_of_the_watches(path: Path, alice: str, bob: str) -> None:
    options = ServerOptions(max_watches=3, max_watches_per_account=2)
    async with running_server(MemoryBackend(), access=AccessFile(path), options=options, drain_seconds=1) as address:
        async with watching(address, "a", alice) as first, watching(address, "b", alice) as second:
            assert (first.status, second.status) == (200, 200)
            async with watching(address, "a", alice) as third:
                assert (third.status, third.headers["retry-after"]) == (429, "1")
            async with watching(address, "a", bob) as fourth, watching(address, "a", bob) as fifth:
                assert (fourth.status, fifth.status) == (200, 503)
        for _ in range(100):
            async with watching(address, "a", alice) as again:
                if again.status == 200:
                    break
            await asyncio.sleep(0.02)
        assert again.status == 200


async def test_figures_count_the_extensions_and_the_log_shows_no_secret(tmp_path: Path) -> None:
    arguments = ("--store", "memory://", "--access-log", "log", "--log-keys")
    with served_process(*arguments, home=tmp_path) as (process, address):
        async with watching(address, "db", "X-Request-Id: mine") as stream:
            assert stream.headers["x-request-id"] == "mine"
            assert await stream.next() == LOST
            async with connected(address) as client:
                entries = [{"key": "k-1", "value": "SECRET"}, {"key": "k-2", "value": "SECRET"}]
                assert content(await client.ask(post("db", {"set": entries}))) == {"done": 2}
                assert (await client.ask(post("db", {"get": ["k-1"] * 3}))).status == 200
                assert (await client.ask(head("GET", "/keys/db?prefix=SECRET"))).status == 200
                assert (await client.ask(head("PUT", "/claims/db/job?owner=SECRET&seconds=5"))).status == 200
                assert (await client.ask(head("PUT", "/claims/db/job?owner=other&seconds=5"))).status == 409
                metrics = (await client.ask(head("GET", "/metrics"))).body.decode()
                status = orjson.loads((await client.ask(head("GET", "/status.json"))).body)
        assert 'aiokv_batch_keys_total{verb="set"} 2.0' in metrics
        assert 'aiokv_batch_keys_total{verb="get"} 3.0' in metrics
        assert "aiokv_watches 1.0" in metrics
        assert 'aiokv_requests_total{status="200",verb="batch"} 2.0' in metrics
        assert 'aiokv_requests_total{status="409",verb="claims"} 1.0' in metrics
        assert status["verbs"]["keys"]["requests"] == 1
        process.terminate()
        process.wait()
    log = (tmp_path / "log").read_text()
    assert "SECRET" not in log
    lines = [orjson.loads(line) for line in log.splitlines()]
    assert [(line["verb"], line["db"], line["status"], line["key"]) for line in lines if line["verb"] != "other"] == [
        ("batch", "db", 200, None),
        ("batch", "db", 200, None),
        ("keys", "db", 200, None),
        ("claims", "db", 200, "job"),
        ("claims", "db", 409, "job"),
        ("watch", "db", 200, None),
    ]
    [watch] = [line for line in lines if line["verb"] == "watch"]
    assert watch["request_id"] == "mine"
    assert watch["bytes_out"] > 50
