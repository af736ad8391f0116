"""Listing, counting, clearing and claims over HTTP; what a server that lacks them is met with."""

import asyncio
import itertools
import socket

import orjson
import pytest
from aiohttp import web
from extension_service import ALL, ExtensionService, connected
from helpers import all_texts, no_wait
from yarl import URL

from aiokv.backends.capabilities import Capabilities, Entry, capabilities_of
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.extensions import Extensions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.errors import (
    AuthenticationError,
    CallError,
    RejectedError,
    ResponseError,
    TransportError,
    UnavailableError,
    UnsupportedError,
)
from aiokv.listing import clear_keys, list_keys
from aiokv.testing import FaultProxy, ResetAfter, ScriptedService
from aiokv.testing.contract.scan import clearing
from aiokv.wire import TOKEN_PATH, error_body

OWNER = "s3cret-owner-of-the-claim"
ASKS = {
    "scan": lambda backend: backend.scan("db", "p"),
    "count": lambda backend: backend.count("db", "p"),
    "clear": lambda backend: backend.clear("db", "p"),
    "claim": lambda backend: backend.claim("db", "p", OWNER, 5.0),
    "release": lambda backend: backend.release("db", "p", OWNER),
}
WRITES = {"clear": "DELETE keys", "claim": "PUT claims", "release": "DELETE claims"}
every_ask = pytest.mark.parametrize("verb", list(ASKS))
every_write = pytest.mark.parametrize("verb", list(WRITES))


async def fill(service: ExtensionService, *keys: str) -> None:
    for key in keys:
        await service.backend.set("db", key, "value", 60)


async def test_keys_are_listed_page_by_page() -> None:
    service = ExtensionService()
    await fill(service, "b/ü", "b/2", "b/1", "a", "b", "c")
    async with connected(service, is_known=False) as backend:
        listed, cursor = [], None
        while True:
            page = await backend.scan("db", "b/", cursor, 2)
            listed += [info.key for info in page.infos]
            cursor = page.cursor
            if cursor is None:
                break
        assert sorted(listed) == ["b/1", "b/2", "b/ü"]
        assert page.infos[0].value_bytes == 5
        assert backend.scans_in_order is service.backend.scans_in_order
        assert (await backend.count("db"), await backend.count("db", "b/"), await backend.count("other")) == (6, 3, 0)
    assert {kind.split()[1] for kind in service.asked} == {"keys", "count"}


async def test_clearing_deletes_at_most_the_limit_at_once() -> None:
    service = ExtensionService()
    await fill(service, "b1", "b2", "b3", "a")
    async with connected(service) as backend:
        assert (await backend.clear("db", "b", None, 2)).deleted == 2
        assert await backend.clear("db", "b", None, 2) == (1, None)
        assert await backend.count("db") == 1


async def test_claims_exclude_one_another() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        assert (await backend.claim("db", "a/b", OWNER, 5.0))[:2] == (True, 5.0)
        other = await backend.claim("db", "a/b", "other", 5.0)
        assert not other.is_held
        assert 0 < other.seconds_left <= 5.0
        assert not await backend.release("db", "a/b", "other")
        assert await backend.release("db", "a/b", OWNER)
        assert (await backend.claim("db", "a/b", "other", 1.5)).is_held
    # A claim that another holds is an answer, and not tried again.
    assert service.asked.count("PUT claims") == 3


async def test_renewal_behind_the_release_takes_nothing() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        await backend.claim("db", "k", OWNER, 5.0)
        await backend.release("db", "k", OWNER)
        assert await backend.renew("db", "k", OWNER, 5.0) == (False, 0.0, False)
        assert (await backend.claim("db", "k", "other", 5.0)).is_held


@pytest.mark.parametrize("is_known", [False, True])
async def test_server_that_knows_no_renewals_is_asked_for_a_claim(is_known: bool) -> None:  # noqa: FBT001
    service = ExtensionService("batch, scan, claims, watch")
    async with connected(service, is_known=is_known) as backend:
        assert (await backend.renew("db", "k", OWNER, 5.0)).is_held
        assert (await backend.renew("db", "k", OWNER, 5.0)).is_held
        assert not (await backend.renew("db", "k", "other", 5.0)).is_held
    assert service.asked.count("PUT claims") == 3


