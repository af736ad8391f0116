"""The text of an entry: it is read as it was written, or it is a miss, whatever the store holds."""

import base64
import itertools
import math
import random
from typing import Any

import orjson
import pytest
import zstandard
from helpers import stable_id
from hypothesis import given, settings
from hypothesis import strategies as st

from aiokv.caching.codecs import Codec, Encrypted, Zstd
from aiokv.caching.entries import FORMAT_VERSION, Entry, pack, unpack
from aiokv.caching.results import NotStorable
from aiokv.limits import MAX_VALUE_BYTES

SECRET = "s3cr3t-value"
ENTRY = Entry('{"a":\n1}', 1_000.5, 2_000.0, 0.25)
ENCRYPTED = Encrypted(b"k" * 32)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.floats(-1e12, 1e12) | st.integers(-(2**63), 2**64 - 1)
ENTRIES = st.builds(Entry, json=TEXT | st.binary(), started=NUMBERS, fresh_until=NUMBERS, compute_seconds=st.floats(0, 1e9))
STEPS: list[tuple[Codec, ...]] = [
    (),
    (Zstd(),),
    (Zstd(min_bytes=0),),
    (ENCRYPTED,),
    (Zstd(min_bytes=8), ENCRYPTED),
    (ENCRYPTED, Zstd(min_bytes=0)),
]


def packed(entry: Entry = ENTRY, *codecs: Codec, namespace: str = "db", key: str = "a:0:ff", schema: str = "5c") -> str:
    return pack(entry, namespace=namespace, key=key, schema=schema, codecs=codecs)


def unpacked(text: str, *codecs: Codec, namespace: str = "db", key: str = "a:0:ff", schema: str = "5c") -> Entry | None:
    return unpack(text, namespace=namespace, key=key, schema=schema, codecs=codecs)


def test_text_of_an_entry_never_changes() -> None:
    text = '[2,"a:0:ff","5c",1000.5,2000.0,0.25,""]\n{"a":\n1}'
    assert packed() == packed(ENTRY._replace(json=b'{"a":\n1}')) == text
    assert unpacked(text) == ENTRY
    assert type(unpacked(text)) is Entry
    assert FORMAT_VERSION == 2


def test_context_of_a_codec_never_changes() -> None:
    seen: list[bytes] = []

    class Watching:
        name = "watching"
        required = False

        def encode(self, data: bytes, context: bytes) -> bytes | None:
            seen.append(context)
            return data

        def decode(self, data: bytes, context: bytes) -> bytes:
            seen.append(context)
            return data

    codecs = (Zstd(min_bytes=0), Watching())
    assert unpacked(packed(ENTRY, *codecs), *codecs) is not None
    assert seen == [b'[2,"db","a:0:ff","5c",1000.5,2000.0,0.25,"zstd"]'] * 2


@given(entry=ENTRIES, namespace=TEXT, key=TEXT, schema=TEXT, codecs=st.sampled_from(STEPS))
@settings(max_examples=300)
def test_entry_comes_back_the_same_for_its_key_and_schema_alone(
    entry: Entry, namespace: str, key: str, schema: str, codecs: tuple[Codec, ...]
) -> None:
    if isinstance(entry.json, bytes):
        # JSON is UTF-8.
        entry = entry._replace(json=entry.json.decode(errors="replace").encode())
    claims: dict[str, Any] = {"namespace": namespace, "key": key, "schema": schema, "codecs": codecs}
    text = pack(entry, **claims)
    back = unpack(text, **claims)
    assert back is not None
    assert back[1:] == entry[1:]
    assert [type(number) for number in back[1:]] == [type(number) for number in entry[1:]]
    as_bytes = [json if isinstance(json, bytes) else json.encode() for json in (back.json, entry.json)]
    assert as_bytes[0] == as_bytes[1]
    for claim in ("key", "schema"):
        assert unpack(text, **{**claims, claim: claims[claim] + "x"}) is None
    if ENCRYPTED in codecs:
        assert unpack(text, **{**claims, "namespace": namespace + "x"}) is None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
