"""A host that takes no connections: waited for by one call for all, then failed at once, and looked at until it is back."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path

import pytest
import trustme
from aiohttp import web
from helpers import clean_environment
from yarl import URL

from aiokv import AsyncKVStore, HttpOptions, RetryPolicy, kv_cached
from aiokv.backends.base import is_patient
from aiokv.backends.http.availability import Availability, availability_of, reset_hosts
from aiokv.backends.http.retry import QUOTA_TOKENS, quota_of
from aiokv.errors import CallError, ConnectError, StoreClosedError, TransportError
from aiokv.testing import FaultProxy, RecordedRequest, ResetAfter, ResetBefore, ScriptedService, with_probability

# A server that has loaded everything, and takes its port when it is told to.
STANDBY = "import sys; from aiokv.cli import main; sys.stdin.readline(); sys.exit(main(sys.argv[1:]))"


class Connects:
    """Counts the connections that this process tries to make, by port."""

    def __init__(self) -> None:
        self.moments: list[tuple[int, float]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            self.moments.append((arguments[1][1], time.monotonic()))

    def of(self, port: int) -> list[float]:
        return [moment for other, moment in self.moments if other == port]


# An audit hook stays for the life of the process.
connects = Connects()


@contextlib.asynccontextmanager
async def behind_proxy(retry: RetryPolicy | None = None) -> AsyncGenerator[tuple[FaultProxy, AsyncKVStore]]:
    async with (
        ScriptedService() as service,
        FaultProxy(service.url) as proxy,
        AsyncKVStore("db", url=proxy.url, retry=retry) as store,
    ):
        yield proxy, store


def host_of(proxy: FaultProxy) -> Availability:
    return availability_of(URL(proxy.url))


def most_in_a_second(moments: list[float]) -> int:
    return max((sum(first <= moment < first + 1 for moment in moments) for first in moments), default=0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def test_calls_during_a_restart_wait_for_it_and_one_looks_for_all() -> None:
    async with behind_proxy() as (proxy, store):
        await store.set("k", "v")
        await proxy.stop_listening()
        before = len(connects.of(proxy.port))
        reads = [asyncio.create_task(store.get("k")) for _ in range(150)]
        writes = [asyncio.create_task(store.set(f"w{number}", "v")) for number in range(150)]
        await asyncio.sleep(0.8)
        assert not any(task.done() for task in (*reads, *writes))
        # Those that came before the first refusal have connected, too; after that one looks.
        moments = connects.of(proxy.port)[before:]
        assert len(moments) <= 100 + 3
        assert len([moment for moment in moments if moment > moments[0] + 0.4]) <= 2
        await proxy.resume()
        assert set(await asyncio.gather(*reads)) == {"v"}
        await asyncio.gather(*writes)
        assert quota_of(URL(proxy.url).authority).tokens == QUOTA_TOKENS


async def test_connections_reset_with_the_host_are_sent_again_without_drawing_on_the_quota() -> None:
    held = asyncio.Event()

    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        await held.wait()
        return web.json_response({"value": "v"})

    async with (
        ScriptedService(handler=answer) as service,
        FaultProxy(service.url) as proxy,
        AsyncKVStore("db", url=proxy.url) as store,
    ):
        calls = [asyncio.create_task(store.get(f"k{number}")) for number in range(60)]
        calls += [asyncio.create_task(store.set(f"k{number}", "v")) for number in range(40)]
        await until(lambda: len(proxy.requests) == 100)
        await proxy.stop_listening()
        await asyncio.sleep(0.3)
        held.set()
        await proxy.resume()
        await asyncio.gather(*calls)
        assert len(proxy.requests) == 200
        assert quota_of(URL(proxy.url).authority).tokens == QUOTA_TOKENS


async def test_connections_reset_by_a_host_that_is_back_at_once_draw_on_no_quota_either() -> None:
    async with behind_proxy() as (proxy, store):
        sent: set[str] = set()

        def resets_the_first(request: RecordedRequest) -> ResetAfter | None:
            is_first = request.path not in sent
            sent.add(request.path)
            return ResetAfter() if is_first else None

        proxy.faults = resets_the_first
        await asyncio.gather(*(store.set(f"k{number}", "v") for number in range(100)))
        assert len(proxy.requests) == 200
        assert quota_of(URL(proxy.url).authority).tokens == QUOTA_TOKENS


async def test_host_that_takes_connections_and_breaks_all_of_them_draws_on_the_quota() -> None:
    async with behind_proxy() as (proxy, store):
        proxy.faults = ResetBefore()
        for _ in range(40):
            with pytest.raises(TransportError):
                await store.with_options(retry=RetryPolicy(backoff_base=0.0)).get("k")
        quota = quota_of(URL(proxy.url).authority)
        assert quota.tokens < 14
        sends = len(proxy.requests)
        with pytest.raises(TransportError):
            await store.get("k")
        assert len(proxy.requests) == sends + 1


async def test_call_fails_with_the_refusal_once_its_wait_is_over() -> None:
    async with behind_proxy(RetryPolicy(wait_for_ready=0.3)) as (proxy, store), proxy.outage():
        with pytest.raises(ConnectError) as caught:
            await store.set("k", "v")
        assert 0.25 <= (caught.value.elapsed or 0) < 5
        assert (caught.value.attempts, caught.value.maybe_applied) == (1, False)
        assert "Connection refused" in str(caught.value)


async def test_calls_fail_at_once_while_the_host_is_known_to_be_down() -> None:
    async with behind_proxy(RetryPolicy(wait_for_ready=0.1)) as (proxy, store), proxy.outage():
        with pytest.raises(ConnectError):
            await store.get("k")
        before = len(connects.of(proxy.port))
        elapsed: list[float] = []
        for _ in range(200):
            with pytest.raises(ConnectError) as caught:
                await store.set("k", "v")
            elapsed.append(caught.value.elapsed or 0.0)
        assert sorted(elapsed)[100] < 0.1
        assert len(connects.of(proxy.port)) - before <= 3
        assert caught.value.attempts == 0
        assert "no connection for " in str(caught.value)
        assert not caught.value.maybe_applied


@pytest.mark.slow
async def test_outage_meets_three_connects_a_second_at_most_and_its_end_is_noticed_in_about_one() -> None:
    async with behind_proxy() as (proxy, store):
        await store.get("k")
        await proxy.stop_listening()
        began = time.monotonic()
        succeeded: list[float] = []
        failed: list[CallError] = []

        async def call() -> None:
            try:
                await store.get("k")
            except ConnectError as error:
                failed.append(error)
            else:
                succeeded.append(time.monotonic())

        async with asyncio.TaskGroup() as group:
            resumed = 0.0
            while not succeeded:
                group.create_task(call())
                await asyncio.sleep(0.005)
                if not resumed and time.monotonic() > began + 6:
                    resumed = time.monotonic()
                    await proxy.resume()
                assert time.monotonic() < began + 12
        down = [moment for moment in connects.of(proxy.port) if began + 3.2 < moment < resumed]
        assert most_in_a_second(down) <= 2
        assert most_in_a_second([moment for moment in connects.of(proxy.port) if began + 0.05 < moment < resumed]) <= 3
        at_once = sorted(error.elapsed or 0.0 for error in failed if not error.attempts and (error.elapsed or 0) < 2.5)
        # How fast that is, `benchmarks/outage.py` says.
        assert at_once[len(at_once) // 2] < 0.1
        assert succeeded[0] - resumed < 1.2 + 1


async def test_answer_of_a_host_that_drains_releases_nobody_to_be_refused() -> None:
    host = Availability("127.0.0.1", 1)
    host.refused("refused")
    waiting = asyncio.create_task(host.wait(5, 5, 1, lambda: False))
    await asyncio.sleep(0.01)
    host.answered(host.generation)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert not host.is_well
    host.reset()
    async with asyncio.timeout(5):
        assert await waiting
    assert host.is_well


async def test_reset_of_one_connection_of_many_holds_nobody_up() -> None:
    async with behind_proxy() as (proxy, store):
        proxy.faults = with_probability(0.05, ResetBefore(), ResetAfter(), seed=3)
        started = time.monotonic()
        for _ in range(10):
            await asyncio.gather(*(store.get(f"k{number}") for number in range(30)))
        assert time.monotonic() - started < 10
        assert host_of(proxy).is_open


async def test_policy_that_waits_for_no_host_fails_at_once() -> None:
    async with behind_proxy(RetryPolicy(wait_for_ready=0)) as (proxy, store), proxy.outage():
        with pytest.raises(ConnectError) as caught:
            await store.get("k")
        assert (caught.value.elapsed or 0) < 1
        assert caught.value.attempts == 1


async def test_policy_that_waits_for_no_host_is_not_held_up_by_a_reset() -> None:
    host = Availability("127.0.0.1", 1)
    assert host.broke(host.generation)
    assert host.blocks(3.0)
    assert not host.blocks(0.0)
    host.refused("refused")
    assert host.blocks(0.0)


async def test_call_with_less_time_than_the_wait_fails_at_its_deadline() -> None:
    async with behind_proxy() as (proxy, store), proxy.outage():
        with pytest.raises(ConnectError) as caught:
            await store.with_options(timeout=0.2).get("k")
        assert (caught.value.elapsed or 9) < 2


async def test_waiting_call_that_looks_and_is_cancelled_hands_over() -> None:
    async with behind_proxy(RetryPolicy(wait_for_ready=15)) as (proxy, store):
        await proxy.stop_listening()
        first = asyncio.create_task(store.get("a"))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(store.get("b"))
        await asyncio.sleep(0.01)
        first.cancel()
        await proxy.resume()
        async with asyncio.timeout(8):
            assert await second is None


def test_request_of_before_the_return_went_down_with_the_host_and_one_of_after_it_did_not() -> None:
    host = Availability("127.0.0.1", 1)
    before = host.generation
    assert host.broke(before)
    host._looked(None)
    assert host.is_open
    assert host.broke(before)
    assert host.is_open
    assert not host.broke(host.generation)
    host.answered(host.generation)
    assert host.broke(host.generation)


async def test_writes_of_a_lost_host_stay_in_their_order() -> None:
    async with behind_proxy() as (proxy, store):
        await proxy.stop_listening()
        writes = []
        for number in range(20):
            writes.append(asyncio.create_task(store.set("k", str(number))))
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        await proxy.resume()
        await asyncio.gather(*writes)
        assert await store.get("k") == "19"


async def test_set_that_was_reset_and_found_the_host_down_says_that_it_may_be_applied() -> None:
    async with behind_proxy(RetryPolicy(wait_for_ready=0.2)) as (proxy, store):
        proxy.faults = ResetAfter()
        writing = asyncio.create_task(store.set("k", "v"))
        await until(lambda: bool(proxy.requests))
        await proxy.stop_listening()
        with pytest.raises(CallError) as caught:
            await writing
        assert isinstance(caught.value, ConnectError)
        assert caught.value.maybe_applied
        assert "an earlier attempt may have been applied" in str(caught.value)


async def test_closing_ends_the_calls_that_wait_for_a_host() -> None:
    async with behind_proxy(RetryPolicy(wait_for_ready=60, total_timeout=60)) as (proxy, store), proxy.outage():
        calls = [asyncio.create_task(store.get(f"k{number}")) for number in range(3)]
        await asyncio.sleep(0.05)
        # Far from any look, so that only the closing can end them.
        host_of(proxy)._look_at += 30
        await asyncio.sleep(0.6)
        await store.aclose()
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StoreClosedError}


async def test_exchange_of_credentials_waits_for_its_host_too() -> None:
    async with ScriptedService(requires_token=True) as service, FaultProxy(service.url) as proxy:
        await proxy.stop_listening()
        async with AsyncKVStore("db", url=proxy.url, credentials="id:secret") as store:
            call = asyncio.create_task(store.get("k"))
            await asyncio.sleep(0.2)
            await proxy.resume()
            assert await call is None
        assert service.exchanges == 1


async def test_cached_function_computes_instead_of_waiting_for_the_host() -> None:
    async with behind_proxy() as (proxy, store):

        @kv_cached(600, store=store, key=lambda number: number)
        async def double(number: int) -> int:
            return 2 * number

        async with proxy.outage():
            started = time.monotonic()
            assert [await double(number) for number in range(20)] == [2 * number for number in range(20)]
            assert time.monotonic() - started < 1.5
        assert is_patient.get()
        await double.aclose()


async def test_several_loops_of_a_process_look_as_one() -> None:
    async with behind_proxy() as (proxy, _):
        await proxy.stop_listening()
        before = len(connects.of(proxy.port))
        outcomes: list[str | None] = []

        async def call() -> None:
            async with AsyncKVStore("db", url=proxy.url) as store:
                outcomes.extend(await asyncio.gather(*(store.get(f"k{number}") for number in range(10))))

        threads = [threading.Thread(target=asyncio.run, args=(call(),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        await asyncio.sleep(0.8)
        moments = connects.of(proxy.port)[before:]
        assert len([moment for moment in moments if moment > moments[0] + 0.4]) <= 2
        await proxy.resume()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert outcomes == [None] * 30


async def test_waiting_call_takes_over_the_look_of_a_loop_that_is_blocked() -> None:
    async with behind_proxy(RetryPolicy(wait_for_ready=20, total_timeout=20)) as (proxy, store):
        await proxy.stop_listening()
        released = threading.Event()

        async def look_and_block() -> None:
            async with AsyncKVStore("db", url=proxy.url) as other:
                call = asyncio.create_task(other.get("k"))
                await until(lambda: host_of(proxy)._looker is not None)
                released.wait(30)
                assert await call is None

        blocked = asyncio.create_task(asyncio.to_thread(asyncio.run, look_and_block()))
        await until(lambda: host_of(proxy)._looker is not None)
        call = asyncio.create_task(store.get("k"))
        await asyncio.sleep(0.1)
        await proxy.resume()
        try:
            async with asyncio.timeout(10):
                assert await call is None
            assert not blocked.done()
        finally:
            released.set()
            await blocked


async def test_look_of_a_loop_that_has_died_is_taken_over() -> None:
    now = 100.0
    host = Availability("127.0.0.1", 1, lambda: now)
    host.refused("refused")
    dead = asyncio.new_event_loop()
    looking = dead.create_task(host.wait(60, 60, 1, lambda: False))
    dead.call_later(0.05, dead.stop)
    await asyncio.to_thread(dead.run_forever)
    assert not looking.done()
    now += 1.0
    assert not await host.wait(1, 60, 1, lambda: False)
    assert host._looker is not None
    now += 1.0
    before = len(connects.of(1))
    assert not await host.wait(1, 60, 1, lambda: False)
    assert len(connects.of(1)) == before + 1
    looking.cancel()
    await asyncio.to_thread(dead.run_until_complete, asyncio.wait([looking]))
    dead.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
async def test_forked_child_knows_nothing_of_its_parents_failures() -> None:
    url = URL("http://forked.example:1")
    availability_of(url).refused("refused")
    child = os.fork()
    if child == 0:
        os._exit(0 if availability_of(url).is_well else 1)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not availability_of(url).is_open
    reset_hosts()
    assert availability_of(url).is_well


async def test_log_says_once_that_the_host_is_lost_and_once_that_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="aiokv"):
        async with behind_proxy() as (proxy, store):
            await proxy.stop_listening()
            calls = [asyncio.create_task(store.get(f"k{number}")) for number in range(5)]
            await asyncio.sleep(0.3)
            await proxy.resume()
            await asyncio.gather(*calls)
    messages = [record.getMessage() for record in caplog.records]
    assert len([text for text in messages if "takes no connections (" in text]) == 1
    assert len([text for text in messages if "answers again" in text]) == 1


def test_log_calls_a_host_found_only_after_an_answer_to_a_request_that_was_sent_since(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    host = Availability("127.0.0.1", 1, lambda: now)
    before = host.generation
    host.refused("refused")
    now += 0.5
    # The stopping server answers what it has; then a look finds a listener that breaks what is sent.
    host.answered(before)
    host.refused("refused")
    host._looked(None)
    host.answered(before)
    now += 2.0
    host.refused("refused")
    host._looked(None)
    assert [record.getMessage().partition(" ")[2][:20] for record in caplog.records] == ["takes no connections"]
    assert host.is_open
    assert not host.is_well
    host.answered(host.generation)
    assert host.is_well
    assert [record.getMessage() for record in caplog.records][1:] == ["127.0.0.1:1 answers again, after 2.5 s"]


def test_log_of_a_host_that_comes_and_goes_has_a_pair_of_lines_in_five_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    host = Availability("127.0.0.1", 1, lambda: now)
    for _ in range(110):
        host.refused("refused")
        host._looked(None)
        host.answered(host.generation)
        now += 0.1
    messages = [record.getMessage() for record in caplog.records]
    assert len([text for text in messages if "takes no connections (" in text]) == 3
    assert len([text for text in messages if "answers again" in text]) == 3


def test_refusal_long_after_a_look_found_the_host_belongs_to_the_same_absence_until_a_request_is_answered() -> None:
    now = 100.0
    host = Availability("127.0.0.1", 1, lambda: now)
    for _ in range(3):
        host.refused("refused")
        host._looked(None)
        now += 2.0
    host.refused("refused")
    assert host.away() == "no connection for 6.0 s (refused)"
    host._looked(None)
    host.answered(host.generation)
    now += 2.0
    host.refused("refused")
    assert host.away() == "no connection for 0.0 s (refused)"


@pytest.mark.slow
@pytest.mark.parametrize("hold_seconds", [0.3, 60.0], ids=["breaks", "stalls"])
async def test_host_that_takes_connections_but_makes_no_tls_handshake_is_not_found(hold_seconds: float) -> None:
    accepted: list[float] = []

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(hold_seconds):
                await ended.wait()
        writer.transport.abort()

    ended = asyncio.Event()
    listener = await asyncio.start_server(hold, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    retry = RetryPolicy(wait_for_ready=1.5, connect_timeout=0.6)
    async with AsyncKVStore("db", url=url, retry=retry) as store:
        outcomes = await asyncio.gather(*(store.get(f"k{number}") for number in range(20)), return_exceptions=True)
    ended.set()
    listener.close()
    await listener.wait_closed()
    assert {type(outcome) for outcome in outcomes} == {ConnectError}
    assert max(outcome.elapsed or 0.0 for outcome in outcomes if isinstance(outcome, ConnectError)) < 6
    # One for each call before the first one failed; then one call looks for all.
    assert len(accepted) <= 20 + 6
    assert most_in_a_second(accepted[20:]) <= 3


async def test_host_that_makes_tls_handshakes_again_is_found(tmp_path: Path) -> None:
    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"value": "v"})

    def break_off(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    listener = await asyncio.start_server(break_off, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    options = HttpOptions(ca_file=str(tmp_path / "ca.pem"))
    async with AsyncKVStore("db", url=f"https://127.0.0.1:{port}", http=options) as store:
        call = asyncio.create_task(store.get("k"))
        await until(lambda: not availability_of(URL(f"https://127.0.0.1:{port}")).is_well)
        listener.close()
        await listener.wait_closed()
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
        assert await call == "v"
    await runner.cleanup()


async def test_look_at_a_lost_https_host_that_now_speaks_plain_http_says_so() -> None:
    async with ScriptedService() as service:
        host = Availability("127.0.0.1", URL(service.url).port or 0, is_tls=True)
        host.refused("refused")
        assert not await host.wait(0.3, 10, 5, lambda: False)
    assert "the TLS handshake failed (" in host.away()


async def test_https_to_a_server_of_plain_http_fails_at_once_names_the_remedy_and_logs_no_loss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with ScriptedService() as service, AsyncKVStore("db", url=service.url.replace("http:", "https:")) as store:
        with pytest.raises(ConnectError, match="seems to speak plain HTTP; use http://") as caught:
            await store.get("k")
    assert (caught.value.attempts, caught.value.transient) == (1, False)
    assert not caplog.records


@contextlib.contextmanager
def standby(port: int, file: Path) -> Generator[Callable[[], subprocess.Popen[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", STANDBY, "serve", "--port", str(port), "--store", f"sqlite:///{file}"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(file.parent),
    )

    def start() -> subprocess.Popen[str]:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert " at http" in process.stderr.readline()
        return process

    try:
        yield start
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.mark.slow
async def test_server_killed_under_load_and_started_a_second_later_fails_no_call(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stopped = asyncio.Event()
    done = 0

    async def write_and_read(store: AsyncKVStore, task: int) -> None:
        nonlocal done
        number = 0
        while not stopped.is_set():
            await store.set(f"k{task}", str(number))
            assert await store.get(f"k{task}") == str(number)
            number += 1
            done += 1

    with standby(port, tmp_path / "kv.db") as start, standby(port, tmp_path / "kv.db") as start_again:
        server = await asyncio.to_thread(start)
        async with AsyncKVStore("db", url=f"http://127.0.0.1:{port}") as store, asyncio.TaskGroup() as group:
            for task in range(64):
                group.create_task(write_and_read(store, task))
            large = [group.create_task(store.set(f"large{number}", "x" * 1_800_000)) for number in range(60)]
            await asyncio.sleep(0.5)
            server.kill()
            await asyncio.sleep(1)
            await asyncio.to_thread(start_again)
            before = done
            await asyncio.gather(*large)
            await until(lambda: done > before + 64)
            stopped.set()