async def test_renewal_goes_on_at_an_older_server_that_takes_the_place_of_the_other() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        await backend.claim("db", "k", OWNER, 5.0)
        service.extensions = "batch, scan, claims, watch"
        for _ in range(2):
            assert (await backend.renew("db", "k", OWNER, 5.0)).is_held
        # One was refused, which told of the other server.
        assert service.asked.count("PUT claims") == 4
        service.extensions = ALL
        assert (await backend.renew("db", "k", OWNER, 5.0)).is_held
        await backend.release("db", "k", OWNER)
        assert not (await backend.renew("db", "k", OWNER, 5.0)).is_held


async def test_renewal_that_a_server_refuses_though_it_knows_renewals_is_an_error() -> None:
    service = ExtensionService()

    async def refuse(_: web.BaseRequest) -> web.Response:
        return service.respond(400, error_body("no"))

    async with connected(service) as backend:
        service.override = refuse
        with pytest.raises(RejectedError):
            await backend.renew("db", "k", OWNER, 5.0)


async def test_clearing_goes_on_at_a_server_that_gives_no_cursors() -> None:
    service = ExtensionService()
    service.gives_cursors = False
    await fill(service, *(f"b{number}" for number in range(25)), "a")
    async with connected(service) as backend:
        steps = [step.deleted async for step in clearing(backend, "db", "b", 10)]
        assert steps == [10, 10, 5]
        assert await backend.count("db") == 1


async def test_server_without_cursors_that_deletes_for_ever_is_found_out() -> None:
    service = ExtensionService()

    async def lie(request: web.BaseRequest) -> web.Response | None:
        return service.respond(200, b'{"deleted": 1000}') if request.method == "DELETE" else None

    async with connected(service) as backend:
        service.override = lie
        with pytest.raises(TransportError, match="far more entries than it had") as caught:
            await clear_keys(backend, "db", "")
        assert (caught.value.verb, caught.value.maybe_applied, caught.value.transient) == ("clear", True, False)
    assert service.asked.count("DELETE keys") < 200


async def test_server_without_cursors_that_names_any_count_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiokv.backends.http.backend._MAX_UNGUIDED_ENTRIES", 20_000)
    service = ExtensionService()

    async def lie(request: web.BaseRequest) -> web.Response:
        return service.respond(200, b'{"deleted": 1000}' if request.method == "DELETE" else b'{"count": 1000000000000}')

    async with connected(service) as backend:
        service.override = lie
        with pytest.raises(TransportError, match="far more entries than it had, or ten million"):
            await clear_keys(backend, "db", "")
    assert service.asked.count("DELETE keys") < 30


async def test_server_with_ever_new_cursors_that_finds_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiokv.listing._MAX_EMPTY_STEPS", 20)
    service = ExtensionService()
    numbers = itertools.count()

    async def lie(request: web.BaseRequest) -> web.Response:
        number = next(numbers)
        # Anything that is found shows progress, and begins the count anew.
        found = int(number == 10)
        if request.method == "DELETE":
            return service.respond(200, orjson.dumps({"deleted": found, "next": f":{number}"}))
        info = {"key": "k", "expires_at": 1.5, "value_bytes": 1}
        return service.respond(200, orjson.dumps({"keys": [info] * found, "next": f":{number}", "ordered": False}))

    async def open_scan() -> RemoteBackend:
        return backend

    async with connected(service) as backend:
        service.override = lie
        with pytest.raises(TransportError, match="nothing in 20 steps") as cleared:
            await clear_keys(backend, "db", "")
        assert (cleared.value.maybe_applied, next(numbers)) == (True, 31)
        numbers = itertools.count()
        with pytest.raises(TransportError, match="nothing in 20 steps"):
            assert not [info async for info in list_keys(open_scan, "db", "")]


