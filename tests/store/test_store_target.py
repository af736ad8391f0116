"""`AsyncKVStore.target`: which values a store means."""

import asyncio
import os
import pickle
from pathlib import Path

import pytest

from aiokv import AsyncKVStore, ConfigurationError, Target
from aiokv.backends.memory import MemoryBackend


def target_of(url: str, **options: object) -> Target:
    return AsyncKVStore("db", url=url, **options).target  # type: ignore[arg-type]


class Vault:
    """Credentials that are equal to every other."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vault)

    __hash__ = None  # type: ignore[assignment]

    async def authorization(self) -> str:
        return "Key id:secret"


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("HTTPS://KV.Example:443/", "https://kv.example"),
        ("https://kv.example", "https://kv.example"),
        ("http://kv.example:80/a/", "http://kv.example/a"),
        ("http://kv.example:8080", "http://kv.example:8080"),
        ("http://kv.example/%7Ea%2fb", "http://kv.example/~a%2Fb"),
        ("http://kv.example/a%20b", "http://kv.example/a%20b"),
        ("http://kv.example/x/../a", "http://kv.example/a"),
        ("http://[0:0::1]:8787/", "http://[::1]:8787"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("MEMORY://Name/", "memory://Name"),
        ("memory://", "memory://"),
    ],
)
def test_all_ways_to_write_an_address_are_one_target(url: str, canonical: str) -> None:
    assert target_of(url).url == canonical
    assert target_of(url) == target_of(canonical)
    assert hash(target_of(url)) == hash(target_of(canonical))


@pytest.mark.parametrize(
    "other", ["https://kv.example/A", "http://kv.example/a", "https://kv.example:8443/a", "https://kv.example/a%2F"]
)
def test_other_addresses_are_other_targets(other: str) -> None:
    assert target_of("https://kv.example/a") != target_of(other)


def test_two_ways_to_one_file_are_one_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    targets = {target_of(f"sqlite:///{path}") for path in ("real/kv.db", "link/kv.db", f"{tmp_path}/link/../real/./kv.db")}
    assert [target.url for target in targets] == [f"sqlite:///{os.path.realpath(tmp_path)}/real/kv.db"]


async def test_stores_that_reach_one_file_by_two_ways_share_one_backend(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "kv.db")
    one, two = (AsyncKVStore("db", url=f"sqlite:///{tmp_path}/{name}") for name in ("kv.db", "link.db"))
    await one.set("k", "v")
    assert await two.get("k") == "v"
    assert one._backend_here() is two._backend_here()
    await asyncio.gather(one.aclose(), two.aclose())


def test_namespace_and_credentials_count() -> None:
    url = "https://kv.example"
    vault = Vault()
    targets = [
        AsyncKVStore("db", url=url).target,
        AsyncKVStore("other", url=url).target,
        target_of(url, credentials="id:secret"),
        target_of(url, credentials="id:other"),
        target_of(url, credentials=vault),
        target_of(url, credentials=Vault()),
    ]
    assert len(set(targets)) == len(targets)
    assert target_of(url, credentials=" id:secret ") == targets[2]
    assert target_of(url, credentials=vault) == targets[4]


def test_credentials_do_not_count_where_the_backend_takes_none() -> None:
    assert target_of("memory://", credentials="id:secret") == target_of("memory://")


def test_stores_of_equal_arguments_and_what_is_derived_of_them_have_equal_targets() -> None:
    store = AsyncKVStore("db", url="https://kv.example", credentials="id:secret")
    again = AsyncKVStore("db", url="https://kv.example", credentials="id:secret", concurrency=3)
    before = pickle.loads(pickle.dumps(store))
    assert store.target == again.target == before.target == pickle.loads(pickle.dumps(store)).target
    assert store.with_options(timeout=1).target is store.target


def test_target_shows_no_secret_and_is_neither_changed_nor_pickled() -> None:
    target = target_of("https://kv.example", credentials="id:s3cret")
    assert repr(target) == "Target('https://kv.example', db_name='db', credentials='***')"
    assert "s3cret" not in str(target.connection)
    assert not hasattr(target, "__dict__")
    with pytest.raises(AttributeError, match="cannot be changed"):
        target.url = "https://evil.example"
    with pytest.raises(AttributeError, match="cannot be changed"):
        del target.url
    with pytest.raises(TypeError, match="pickle the store instead"):
        pickle.dumps(target)


async def test_target_stays_until_the_store_is_closed_whatever_becomes_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIOKV_URL", "sqlite:///one.db")
    store = AsyncKVStore("db")
    first = store.target
    assert store.target is first
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("AIOKV_URL", "sqlite:///two.db")
    await store.set("k", "v")
    assert store.target is first
    assert (tmp_path / "one.db").exists()
    await store.aclose()
    assert store.target.url == f"sqlite:///{tmp_path}/elsewhere/two.db"


def test_end_of_the_loop_sets_the_target_free(monkeypatch: pytest.MonkeyPatch) -> None:
    store = AsyncKVStore("db")
    monkeypatch.setenv("AIOKV_URL", "memory://target-one")
    asyncio.run(store.set("k", "v"))
    monkeypatch.setenv("AIOKV_URL", "memory://target-two")
    assert store.target.url == "memory://target-two"


async def test_store_whose_environment_names_no_place_has_no_target_and_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = AsyncKVStore("db")
    monkeypatch.setenv("AIOKV_URL", "nonsense")
    with pytest.raises(ConfigurationError, match="has no scheme"):
        _ = store.target
    await store.aclose()


def test_backend_object_counts_by_its_identity() -> None:
    backend = MemoryBackend()
    assert AsyncKVStore("db", backend=backend).target == AsyncKVStore("db", backend=backend).target
    assert AsyncKVStore("db", backend=backend).target != AsyncKVStore("db", backend=MemoryBackend()).target
    assert AsyncKVStore("db", backend=backend).target.url == "backend://MemoryBackend"


def test_object_that_a_target_counts_by_is_held() -> None:
    # Were it not, a new object could get the same identity.
    seen = {AsyncKVStore("db", backend=MemoryBackend()).target for _ in range(50)}
    seen |= {target_of("https://kv.example", credentials=Vault()) for _ in range(50)}
    assert len(seen) == 100
