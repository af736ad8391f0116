"""Credentials: where they are found, who may see them, and that nothing shows them."""

import asyncio
import importlib.util
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from aiohttp import web
from helpers import all_texts, clean_environment
from yarl import URL

from aiokv import AsyncKVStore
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.credentials import (
    FalCredentials,
    KeyCredentials,
    _ask_colab,
    choose_credentials,
    find_fal_key,
    token_url,
)
from aiokv.backends.http.tokens import Token
from aiokv.errors import ConfigurationError, CredentialsError
from aiokv.testing import ScriptedService

SECRET = "hunter2"

FAL_HOSTS = ["kv.fal.media", "fal.media", "KV.FAL.MEDIA", "eu.kv.fal.media", "rest.alpha.fal.ai", "kv.fal.media."]
TENANT_HOSTS = ["fal.run", "app.fal.run", "env.app.fal.run.", "app.gateway.alpha.fal.ai", "gateway.alpha.fal.ai"]
FOREIGN_HOSTS = [
    "evilfal.media",
    "kv.fal.media.evil.example",
    "fal.media.evil.example",
    "kv-fal.media",
    "fal.medial",
    "media",
    "127.0.0.1",
    *TENANT_HOSTS,
]

TWO_PROFILES = """
[__internal__]
profile = "work"
[work]
key = "work:1"
[home]
key = "home:2"
[keyless]
host = "api.fal.ai"
"""


@dataclass(frozen=True)
class Machine:
    """What a machine holds, and the key that is to be found there."""

    expected: str | None
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def settle(self, home: Path) -> dict[str, str]:
        for name, text in self.files.items():
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return {"HOME": str(home), **self.environment}


PAIR = {"FAL_KEY_ID": "pair", "FAL_KEY_SECRET": "4"}
CONFIG = {".fal/config.toml": TWO_PROFILES}

MACHINES = {
    "nothing": Machine(None),
    "key": Machine("env:0", {"FAL_KEY": "env:0"}),
    "secret_with_colons": Machine("env:0:1:2", {"FAL_KEY": "env:0:1:2"}),
    "key_before_profile": Machine("env:0", {"FAL_KEY": "env:0", **PAIR}, CONFIG),
    "empty_key_is_none": Machine("work:1", {"FAL_KEY": ""}, CONFIG),
    "internal_profile": Machine("work:1", PAIR, CONFIG),
    "named_profile": Machine("home:2", {"FAL_PROFILE": "home"}, CONFIG),
    "empty_profile_name": Machine("work:1", {"FAL_PROFILE": ""}, CONFIG),
    "unknown_profile": Machine("pair:4", {"FAL_PROFILE": "nobody", **PAIR}, CONFIG),
    "keyless_profile": Machine("pair:4", {"FAL_PROFILE": "keyless", **PAIR}, CONFIG),
    "no_active_profile": Machine(None, {}, {".fal/config.toml": '[work]\nkey = "work:1"\n'}),
    "empty_config": Machine("pair:4", PAIR, {".fal/config.toml": ""}),
    "other_config": Machine("other:5", {"FAL_CONFIG_PATH": "~/o.toml", "FAL_PROFILE": "o"}, {"o.toml": '[o]\nkey="other:5"'}),
    "absent_config": Machine("pair:4", {"FAL_CONFIG_PATH": "~/absent.toml", **PAIR}, CONFIG),
    "empty_config_path": Machine("pair:4", {"FAL_CONFIG_PATH": "", **PAIR}),
    "config_of_an_unknown_user": Machine("pair:4", {"FAL_CONFIG_PATH": "~no-such-user-here/c.toml", **PAIR}),
    "pair": Machine("pair:4", PAIR),
    "half_a_pair": Machine(None, {"FAL_KEY_ID": "pair"}),
    "forced_login": Machine(None, {"FAL_FORCE_AUTH_BY_USER": "1", "FAL_KEY": "env:0", **PAIR}, CONFIG),
    "login_forced_by_no_other_word": Machine("env:0", {"FAL_FORCE_AUTH_BY_USER": "true", "FAL_KEY": "env:0"}),
}

