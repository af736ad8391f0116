"""The official client, unchanged, against our server over TLS; and what each client writes, the other reads."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import trustme
from helpers import clean_environment, served_process

from aiokv import AsyncKVStore, HttpOptions
from aiokv.server import add_key

pytest.importorskip("fal", reason="the official client is not installed: pip install fal (it is part of aiokv[dev])")

# One process for all the calls: the import of fal takes seconds.
DRIVER = """
import contextlib, json, os, sys, warnings
warnings.simplefilter("ignore")
import fal.toolkit.kv as kv
import fal.toolkit.file.providers.fal as provider
kv.FAL_KV_HOST = "https://" + os.environ["SERVER"]
provider.REST_HOST = os.environ["SERVER"]
print("ready", flush=True)
for line in sys.stdin:
    db_name, verb, arguments, keywords = json.loads(line)
    try:
        # The client prints when it retries.
        with contextlib.redirect_stdout(sys.stderr):
            answer = {"result": getattr(kv.KVStore(db_name), verb)(*arguments, **keywords)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[str, str, Path]]:
    """Run a server with a certificate and an access file; yield its authority, a key for it, and the certificate to trust."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    key = add_key(folder / "access", "fal-user")
    with served_process(
        *("--store", f"sqlite:///{folder}/kv.db", "--access-file", str(folder / "access")),
        *("--tls-cert", str(folder / "server.pem")),
        home=folder,
    ) as (_, address):
        assert address.startswith("https://")
        yield address, key, folder / "ca.pem"


@pytest.fixture(scope="module")
def official(service: tuple[str, str, Path], tmp_path_factory: pytest.TempPathFactory) -> Generator[Call]:
    """Return a function that makes the official client do one call."""
    address, key, ca_file = service
    environment = {
        **clean_environment(tmp_path_factory.mktemp("home")),
        "FAL_KEY": key,
        "SSL_CERT_FILE": str(ca_file),
        "SERVER": address.removeprefix("https://"),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lock = threading.Lock()
    assert process.stdout.readline() == "ready\n"

    def call(verb: str, *arguments: Any, db_name: str = "db", **keywords: Any) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        with lock:
            process.stdin.write(json.dumps([db_name, verb, arguments, keywords]) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    yield call
    process.stdin.close()
    process.wait(timeout=10)
    process.stdout.close()


@pytest.fixture
def ours(service: tuple[str, str, Path]) -> AsyncKVStore:
    address, key, ca_file = service
    return AsyncKVStore("db", url=address, credentials=key, http=HttpOptions(ca_file=str(ca_file)))


def test_what_is_set_is_read_back(official: Call) -> None:
    official("set", "greeting", "hello")
    assert official("get", "greeting") == "hello"


def test_absent_key_is_none(official: Call) -> None:
    assert official("get", "never-set") is None


def test_delete_succeeds_twice(official: Call) -> None:
    official("set", "gone", "v")
    official("delete", "gone")
    official("delete", "gone")
    assert official("get", "gone") is None


def test_ttl_of_a_minute_is_taken(official: Call) -> None:
    official("set", "short", "v", ttl=60)
    assert official("get", "short") == "v"


def test_ttl_below_a_minute_is_refused(official: Call) -> None:
    with pytest.raises(RuntimeError, match=r"KVStoreException: Error sending request. Status 400: ttl must be from 60"):
        official("set", "short", "v", ttl=59)


def test_value_too_large_is_refused_with_its_status(official: Call) -> None:
    with pytest.raises(RuntimeError, match=r"KVStoreException: Error sending request. Status 413: value is 1,900,001 bytes"):
        official("set", "large", "x" * 1_900_001)
    assert official("get", "large") is None


def test_largest_value_is_taken(official: Call) -> None:
    official("set", "largest", "x" * 1_900_000)
    same = official("get", "largest") == "x" * 1_900_000
    assert same


@pytest.mark.parametrize("key", ["plain", "a/b/c", "a%2Fb", "tilde~dot.dash-under_", "semi;colon:at@"])
async def test_what_the_official_client_writes_ours_reads_and_deletes(official: Call, ours: AsyncKVStore, key: str) -> None:
    value = f"from fal ⇒ {key} = a&b +%20 😀"
    await asyncio.to_thread(official, "set", key, value)
    # Unquoted by that client: what is percent-encoded in a key reaches the server decoded.
    ours_key = key.replace("%2F", "/")
    assert await ours.get(ours_key) == value
    await ours.delete(ours_key)
    assert await asyncio.to_thread(official, "get", key) is None


@pytest.mark.parametrize("key", ["plain", "a/b/c", "tilde~dot.dash-under_", "semi;colon:at@"])
async def test_what_ours_writes_the_official_client_reads_and_deletes(official: Call, ours: AsyncKVStore, key: str) -> None:
    value = f"from aiokv ⇒ {key} = a&b +%20 😀"
    await ours.set(key, value, ttl=60)
    assert await asyncio.to_thread(official, "get", key) == value
    await asyncio.to_thread(official, "delete", key)
    assert await ours.get(key) is None


async def test_namespaces_are_the_same_for_both(official: Call, ours: AsyncKVStore) -> None:
    await asyncio.to_thread(official, "set", "k", "other", db_name="other-db")
    assert await ours.get("k") is None
    assert (
        await AsyncKVStore("other-db", url=ours.url, credentials=ours._client.credentials, http=ours._client.http).get("k")
        == "other"
    )
