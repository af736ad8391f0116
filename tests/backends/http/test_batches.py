"""Many keys at once over HTTP: one request where the server can, each key with its own outcome, the order of writes kept."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
from aiohttp import web
from extension_service import ExtensionService, code_of, connected, single_requests
from helpers import all_texts, no_wait
from yarl import URL

from aiokv.backends.capabilities import OMITTED, Entry
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.memory import MemoryBackend
from aiokv.batch_wire import Fault
from aiokv.errors import (
    AuthenticationError,
    CallError,
    CallTimeoutError,
    RejectedError,
    ResponseError,
    TransportError,
    UnavailableError,
)
from aiokv.server import running_server
from aiokv.testing import FaultProxy, ResetAfter, ResetBefore, ScriptedService, Truncate
from aiokv.wire import TOKEN_PATH, error_body

KEYS = [f"k{number}" for number in range(20)]
ENTRIES = [Entry(key, f"value of {key}", 60) for key in KEYS]


async def stored(service: ExtensionService, *keys: str) -> list[str | None]:
    return [await service.backend.get("db", key) for key in keys]


async def test_many_keys_travel_as_one_request_each_way() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        assert await backend.set_many("db", ENTRIES) == [None] * 20
        assert await backend.get_many("db", [*KEYS, "absent"]) == [*(entry.value for entry in ENTRIES), None]
        assert await backend.delete_many("db", KEYS[:5]) == [None] * 5
        assert await backend.get_many("db", KEYS[4:6]) == [None, "value of k5"]
    assert service.asked == ["POST batch"] * 4


async def test_nothing_is_sent_for_no_keys() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        assert (await backend.get_many("db", []), await backend.set_many("db", []), await backend.delete_many("db", [])) == (
            [],
            [],
            [],
        )
    assert service.asked == []


async def test_one_key_is_a_plain_request() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        assert await backend.set_many("db", [Entry("a", "1", 60)]) == [None]
        assert await backend.get_many("db", ["a"]) == ["1"]
    assert service.asked == ["PUT set", "GET get"]


async def test_key_that_comes_twice_is_asked_once_and_answered_twice() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        written = [Entry("a", "first", 60), Entry("b", "b", 60), Entry("a", "last", 60)]
        assert await backend.set_many("db", written) == [None] * 3
        assert await backend.get_many("db", ["a", "b", "a"]) == ["last", "b", "last"]
        assert await backend.delete_many("db", ["a", "a", "b"]) == [None] * 3
        assert await stored(service, "a", "b") == [None, None]
    assert service.bodies[1] == b'{"get":["a","b"]}'


@pytest.mark.parametrize("verb", ["get", "set", "delete"])
async def test_first_key_goes_alone_to_a_server_of_which_nothing_is_known(verb: str) -> None:
    service = ExtensionService()
    async with connected(service, is_known=False) as backend:
        await all_of(backend, verb)
    assert len(service.asked) == 2
    assert service.asked[1] == "POST batch"
    assert single_requests(service) == 1


@pytest.mark.parametrize("verb", ["get", "set", "delete"])
@pytest.mark.parametrize("is_known", [False, True])
async def test_server_without_batches_is_served_call_by_call(verb: str, is_known: bool) -> None:  # noqa: FBT001
    service = ExtensionService(extensions=None)
    async with connected(service, is_known=is_known) as backend:
        await service.backend.set("db", "k3", "three", 60)
        outcomes = await all_of(backend, verb)
        assert outcomes == [None if verb != "get" or key != "k3" else "three" for key in KEYS]
    assert single_requests(service) == len(service.asked) == 20


async def all_of(backend: RemoteBackend, verb: str) -> list[object]:
    if verb == "get":
        return list(await backend.get_many("db", KEYS))
    return list(await (backend.set_many("db", ENTRIES) if verb == "set" else backend.delete_many("db", KEYS)))


@pytest.mark.parametrize("verb", ["get", "set", "delete"])
@pytest.mark.parametrize("status", [404, 405, 413, 501, 400])
async def test_batch_that_the_server_refuses_as_such_is_made_call_by_call(verb: str, status: int) -> None:
    service = ExtensionService()

    async def refuse(request: web.BaseRequest) -> web.Response | None:
        return service.respond(status, error_body("no")) if request.raw_path.startswith("/batch") else None

    async with connected(service) as backend:
        service.override = refuse
        assert await all_of(backend, verb) == [None] * 20
        if verb == "set":
            assert await stored(service, "k0", "k19") == ["value of k0", "value of k19"]
    assert service.asked[0] == "POST batch"
    assert single_requests(service) == 20


async def test_server_replaced_by_an_older_one_is_no_longer_sent_batches() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        service.extensions = None
        assert await backend.get_many("db", KEYS) == [None] * 20
        service.asked.clear()
        assert await backend.get_many("db", KEYS) == [None] * 20
        assert service.asked == ["GET get"] * 20
        service.extensions = "batch"
        await backend.get("db", "k")
        service.asked.clear()
        assert await backend.get_many("db", KEYS) == [None] * 20
    assert service.asked == ["POST batch"]


async def test_one_keys_error_is_its_own() -> None:
    service = ExtensionService()
    service.faults = {"k3": Fault(507, "the account is full"), "k7": Fault(403, "read only")}
    async with connected(service) as backend:
        outcomes = await backend.set_many("db", ENTRIES)
        assert [code_of(outcome) for outcome in outcomes] == [507 if n == 3 else 403 if n == 7 else None for n in range(20)]
        assert await stored(service, "k2", "k3", "k4") == ["value of k2", None, "value of k4"]
        error = outcomes[3]
        assert isinstance(error, UnavailableError)
        assert (error.verb, error.db_name, error.key, error.attempts, error.maybe_applied) == ("set", "db", "k3", 1, False)
        assert error.host
        assert error.elapsed is not None
        assert isinstance(outcomes[7], AuthenticationError)


@pytest.mark.parametrize("verb", ["get", "set", "delete"])
async def test_key_that_failed_for_a_while_is_sent_again_without_the_others(verb: str) -> None:
    service = ExtensionService()
    service.faults = {"k3": Fault(503, "busy"), "k7": Fault(503, "busy")}

    async def recover(_: web.BaseRequest) -> None:
        if len(service.asked) == 2:
            service.faults = {}

    async with connected(service) as backend:
        service.override = recover
        assert await all_of(backend, verb) == [None] * 20
    assert service.asked == ["POST batch"] * 2
    assert service.bodies[1].count(b'"k') == 2 + (verb == "set") * 2
    assert b'"k3"' in service.bodies[1]


async def test_key_that_goes_on_failing_ends_with_its_own_error() -> None:
    service = ExtensionService()
    service.faults = {"k3": Fault(503, "busy", maybe_applied=True), "k7": Fault(502, "gone")}
    async with connected(service, policy=RetryPolicy(attempts=3)) as backend:
        outcomes = await backend.set_many("db", ENTRIES)
        first, second = outcomes[3], outcomes[7]
        assert isinstance(first, UnavailableError)
        assert (first.status, first.key, first.attempts, first.maybe_applied) == (503, "k3", 3, True)
        assert isinstance(second, UnavailableError)
        assert (second.status, second.key, second.reason) == (502, "k7", "gone")
        assert sum(outcome is not None for outcome in outcomes) == 2
    assert len(service.asked) == 3


async def test_earlier_attempt_that_may_have_been_applied_is_remembered_for_each_key() -> None:
    service = ExtensionService()
    service.faults = {"k3": Fault(507, "full")}

    async with connected(service) as backend:

        async def fail_once(request: web.BaseRequest) -> web.Response | None:
            if len(service.asked) == 1:
                await service.serve(request)
                return service.respond(500, error_body("broke"))
            return None

        service.override = fail_once
        outcomes = await backend.set_many("db", ENTRIES)
        error = outcomes[3]
        assert isinstance(error, UnavailableError)
        assert error.maybe_applied
        assert "an earlier attempt may have been applied" in error.reason


@pytest.mark.parametrize("verb", ["get", "set", "delete"])
async def test_batch_cut_off_by_a_reset_is_sent_again(verb: str) -> None:
    service = ExtensionService()
    async with ScriptedService(handler=service.answer) as scripted, FaultProxy(scripted.url) as proxy:
        backend = RemoteBackend(URL(proxy.url), sleep=no_wait)
        await backend.get("db", "learn")
        for fault in (ResetBefore(), ResetAfter(), Truncate(40)):
            proxy.faults = [fault]
            assert await all_of(backend, verb) == [None] * 20
        await backend.aclose()
    assert set(service.asked) == {"GET get", "POST batch"}


@pytest.mark.parametrize(("verb", "maybe"), [("get", False), ("set", True), ("delete", True)])
async def test_batch_that_never_gets_an_answer_says_whether_it_may_be_applied(verb: str, maybe: bool) -> None:  # noqa: FBT001
    service = ExtensionService()
    async with ScriptedService(handler=service.answer) as scripted, FaultProxy(scripted.url) as proxy:
        backend = RemoteBackend(URL(proxy.url), sleep=no_wait, policy=RetryPolicy(attempts=2, wait_for_ready=0))
        await backend.get("db", "learn")
        proxy.faults = lambda _: ResetAfter()
        with pytest.raises(TransportError) as caught:
            await all_of(backend, verb)
        assert caught.value.maybe_applied is maybe
        assert caught.value.verb == f"{verb}_many"
        await backend.aclose()


@pytest.mark.parametrize(
    "body",
    [
        b'{"values":["a"]}',
        b'{"values":[' + b",".join([b"1"] * 20) + b"]}",
        b'{"values":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"values":[' + b",".join([b"null"] * 20) + b'],"omitted":[0]}',
        b'{"values":[' + b",".join([b"null"] * 20) + b'],"omitted":[99]}',
        b'{"values":[' + b",".join([b"null"] * 20) + b'],"errors":[{"index":20,"status":503,"error":"x"}]}',
        b'{"values":[' + b",".join([b"null"] * 20) + b'],"errors":[{"index":1,"status":200,"error":"x"}]}',
        b'{"values":[' + b",".join([b"{}"] * 2_000_000) + b"]}",
        b"<html>captive portal</html>",
        b"[]",
        b"",
    ],
    ids=["count", "types", "deep", "first omitted", "far omitted", "far error", "good error", "many", "html", "list", "empty"],
)
async def test_answer_that_lies_is_an_error_and_not_a_value(body: bytes) -> None:
    service = ExtensionService()

    async def lie(request: web.BaseRequest) -> web.Response | None:
        return service.respond(200, body) if request.raw_path.startswith("/batch") else None

    async with connected(service) as backend:
        service.override = lie
        with pytest.raises(ResponseError) as caught:
            await backend.get_many("db", KEYS)
        assert not caught.value.transient
        with pytest.raises(ResponseError) as caught:
            await backend.set_many("db", ENTRIES)
        assert caught.value.maybe_applied
    assert service.asked == ["POST batch"] * 2


async def test_answer_larger_than_any_answer_can_be_is_refused() -> None:
    service = ExtensionService()

    async def flood(request: web.BaseRequest) -> web.StreamResponse | None:
        if not request.raw_path.startswith("/batch"):
            return None
        response = web.StreamResponse(headers={"Aiokv-Extensions": "batch"})
        await response.prepare(request)
        for _ in range(40):
            await response.write(b" " * 1024 * 1024)
        return response

    async with connected(service) as backend:
        service.override = flood
        with pytest.raises(ResponseError, match="larger than"):
            await backend.get_many("db", KEYS)


async def test_error_repeats_no_value() -> None:
    service = ExtensionService()
    service.faults = {"k3": Fault(507, "cannot store the text s3cret-of-k3 here")}
    async with connected(service) as backend:
        outcomes = await backend.set_many("db", [Entry(key, f"s3cret-of-{key}", 60) for key in KEYS])
        assert isinstance(outcomes[3], CallError)
        assert "***" in outcomes[3].reason
        assert "s3cret" not in all_texts(outcomes[3])

        async def echo(request: web.BaseRequest) -> web.Response | None:
            return service.respond(507, error_body((await request.text())[:100])) if request.method == "POST" else None

        service.override = echo
        with pytest.raises(UnavailableError) as caught:
            await backend.set_many("db", [Entry(key, f"s3cret-of-{key}", 60) for key in KEYS[:2]])
        assert "s3cret" not in all_texts(caught.value)


async def test_value_over_256_kib_travels_alone() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        large = "x" * (256 * 1024 + 1)
        entries = [Entry("large", large, 60), Entry("wide", "ä" * (128 * 1024 + 1), 60), *ENTRIES]
        assert await backend.set_many("db", entries) == [None] * 22
        assert await stored(service, "large", "k19") == [large, "value of k19"]
    assert sorted(service.asked) == ["POST batch", "PUT set", "PUT set"]


async def test_batch_is_cut_where_its_json_is_over_8_mib() -> None:
    store = MemoryBackend()
    async with running_server(store) as address, FaultProxy(address) as proxy:
        backend = RemoteBackend(URL(proxy.url))
        await backend.get("db", "learn")
        # As JSON a control character takes six bytes.
        entries = [Entry(f"k{n}", "\1" * 100_000, 60) for n in range(20)]
        assert await backend.set_many("db", entries) == [None] * 20
        assert [request.method for request in proxy.requests] == ["GET", "POST", "POST"]
        assert [await store.get("db", key) for key in ("k0", "k19")] == ["\1" * 100_000] * 2
        await backend.aclose()


async def test_values_that_do_not_fit_an_answer_are_omitted_and_can_be_asked_again() -> None:
    store = MemoryBackend()
    async with running_server(store) as address:
        backend = RemoteBackend(URL(address))
        await backend.get("db", "learn")
        for key in KEYS[:7]:
            await store.set("db", key, key * 900_000, 60)
        outcomes = await backend.get_many("db", KEYS[:7])
        assert outcomes[0] == "k0" * 900_000
        rest = [key for key, outcome in zip(KEYS, outcomes, strict=False) if outcome is OMITTED]
        assert rest == KEYS[4:7]
        assert await backend.get_many("db", rest) == [key * 900_000 for key in rest]
        await backend.aclose()


async def test_token_refused_in_a_batch_is_renewed_once() -> None:
    service = ExtensionService()
    tokens: list[str] = []

    async def check(request: web.BaseRequest) -> web.Response | None:
        if request.path == TOKEN_PATH:
            tokens.append(f"t{len(tokens)}")
            return web.json_response({"token": tokens[-1], "token_type": "Bearer", "expires_at": "2100-01-01T00:00:00Z"})
        is_good = request.headers.get("Authorization") == f"Bearer {tokens[-1]}" and tokens[-1] != "t0"
        is_first = request.raw_path.startswith("/get")
        return None if is_good or is_first else service.respond(401, error_body("token refused"))

    service.override = check
    async with ScriptedService(handler=service.answer) as scripted:
        backend = RemoteBackend(URL(scripted.url), credentials="id:secret", sleep=no_wait)
        await backend.get("db", "learn")
        assert await backend.set_many("db", ENTRIES) == [None] * 20
        assert len(tokens) == 2
        await backend.aclose()
    assert service.asked.count("POST batch") == 2


async def test_batch_refused_with_a_new_token_fails_as_a_whole() -> None:
    service = ExtensionService()

    async def refuse(request: web.BaseRequest) -> web.Response | None:
        return service.respond(403, error_body("not this store")) if request.method == "POST" else None

    async with connected(service) as backend:
        service.override = refuse
        with pytest.raises(AuthenticationError, match="not this store"):
            await backend.get_many("db", KEYS)
    assert service.asked == ["POST batch"]


async def test_host_that_fails_is_not_asked_for_every_key() -> None:
    service = ExtensionService(extensions=None)

    async def fail(_: web.BaseRequest) -> web.Response:
        return web.Response(status=503)

    async with connected(service, policy=RetryPolicy.none()) as backend:
        service.override = fail
        outcomes = await backend.set_many("db", [Entry(f"k{n}", "v", 60) for n in range(200)])
        assert all(isinstance(outcome, CallError) for outcome in outcomes)
        assert len({id(outcome) for outcome in outcomes}) == 200
        last = outcomes[-1]
        assert isinstance(last, CallError)
        assert (last.key, last.attempts, last.maybe_applied) == ("k199", 0, False)
        assert last.reason.startswith("not tried, since")
    assert len(service.asked) <= 16


async def test_key_that_an_older_server_refuses_leaves_the_others_alone() -> None:
    service = ExtensionService(extensions=None)

    async def refuse(request: web.BaseRequest) -> web.Response | None:
        return service.respond(400, error_body("bad key")) if request.path.endswith("/k0") else None

    async with connected(service, is_known=False) as backend:
        service.override = refuse
        outcomes = await backend.set_many("db", ENTRIES)
        assert isinstance(outcomes[0], RejectedError)
        assert outcomes[1:] == [None] * 19


class Gated:
    """Holds requests back until a test lets them through; notes the order in which they were applied."""

    def __init__(self, service: ExtensionService) -> None:
        self.service = service
        self.gates: list[asyncio.Event] = []

    async def __call__(self, _: web.BaseRequest) -> web.StreamResponse | None:
        gate = asyncio.Event()
        self.gates.append(gate)
        await gate.wait()
        return None

    async def settle(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.gates) < count:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.03)
        assert len(self.gates) == count, "a write overtook another"


@pytest.fixture
async def gated() -> AsyncGenerator[tuple[Gated, RemoteBackend]]:
    service = ExtensionService()
    async with connected(service) as backend:
        gates = service.override = Gated(service)
        yield gates, backend
        for gate in gates.gates:
            gate.set()


Write = Callable[[RemoteBackend], Awaitable[object]]


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (lambda b: b.set("db", "k3", "old", 60), lambda b: b.set_many("db", ENTRIES), "value of k3"),
        (lambda b: b.set_many("db", ENTRIES), lambda b: b.set("db", "k3", "new", 60), "new"),
        (lambda b: b.set_many("db", ENTRIES[:10]), lambda b: b.delete_many("db", KEYS[3:]), None),
        (lambda b: b.delete_many("db", KEYS[3:]), lambda b: b.set_many("db", ENTRIES[:10]), "value of k3"),
    ],
    ids=["single, batch", "batch, single", "batch, batch", "delete, set"],
)
async def test_writes_that_share_a_key_go_one_after_the_other(
    gated: tuple[Gated, RemoteBackend], first: Write, second: Write, result: str | None
) -> None:
    gates, backend = gated
    tasks = [asyncio.ensure_future(write(backend)) for write in (first, second)]
    await gates.settle(1)
    gates.gates[0].set()
    await gates.settle(2)
    gates.gates[1].set()
    await asyncio.gather(*tasks)
    assert await stored(gates.service, "k3") == [result]
    assert backend._last_writes == {}


async def test_overlapping_batches_do_not_wait_for_each_other() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        halves = [[*KEYS[start:], *KEYS[:start]] for start in range(20)]
        async with asyncio.timeout(10):
            await asyncio.gather(
                *(backend.set_many("db", [Entry(key, f"{n}", 60) for key in keys[:12]]) for n, keys in enumerate(halves)),
                *(backend.delete_many("db", keys[5:17]) for keys in halves),
                *(backend.set("db", key, "last", 60) for key in KEYS),
            )
        assert await stored(service, *KEYS) == ["last"] * 20
        assert backend._last_writes == {}


async def test_batches_of_other_keys_and_namespaces_do_not_wait(gated: tuple[Gated, RemoteBackend]) -> None:
    gates, backend = gated
    tasks = [
        asyncio.ensure_future(backend.set_many("db", ENTRIES[:5])),
        asyncio.ensure_future(backend.set_many("db", ENTRIES[5:])),
        asyncio.ensure_future(backend.set_many("other", ENTRIES)),
    ]
    await gates.settle(3)
    for gate in gates.gates:
        gate.set()
    await asyncio.gather(*tasks)


async def test_cancelled_batch_lets_no_write_overtake_the_one_it_waited_for(gated: tuple[Gated, RemoteBackend]) -> None:
    gates, backend = gated
    first = asyncio.ensure_future(backend.set("db", "k3", "first", 60))
    await gates.settle(1)
    batch = asyncio.ensure_future(backend.set_many("db", ENTRIES))
    await asyncio.sleep(0)
    other = asyncio.ensure_future(backend.set("db", "k5", "free", 60))
    third = asyncio.ensure_future(backend.set("db", "k3", "third", 60))
    await asyncio.sleep(0)
    batch.cancel()
    await gates.settle(1)
    gates.gates[0].set()
    await gates.settle(3)
    for gate in gates.gates:
        gate.set()
    await asyncio.gather(first, other, third)
    assert batch.cancelled()
    assert await stored(gates.service, "k3", "k5", "k6") == ["third", "free", None]
    assert backend._last_writes == {}


async def test_batch_that_waits_past_its_deadline_has_sent_nothing() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        gates = service.override = Gated(service)
        hasty = backend.with_options(RetryPolicy(total_timeout=0.05), None)
        first = asyncio.ensure_future(backend.set("db", "k3", "first", 60))
        await gates.settle(1)
        with pytest.raises(CallTimeoutError, match="nothing was sent") as caught:
            await hasty.set_many("db", ENTRIES)
        assert not caught.value.maybe_applied
        gates.gates[0].set()
        await first
    assert service.asked == ["PUT set"]
