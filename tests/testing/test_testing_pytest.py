"""The pytest plugin: its fixtures in tests that await, by either plugin, and in tests that do not; and its weight."""

import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from helpers import clean_environment

import aiokv.testing
from aiokv.testing.background import in_thread, kv_server

SYNCHRONOUS = """
import asyncio
import os
import pytest
from aiokv import AsyncKVStore, ConnectError, ThrottledError, TransportError
from aiokv.testing import ResetAfter, ResetBefore, Stall

async def round_trip(store):
    assert await store.get("k") is None
    await store.set("k", "v")
    assert await store.get("k") == "v"

async def ride_out(flaky_kv, kv_store):
    flaky_kv.proxy.faults = [ResetAfter(), ResetBefore(), ResetBefore()]
    await flaky_kv.store.set("k", "v")
    assert await kv_store.get("k") == "v"
    assert [seen.reached_upstream for seen in flaky_kv.proxy.requests] == [True, False, False, True]
    async with flaky_kv.proxy.outage():
        with pytest.raises(ConnectError) as raised:
            await flaky_kv.store.get("k")
        assert raised.value.attempts == 1
    assert await flaky_kv.store.get("k") == "v"

def test_plain(kv_store):
    asyncio.run(round_trip(kv_store))
    asyncio.run(kv_store.delete("k"))

@pytest.mark.parametrize("kv_server", ["memory", "sqlite"], indirect=True)
def test_either_backend(kv_server, kv_store, tmp_path, request):
    asyncio.run(round_trip(kv_store))
    kind = request.node.callspec.params["kv_server"]
    assert (tmp_path / "kv_server.db").exists() == (kind == "sqlite")

def test_own_store(kv_server):
    asyncio.run(round_trip(AsyncKVStore("db", url=kv_server.url)))

def test_flaky(flaky_kv, kv_store):
    assert "AIOKV_KEY" not in os.environ
    asyncio.run(ride_out(flaky_kv, kv_store))

def test_request_left_stalled(flaky_kv):
    flaky_kv.proxy.faults = Stall()

    async def leave():
        call = asyncio.create_task(flaky_kv.store.get("k"))
        while not flaky_kv.proxy.requests:
            await asyncio.sleep(0.001)
        call.cancel()

    asyncio.run(leave())
"""

ASYNCHRONOUS = """
{mark}
async def test_awaiting(kv_store):
    await round_trip(kv_store)

{mark}
async def test_awaiting_flaky(flaky_kv, kv_store):
    await ride_out(flaky_kv, kv_store)

{mark}
async def test_left_stalled(flaky_kv):
    flaky_kv.proxy.faults = Stall()
    call = asyncio.create_task(flaky_kv.store.get("k"))
    while not flaky_kv.proxy.requests:
        await asyncio.sleep(0.001)
    call.cancel()
"""

LOOP_SCOPE = ["-o", "asyncio_default_fixture_loop_scope=function"]


def run_pytest(folder: Path, source: str, *options: str) -> str:
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(source)
    environment = {**clean_environment(folder), "AIOKV_KEY": "me:s3cret"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "pytest", "-W", "error", "--rootdir", str(folder), *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "asynchronous", "passed"),
    [
        (["-p", "no:asyncio", "-p", "no:anyio"], "", 6),
        ([*LOOP_SCOPE, "-o", "asyncio_mode=auto", "-p", "no:randomly"], ASYNCHRONOUS.format(mark=""), 9),
        (LOOP_SCOPE, ASYNCHRONOUS.format(mark="@pytest.mark.asyncio(loop_scope='module')"), 9),
        (
            ["-p", "no:asyncio", "-p", "no:randomly"],
            ASYNCHRONOUS.format(mark="@pytest.mark.anyio") + "@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n",
            9,
        ),
    ],
    ids=["synchronous", "asyncio auto", "asyncio with a module's loop", "anyio"],
)
@pytest.mark.slow
def test_fixtures_serve_tests_of_any_kind(tmp_path: Path, options: list[str], asynchronous: str, passed: int) -> None:
    output = run_pytest(tmp_path, SYNCHRONOUS + asynchronous, *options)
    assert f"= {passed} passed in " in output, output


def test_plugin_loads_nothing_of_the_package_until_a_fixture_is_used(tmp_path: Path) -> None:
    source = """
import sys

def test_nothing(pytestconfig):
    assert pytestconfig.pluginmanager.hasplugin("aiokv")
    assert [name for name in sys.modules if name.partition(".")[0] in ("aiokv", "aiohttp", "orjson")] == []
"""
    # Plug-ins of other packages load what they like.
    assert "= 1 passed in " in run_pytest(tmp_path, source, *LOOP_SCOPE, "-p", "no:langsmith_plugin")


@pytest.mark.slow
def test_server_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    source = """
import pytest

@pytest.mark.parametrize("kv_server", ["redis"], indirect=True)
def test_nothing(kv_server):
    pass
"""
    output = run_pytest(tmp_path, source, *LOOP_SCOPE)
    assert "UsageError: kv_server keeps its values in 'memory' or 'sqlite', not 'redis'" in output


def test_store_that_is_left_open_does_not_hold_the_end_of_its_server_up() -> None:
    began = time.monotonic()
    for _ in range(20):
        with in_thread(lambda: kv_server(None)) as server:
            aiokv.KVStore("db", url=server.url).set("k", "v")
    assert time.monotonic() - began < 5


def test_package_does_not_load_its_own_test_tools() -> None:
    script = "import sys, aiokv, aiokv.server, aiokv.cli; print([m for m in sys.modules if m.startswith('aiokv.testing')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_plugin_is_registered_and_its_package_says_what_is_public() -> None:
    (entry_point,) = entry_points(group="pytest11", name="aiokv")
    assert entry_point.value == "pytest_aiokv"
    assert all(hasattr(aiokv.testing, name) for name in aiokv.testing.__all__)
    assert "disable_backoff" in aiokv.testing.__all__


def test_fixtures_of_this_run_are_the_plugin_s(kv_store: aiokv.AsyncKVStore, flaky_kv: object) -> None:
    assert kv_store.url.startswith("http://127.0.0.1:")
    assert "FaultProxy" in repr(flaky_kv)
    assert "AIOKV_KEY" not in os.environ
