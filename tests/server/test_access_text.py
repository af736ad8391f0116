"""The access file as text: what its lines say, and that writing and parsing undo each other."""

import re

import pytest
from helpers import all_texts
from hypothesis import given
from hypothesis import strategies as st

from aiokv.errors import ConfigurationError
from aiokv.limits import check_db_name
from aiokv.server.access_text import AccessText, Comment, Key, Limits, Line, SigningKey

HASH = "0123456789abcdef" * 4
SIGNING_LINE = f"!signing-key {'0' * 64}"


def is_namespace(text: str) -> bool:
    try:
        check_db_name(text)
    except ValueError:
        return False
    return True


def is_one_line(text: str) -> bool:
    return len(f"#{text}#".splitlines()) == 1


ACCOUNTS = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)
HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
PATTERNS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(is_namespace)
COMMENTS = st.one_of(
    st.sampled_from(["", "  ", "\t"]),
    st.tuples(
        st.sampled_from(["#", "  #"]), st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(is_one_line)
    ).map("".join),
).map(Comment)
KEYS = st.builds(
    Key, ACCOUNTS, HASHES, st.booleans(), st.booleans(), st.none() | st.lists(PATTERNS, min_size=1, max_size=4).map(tuple)
)
RATES = st.decimals("0.000001", "999999999", places=6).map(float)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "requests-per-second": st.none() | RATES,
        "max-bytes": st.none() | st.integers(0, 10**15 - 1),
        "max-entries": st.none() | st.integers(0, 10**15 - 1),
    },
).filter(bool)
LIMITS = st.lists(st.builds(Limits, ACCOUNTS, SETTINGS), max_size=4, unique_by=lambda limits: limits.account)
SIGNING_KEYS = st.binary(min_size=32, max_size=32).map(SigningKey)


@st.composite
def texts(draw: st.DrawFn) -> AccessText:
    lines: list[Line] = [draw(SIGNING_KEYS), *draw(LIMITS)]
    lines += draw(st.lists(KEYS, max_size=4, unique_by=lambda key: key.key_hash))
    lines += draw(st.lists(COMMENTS, max_size=4))
    return AccessText(tuple(draw(st.permutations(lines))))


@given(texts())
def test_parsing_returns_what_was_written(text: AccessText) -> None:
    assert AccessText.parse(text.write()) == text


@given(texts())
def test_written_file_has_one_line_for_each_and_ends_with_a_line_break(text: AccessText) -> None:
    assert len(text.write().decode().splitlines()) == len(text.lines)
    assert text.write().endswith(b"\n")


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_other_bytes_are_refused_or_parsed_without_another_error(content: bytes) -> None:
    try:
        text = AccessText.parse(SIGNING_LINE.encode() + b"\n" + content)
    except ConfigurationError:
        return
    assert AccessText.parse(text.write()) == text


def parse(*lines: str) -> AccessText:
    return AccessText.parse("\n".join((SIGNING_LINE, *lines)).encode())


def test_file_of_version_1_is_parsed() -> None:
    text = parse("# aiokv access file, version 1. Keep it private.", "", f"  alice:sha256:{HASH} ", f"alice:sha256:{HASH}")
    assert text.keys() == {"alice": (Key("alice", HASH),)}
    assert text.limits() == {}
    assert text.signing_key == bytes(32)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("read-only", Key("alice", HASH, read_only=True)),
        ("operator", Key("alice", HASH, operator=True)),
        ("db=config", Key("alice", HASH, db_patterns=("config",))),
        ("db=cache-*,config", Key("alice", HASH, db_patterns=("cache-*", "config"))),
        ("db=caf%C3%A9,a%2Cb,caf\xe9,a=b,#x", Key("alice", HASH, db_patterns=("caf\xe9", "a,b", "caf\xe9", "a=b", "#x"))),
        ("db=x\toperator   read-only", Key("alice", HASH, read_only=True, operator=True, db_patterns=("x",))),
    ],
)
def test_flags_of_a_key_are_parsed_in_any_order(words: str, key: Key) -> None:
    assert parse(f"alice:sha256:{HASH} {words}").keys() == {"alice": (key,)}


def test_limits_are_parsed() -> None:
    text = parse("@limits alice requests-per-second=0.5 max-bytes=2G max-entries=none", "@limits bob max-entries=0")
    assert text.limits() == {
        "alice": Limits("alice", {"requests-per-second": 0.5, "max-bytes": 2_000_000_000, "max-entries": None}),
        "bob": Limits("bob", {"max-entries": 0}),
    }
    assert text.accounts() == ("alice", "bob")


@pytest.mark.parametrize(
    "line",
    [
        *("my-secret", "alice:my-secret", f"alice:sha256:{HASH}my-secret", f"alice:sha256:{HASH} my-secret"),
        *(f"alice:sha256:{HASH} Read-only my-secret", f"alice:sha256:{HASH} read-only read-only my-secret"),
        *(f"alice:sha256:{HASH} db=", f"alice:sha256:{HASH} db=a,,my-secret", f"alice:sha256:{HASH} db=a/my-secret"),
        *(f"alice:sha256:{HASH} db=my-secret db=b", f"alice:sha256:{HASH} db=..", f"alice:sha256:{HASH} db=%ff"),
        *("@limits", "@limits alice", "@limits my/secret max-bytes=1", "@limits alice max-bytes", "@limits alice max-bytes="),
        *(
            "@limits alice max-bytes=-1",
            "@limits alice max-bytes=1.5",
            "@limits alice max-bytes=1_0",
            "@limits alice max-bytes=\u0663",
        ),
        *("@limits alice max-bytes=1 max-bytes=2", "@limits alice my-secret=1", "@limits alice max-bytes=my-secret"),
        *(
            "@limits alice requests-per-second=0",
            "@limits alice requests-per-second=0.0",
            "@limits alice requests-per-second=inf",
        ),
        *(
            "@limits alice requests-per-second=nan",
            "@limits alice requests-per-second=1e9",
            "@limits alice requests-per-second=-1",
        ),
        *("@limits alice requests-per-second=1k", "@limits: alice max-bytes=1", "!signing-key my-secret"),
    ],
)
def test_malformed_line_is_refused_by_its_number_alone(line: str) -> None:
    with pytest.raises(ConfigurationError, match="line 3: expected") as caught:
        parse("# comment", line)
    assert "secret" not in all_texts(caught.value).replace("hash of its secret", "")
    assert HASH not in all_texts(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((f"a:sha256:{HASH}", "", f"a:sha256:{HASH} read-only"), "line 4: a key that an earlier line has with other flags"),
        (("@limits a max-bytes=1", "@limits a max-bytes=1"), "line 3: a second line with limits of one account"),
    ],
)
def test_lines_that_leave_open_which_counts_are_refused(lines: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        parse(*lines)


def test_content_that_is_not_text_is_in_no_part_of_the_error() -> None:
    with pytest.raises(ConfigurationError, match="not text") as caught:
        AccessText.parse(b"alice:my-secret\xff")
    assert "secret" not in all_texts(caught.value)
