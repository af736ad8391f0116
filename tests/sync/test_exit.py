"""A program ends in silence, in time and with its connections closed, wherever blocking calls stand at its end."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import clean_environment

from aiokv.testing.background import KVServer

OPEN = """
import sys
from aiokv import KVStore
store = KVStore("db", url=sys.argv[1])
store.set("k", "v")
"""

HANDLERS = """
import atexit, sys
def early():
    try:
        print("early:", store.get("k"))
    except RuntimeError as error:
        print("early:", error)
    store.close()
atexit.register(early)
from aiokv import KVStore
atexit.register(lambda: print("late:", store.get("k")))
store = KVStore("db", url=sys.argv[1])
store.set("k", "v")
"""

WATCHING_DAEMON = """
import sys, threading
from aiokv import KVStore, Lost
store = KVStore("db", url=sys.argv[1])
began = threading.Event()
def read():
    for change in store.watch():
        began.set()
threading.Thread(target=read, daemon=True).start()
assert began.wait(10)
"""

CALLING_DAEMONS = """
import sys, threading
from aiokv import KVStore
store = KVStore("db", url=sys.argv[1])
began = threading.Event()
def call():
    try:
        while True:
            store.get("k")
            began.set()
    except RuntimeError as error:
        assert "the interpreter is ending" in str(error)
for _ in range(8):
    threading.Thread(target=call, daemon=True).start()
assert began.wait(10)
"""

THREAD_THAT_OUTLIVES_MAIN = """
import sys, threading
from aiokv import KVStore
store = KVStore("db", url=sys.argv[1].replace("127.0.0.1", "localhost"))
def work():
    threading.main_thread().join()
    # A name is looked up in a thread, and executors take no work any more.
    store.set("k", "v")
    print(store.get("k"))
threading.Thread(target=work).start()
"""

HELD_CLAIM = """
import sys
from aiokv import KVStore
store = KVStore("db", url=sys.argv[1])
claim = store.claim("report").__enter__()
assert claim.is_held
"""

LEFT_LISTING = """
import sys
from aiokv import KVStore
store = KVStore("db", url=sys.argv[1])
store.set_many({f"key-{number}": "v" for number in range(2_500)})
keys = store.keys()
next(keys)
"""

SUBMITTED = """
import asyncio, sys
from aiokv import KVStore, background
store = KVStore("db", url=sys.argv[1]).async_store
async def write():
    await asyncio.sleep(0.1)
    await store.set("k", "v")
    print(await store.get("k"))
background.submit(write)
"""

FORKED = """
import os, sys
from aiokv import KVStore
store = KVStore("db", url=sys.argv[1])
store.set("k", "v")
if os.fork() == 0:
    print(store.get("k"), flush=True)
    sys.exit(0)
status = os.waitstatus_to_exitcode(os.wait()[1])
print(status, store.get("k"))
"""

CAUGHT_IN_A_CALL = """
import os, signal, sys, threading
from aiokv import KVStore
store = KVStore("db", url=sys.argv[1])
def interrupt():
    while not store_is_watched.wait(10):
        pass
    os.kill(os.getpid(), signal.SIGINT)
store_is_watched = threading.Event()
threading.Thread(target=interrupt, daemon=True).start()
try:
    for change in store.watch():
        store_is_watched.set()
except KeyboardInterrupt:
    print(store.get("k"))
"""

PROGRAMS = {
    "open store": (OPEN, ""),
    "daemon that watches": (WATCHING_DAEMON, ""),
    "daemons that call": (CALLING_DAEMONS, ""),
    "thread that outlives main": (THREAD_THAT_OUTLIVES_MAIN, "v\n"),
    "held claim": (HELD_CLAIM, ""),
    "left listing": (LEFT_LISTING, ""),
    "submitted write": (SUBMITTED, "v\n"),
    "forked child": (FORKED, "v\n0 v\n"),
    "interrupted call": (CAUGHT_IN_A_CALL, "None\n"),
    "handlers": (
        HANDLERS,
        "late: v\nearly: the interpreter is ending, and aiokv has closed its connections: make this call before\n",
    ),
}


NEED_A_THREAD = {"thread that outlives main", "submitted write"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "http"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_ends_without_a_warning(name: str, kind: str, tmp_path: Path, kv_server: KVServer) -> None:
    if name in NEED_A_THREAD and (3, 12) <= sys.version_info < (3, 12, 2):
        pytest.skip("Python 3.12.0 and 3.12.1 start no thread after the end of the main one")
    program, output = PROGRAMS[name]
    url = kv_server.url if kind == "http" else f"sqlite:///{tmp_path}/kv.db"
    warnings = ["-W", "error"]
    if name == "forked child" and sys.version_info >= (3, 12):
        # What that warns of is what is tested.
        warnings += ["-W", "ignore:This process:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, "-X", "dev", *warnings, "-c", program, url],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
        check=False,
        timeout=18,
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.stdout, errors, done.returncode) == (output, [], 0)
