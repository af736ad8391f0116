"""The URLs of Redis stores, and the login that goes with them."""

import pytest

from aiokv import AsyncKVStore, ConfigurationError, CredentialsError, RedisOptions
from aiokv.backends.redis.urls import NO_LOGIN, choose_login, login_of_environment, parse_url
from aiokv.backends.registry import canonical_url, check_url


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("redis://Host", "redis://host:6379"),
        ("redis://host:6379/", "redis://host:6379"),
        ("redis://host:6379/0", "redis://host:6379"),
        ("redis://host:7000/3", "redis://host:7000/3"),
        ("REDIS://host", "redis://host:6379"),
        ("valkey://host", "redis://host:6379"),
        ("rediss://host", "rediss://host:6379"),
        ("valkeys://host/2", "rediss://host:6379/2"),
        ("redis://[::1]:7000", "redis://[::1]:7000"),
        ("redis+cluster://b:2,a,B:2", "redis+cluster://a:6379,b:2"),
        ("valkey+cluster://a:6379,b:2/", "redis+cluster://a:6379,b:2"),
        ("valkeys+cluster://a", "rediss+cluster://a:6379"),
        ("redis+sentinel://b,a:1/main", "redis+sentinel://a:1,b:26379/main"),
        ("valkey+sentinel://a/main/2", "redis+sentinel://a:26379/main/2"),
        ("rediss+sentinel://a/main", "rediss+sentinel://a:26379/main"),
    ],
)
def test_urls_of_one_place_have_one_form(url: str, canonical: str) -> None:
    assert canonical_url(url) == canonical
    assert canonical_url(canonical) == canonical
    assert str(parse_url(canonical)) == canonical


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis:///1",
        "redis://host:0",
        "redis://host:65536",
        "redis://host:x",
        "redis://host/x",
        "redis://host/-1",
        "redis://host/1/2",
        "redis://host/123456",
        "redis://a,b",
        "redis+cluster://a,,b",
        "redis+cluster://a/1",
        "redis+sentinel://a",
        "redis+sentinel://a/b c",
        "redis+sentinel://a/main/x",
        "redis://host?db=1",
        "redis://host#1",
    ],
)
def test_other_forms_are_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"write redis|query|malformed"):
        check_url(url)


def test_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigurationError, match="AIOKV_REDIS_PASSWORD") as caught:
        AsyncKVStore("db", url="redis://user:hunter2@host")
    assert "hunter2" not in str(caught.value)


def test_stores_of_one_place_have_one_target() -> None:
    one = AsyncKVStore("db", url="valkey+cluster://b,a", credentials="me:secret")
    same = AsyncKVStore("db", url="redis+cluster://a:6379,b:6379", credentials="me:secret")
    assert one.target == same.target
    assert one.target != AsyncKVStore("db", url="redis+cluster://a:6379,b:6379", credentials="you:secret").target


def test_login_is_the_argument_else_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_login(None) == NO_LOGIN
    monkeypatch.setenv("AIOKV_REDIS_PASSWORD", "from the environment")
    assert choose_login(None)[:2] == ("default", "from the environment")
    monkeypatch.setenv("AIOKV_REDIS_USERNAME", "me")
    assert choose_login(None)[:2] == ("me", "from the environment")
    assert choose_login("you:a:b")[:2] == ("you", "a:b")
    assert login_of_environment("AIOKV_REDIS_SENTINEL") == NO_LOGIN


def test_login_is_shown_masked() -> None:
    assert "secret" not in repr(choose_login("me:secret"))


def test_user_without_a_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOKV_REDIS_USERNAME", "me")
    with pytest.raises(CredentialsError, match="AIOKV_REDIS_PASSWORD"):
        choose_login(None)


def test_credentials_that_are_an_object_are_refused() -> None:
    class Vault:
        async def authorization(self) -> str:
            return "Key a:b"

    with pytest.raises(CredentialsError, match="Vault"):
        choose_login(Vault())


@pytest.mark.parametrize(
    "wrong",
    [
        {"durability": "safe"},
        {"replicas": 0},
        {"replicas": True},
        {"max_connections": 0},
        {"max_connections": 1.5},
        {"replication_timeout": 0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RedisOptions(**wrong)  # type: ignore[arg-type]


def test_certificate_file_must_be_a_path() -> None:
    with pytest.raises(TypeError, match="ca_file"):
        RedisOptions(ca_file=1)  # type: ignore[arg-type]
