"""What is refused before any I/O, and that the message says what to do."""

from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokv import AsyncKVStore, ValueTooLargeError
from aiokv.limits import (
    DEFAULT_TTL_SECONDS,
    MAX_ENTRY_PATH_BYTES,
    MAX_VALUE_BYTES,
    check_db_name,
    check_entry,
    check_ttl,
    check_value,
)
from aiokv.wire import entry_path, parse_entry_path, ttl_query

UNREACHABLE = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", "empty"),
        (".", "drop such path segments"),
        ("..", "drop such path segments"),
        ("a\0b", "NUL"),
        ("a\ud800b", "lone surrogate at position 1"),
        ("x" * 8_000, "too long for a request line"),
        ("é" * 1_400, "too long for a request line"),
        ("😀" * 700, "too long for a request line"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("verb", ["get", "set", "delete", "get_json", "set_json", "get_many", "set_many", "delete_many"])
async def test_unusable_key_is_refused_by_every_verb_before_any_io(verb: str, key: str, words: str) -> None:
    store = AsyncKVStore("db", url=UNREACHABLE)
    arguments: dict[str, tuple[Any, ...]] = {
        "set": (key, "v"),
        "set_json": (key, 1),
        "get_many": (["fine", key],),
        "set_many": ({"fine": "v", key: "v"},),
        "delete_many": (["fine", key],),
    }
    with pytest.raises(ValueError, match=words):
        await getattr(store, verb)(*arguments.get(verb, (key,)))


@pytest.mark.parametrize("key", [None, 1, b"k", ["k"]])
async def test_key_of_another_type_is_a_type_error(key: Any) -> None:
    with pytest.raises(TypeError, match="key must be str, not"):
        await AsyncKVStore("db", url=UNREACHABLE).get(key)


def test_longest_key_fits_and_one_more_byte_does_not() -> None:
    check_entry("db", "x" * (MAX_ENTRY_PATH_BYTES - 2))
    with pytest.raises(ValueError, match="too long"):
        check_entry("db", "x" * (MAX_ENTRY_PATH_BYTES - 1))


def test_longest_request_line_stays_within_what_servers_take() -> None:
    [(name, ttl)] = ttl_query(2_592_000).items()
    path = f"{entry_path('delete', 'db', 'x' * (MAX_ENTRY_PATH_BYTES - 2))}?{name}={ttl}"
    assert len(f"DELETE {path} HTTP/1.1\r\n") < 8_190 - 100


@pytest.mark.parametrize("db_name", ["", ".", "..", "a/b", "a\0", "\udfff", "x" * 9_000], ids=ascii)
def test_unusable_namespace_is_refused_at_construction(db_name: str) -> None:
    with pytest.raises(ValueError, match="db_name"):
        AsyncKVStore(db_name)


def test_namespace_of_another_type_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="db_name must be str, not bytes"):
        check_db_name(b"db")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [
        (None, DEFAULT_TTL_SECONDS),
        (60, 60),
        (2_592_000, 2_592_000),
        (timedelta(minutes=1), 60),
        (timedelta(days=30), 2_592_000),
        (timedelta(days=1, seconds=1), 86_401),
    ],
)
def test_ttl_within_the_range_is_taken_in_seconds(ttl: Any, seconds: int) -> None:
    assert check_ttl(ttl) == seconds


@pytest.mark.parametrize(
    "ttl",
    [
        59,
        2_592_001,
        0,
        -60,
        True,
        False,
        60.0,
        "60",
        timedelta(seconds=59),
        timedelta(days=30, seconds=1),
        timedelta(minutes=-5),
    ],
)
async def test_ttl_outside_the_range_or_of_another_type_is_a_value_error_before_any_io(ttl: Any) -> None:
    store = AsyncKVStore("db", url=UNREACHABLE)
    with pytest.raises(ValueError, match="ttl must be"):
        await store.set("k", "v", ttl)
    with pytest.raises(ValueError, match="ttl must be"):
        await store.set_many({"k": "v"}, ttl)


def test_ttl_with_a_fraction_of_a_second_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number of seconds"):
        check_ttl(timedelta(seconds=90.5))


@pytest.mark.parametrize("char", ["x", "é", "😀"])
def test_size_is_counted_in_bytes_of_utf8(char: str) -> None:
    most = MAX_VALUE_BYTES // len(char.encode())
    check_value(char * most)
    with pytest.raises(ValueTooLargeError):
        check_value(char * (most + 1))


async def test_value_too_large_names_its_size_and_the_limit_and_never_the_value() -> None:
    with pytest.raises(ValueTooLargeError, match=r"1,900,001 bytes of UTF-8, over the limit of 1,900,000") as caught:
        await AsyncKVStore("db", url=UNREACHABLE).set("k", "s3cret!" + "x" * (MAX_VALUE_BYTES - 6))
    assert isinstance(caught.value, ValueError)
    assert "s3cret" not in repr(caught.value)


@pytest.mark.parametrize("value", [1, None, b"v", {"a": 1}])
async def test_value_of_another_type_is_a_type_error_that_names_set_json(value: Any) -> None:
    with pytest.raises(TypeError, match="set_json"):
        await AsyncKVStore("db", url=UNREACHABLE).set("k", value)


async def test_value_with_a_lone_surrogate_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match="lone surrogate at position 6") as caught:
        await AsyncKVStore("db", url=UNREACHABLE).set("k", "s3cret\ud800")
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "s3cret" not in repr(chain)
        chain = chain.__cause__ or chain.__context__


key_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda text: text not in {".", ".."}
)


@given(db_name=key_texts.filter(lambda text: "/" not in text), key=key_texts)
def test_any_acceptable_name_survives_the_path(db_name: str, key: str) -> None:
    path = entry_path("get", db_name, key)
    assert path.isascii()
    assert not {"?", "#", " "} & set(path)
    assert parse_entry_path(path.removeprefix("/get/")) == (db_name, key)


@given(first=st.tuples(key_texts, key_texts), second=st.tuples(key_texts, key_texts))
def test_different_names_never_share_a_path(first: tuple[str, str], second: tuple[str, str]) -> None:
    assert (entry_path("get", *first) == entry_path("get", *second)) == (first == second)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=700, max_size=3000))
def test_size_in_a_request_line_is_that_of_the_quoted_key(key: str) -> None:
    size_bytes = len(quote(f"db{key}", safe=""))
    if size_bytes <= 8_000:
        check_entry("db", key)
    else:
        with pytest.raises(ValueError, match=f"are {size_bytes:,} bytes percent-encoded"):
            check_entry("db", key)