HEADS = st.tuples(
    st.just(2) | JSON_VALUES,
    st.just("a:0:ff") | JSON_VALUES,
    st.just("5c") | JSON_VALUES,
    NUMBERS | JSON_VALUES,
    NUMBERS | JSON_VALUES,
    st.floats(0, 10) | JSON_VALUES,
    st.sampled_from(["", "zstd", "aesgcm", "zstd+aesgcm", "aesgcm+zstd", "+", "zstd+zstd", "other"]) | JSON_VALUES,
)


@pytest.mark.slow
@given(
    text=st.one_of(
        st.text(),
        JSON_VALUES.map(lambda value: orjson.dumps(value).decode() + "\n"),
        st.tuples(HEADS, st.text()).map(lambda parts: f"{orjson.dumps(parts[0]).decode()}\n{parts[1]}"),
    ),
    codecs=st.sampled_from(STEPS),
)
@settings(max_examples=500)
def test_reading_any_text_gives_an_entry_or_none_and_never_raises(text: str, codecs: tuple[Codec, ...]) -> None:
    entry = unpacked(text, *codecs)
    if entry is not None:
        assert ENCRYPTED not in codecs
        assert all(type(number) in {int, float} and math.isfinite(number) for number in entry[1:])
        assert entry.compute_seconds >= 0
        assert isinstance(entry.json, str | bytes)


@given(codecs=st.sampled_from(STEPS), seed=st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_reading_a_mutated_entry_gives_an_entry_or_none_and_never_raises(
    codecs: tuple[Codec, ...], seed: random.Random
) -> None:
    text = list(packed(ENTRY, *codecs))
    for _ in range(seed.randint(1, 3)):
        position = seed.randrange(len(text))
        text[position : position + seed.randint(0, 2)] = seed.choice(
            ["", "0", '"', "é", "\ud800", "\n", ",", "[", "~", "9" * 30]
        )
    entry = unpacked("".join(text), *codecs)
    if ENCRYPTED in codecs:
        # The head may be written differently, such as 2000.00, but it claims what was claimed.
        assert entry is None or entry == ENTRY._replace(json=b'{"a":\n1}')


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "{}\n",
        '"abcdefg"\n',
        '{"a":1,"b":1,"c":1,"d":1,"e":1,"f":1,"g":1}\n',
        '[2,"k","s",1,1,1,""]',
        '[1,"k",1,1,1,""]\n',
        '[1,"k",1,1,1,"@0a1b2c3d"]\n',
        '[1,"k","s",1,1,1,""]\n',
        '[3,"k","s",1,1,1,""]\n',
        '["2","k","s",1,1,1,""]\n',
        '[2.0,"k","s",1,1,1,""]\n',
        '[true,"k","s",1,1,1,""]\n',
        '[2,"K","s",1,1,1,""]\n',
        '[2,null,"s",1,1,1,""]\n',
        '[2,"k","S",1,1,1,""]\n',
        '[2,"k","",1,1,1,""]\n',
        '[2,"k",null,1,1,1,""]\n',
        '[2,"k","s",1,1,1]\n',
        '[2,"k","s",1,1,1,"",""]\n',
        '[2,"k","s","1",1,1,""]\n',
        '[2,"k","s",1,null,1,""]\n',
        '[2,"k","s",1,true,1,""]\n',
        '[2,"k","s",1,1,-1,""]\n',
        '[2,"k","s",1,1,1,null]\n',
        '[2,"k","s",1,1,1,[]]\n',
        '[2,"k","s",1,1,1,"zstd"]\n',
        '[2,"k","s",NaN,1,1,""]\n',
        '[2,"k","s",1,1e999,1,""]\n',
        "[" * 100_000 + "\n",
        "\ud800\n",
    ],
    ids=lambda text: ascii(text)[:30],
)
@pytest.mark.parametrize("codecs", [(), (Zstd(),), (ENCRYPTED,)], ids=["none", "zstd", "encrypted"])
def test_text_of_another_form_key_or_type_is_a_miss(text: str, codecs: tuple[Codec, ...]) -> None:
    assert unpack(text, namespace="db", key="k", schema="s", codecs=codecs) is None