@pytest.mark.parametrize("cursors", [[":a"], [":a", ":b"], [":a", ":b", ":c", ":d", ":e"]])
async def test_server_whose_cursors_come_again_is_found_out(cursors: list[str]) -> None:
    service = ExtensionService()
    answers = itertools.cycle(cursors)

    async def lie(request: web.BaseRequest) -> web.Response:
        if request.method == "DELETE":
            return service.respond(200, orjson.dumps({"deleted": 1000, "next": next(answers)}))
        return service.respond(200, orjson.dumps({"keys": [], "next": next(answers), "ordered": False}))

    async def open_scan() -> RemoteBackend:
        return backend

    async with connected(service) as backend:
        service.override = lie
        with pytest.raises(TransportError, match="cursor that it has given before") as cleared:
            await clear_keys(backend, "db", "p")
        assert (cleared.value.verb, cleared.value.maybe_applied, cleared.value.transient) == ("clear", True, False)
        with pytest.raises(TransportError, match="cursor that it has given before") as listed:
            assert not [info async for info in list_keys(open_scan, "db", "p")]
        assert (listed.value.verb, listed.value.key) == ("keys", "p")
    assert len(service.asked) < 50


async def test_conflict_that_is_no_answer_to_a_claim_is_an_error() -> None:
    service = ExtensionService()

    async def conflict(_: web.BaseRequest) -> web.Response:
        return service.respond(409, error_body("two at once"))

    async with connected(service, policy=RetryPolicy(attempts=2)) as backend:
        service.override = conflict
        with pytest.raises(RejectedError, match="two at once") as caught:
            await backend.claim("db", "k", OWNER, 5.0)
        assert caught.value.attempts == 2


async def test_cursor_of_another_store_is_a_value_error() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        with pytest.raises(ValueError, match="cursor must be that of the page before"):
            await backend.scan("db", "", "nonsense")
        with pytest.raises(ValueError, match="cursor must be that of the page before"):
            await backend.clear("db", "", "nonsense")


@every_ask
@pytest.mark.parametrize("is_known", [False, True])
async def test_server_without_extensions_is_told_apart_from_a_failure(verb: str, is_known: bool) -> None:  # noqa: FBT001
    service = ExtensionService(extensions=None)
    async with connected(service, is_known=is_known) as backend:
        with pytest.raises(UnsupportedError, match=r"sqlite:///, memory://, redis://") as caught:
            await ASKS[verb](backend)
        error = caught.value
        assert (error.verb, error.db_name, error.key, error.maybe_applied) == (verb, "db", "p", False)
        assert not error.transient
    # What reads may ask a server that has said nothing of it; what writes may not.
    assert len(service.asked) == (0 if is_known and verb in WRITES else 1)
    assert not set(service.asked) & set(WRITES.values())


@every_write
async def test_nothing_is_changed_by_a_server_that_does_not_name_the_extension(verb: str) -> None:
    service = ExtensionService()
    await fill(service, "p1")
    service.extensions = None

    async def do(request: web.BaseRequest) -> web.StreamResponse | None:
        # It knows the paths all the same.
        service.extensions = ALL
        response = await service.serve(request)
        service.extensions = None
        del response.headers["Aiokv-Extensions"]
        return response

    service.override = do
    async with connected(service, is_known=False) as backend:
        for _ in range(2):
            with pytest.raises(UnsupportedError) as caught:
                await ASKS[verb](backend)
            assert not caught.value.maybe_applied
            assert caught.value.verb == verb
    assert len(service.asked) == 1
    assert service.asked[0].startswith("GET ")
    assert await service.backend.get("db", "p1") == "value"
    assert (await service.backend.claim("db", "p", "other", 5.0)).is_held


@every_write
async def test_server_that_is_not_known_is_asked_by_a_read_first_and_only_once(verb: str) -> None:
    service = ExtensionService()
    await fill(service, "p1", "p2")
    async with connected(service, is_known=False) as backend:
        await ASKS[verb](backend)
        await ASKS[verb](backend)
    question, *writes = service.asked
    assert question == ("GET keys" if verb == "clear" else "GET get")
    assert writes == [WRITES[verb]] * 2


@every_write
async def test_server_that_does_not_know_the_path_of_a_listing_is_asked_nothing_more(verb: str) -> None:
    service = ExtensionService(extensions=None)
    async with connected(service, is_known=False) as backend:
        for ask in (ASKS["scan"], ASKS[verb]):
            with pytest.raises(UnsupportedError):
                await ask(backend)
    assert service.asked == ["GET keys"]


