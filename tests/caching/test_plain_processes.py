"""Cached plain functions in other processes: shipped, forked, interrupted, and at the end of the interpreter."""

import inspect
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from caching_under_test import in_child
from helpers import clean_environment
from plain_under_test import begin, results, wait_until
from shipped_project import ship

from aiokv import AsyncKVStore, NearCache, PlainCachedFunction, kv_cached, kv_cached_many
from aiokv.testing.background import KVServer

kv = AsyncKVStore("db", url="memory://plain-processes")


@kv_cached(60, store=kv, near=NearCache(60))
def double(number: int) -> int:
    return 2 * number


@kv_cached_many(60, store=kv)
def doubles(ids: list[int]) -> dict[int, int]:
    return {id_: 2 * id_ for id_ in ids}


def test_function_that_came_by_value_works_and_has_the_same_keys() -> None:
    cloudpickle = pytest.importorskip("cloudpickle", reason="cloudpickle is not installed: pip install 'aiokv[test]'")
    module = inspect.getmodule(test_function_that_came_by_value_works_and_has_the_same_keys)
    cloudpickle.register_pickle_by_value(module)
    try:
        one, many = ship(double), ship(doubles)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert one is not double
    assert isinstance(one, PlainCachedFunction)
    assert not inspect.iscoroutinefunction(one)
    assert one.key(4) == double.key(4)
    assert [one(4), one(4), many([1, 2])] == [8, 8, {1: 2, 2: 4}]


def test_forked_child_computes_and_is_served() -> None:
    double(1)

    def child() -> None:
        assert [double(1), double(2), double.refresh(2), doubles([1, 2])] == [2, 4, 4, {1: 2, 2: 4}]
        threads = [begin(double, number) for number in (3, 3, 3, 4)]
        assert results(threads, 5) == [6, 6, 6, 8]

    assert in_child(child) == 0
    assert double(2) == 4


def test_child_of_a_thread_in_the_middle_of_a_computation_waits_for_nothing(store: AsyncKVStore) -> None:
    gate, began = threading.Event(), threading.Event()

    @kv_cached(60, store=store, key=lambda: "one")
    def slow() -> int:
        if not began.is_set():
            began.set()
            assert gate.wait(10)
        return 1

    computing = begin(slow)
    assert began.wait(10)

    def child() -> None:
        assert [slow(), slow()] == [1, 1]

    assert in_child(child) == 0
    gate.set()
    assert computing.result(10) == 1


def test_child_that_is_forked_by_the_function_works(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda n: n)
    def fork(n: int) -> int:
        return in_child(lambda: None if fork(n - 1) == 0 else 1 // 0) if n else 0

    assert fork(2) == 0


SCRIPT = """
import sys, time
from aiokv import KVStore, kv_cached

kv = KVStore("db", url=sys.argv[1])

@kv_cached(60, store=kv, prefix="script", version=1)
def slow(number: int) -> int:
    print("computed", number, flush=True)
    {body}
    return number * number

print(slow(3), slow(3), flush=True)
"""


def run(body: str, url: str, home: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT.format(body=body), url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(home),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "server"])
def test_results_outlive_the_process_which_ends_in_silence(kind: str, tmp_path: Path, kv_server: KVServer) -> None:
    url = f"sqlite:///{tmp_path}/kv.db" if kind == "file" else kv_server.url
    assert run("pass", url, tmp_path).communicate(timeout=15) == ("computed 3\n9 9\n", "")
    assert run("pass", url, tmp_path).communicate(timeout=15) == ("9 9\n", "")


@pytest.mark.slow
def test_interrupted_program_ends_with_keyboard_interrupt_and_stores_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kv.db"
    process = run("time.sleep(60)", url, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "computed 3\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=15)
    assert (process.returncode, out) == (-signal.SIGINT, "")
    assert re.search(r"KeyboardInterrupt$", error.strip())
    assert "never" not in error
    assert time.monotonic() - began < 10
    assert run("pass", url, tmp_path).communicate(timeout=15) == ("computed 3\n9 9\n", "")


@pytest.mark.slow
def test_refresh_that_is_under_way_at_the_end_does_not_hold_the_process_up(tmp_path: Path) -> None:
    body = "threading.current_thread() is threading.main_thread() or time.sleep(60)"
    script = (
        SCRIPT.format(body=body)
        .replace("import sys", "import sys, threading")
        .replace("60, store=kv", "1, store=kv, stale_while_revalidate=60, early=0.0")
    )
    script += "time.sleep(1.1)\nslow(3)\nwhile threading.active_count() < 3: time.sleep(0.01)\ntime.sleep(0.1)\n"
    process = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script, f"sqlite:///{tmp_path}/kv.db"],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
        timeout=15,
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "computed 3\n9 9\ncomputed 3\n", "")


def test_threads_that_are_left_are_few() -> None:
    before = threading.active_count()
    assert results([begin(double, number) for number in range(40)]) == [2 * number for number in range(40)]
    wait_until(lambda: threading.active_count() <= before + 2)