HEAD = {"version": 0, "key": 1, "schema": 2, "started": 3, "fresh_until": 4, "compute_seconds": 5, "applied": 6}


def forged(text: str, **claims: object) -> str:
    head, _, payload = text.partition("\n")
    parts = orjson.loads(head)
    for claim, value in claims.items():
        parts[HEAD[claim]] = value
    return f"{orjson.dumps(parts).decode()}\n{payload}"


@pytest.mark.parametrize("codecs", [(ENCRYPTED,), (Zstd(min_bytes=0), ENCRYPTED)], ids=["alone", "after Zstd"])
class TestAuthenticated:
    def test_entry_is_read_where_nothing_was_changed(self, codecs: tuple[Codec, ...]) -> None:
        assert unpacked(forged(packed(ENTRY, *codecs)), *codecs) == ENTRY._replace(json=b'{"a":\n1}')

    @pytest.mark.parametrize(
        "claims",
        [
            {"started": 1_000.25},
            {"started": 1_001},
            {"fresh_until": 1e12},
            {"fresh_until": 2_000},
            {"compute_seconds": 0.0},
            {"compute_seconds": -0.0},
            {"applied": ""},
            {"applied": "zstd"},
            {"applied": "aesgcm+zstd"},
            {"version": 1},
            {"version": 3},
        ],
        ids=str,
    )
    def test_entry_with_a_forged_head_is_a_miss(self, codecs: tuple[Codec, ...], claims: dict[str, object]) -> None:
        assert unpacked(forged(packed(ENTRY, *codecs), **claims), *codecs) is None

    def test_entry_that_was_moved_is_a_miss(self, codecs: tuple[Codec, ...]) -> None:
        text = packed(ENTRY, *codecs)
        assert unpacked(text, *codecs, namespace="other") is None
        assert unpacked(forged(text, key="b:0:ff"), *codecs, key="b:0:ff") is None
        assert unpacked(forged(text, schema="6d"), *codecs, schema="6d") is None

    def test_entry_without_its_compression_or_with_more_is_a_miss(self, codecs: tuple[Codec, ...]) -> None:
        for configured, name in itertools.product([(ENCRYPTED,), (Zstd(min_bytes=0), ENCRYPTED)], ["aesgcm", "zstd+aesgcm"]):
            if name.startswith("zstd") is not (len(codecs) == 2):
                assert unpacked(forged(packed(ENTRY, *codecs), applied=name), *configured) is None

    def test_entry_that_was_not_encrypted_is_a_miss(self, codecs: tuple[Codec, ...]) -> None:
        assert unpacked(packed(), *codecs) is None
        assert unpacked(packed(ENTRY, Zstd(min_bytes=0)), *codecs) is None

    def test_parts_of_two_entries_do_not_make_a_third(self, codecs: tuple[Codec, ...]) -> None:
        first, second = packed(ENTRY, *codecs), packed(ENTRY._replace(fresh_until=9e9), *codecs)
        assert unpacked(f"{second.partition(chr(10))[0]}\n{first.partition(chr(10))[2]}", *codecs) is None

    def test_text_shows_nothing_of_the_result(self, codecs: tuple[Codec, ...]) -> None:
        text = packed(ENTRY._replace(json=SECRET), *codecs)
        assert SECRET not in text
        assert SECRET.encode() not in base64.b85decode(text.partition("\n")[2])


@pytest.mark.parametrize(
    ("codecs", "applied"),
    [
        ((), "zstd"),
        ((), "other"),
        ((), "+"),
        ((Zstd(),), "aesgcm"),
        ((Zstd(),), "zstd+zstd"),
        ((Zstd(),), "zstd+"),
        ((Zstd(),), "+"),
        ((Zstd(), ENCRYPTED), "aesgcm+zstd"),
        ((ENCRYPTED,), "zstd+aesgcm"),
    ],
    ids=stable_id,
)
def test_entry_of_other_codecs_is_a_miss(codecs: tuple[Codec, ...], applied: str) -> None:
    assert unpacked(f'[2,"a:0:ff","5c",1,2,0,"{applied}"]\n1', *codecs) is None