ASK_THE_OFFICIAL_CLIENT = """
import json, os, sys
import fal.auth
answers = {}
for name, environment in json.load(sys.stdin).items():
    for variable in [v for v in os.environ if v.startswith("FAL_")]:
        del os.environ[variable]
    os.environ.update(environment)
    found = fal.auth.key_credentials()
    answers[name] = None if found is None else ":".join(found)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def official_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    if importlib.util.find_spec("fal") is None:
        pytest.skip("the official client is not installed")
    environments = {name: machine.settle(tmp_path_factory.mktemp("home")) for name, machine in MACHINES.items()}
    done = subprocess.run(
        [sys.executable, "-c", ASK_THE_OFFICIAL_CLIENT],
        input=json.dumps(environments),
        capture_output=True,
        check=True,
        text=True,
        env=clean_environment(tmp_path_factory.mktemp("home")),
    )
    answers: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture
def without_fal_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fal", None)


def install_fake_fal(monkeypatch: pytest.MonkeyPatch, login: Callable[[], object]) -> None:
    for name in ("fal", "fal.auth"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["fal.auth"], "fetch_auth_credentials", login, raising=False)


def install_fake_colab(monkeypatch: pytest.MonkeyPatch, read: Callable[[str], object]) -> None:
    _ask_colab.cache_clear()
    colab = ModuleType("google.colab")
    monkeypatch.setattr(colab, "userdata", SimpleNamespace(get=read), raising=False)
    monkeypatch.setitem(sys.modules, "google.colab", colab)


def place_key(monkeypatch: pytest.MonkeyPatch, home: Path, place: str, key: str) -> None:
    if place == "FAL_KEY":
        monkeypatch.setenv("FAL_KEY", key)
    elif place == "profile":
        (home / ".fal").mkdir()
        (home / ".fal/config.toml").write_text(f'[__internal__]\nprofile = "p"\n[p]\nkey = {json.dumps(key)}\n')
    elif place == "Colab":
        install_fake_colab(monkeypatch, {"FAL_KEY": key}.__getitem__)
    elif place == "AIOKV_KEY":
        monkeypatch.setenv("AIOKV_KEY", key)
    else:
        monkeypatch.setenv("FAL_KEY_ID", key.partition(":")[0])
        monkeypatch.setenv("FAL_KEY_SECRET", key.partition(":")[2])


@pytest.mark.parametrize("name", MACHINES)
def test_key_is_found_in_its_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in MACHINES[name].settle(tmp_path).items():
        monkeypatch.setenv(variable, value)
    found = find_fal_key()
    assert (found and found.key) == MACHINES[name].expected


@pytest.mark.parametrize("name", MACHINES)
def test_official_client_finds_the_same_key(name: str, official_answers: dict[str, str | None]) -> None:
    assert official_answers[name] == MACHINES[name].expected


MALFORMED_KEYS = [SECRET, f":{SECRET}", f"{SECRET}:", f"a b:{SECRET}", f"a:{SECRET}\nb", f"a:{SECRET}\x7f", "ü:ö"]
PLACES = ["FAL_KEY", "profile", "Colab", "FAL_KEY_ID with FAL_KEY_SECRET"]


@pytest.mark.parametrize("first", range(len(PLACES)), ids=PLACES)
def test_first_place_that_holds_a_key_wins(
    first: int, no_credentials_of_this_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in PLACES[first:]:
        place_key(monkeypatch, no_credentials_of_this_machine, place, f"id:{PLACES.index(place)}")

    found = find_fal_key()

    assert found is not None
    assert found.key == f"id:{first}"
    assert PLACES[first].split()[0] in found.source


@pytest.mark.parametrize("place", PLACES)
def test_trailing_newline_is_stripped(
    place: str, no_credentials_of_this_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_key(monkeypatch, no_credentials_of_this_machine, place, f"id:{SECRET}\n")
    found = find_fal_key()
    assert found is not None
    assert found.key == f"id:{SECRET}"


def refuse_access(_name: str) -> str:
    raise PermissionError("the notebook has no access")


@pytest.mark.parametrize("read", [refuse_access, {"FAL_KEY": None}.get, {}.__getitem__], ids=["refused", "none", "absent"])
def test_colab_without_a_key_is_passed_over(read: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_colab(monkeypatch, read)
    assert find_fal_key() is None
    monkeypatch.setenv("FAL_KEY_ID", "pair")
    monkeypatch.setenv("FAL_KEY_SECRET", "4")
    found = find_fal_key()
    assert found is not None
    assert found.key == "pair:4"


def test_colab_is_asked_once_whatever_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def refuse(_name: str) -> str:
        nonlocal asked
        asked += 1
        raise PermissionError("the user said no")

    install_fake_colab(monkeypatch, refuse)
    assert [find_fal_key() for _ in range(3)] == [None] * 3
    assert asked == 1


@pytest.mark.parametrize("key", MALFORMED_KEYS)
@pytest.mark.parametrize("place", [*PLACES, "AIOKV_KEY"])
def test_malformed_key_is_named_by_its_place_and_not_shown(
    place: str, key: str, no_credentials_of_this_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_key(monkeypatch, no_credentials_of_this_machine, place, key)
    url = URL("http://127.0.0.1:1")
    with pytest.raises(CredentialsError, match=place.split(maxsplit=1)[0]) as caught:
        choose_credentials(url, None) if place == "AIOKV_KEY" else find_fal_key()
    assert SECRET not in all_texts(caught.value)
    assert key not in all_texts(caught.value)


@pytest.mark.parametrize(
    "content", [f'key = "id:{SECRET}'.encode(), f"{SECRET} = [".encode(), f'key = "{SECRET}\xff"'.encode("latin-1"), None]
)
def test_unreadable_config_is_named_and_not_quoted(content: bytes | None, no_credentials_of_this_machine: Path) -> None:
    path = no_credentials_of_this_machine / ".fal/config.toml"
    path.parent.mkdir()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(CredentialsError) as caught:
        find_fal_key()
    assert str(path) in str(caught.value)
    assert SECRET not in all_texts(caught.value)


def test_key_of_the_environment_needs_no_readable_config(
    no_credentials_of_this_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_credentials_of_this_machine / ".fal").mkdir()
    (no_credentials_of_this_machine / ".fal/config.toml").write_text("= broken")
    monkeypatch.setenv("FAL_KEY", "env:0")
    found = find_fal_key()
    assert found is not None
    assert found.key == "env:0"


@pytest.mark.parametrize("environment", [{}, {"FAL_FORCE_AUTH_BY_USER": "1", "FAL_KEY": "env:0"}], ids=["no_key", "forced"])
async def test_login_is_used_where_there_is_no_key(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    install_fake_fal(monkeypatch, lambda: SimpleNamespace(header_value="Bearer of-the-login"))
    assert await FalCredentials().authorization() == "Bearer of-the-login"


async def test_key_comes_before_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_fal(monkeypatch, lambda: pytest.fail("the login was asked"))
    monkeypatch.setenv("FAL_KEY", "env:0")
    assert await FalCredentials().authorization() == "Key env:0"


async def test_login_that_blocks_leaves_the_event_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, ran = asyncio.get_running_loop(), asyncio.Event()

    def login() -> SimpleNamespace:
        async def run() -> bool:
            ran.set()
            return True

        assert asyncio.run_coroutine_threadsafe(run(), loop).result(timeout=5)
        return SimpleNamespace(header_value="Bearer x")

    install_fake_fal(monkeypatch, login)
    assert await FalCredentials().authorization() == "Bearer x"
    assert ran.is_set()


async def test_failed_login_is_told_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def login() -> SimpleNamespace:
        raise PermissionError(f"refresh token {SECRET}")

    install_fake_fal(monkeypatch, login)
    with pytest.raises(CredentialsError, match=r"fal auth login.*PermissionError") as caught:
        await FalCredentials().authorization()
    assert SECRET not in f"{caught.value} {caught.value!r}"


@pytest.mark.usefixtures("without_fal_package")
async def test_nothing_found_lists_every_place_and_the_way_on_without_fal(no_credentials_of_this_machine: Path) -> None:
    with pytest.raises(CredentialsError) as caught:
        await AsyncKVStore("db", url="https://kv.fal.media").get("key")
    for place in (
        "FAL_KEY",
        str(no_credentials_of_this_machine / ".fal/config.toml"),
        "Google Colab",
        "FAL_KEY_ID with FAL_KEY_SECRET",
        "fal auth login",
        "pip install fal",
        "AIOKV_URL=sqlite:///",
    ):
        assert place in str(caught.value)


@pytest.mark.usefixtures("without_fal_package")
async def test_forced_login_without_the_package_says_that_keys_are_ruled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_FORCE_AUTH_BY_USER", "1")
    monkeypatch.setenv("FAL_KEY", f"id:{SECRET}")
    with pytest.raises(CredentialsError, match="FAL_FORCE_AUTH_BY_USER=1 rules keys out") as caught:
        await FalCredentials().authorization()
    assert SECRET not in all_texts(caught.value)


@pytest.mark.parametrize("host", FAL_HOSTS)
def test_fal_host_is_given_fal_credentials_and_never_aiokv_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOKV_KEY", "own:key")
    assert choose_credentials(URL(f"https://{host}"), None) == FalCredentials()


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_foreign_host_is_given_aiokv_key_and_never_fal_credentials(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_KEY", f"fal:{SECRET}")
    url = URL(f"https://{host}")
    assert choose_credentials(url, None) is None
    assert token_url(url).host == host
    monkeypatch.setenv("AIOKV_KEY", "own:key")
    assert choose_credentials(url, None) == KeyCredentials("own:key", "AIOKV_KEY")


async def test_fal_key_reaches_no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_KEY", f"fal:{SECRET}")

    async def answer(_request: web.BaseRequest) -> web.Response:
        return web.json_response({"value": "v"})

    async with ScriptedService(handler=answer) as recorded, AsyncKVStore("db", url=recorded.url) as store:
        assert await store.get("key") == "v"
    assert len(recorded.requests) == 1
    assert SECRET not in str(recorded.requests[0].headers)
    assert "Authorization" not in recorded.requests[0].headers


@pytest.mark.parametrize(
    ("url", "given", "environment_key"),
    [
        ("http://kv.example", f"id:{SECRET}", None),
        ("http://kv.example", None, f"id:{SECRET}"),
        ("http://192.0.2.1:8787", f"id:{SECRET}", None),
        ("http://localhost.kv.example", f"id:{SECRET}", None),
        ("http://127.0.0.1.kv.example", f"id:{SECRET}", None),
        ("http://kv.fal.media", None, None),
    ],
)
async def test_credentials_over_plain_http_are_refused_before_any_io(
    url: str, given: str | None, environment_key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment_key is not None:
        monkeypatch.setenv("AIOKV_KEY", environment_key)
    for name in ("getaddrinfo", "create_connection", "sock_connect"):
        monkeypatch.setattr(asyncio.get_running_loop(), name, lambda *_a, **_k: pytest.fail("something was sent"))
    with pytest.raises(CredentialsError, match="plain HTTP") as caught:
        RemoteBackend(URL(url), credentials=given)
    assert SECRET not in all_texts(caught.value)
    with pytest.raises(CredentialsError, match="plain HTTP"):
        await AsyncKVStore("db", url=url, credentials=given).get("key")


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("http://kv.example", None),
        ("https://kv.example", "id:s"),
        *((f"http://{host}:8787", "id:s") for host in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]")),
    ],
)
async def test_safe_combinations_of_host_and_credentials_are_accepted(url: str, given: str | None) -> None:
    await RemoteBackend(URL(url), credentials=given).aclose()


@pytest.mark.parametrize(
    ("environment", "rest_host"),
    [
        ({}, "rest.alpha.fal.ai"),
        ({"FAL_REST_HOST": "r.fal.ai"}, "r.fal.ai"),
        ({"FAL_HOST": "api.api.ai"}, "rest.api.ai"),
        ({"FAL_REST_HOST": "r.fal.ai", "FAL_HOST": "unfit.fal.ai"}, "r.fal.ai"),
        ({"FAL_REST_HOST": "", "FAL_HOST": ""}, "rest.alpha.fal.ai"),
        ({"FAL_GRPC_HOST": "api.one.ai", "FAL_HOST": "api.two.ai"}, "rest.one.ai"),
        ({"FAL_GRPC_HOST": "grpc.one.ai", "FAL_HOST": "unfit"}, "grpc.one.ai"),
        ({"FAL_GRPC_HOST": "api.one.ai", "FAL_REST_HOST": "r.fal.ai"}, "r.fal.ai"),
        ({"FAL_GRPC_HOST": "", "FAL_HOST": "api.two.ai"}, "rest.two.ai"),
    ],
)
def test_fal_token_comes_from_its_rest_host(
    environment: dict[str, str], rest_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = f"https://{rest_host}/storage/auth/token?storage_type=fal-cdn-v3"
    assert str(token_url(URL("https://kv.fal.media"))) == expected


@pytest.mark.parametrize(
    ("environment", "rest_host"),
    [({}, "rest.of.profile"), ({"FAL_PROFILE": "q"}, "rest.alpha.fal.ai"), ({"FAL_HOST": "api.two.ai"}, "rest.two.ai")],
)
def test_host_of_the_active_profile_names_where_tokens_come_from(
    environment: dict[str, str], rest_host: str, monkeypatch: pytest.MonkeyPatch, no_credentials_of_this_machine: Path
) -> None:
    (no_credentials_of_this_machine / ".fal").mkdir()
    config = no_credentials_of_this_machine / ".fal/config.toml"
    config.write_text('[__internal__]\nprofile = "p"\n[p]\nhost = "api.of.profile"\n[q]\nkey = "a:b"\n')
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert token_url(URL("https://kv.fal.media")).host == rest_host


def test_unfit_host_of_the_active_profile_is_refused(no_credentials_of_this_machine: Path) -> None:
    (no_credentials_of_this_machine / ".fal").mkdir()
    config = no_credentials_of_this_machine / ".fal/config.toml"
    config.write_text('[__internal__]\nprofile = "p"\n[p]\nhost = "kv.of.profile"\n')
    with pytest.raises(ConfigurationError, match=r"host of the active profile in .* must begin with 'api'"):
        token_url(URL("https://kv.fal.media"))


@pytest.mark.parametrize("host", TENANT_HOSTS)
def test_app_of_a_customer_of_fal_is_asked_for_its_own_tokens(host: str) -> None:
    assert token_url(URL(f"https://{host}")).host == URL(f"https://{host}").host


@pytest.mark.parametrize("url", ["https://kv.example", "http://localhost:8787/a%2Fb/"])
def test_other_token_comes_from_the_store_itself(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_REST_HOST", "r.fal.ai")
    monkeypatch.setenv("FAL_HOST", "unfit")
    assert str(token_url(URL(url))) == f"{url.rstrip('/')}/storage/auth/token"


def test_unfit_fal_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_HOST", "kv.fal.ai")
    with pytest.raises(ConfigurationError, match="FAL_HOST must begin with 'api'"):
        token_url(URL("https://kv.fal.media"))


class VaultCredentials:
    """Credentials of a program's own, with a careless repr."""

    def __repr__(self) -> str:
        return f"VaultCredentials({SECRET})"

    async def authorization(self) -> str:
        return f"Key id:{SECRET}"


@pytest.mark.parametrize(
    "holder",
    [
        KeyCredentials(f"id:{SECRET}"),
        Token(f"Bearer {SECRET}", 60.0),
        AsyncKVStore("db", url="https://kv.example", credentials=f"id:{SECRET}"),
        AsyncKVStore("db", url="https://kv.example", credentials=KeyCredentials(f"id:{SECRET}")),
        AsyncKVStore("db", url="https://kv.example", credentials=VaultCredentials()),
    ],
    ids=["key", "token", "store", "store_with_key", "store_with_vault"],
)
def test_secret_is_not_shown_before_or_after_pickling(holder: object) -> None:
    copied = pickle.loads(pickle.dumps(holder))
    for shown in (repr(holder), str(holder), f"{holder}", repr(copied), repr([holder])):
        assert SECRET not in shown
        assert shown


async def test_open_backend_does_not_show_its_secret() -> None:
    backend = RemoteBackend(URL("https://kv.example"), credentials=f"id:{SECRET}")
    assert SECRET not in f"{backend!r} {backend}"
    await backend.aclose()


def test_credentials_in_the_url_of_the_environment_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOKV_URL", f"https://id:{SECRET}@kv.example")
    assert SECRET not in repr(AsyncKVStore("db"))
