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
from aiokv import AsyncKVStore, RetryPolicy
url = sys.argv[1]
# A callback that a busy machine holds up is no fault; what is left unclosed is logged as an error.
logging.getLogger("asyncio").setLevel(logging.ERROR)
# A retry is logged, and a busy machine is slow to accept a hundred connections.
patient = RetryPolicy(connect_timeout=15, attempt_timeout=15)
store = AsyncKVStore("db", url=url, credentials="id:secret", retry=patient)

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


@pytest.mark.slow
def test_one_store_serves_ten_loops_one_after_the_other(url: str, tmp_path: Path) -> None:
    body = """
        for i in range(10):
            asyncio.run(use(str(i)))
        gc.collect()
    """
    assert run_script(body, url, tmp_path) == "done\n"


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_ten_forks_and_ten_loops_use_one_store_at_once(url: str, tmp_path: Path) -> None:
    body = """
        failures = []
        def run(name):
            try:
                asyncio.run(use(name))
            except BaseException as error:
                failures.append(error)
        def ten_loops(process):
            threads = [threading.Thread(target=run, args=(f'{process}-{i}',)) for i in range(10)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            assert not failures, failures
        loop = asyncio.new_event_loop()
        loop.run_until_complete(use('parent'))
        children = []
        for i in range(10):
            pid = os.fork()
            if pid == 0:
                # Out by the ordinary way, where warnings come.
                ten_loops(f'child{i}') if i % 5 == 0 else asyncio.run(use(f'child{i}'))
                sys.exit(0)
            children.append(pid)
        ten_loops('parent')
        loop.run_until_complete(use('parent again'))
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 10
        loop.run_until_complete(store.aclose())
        loop.close()
        gc.collect()
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


def test_child_forked_in_the_middle_of_writes_takes_locks_of_its_own(tmp_path: Path) -> None:
    body = """
        import signal
        async def write_on():
            i = 0
            while True:
                await store.set(f'k{i % 100}', 'v' * 1000)
                i += 1
        async def main():
            writers = [asyncio.create_task(write_on()) for _ in range(32)]
            for attempt in range(4):
                await asyncio.sleep(0.05)
                pid = os.fork()
                if pid == 0:
                    signal.alarm(8)
                    try:
                        asyncio.events._set_running_loop(None)
                        asyncio.run(use(f'child{attempt}'))
                        os._exit(0)
                    finally:
                        os._exit(1)
                code = (await asyncio.to_thread(os.waitpid, pid, 0))[1]
                assert code == 0, code
            for writer in writers:
                writer.cancel()
            await asyncio.wait(writers)
            assert await store.get('child3-19') == 'child3'
            await store.aclose()
        asyncio.run(main())
    """
    assert run_script(body, f"sqlite:///{tmp_path}/kv.db", tmp_path) == "done\n"


def test_child_keeps_its_writes_when_its_parent_has_closed_the_file(tmp_path: Path) -> None:
    body = """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(use('parent'))
        began, closed = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            async def child():
                await store.set('c1', '1')
                os.write(began[1], b'x')
                os.read(closed[0], 1)
                await store.set('c2', '2')
                assert await store.get('c2') == '2'
            try:
                asyncio.run(child())
                os._exit(0)
            finally:
                os._exit(1)
        os.read(began[0], 1)
        loop.run_until_complete(store.aclose())
        os.write(closed[1], b'x')
        assert os.waitpid(pid, 0)[1] == 0
        assert loop.run_until_complete(store.get('c2')) == '2'
        loop.run_until_complete(store.aclose())
        loop.close()
    """
    assert run_script(body, f"sqlite:///{tmp_path}/kv.db", tmp_path) == "done\n"


def test_memory_works_in_a_child_forked_while_a_thread_was_writing(tmp_path: Path) -> None:
    body = """
        async def write_on():
            while True:
                await store.set('k', 'v')
        threading.Thread(target=lambda: asyncio.run(write_on()), daemon=True).start()
        for _ in range(40):
            pid = os.fork()
            if pid == 0:
                import signal
                signal.alarm(5)
                try:
                    asyncio.run(use('child'))
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0
        print('done', flush=True)
        os._exit(0)
    """
    assert run_script(body, "memory://", tmp_path) == "done\n"