def test_uncompressed_entry_is_read_where_compression_is_configured() -> None:
    assert unpacked(packed(), Zstd()) == ENTRY


def test_codecs_are_applied_in_order_and_undone_in_reverse() -> None:
    entry = ENTRY._replace(json=b"x" * 5_000)
    small, large = packed(entry, Zstd(), ENCRYPTED), packed(entry, ENCRYPTED, Zstd())
    assert len(small) < 300
    assert len(large) > 5_000
    assert unpacked(small, Zstd(), ENCRYPTED) == unpacked(large, ENCRYPTED, Zstd()) == entry
    assert unpacked(small, ENCRYPTED, Zstd()) is unpacked(large, Zstd(), ENCRYPTED) is None


def test_large_result_fits_the_store_when_compressed() -> None:
    entry = ENTRY._replace(json=orjson.dumps([{"number": number, "text": "something to say"} for number in range(100_000)]))
    text = packed(entry, Zstd())
    assert len(text) < MAX_VALUE_BYTES < len(packed(entry))
    assert unpacked(text, Zstd()) == entry


@pytest.mark.parametrize("size_bytes", [60_000_000, 2_000])
def test_compressed_bomb_is_a_miss(size_bytes: int) -> None:
    bomb = base64.b85encode(zstandard.ZstdCompressor().compress(bytes(size_bytes))).decode()
    text = f'[2,"a:0:ff","5c",1,2,0,"zstd"]\n{bomb}'
    assert unpacked(text, Zstd(max_bytes=1_000)) is None
    assert (unpacked(text, Zstd()) is None) is (size_bytes > 2_000)


@pytest.mark.parametrize("payload", ["", "é", '"""""', "~~~~~", "\0", "x", "\ud800"], ids=ascii)
def test_payload_that_is_no_base85_is_a_miss(payload: str) -> None:
    for codecs, applied in (((Zstd(),), "zstd"), ((ENCRYPTED,), "aesgcm")):
        assert unpacked(f'[2,"a:0:ff","5c",1,2,0,"{applied}"]\n{payload}', *codecs) is None


class Failing:
    name = "failing"
    required = False

    def __init__(self, error: Exception | None = None, returns: Any = b"") -> None:
        self.error = error
        self.returns = returns

    def encode(self, data: bytes, context: bytes) -> bytes | None:  # noqa: ARG002 (the protocol's)
        if self.error is not None:
            raise self.error
        return self.returns  # type: ignore[no-any-return]

    def decode(self, data: bytes, context: bytes) -> bytes:
        return self.encode(data, context)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "error", [ValueError(SECRET), KeyError(SECRET), OSError(SECRET), RecursionError(), MemoryError()], ids=repr
)
def test_codec_that_fails_makes_the_result_not_storable_and_is_named(error: Exception) -> None:
    with pytest.raises(NotStorable, match=f"codec failing.*{type(error).__name__}") as caught:
        packed(ENTRY, Failing(error))
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_codec_that_refuses_says_why() -> None:
    with pytest.raises(NotStorable, match=r"codec zstd refuses the result: its JSON of 8 bytes is over max_bytes=7"):
        packed(ENTRY, Zstd(max_bytes=7))
    with pytest.raises(NotStorable, match=r"codec failing refuses.*str in place of bytes"):
        packed(ENTRY, Failing(returns="text"))


@pytest.mark.parametrize(
    "codec",
    [*(Failing(error) for error in (ValueError(), KeyError(), RecursionError())), Failing(returns=None), Failing(returns="")],
)
def test_codec_that_fails_at_reading_is_a_miss(codec: Codec) -> None:
    text = packed(ENTRY, Failing(returns=b"x"))
    assert unpacked(text, Failing(returns=b"{}")) == ENTRY._replace(json=b"{}")
    assert unpacked(text, codec) is None
