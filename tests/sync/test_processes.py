"""One store serves the processes that a program makes in any way, each with connections of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import clean_environment

from aiokv.testing.background import KVServer

WORKERS = """
import multiprocessing, sys
from aiokv import KVStore

def work(store, number):
    store.set(str(number), f"of {number}")
    with store.claim(f"claim {number}") as claim:
        return store.get("before"), store.get(str(number)), claim.is_held

if __name__ == "__main__":
    method, url = sys.argv[1:]
    store = KVStore("db", url=url)
    store.set("before", "v")
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.starmap(work, [(store, number) for number in range(6)])
        pool.close()
        pool.join()
    assert results == [("v", f"of {number}", True) for number in range(6)], results
    assert store.count() == 7
"""

# As servers do that load the program once and then fork: the store is used before, and by threads of each worker.
PREFORK = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from aiokv import KVStore
store = KVStore("db", url=sys.argv[2])
store.set("before", "v")
for number in range(3):
    if os.fork() == 0:
        def call(thread):
            store.set(f"{number} {thread}", store.get("before"))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, range(20)))
        sys.exit(0)
assert [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)] == [0, 0, 0]
assert store.count() == 61
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "http"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver", "prefork"])
def test_store_serves_every_process_and_all_end_in_silence(method: str, kind: str, tmp_path: Path, kv_server: KVServer) -> None:
    program = tmp_path / "program.py"
    program.write_text(PREFORK if method == "prefork" else WORKERS)
    url = kv_server.url if kind == "http" else f"sqlite:///{tmp_path}/kv.db"
    warnings = ["-W", "error"]
    if sys.version_info >= (3, 12):
        # A fork beside other threads warns, which is what is tested.
        warnings += ["-W", "ignore:This process:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, "-X", "dev", *warnings, str(program), method, url],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
        check=False,
        timeout=18,
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.stdout, errors, done.returncode) == ("", [], 0)
