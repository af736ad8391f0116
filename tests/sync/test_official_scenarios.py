"""Code written for fal's own client runs with `KVStore` in its place: the same calls, results and exceptions caught."""

import json
import subprocess
import sys
from typing import Any

import pytest
import trustme
from helpers import clean_environment, served_process

from aiokv.server import add_key

pytest.importorskip("fal", reason="the official client is not installed: pip install fal (it is part of aiokv[dev])")

# Each scenario runs with both clients, in a namespace of its own, in one process: the import of fal takes seconds.
PROGRAM = """
import contextlib, json, os, pickle, sys, urllib.error, uuid, warnings
warnings.simplefilter("ignore")
import fal.toolkit.kv
from fal.toolkit.exceptions import FalTookitException, KVStoreException
from fal.toolkit.file.providers import fal as provider
import aiokv
fal.toolkit.kv.FAL_KV_HOST = os.environ["AIOKV_URL"]
provider.REST_HOST = os.environ["AIOKV_URL"].removeprefix("https://")
provider.MAX_ATTEMPTS = 2

def set_and_get(store):
    store.set("test", "test")
    return store.get("test"), store.get("test2")

def delete(store):
    key = f"delete-{uuid.uuid4()}"
    store.set(key, "value")
    before = store.get(key)
    store.delete(key)
    after = store.get(key)
    return before, after, store.delete(key)

def set_with_ttl(store):
    key = f"ttl-{uuid.uuid4()}"
    first = store.set(key, "value", ttl=60)
    second = store.set(key, "other", 2_592_000)
    return first, second, store.get(key), store.delete(key), store.get(key)

def odd_texts(store):
    for key in ("a/b/c", "tilde~dot.dash-under_", "semi;colon:at@"):
        store.set(key, f"{key} = a&b +%20 \\n \\u20ac \\U0001f600")
    store.set("empty", "")
    return [store.get(key) for key in ("a/b/c", "tilde~dot.dash-under_", "semi;colon:at@", "empty")]

def last_write_wins(store):
    store.set("k", "1")
    store.set(key="k", value="2", ttl=None)
    return store.get(key="k")

def namespaces(store):
    other = type(store)(store.db_name + "-other")
    store.set("k", "mine")
    return other.get("k"), other.set("k", "other"), store.get("k"), other.get("k")

def largest_value(store):
    store.set("k", "x" * 1_900_000)
    return len(store.get("k"))

def caught(act):
    try:
        act()
    except KVStoreException as error:
        return isinstance(error, FalTookitException), type(error).__name__
    return "nothing raised"

def too_large(store):
    return caught(lambda: store.set("k", "x" * 1_900_001))[0], store.get("k")

def ttl_too_short(store):
    return caught(lambda: store.set("k", "v", ttl=59))[0], store.get("k")

def ttl_too_long(store):
    return caught(lambda: store.set("k", "v", ttl=2_592_001))[0]

def pickled(store):
    store.set("k", "v")
    copied = pickle.loads(pickle.dumps(store))
    return copied.db_name == store.db_name, copied.get("k")

SCENARIOS = [set_and_get, delete, set_with_ttl, odd_texts, last_write_wins, namespaces, largest_value, too_large,
             ttl_too_short, ttl_too_long, pickled]
seen = {}
for scenario in SCENARIOS:
    for name, client in (("official", fal.toolkit.kv.KVStore), ("ours", aiokv.KVStore)):
        with contextlib.redirect_stdout(sys.stderr):
            try:
                outcome = scenario(client(f"{name}-{scenario.__name__}"))
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
        seen.setdefault(scenario.__name__, {})[name] = outcome

def outcome_of(error):
    # Pickled, an error is of aiokv's class alone.
    return [isinstance(error, KVStoreException), isinstance(error, aiokv.AioKVError), type(error).__name__, str(error),
            type(pickle.loads(pickle.dumps(error))).__mro__[0] is getattr(aiokv, type(error).__name__, ValueError)]

def raised(act):
    try:
        act()
    except Exception as error:
        return outcome_of(error)

nowhere = aiokv.KVStore("db", url="http://127.0.0.1:1").with_options(timeout=0.2)
errors = {
    "no connection": raised(lambda: nowhere.get("k")),
    "many": raised(lambda: nowhere.get_many(["a", "b"])),
    "not JSON": raised(lambda: [nowhere.async_store, aiokv.KVStore("json").set("k", "{"), aiokv.KVStore("json").get_json("k")]),
    "key": raised(lambda: nowhere.get("")),
    "prefix": raised(lambda: nowhere.keys("\\0")),
    "type": raised(lambda: nowhere.set("k", 1)),
}
print(json.dumps({"scenarios": seen, "errors": errors}))
"""

EXPECTED: dict[str, Any] = {
    "set_and_get": ["test", None],
    "delete": ["value", None, None],
    "set_with_ttl": [None, None, "other", None, None],
    "odd_texts": [
        *[f"{key} = a&b +%20 \n € 😀" for key in ("a/b/c", "tilde~dot.dash-under_", "semi;colon:at@")],
        "",
    ],
    "last_write_wins": "2",
    "namespaces": [None, None, "mine", "other"],
    "largest_value": 1_900_000,
    "too_large": [True, None],
    "ttl_too_short": [True, None],
    "ttl_too_long": True,
    "pickled": [True, "v"],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the program against a server over TLS; return what it saw."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    key = add_key(folder / "access", "fal-user")
    with served_process(
        *("--store", "memory://", "--access-file", str(folder / "access"), "--tls-cert", str(folder / "server.pem")),
        home=folder,
    ) as (_, address):
        environment = clean_environment(folder) | {
            "AIOKV_KEY": key,
            "AIOKV_URL": address,
            "FAL_KEY": key,
            "SSL_CERT_FILE": str(folder / "ca.pem"),
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False, timeout=100
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("scenario", EXPECTED)
def test_scenario_is_the_same_with_both_clients(outcomes: dict[str, Any], scenario: str) -> None:
    assert outcomes["scenarios"][scenario] == {"official": EXPECTED[scenario], "ours": EXPECTED[scenario]}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no connection", [True, True, "ConnectError"]),
        ("many", [True, True, "BatchError"]),
        ("not JSON", [True, True, "DecodeError"]),
        ("key", [True, False, "ValueError"]),
        ("prefix", [True, False, "ValueError"]),
        ("type", [False, False, "TypeError"]),
    ],
)
def test_errors_are_caught_as_those_of_the_official_client(outcomes: dict[str, Any], name: str, expected: list[Any]) -> None:
    *facts, text, pickles_as_its_own_class = outcomes["errors"][name]
    assert facts == expected
    assert text
    assert pickles_as_its_own_class or name == "type"
