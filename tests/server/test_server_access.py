"""Keys and tokens: who gets in, who does not, and what a change of the access file does."""

import asyncio
import base64
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import jwt
import pytest
from helpers import FakeClock

from aiokv.backends.memory import MemoryBackend
from aiokv.errors import ConfigurationError
from aiokv.server import AccessFile, add_key, running_server

TOKEN_PATH = "/storage/auth/token"
LIFETIME_SECONDS = 7_200
NO_HASH = "0" * 64


def account_of_key(access: AccessFile, authorization: str) -> str | None:
    """Exchange a key for a token, and return the account of the token."""
    issued = access.issue_token(authorization)
    return None if issued is None else account_of_token(access, f"Bearer {issued.token}")


def account_of_token(access: AccessFile, authorization: str) -> str | None:
    permit = access.permit_of_token(authorization)
    return None if permit is None else permit.account


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access"


@pytest.fixture
def key(path: Path) -> str:
    return add_key(path, "alice")


@pytest.fixture
def access(path: Path, key: str, clock: FakeClock) -> AccessFile:
    assert key
    return AccessFile(path, clock)


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def token_for(access: AccessFile, key: str) -> str:
    issued = access.issue_token(f"Key {key}")
    assert issued is not None
    return f"Bearer {issued.token}"


def read_again(access: AccessFile) -> None:
    """Check the file now, not within a second."""
    access.reload()


def without_line(path: Path, hashed_key: str) -> None:
    kept = [line for line in path.read_text().splitlines() if digest(hashed_key) not in line]
    path.write_text("\n".join(kept) + "\n")


def digest(key: str) -> str:
    return hashlib.sha256(key.partition(":")[2].encode()).hexdigest()


def signing_key(path: Path) -> bytes:
    return bytes.fromhex(path.read_text().partition("!signing-key ")[2][:64])


def unsigned(claims: dict[str, object]) -> str:
    parts = (json.dumps({"alg": "none", "typ": "JWT"}), json.dumps(claims))
    return ".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=").decode() for part in parts) + "."


def test_key_and_its_token_name_the_account(access: AccessFile, key: str, clock: FakeClock) -> None:
    issued = access.issue_token(f"Key {key}")
    assert issued is not None
    assert issued.expires_at == datetime.fromtimestamp(clock.now + LIFETIME_SECONDS, UTC)
    assert account_of_key(access, f"key {key}") == "alice"
    assert account_of_token(access, f"Bearer {issued.token}") == "alice"
    assert account_of_token(access, f"bearer {issued.token}") == "alice"


@pytest.mark.parametrize(
    "authorization",
    [
        *("", "Key", "Key ", "Key :", "Key alice", "Key alice:", "Key alice:wrong", "Key {key}x", "Key {key} ", "Key  {key}"),
        *("Key bob:{secret}", "Key ALICE:{secret}", "Key :{secret}", "{key}", "Basic {key}", "Bearer {key}", "Key {hash}"),
        *("Key alice:{hash}", f"Key bob:{NO_HASH}", "Key alice:\udcff", "Key \udcff:{secret}", "Key alice:é", "Key alice:\0"),
    ],
    ids=ascii,
)
def test_wrong_key_gets_no_token(access: AccessFile, key: str, authorization: str) -> None:
    offered = authorization.format(key=key, secret=key.partition(":")[2], hash=digest(key))
    assert account_of_key(access, offered) is None
    assert access.issue_token(offered) is None


@pytest.mark.parametrize("seen_before", [True, False])
def test_token_works_until_it_expires(access: AccessFile, key: str, clock: FakeClock, *, seen_before: bool) -> None:
    token = token_for(access, key)
    clock.advance(LIFETIME_SECONDS - 1)
    if seen_before:
        assert account_of_token(access, token) == "alice"
    clock.advance(1)
    assert account_of_token(access, token) is None