@every_write
async def test_refusal_of_the_read_tells_of_the_extension_too(verb: str) -> None:
    service = ExtensionService()

    async def refuse_reads(request: web.BaseRequest) -> web.Response | None:
        return service.respond(403, error_body("no reads")) if request.method == "GET" else None

    service.override = refuse_reads
    async with connected(service, is_known=False) as backend:
        await ASKS[verb](backend)
    assert service.asked[-1] == WRITES[verb]


@every_write
async def test_answer_of_a_gateway_in_between_does_not_make_a_server_unable(verb: str) -> None:
    service = ExtensionService()

    async def fail(_: web.BaseRequest) -> web.Response:
        return web.Response(status=502)

    async with connected(service, policy=RetryPolicy.none()) as backend:
        service.override = fail
        with pytest.raises(UnavailableError):
            await backend.get("db", "k")
        service.override = None
        await ASKS[verb](backend)
    assert service.asked[-1] == WRITES[verb]


@every_ask
@pytest.mark.parametrize("status", [404, 405, 501])
async def test_refusal_of_the_path_or_the_ability_is_unsupported(verb: str, status: int) -> None:
    service = ExtensionService()

    async def refuse(_: web.BaseRequest) -> web.Response:
        return service.respond(status, error_body("no"))

    async with connected(service) as backend:
        service.override = refuse
        with pytest.raises(
            UnsupportedError, match=rf"it has '\w+' in a header Aiokv-Extensions, but .* status {status}"
        ) as caught:
            await ASKS[verb](backend)
        assert caught.value.status == status


@every_ask
async def test_page_of_a_captive_portal_is_unsupported(verb: str) -> None:
    async def portal(_: web.BaseRequest) -> web.Response:
        return web.Response(text="<html>log in</html>")

    async with ScriptedService(handler=portal) as scripted:
        backend = RemoteBackend(URL(scripted.url))
        with pytest.raises(UnsupportedError):
            await ASKS[verb](backend)
        await backend.aclose()


@every_ask
async def test_server_that_is_down_for_a_moment_is_asked_again(verb: str) -> None:
    service = ExtensionService()
    await fill(service, "p1")
    left = [503, 429]

    async def fail(_: web.BaseRequest) -> web.Response | None:
        return web.Response(status=left.pop()) if left else None

    async with connected(service) as backend:
        service.override = fail
        await ASKS[verb](backend)
    assert len(service.asked) == 3


@every_ask
async def test_gateway_that_fails_is_no_proof_that_the_server_lacks_anything(verb: str) -> None:
    async def fail(_: web.BaseRequest) -> web.Response:
        return web.Response(status=502)

    service = ExtensionService()
    async with connected(service, policy=RetryPolicy.none()) as backend:
        service.override = fail
        # The first answer is forgotten by the second call, which asks by a read.
        for maybe_applied in (verb in WRITES, False):
            with pytest.raises(UnavailableError) as caught:
                await ASKS[verb](backend)
            assert caught.value.maybe_applied is maybe_applied
            assert caught.value.verb == verb


@every_ask
async def test_broken_connection_says_whether_something_may_have_changed(verb: str) -> None:
    service = ExtensionService()
    async with ScriptedService(handler=service.answer) as scripted, FaultProxy(scripted.url) as proxy:
        backend = RemoteBackend(URL(proxy.url), sleep=no_wait, policy=RetryPolicy.none())
        await backend.get("db", "whether it has extensions")
        proxy.faults = ResetAfter()
        with pytest.raises(TransportError) as caught:
            await ASKS[verb](backend)
        assert caught.value.maybe_applied is (verb in WRITES)
        assert caught.value.verb == verb
        await backend.aclose()


@every_ask
@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"count":-1,"deleted":true,"keys":{},"held":1,"released":"yes"}', b"[" * 100_000],
    ids=["empty", "list", "nothing", "types", "deep"],
)
async def test_answer_that_lies_is_an_error(verb: str, body: bytes) -> None:
    service = ExtensionService()

    async def lie(_: web.BaseRequest) -> web.Response:
        return service.respond(200, body)

    async with connected(service) as backend:
        service.override = lie
        with pytest.raises(ResponseError) as caught:
            await ASKS[verb](backend)
        assert caught.value.maybe_applied is (verb in WRITES)


