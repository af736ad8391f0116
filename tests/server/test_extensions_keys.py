"""Listings, counts, clears and claims over a socket."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, NoReturn
from urllib.parse import quote

import pytest
from extension_clients import ask, content
from helpers import FakeClock
from server_clients import connected, head, serving

from aiokv.backends.capabilities import Cleared, Page
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.sqlite import SqliteBackend


@pytest.fixture
def backend(clock: FakeClock) -> MemoryBackend:
    return MemoryBackend(clock)


@pytest.fixture
async def address(backend: MemoryBackend) -> AsyncGenerator[str]:
    async with serving(backend) as address:
        yield address


async def listed(address: str, query: str = "") -> dict[str, Any]:
    return content(await ask(address, head("GET", f"/keys/db{query}")))


async def test_a_listing_names_keys_their_expiry_and_their_size(address: str, backend: MemoryBackend, clock: FakeClock) -> None:
    await backend.set("db", "a", "ä", 60)
    await backend.set("other", "b", "", 60)
    assert await listed(address) == {
        "keys": [{"key": "a", "expires_at": clock.now + 60, "value_bytes": 2}],
        "next": None,
        "ordered": backend.scans_in_order,
    }
    assert (await listed(address, "?prefix=b"))["keys"] == []


async def test_pages_follow_one_another_until_all_keys_came_once(address: str, backend: MemoryBackend) -> None:
    keys = {f"user:{index}" for index in range(25)}
    for key in keys:
        await backend.set("db", key, "v", 60)
    await backend.set("db", "other", "v", 60)
    found: list[str] = []
    query, cursor = "?prefix=user%3A&limit=10", ""
    for _ in range(10):
        page = await listed(address, query + cursor)
        found += [info["key"] for info in page["keys"]]
        if page["next"] is None:
            break
        cursor = f"&after={quote(page['next'], safe='')}"
    assert (len(found), set(found)) == (25, keys)


HOSTILE = [
    "a/b",
    "%",
    "_",
    "*",
    "[a-z]",
    "?",
    "a b",
    "+",
    "&limit=1",
    "#",
    "ä",
    "\u202e",
    "💥",
    "\uffff",
    "\U0010ffff",
    "'--",
    "\n",
]


@pytest.mark.parametrize("key", HOSTILE)
async def test_a_hostile_prefix_matches_itself_alone(address: str, backend: MemoryBackend, key: str) -> None:
    for other in HOSTILE:
        await backend.set("db", f"{other}key", "v", 60)
    query = f"?prefix={quote(key, safe='')}"
    assert [info["key"] for info in (await listed(address, query))["keys"]] == [f"{key}key"]
    assert content(await ask(address, head("GET", f"/count/db{query}"))) == {"count": 1}
    assert content(await ask(address, head("DELETE", f"/keys/db{query}"))) == {"deleted": 1, "next": None}
    assert await backend.get("db", f"{key}key") is None
    assert await backend.count("db") == len(HOSTILE) - 1


async def test_a_clear_goes_in_steps(address: str, backend: MemoryBackend) -> None:
    for index in range(25):
        await backend.set("db", str(index), "v", 60)
    deleted = [content(await ask(address, head("DELETE", "/keys/db?limit=10")))["deleted"] for _ in range(4)]
    assert deleted == [10, 10, 5, 0]


async def test_a_clear_that_goes_on_behind_its_steps_leaves_what_is_set_meanwhile(address: str, backend: MemoryBackend) -> None:
    for index in range(25):
        await backend.set("db", f"old {index}", "v", 60)
    deleted, after = [], ""
    while True:
        step = content(await ask(address, head("DELETE", f"/keys/db?limit=10{after}")))
        deleted.append(step["deleted"])
        await backend.set("db", f"new {len(deleted)}", "v", 60)
        if step["next"] is None:
            break
        after = f"&after={quote(step['next'], safe='')}"
    assert deleted == [10, 10, 5]
    assert sorted(info.key for info in (await backend.scan("db")).infos) == ["new 1", "new 2", "new 3"]


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/keys/db?limit=0"),
        ("GET", "/keys/db?limit=1001"),
        ("GET", "/keys/db?after="),
        ("GET", "/keys/db?after=foreign"),
        ("GET", "/keys/db?after=0%3Aforeign"),
        ("GET", "/keys/db?prefix=%00"),
        ("GET", "/keys/db?prefix=%zz"),
        ("GET", "/keys/db?prefix=%ff"),
        ("GET", "/keys/db?prefix=a&prefix=b"),
        ("GET", "/keys/a%2Fb"),
        ("GET", "/count/db?limit=5"),
        ("GET", "/count/db?after=a"),
        ("DELETE", "/keys/db?prefx=a"),
        ("DELETE", "/keys/db?after=a"),
        ("DELETE", "/keys/.."),
    ],
)
async def test_a_query_that_breaks_a_rule_is_refused_and_deletes_nothing(
    address: str, backend: MemoryBackend, method: str, target: str
) -> None:
    await backend.set("db", "a", "v", 60)
    answer = await ask(address, head(method, target))
    assert answer.status == 400
    assert answer.error()
    assert await backend.count("db") == 1


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        ("PUT", "/keys/db", "GET, DELETE"),
        ("DELETE", "/count/db", "GET"),
        ("GET", "/claims/db/k", "PUT, DELETE"),
        ("POST", "/watch/db", "GET"),
    ],
)
async def test_another_method_is_refused(address: str, method: str, target: str, allowed: str) -> None:
    answer = await ask(address, head(method, target))
    assert (answer.status, answer.headers["allow"]) == (405, allowed)


async def test_the_longest_keys_are_listed_with_the_longest_prefix(tmp_path: Any) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    prefix = "p" * 7_900
    async with serving(backend) as address:
        for end in "abc":
            await backend.set("db", f"{prefix}{end}", "v", 60)
        found, cursor = [], ""
        while len(found) < 3:
            page = await listed(address, f"?prefix={prefix}&limit=1{cursor}")
            found += [info["key"][-1] for info in page["keys"]]
            cursor = f"&after={quote(page['next'] or '', safe='')}"
    await backend.aclose()
    assert found == ["a", "b", "c"]


async def test_one_owner_holds_a_claim_until_it_is_released_or_ends(address: str, clock: FakeClock) -> None:
    async with connected(address) as client:

        async def claim(owner: str, seconds: str = "15") -> tuple[int, dict[str, Any]]:
            answer = await client.ask(head("PUT", f"/claims/db/a%2Fjob?owner={owner}&seconds={seconds}"))
            return answer.status, content(answer, answer.status)

        async def release(owner: str) -> object:
            return content(await client.ask(head("DELETE", f"/claims/db/a%2Fjob?owner={owner}")))["released"]

        assert await claim("me") == (200, {"held": True, "seconds_left": 15.0})
        assert await claim("you") == (409, {"held": False, "seconds_left": 15.0})
        assert await release("you") is False
        clock.advance(10)
        assert await claim("me", "7.5") == (200, {"held": True, "seconds_left": 7.5})
        assert await release("me") is True
        assert await claim("me", "15&renew=1") == (409, {"held": False, "seconds_left": 0.0})
        assert await claim("you") == (200, {"held": True, "seconds_left": 15.0})
        assert await claim("me", "15&renew=1") == (409, {"held": False, "seconds_left": 15.0})
        assert await claim("you", "20&renew=1") == (200, {"held": True, "seconds_left": 20.0})
        clock.advance(20)
        assert await release("you") is False
        assert (await claim("me"))[0] == 200
        # A claim is no value.
        assert (await client.ask(head("GET", "/get/db/a%2Fjob"))).status == 404
        assert content(await client.ask(head("GET", "/count/db"))) == {"count": 0}


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?owner=SECRET%20",
        "?seconds=5",
        "?owner=SECRET",
        "?owner=SECRET&seconds=0.5",
        "?owner=SECRET&seconds=3601",
        "?owner=SECRET&seconds=5&renew=2",
        "?owner=",
    ],
)
async def test_a_claim_that_breaks_a_rule_is_refused_without_its_owner(address: str, query: str) -> None:
    answer = await ask(address, head("PUT", f"/claims/db/job{query}"))
    assert answer.status == 400
    assert "SECRET" not in answer.error()


class EndlessBackend(MemoryBackend):
    """A backend whose listings, counts and clears end only where they are cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()

    async def _go_on(self) -> NoReturn:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError

    async def count(self, db_name: str, prefix: str = "") -> int:  # noqa: ARG002
        await self._go_on()

    async def scan(
        self,
        db_name: str,  # noqa: ARG002
        prefix: str = "",  # noqa: ARG002
        cursor: str | None = None,  # noqa: ARG002
        limit: int = 1_000,  # noqa: ARG002
    ) -> Page:
        await self._go_on()

    async def clear(
        self,
        db_name: str,  # noqa: ARG002
        prefix: str = "",  # noqa: ARG002
        cursor: str | None = None,  # noqa: ARG002
        limit: int = 1_000,  # noqa: ARG002
    ) -> Cleared:
        await self._go_on()


@pytest.mark.parametrize(("method", "target"), [("GET", "/count/db"), ("GET", "/keys/db"), ("DELETE", "/keys/db")])
async def test_what_its_client_has_left_is_stopped(method: str, target: str) -> None:
    backend = EndlessBackend()
    async with serving(backend) as address, asyncio.timeout(15):
        async with connected(address) as client:
            await client.send(head(method, target))
            await backend.begun.wait()
            assert not backend.cancelled.is_set()
        await backend.cancelled.wait()


async def test_count_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiokv.server.extensions._COUNT_SECONDS", 0.05)
    backend = EndlessBackend()
    async with serving(backend) as address:
        answer = await ask(address, head("GET", "/count/db"))
        assert answer.status == 503
        assert "list them in pages" in answer.error()
        assert backend.cancelled.is_set()