FORGERIES: dict[str, Callable[[dict[str, object], bytes, str], str]] = {
    "other signing key": lambda claims, _secret, _token: f"Bearer {jwt.encode(claims, bytes(32), algorithm='HS256')}",
    "no algorithm": lambda claims, _secret, _token: f"Bearer {unsigned(claims)}",
    "no algorithm but a signature": lambda claims, _secret, token: f"Bearer {unsigned(claims)}{token.rpartition('.')[2]}",
    "other account": lambda claims, secret, _token: f"Bearer {jwt.encode(claims | {'sub': 'bob'}, secret)}",
    "other key": lambda claims, secret, _token: f"Bearer {jwt.encode(claims | {'key': '0' * 16}, secret)}",
    "empty key": lambda claims, secret, _token: f"Bearer {jwt.encode(claims | {'key': ''}, secret)}",
    "claims missing": lambda claims, secret, _token: f"Bearer {jwt.encode({'sub': claims['sub']}, secret)}",
    "cut": lambda _claims, _secret, token: token[:-2],
    "extended": lambda _claims, _secret, token: token + "A",
    "tampered": lambda _claims, _secret, token: token.replace(".", ".e30", 1),
    "no scheme": lambda _claims, _secret, token: token.removeprefix("Bearer "),
    "key's scheme": lambda _claims, _secret, token: token.replace("Bearer", "Key"),
    "two spaces": lambda _claims, _secret, token: token.replace("Bearer ", "Bearer  "),
    "not UTF-8 at the end": lambda _claims, _secret, token: f"{token}\udcff",
    "not UTF-8": lambda _claims, _secret, _token: "Bearer \udcff",
    "not ASCII": lambda _claims, _secret, _token: "Bearer é.é.é",
    "empty": lambda _claims, _secret, _token: "Bearer ",
    "nothing": lambda _claims, _secret, _token: "",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_token_is_refused_before_and_after_a_good_one(
    access: AccessFile, path: Path, key: str, clock: FakeClock, forgery: str
) -> None:
    token = token_for(access, key)
    claims: dict[str, object] = {"sub": "alice", "key": digest(key)[:16], "exp": int(clock.now) + 60}
    forged = FORGERIES[forgery](claims, signing_key(path), token)
    assert account_of_token(access, forged) is None
    assert account_of_token(access, token) == "alice"
    assert account_of_token(access, forged) is None


def test_claims_of_the_forgeries_would_do_if_rightly_signed(access: AccessFile, path: Path, key: str, clock: FakeClock) -> None:
    claims = {"sub": "alice", "key": digest(key)[:16], "exp": int(clock.now) + 60}
    assert account_of_token(access, f"Bearer {jwt.encode(claims, signing_key(path))}") == "alice"


def test_token_expires_by_the_clock_of_the_package(path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    access = AccessFile(path)
    monkeypatch.setattr("aiokv.clock.now", lambda: 1_000_000.0)
    issued = access.issue_token(f"Key {key}")
    assert issued is not None
    assert issued.expires_at == datetime.fromtimestamp(1_000_000 + LIFETIME_SECONDS, UTC)
    assert account_of_token(access, f"Bearer {issued.token}") == "alice"
    monkeypatch.setattr("aiokv.clock.now", lambda: 1_000_000.0 + LIFETIME_SECONDS)
    assert account_of_token(access, f"Bearer {issued.token}") is None


def test_changed_file_is_read_again_by_the_clock_of_the_package(path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiokv.clock.monotonic", lambda: 1_000.0)
    access = AccessFile(path)
    without_line(path, key)
    assert account_of_key(access, f"Key {key}") == "alice"
    monkeypatch.setattr("aiokv.clock.monotonic", lambda: 1_001.0)
    assert account_of_key(access, f"Key {key}") is None


def test_removed_line_revokes_its_key_and_tokens_alone(path: Path, key: str, clock: FakeClock) -> None:
    second = add_key(path, "alice")
    access = AccessFile(path, clock)
    old_token, new_token = token_for(access, key), token_for(access, second)
    assert [account_of_token(access, token) for token in (old_token, new_token)] == ["alice", "alice"]
    without_line(path, key)
    read_again(access)
    assert account_of_token(access, old_token) is None
    assert account_of_key(access, f"Key {key}") is None
    assert account_of_token(access, new_token) == "alice"
    assert account_of_key(access, f"Key {second}") == "alice"


def test_changed_signing_key_revokes_every_token(access: AccessFile, path: Path, key: str) -> None:
    token = token_for(access, key)
    assert account_of_token(access, token) == "alice"
    path.write_text(path.read_text().replace(signing_key(path).hex(), NO_HASH))
    read_again(access)
    assert account_of_token(access, token) is None
    assert account_of_token(access, token_for(access, key)) == "alice"


def test_half_edited_file_keeps_the_last_good_state(
    access: AccessFile, path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = path.read_text()
    token = token_for(access, key)
    path.write_text(f"{good}carol:sha256:my-secret-line\n")
    read_again(access)
    assert account_of_token(access, token) == "alice"
    assert account_of_key(access, f"Key {key}") == "alice"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "line 5" in caplog.text
    assert "my-secret" not in caplog.text
    path.write_text(good)
    second = add_key(path, "bob")
    read_again(access)
    assert account_of_key(access, f"Key {second}") == "bob"
    assert account_of_token(access, token) == "alice"


def test_file_that_is_gone_keeps_the_last_good_state(
    access: AccessFile, path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.unlink()
    read_again(access)
    assert account_of_key(access, f"Key {key}") == "alice"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"!signing-key {NO_HASH}\n\nalice:my-secret\n", "line 3"),
        (f"!signing-key {NO_HASH}\nalice:sha256:{NO_HASH} my-secret\n", "line 2"),
        (f"!signing-key {NO_HASH}\nmy/secret:sha256:{NO_HASH}\n", "line 2"),
        (f"!signing-key {NO_HASH}\nalice:sha256:{NO_HASH[1:]}\n", "line 2"),
        ("# comment\n!signing-key my-secret\n", "line 2"),
        (f"alice:sha256:{NO_HASH}\n", "signing-key"),
        ("", "signing-key"),
        (b"\xff\xfe", "not text"),
        (None, "access add"),
    ],
)
def test_malformed_file_is_refused_by_line_number_alone(path: Path, content: str | bytes | None, told: str) -> None:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError) as caught:
        AccessFile(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)
    assert NO_HASH[1:] not in str(caught.value)


async def ask(
    session: aiohttp.ClientSession, method: str, url: str, authorization: str | None = None, data: str | None = None
) -> tuple[int, dict[str, str], aiohttp.typedefs.LooseHeaders]:
    headers = {"Authorization": authorization} if authorization is not None else {}
    async with session.request(method, url, headers=headers, data=data) as answer:
        assert answer.content_type == "application/json"
        return answer.status, await answer.json(), answer.headers


async def exchange(session: aiohttp.ClientSession, address: str, key: str) -> str:
    status, content, _ = await ask(session, "POST", f"{address}{TOKEN_PATH}?storage_type=fal-cdn-v3", f"Key {key}", data="{}")
    assert status == 200
    assert set(content) == {"token", "token_type", "base_url", "expires_at"}
    assert content["base_url"] == address
    assert (datetime.fromisoformat(content["expires_at"]) - datetime.now(UTC)).total_seconds() > 3_600
    return f"{content['token_type']} {content['token']}"


async def test_accounts_are_isolated_and_keys_of_one_account_share(path: Path, session: aiohttp.ClientSession) -> None:
    keys = [add_key(path, account) for account in ("alice", "alice", "bob")]
    backend = MemoryBackend()
    async with running_server(backend, access=AccessFile(path)) as address:
        first, second, other = [await exchange(session, address, key) for key in keys]
        for token, value in ((first, "alice's"), (other, "bob's")):
            assert (await ask(session, "PUT", f"{address}/set/db/key", token, data=value))[0] == 200
        for token, value in ((first, "alice's"), (second, "alice's"), (other, "bob's")):
            assert (await ask(session, "GET", f"{address}/get/db/key", token))[:2] == (200, {"value": value})
        assert (await ask(session, "DELETE", f"{address}/delete/db/key", other))[0] == 200
        assert (await ask(session, "GET", f"{address}/get/db/key", other))[0] == 404
        assert (await ask(session, "GET", f"{address}/get/db/key", second))[0] == 200


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer forged", "Key {key}", "Basic {key}"])
async def test_call_without_a_token_is_refused_and_touches_nothing(
    access: AccessFile, key: str, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture, authorization: str | None
) -> None:
    caplog.set_level(logging.DEBUG)
    backend = MemoryBackend()
    await backend.set("alice/db", "key", "kept", 60)
    offered = authorization.format(key=key) if authorization is not None else None
    async with running_server(backend, access=access) as address:
        for method, verb in (("GET", "get"), ("PUT", "set"), ("DELETE", "delete")):
            status, content, headers = await ask(session, method, f"{address}/{verb}/db/key", offered)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert list(content) == ["error"]
            assert key.partition(":")[2] not in content["error"]
        for probe in ("livez", "readyz"):
            assert (await ask(session, "GET", f"{address}/{probe}"))[0] == 200
    assert list(backend._entries) == [("alice/db", "key")]
    assert await backend.get("alice/db", "key") == "kept"
    assert key.partition(":")[2] not in caplog.text


async def test_refused_key_is_told_what_is_expected(access: AccessFile, session: aiohttp.ClientSession) -> None:
    async with running_server(MemoryBackend(), access=access) as address:
        for offered in (None, "Key alice:wrong-secret", "Bearer x"):
            status, content, headers = await ask(session, "POST", f"{address}{TOKEN_PATH}", offered, data="{}")
            assert status == 401
            assert "wrong-secret" not in content["error"]
            assert headers.get("WWW-Authenticate"), "a 401 names the scheme that it wants"


async def test_answer_to_a_wrong_key_waits_and_to_a_right_one_does_not(
    path: Path, key: str, session: aiohttp.ClientSession
) -> None:
    access = AccessFile(path)
    loop = asyncio.get_running_loop()
    async with running_server(MemoryBackend(), access=access) as address:
        for least_seconds in (0.1, 0.2, 0.4):
            start = loop.time()
            assert (await ask(session, "POST", f"{address}{TOKEN_PATH}", "Key alice:wrong", data="{}"))[0] == 401
            assert loop.time() - start >= least_seconds * 0.99
        for _ in range(5):
            access.issue_token("Key alice:wrong", "127.0.0.1")
        async with asyncio.timeout(access.delay_of("127.0.0.1") * 0.9):
            await exchange(session, address, key)


async def test_unknown_key_is_told_from_what_is_no_key(access: AccessFile, session: aiohttp.ClientSession) -> None:
    async with running_server(MemoryBackend(), access=access) as address:
        answers = [await ask(session, "POST", f"{address}{TOKEN_PATH}", text, data="{}") for text in ("Key a:b", "Bearer x")]
    assert [(status, content["error"]) for status, content, _ in answers] == [
        (401, "the key is unknown here or was revoked"),
        (401, "expected a key: 'Authorization: Key <id>:<secret>'"),
    ]


async def test_call_that_a_key_may_not_make_is_refused_and_touches_nothing(path: Path, session: aiohttp.ClientSession) -> None:
    keys = [add_key(path, "alice"), add_key(path, "alice", read_only=True), add_key(path, "alice", db_patterns=("cache-*",))]
    backend = MemoryBackend()
    async with running_server(backend, access=AccessFile(path)) as address:
        owner, reader, cacher = [await exchange(session, address, key) for key in keys]

        async def statuses(token: str, db_name: str) -> list[int]:
            calls = (("PUT", "set"), ("GET", "get"), ("DELETE", "delete"))
            return [(await ask(session, method, f"{address}/{verb}/{db_name}/key", token, "new"))[0] for method, verb in calls]

        for db_name in ("config", "cache-a"):
            assert (await ask(session, "PUT", f"{address}/set/{db_name}/key", owner, data="old"))[0] == 200
        assert await statuses(reader, "config") == [403, 200, 403]
        assert await statuses(cacher, "config") == [403, 403, 403]
        # The pattern is compared with the decoded name.
        assert await statuses(cacher, "c%61che-%61") == [200, 200, 200]
        assert await statuses(cacher, "alice:cache-a") == [403, 403, 403]
        assert (await ask(session, "GET", f"{address}/get/config/key", owner))[:2] == (200, {"value": "old"})
        _, content, _ = await ask(session, "PUT", f"{address}/set/config/key", reader, data="new")
        assert "read-only" in content["error"]


async def test_token_that_is_not_utf8_is_refused(access: AccessFile, session: aiohttp.ClientSession) -> None:
    async with running_server(MemoryBackend(), access=access) as address:
        status, content, _ = await ask(session, "GET", f"{address}/get/db/key", "Bearer \udcff")
    assert status == 401
    assert list(content) == ["error"]


async def test_any_host_name_is_served_with_an_access_file(
    access: AccessFile, key: str, session: aiohttp.ClientSession
) -> None:
    headers = {"Host": "kv.example.com:8443", "Authorization": f"Key {key}"}
    async with running_server(MemoryBackend(), host="0.0.0.0", access=access) as address:
        url = address.replace("0.0.0.0", "127.0.0.1") + TOKEN_PATH
        async with session.post(url, headers=headers) as answer:
            assert answer.status == 200
            assert (await answer.json())["base_url"] == "http://kv.example.com:8443"


async def test_host_that_is_not_utf8_is_the_clients_fault(access: AccessFile, key: str) -> None:
    async with running_server(MemoryBackend(), access=access, drain_seconds=1) as address:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        request = f"POST {TOKEN_PATH} HTTP/1.1\r\nAuthorization: Key {key}\r\nConnection: close\r\nHost: "
        writer.write(request.encode() + b"\xff\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 400 ")


async def test_token_is_given_to_anybody_without_an_access_file(session: aiohttp.ClientSession) -> None:
    async with running_server(MemoryBackend()) as address:
        tokens = {await exchange(session, address, key) for key in ("any:thing", "any:thing", "other:thing")}
        assert len(tokens) == 3
        assert (await ask(session, "POST", f"{address}{TOKEN_PATH}", data="{}"))[0] == 200
        for authorization in (*tokens, None, "Bearer made-up"):
            assert (await ask(session, "PUT", f"{address}/set/db/key", authorization, data="x"))[0] == 200
            assert (await ask(session, "GET", f"{address}/get/db/key"))[:2] == (200, {"value": "x"})


async def test_token_request_over_its_limit_is_refused(session: aiohttp.ClientSession) -> None:
    async with running_server(MemoryBackend()) as address:
        assert (await ask(session, "POST", f"{address}{TOKEN_PATH}", data="x" * 65_536))[0] == 200
        assert (await ask(session, "POST", f"{address}{TOKEN_PATH}", data="x" * 65_537))[0] == 413