async def test_owner_of_a_claim_is_masked_in_what_the_service_says() -> None:
    service = ExtensionService()

    async def echo(request: web.BaseRequest) -> web.Response:
        return service.respond(400, error_body(f"cannot take {request.raw_path}"))

    async with connected(service) as backend:
        service.override = echo
        for ask in (backend.claim("db", "k", OWNER, 5.0), backend.release("db", "k", OWNER)):
            with pytest.raises(RejectedError, match=r"\*\*\*") as caught:
                await ask
            assert OWNER not in all_texts(caught.value)


@every_ask
async def test_refused_token_is_renewed_once(verb: str) -> None:
    service = ExtensionService()
    tokens: list[str] = []

    async def check(request: web.BaseRequest) -> web.Response | None:
        if request.path == TOKEN_PATH:
            tokens.append(f"t{len(tokens)}")
            return web.json_response({"token": tokens[-1], "token_type": "Bearer", "expires_at": "2100-01-01T00:00:00Z"})
        return None if request.headers["Authorization"] == "Bearer t1" else service.respond(401, error_body("old token"))

    service.override = check
    async with ScriptedService(handler=service.answer) as scripted:
        backend = RemoteBackend(URL(scripted.url), credentials="id:secret", sleep=no_wait)
        await ASKS[verb](backend)
        assert tokens == ["t0", "t1"]
        await backend.aclose()


@every_ask
async def test_refusal_for_want_of_credentials_is_not_unsupported(verb: str) -> None:
    async def refuse(_: web.BaseRequest) -> web.Response:
        return web.Response(status=403, body=error_body("not you"))

    async with ScriptedService(handler=refuse) as scripted:
        backend = RemoteBackend(URL(scripted.url))
        with pytest.raises(AuthenticationError, match="not you"):
            await ASKS[verb](backend)
        await backend.aclose()


@pytest.mark.parametrize("url", ["https://kv.fal.media", "https://rest.fal.ai"])
async def test_fals_hosts_are_never_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("something was sent")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", refuse)
    backend = RemoteBackend(URL(url), credentials="id:secret")
    assert capabilities_of(backend) == Capabilities()
    for ask in ASKS.values():
        with pytest.raises(UnsupportedError) as caught:
            await ask(backend)
        assert not caught.value.attempts
    with pytest.raises(UnsupportedError):
        await anext(backend.watch("db"))
    await backend.aclose()


async def test_other_hosts_have_all_abilities_until_they_say_otherwise() -> None:
    backend = RemoteBackend(URL("http://127.0.0.1:9"))
    assert capabilities_of(backend) == Capabilities(backend, backend, backend, backend)
    other = backend.with_options(RetryPolicy(), None)
    assert capabilities_of(other).batch is other
    await backend.aclose()


def test_header_of_a_host_that_is_not_trusted_does_not_count() -> None:
    extensions = Extensions(is_trusted=False)
    extensions.learn("batch, scan")
    assert not extensions.has_batch


async def test_what_one_view_learns_the_others_know() -> None:
    service = ExtensionService()
    async with connected(service, is_known=False) as backend:
        other = backend.with_options(RetryPolicy(), None)
        await other.get("db", "learn")
        assert await backend.set_many("db", [Entry("a", "1", 60), Entry("b", "2", 60)]) == [None, None]
    assert service.asked == ["GET get", "POST batch"]


async def test_address_with_a_prefix_keeps_it() -> None:
    service = ExtensionService()
    paths: list[str] = []

    async def note(request: web.BaseRequest) -> web.Response:
        paths.append(request.raw_path)
        return service.respond(400, error_body("no"))

    service.override = note
    async with connected(service, is_known=False, through=lambda url: f"{url}/a%20prefix/") as backend:
        for ask in ASKS.values():
            with pytest.raises(CallError):
                await ask(backend)
        with pytest.raises(CallError):
            await anext(backend.watch("d b"))
    assert [path.partition("?")[0] for path in paths] == [
        "/a%20prefix/keys/db",
        "/a%20prefix/count/db",
        "/a%20prefix/keys/db",
        "/a%20prefix/claims/db/p",
        "/a%20prefix/claims/db/p",
        "/a%20prefix/watch/d%20b",
    ]
