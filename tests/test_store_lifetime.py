"""Loops, threads, forks and exits: a store serves each and leaves no warning behind."""

import subprocess
import sys
import textwrap
from collections.abc import Generator
from pathlib import Path

import pytest
from helpers import clean_environment, served_process

PRELUDE = """
import asyncio, gc, logging, os, sys, threading
from aiokv import AsyncKVStore
url = sys.argv[1]
# A callback that a busy machine holds up is no fault; what is left unclosed is logged as an error.
logging.getLogger("asyncio").setLevel(logging.ERROR)
store = AsyncKVStore("db", url=url, credentials="id:secret")

async def use(name):
    await store.set_many({f"{name}-{i}": name for i in range(20)})
    values = await store.get_many(f"{name}-{i}" for i in range(20))
    assert set(values.values()) == {name}, values
"""


@pytest.fixture(params=["sqlite", "http"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/kv.db"
    return str(request.getfixturevalue("server"))


@pytest.fixture
def server(tmp_path: Path) -> Generator[str]:
    with served_process("--store", f"sqlite:///{tmp_path}/served.db", home=tmp_path) as (_, address):
        yield address


def run_script(body: str, url: str, home: Path) -> str:
    """Run a script with every warning an error and every debug check on; its standard error must stay empty."""
    script = PRELUDE + textwrap.dedent(body) + "\nprint('done')\n"
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script, url],
        capture_output=True,
        text=True,
        timeout=18,
        env=clean_environment(home),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_store_that_is_never_closed_leaves_no_warning(url: str, tmp_path: Path) -> None:
    assert run_script("asyncio.run(use('a'))", url, tmp_path) == "done\n"


def test_one_store_serves_ten_loops_one_after_the_other(url: str, tmp_path: Path) -> None:
    body = """
        for i in range(10):
            asyncio.run(use(str(i)))
        gc.collect()
    """
    assert run_script(body, url, tmp_path) == "done\n"


def test_one_store_serves_ten_loops_in_ten_threads_at_once(url: str, tmp_path: Path) -> None:
    body = """
        failures = []
        def run(name):
            try:
                asyncio.run(use(name))
            except BaseException as error:
                failures.append(error)
        threads = [threading.Thread(target=run, args=(str(i),)) for i in range(10)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not failures, failures
    """
    assert run_script(body, url, tmp_path) == "done\n"


def test_loop_that_is_closed_without_ceremony_leaves_no_warning(url: str, tmp_path: Path) -> None:
    body = """
        for i in range(3):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(use(str(i)))
            loop.run_until_complete(store.aclose())
            loop.close()
        gc.collect()
    """
    assert run_script(body, url, tmp_path) == "done\n"


def test_forked_children_use_the_store_that_their_parent_had_open(url: str, tmp_path: Path) -> None:
    body = """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(use('parent'))
        children = []
        for i in range(5):
            pid = os.fork()
            if pid == 0:
                try:
                    asyncio.run(use(f'child{i}'))
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(pid)
        loop.run_until_complete(use('parent again'))
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 5
        loop.run_until_complete(use('parent at last'))
        loop.run_until_complete(store.aclose())
        loop.close()
    """
    assert run_script(body, url, tmp_path) == "done\n"


def test_forked_child_that_exits_in_the_ordinary_way_leaves_its_parents_connections_alone(url: str, tmp_path: Path) -> None:
    body = """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(use('parent'))
        pid = os.fork()
        if pid == 0:
            asyncio.run(use('child'))
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        loop.run_until_complete(use('parent again'))
        loop.run_until_complete(store.aclose())
        loop.close()
    """
    assert run_script(body, url, tmp_path) == "done\n"
