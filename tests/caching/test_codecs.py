"""Steps between a result's JSON and the store: bounded, bound to their entry, and never the cause of a wrong result."""

import random
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import zstandard
from helpers import stable_id

from aiokv import ConfigurationError
from aiokv.caching.codecs import DEFAULT_MAX_BYTES, JSON, Codec, Encrypted, Zstd, check_codecs
from aiokv.caching.results import NotStorable

CONTEXT = b'[2,"db","key"]'
DATA = random.Random(1).randbytes(300)


def applied(step: Codec, data: bytes, context: bytes = CONTEXT) -> bytes:
    changed = step.encode(data, context)
    assert changed is not None
    return changed


def compressed_zeros(size_bytes: int) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj(size=size_bytes)
    whole, rest = divmod(size_bytes, 2**20)
    parts = [compressor.compress(bytes(2**20)) for _ in range(whole)] + [compressor.compress(bytes(rest)), compressor.flush()]
    return b"".join(parts)


@pytest.mark.parametrize(("length", "is_compressed"), [(99, False), (100, True), (101, True)])
def test_data_are_compressed_from_the_least_length_on(length: int, *, is_compressed: bool) -> None:
    step = Zstd(min_bytes=100)
    data = step.encode(b"x" * length, CONTEXT)
    assert (data is not None) is is_compressed
    if data is not None:
        assert step.decode(data, CONTEXT) == b"x" * length


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "hidden"])
def test_bomb_of_six_kilobytes_is_refused_before_memory_is_taken(*, declared: bool) -> None:
    size = 60_000_000
    bomb = compressed_zeros(size) if declared else zstandard.ZstdCompressor(write_content_size=False).compress(bytes(size))
    assert len(bomb) < 7_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="max_bytes"):
            Zstd().decode(bomb, CONTEXT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def lying(size_bytes: int, declared: int) -> bytes:
    """Make a frame of zeros whose header declares another size."""
    frame = bytearray(compressed_zeros(size_bytes))
    # The descriptor says that four bytes of content size follow; without a window byte in a single segment.
    parameters = zstandard.get_frame_parameters(bytes(frame))
    assert parameters.content_size == size_bytes
    position = bytes(frame).index(size_bytes.to_bytes(4, "little"), 4)
    frame[position : position + 4] = declared.to_bytes(4, "little")
    return bytes(frame)


@pytest.mark.parametrize("declared", [70_000, 1_000_000, 59_999_999])
def test_frame_that_holds_more_than_it_declares_takes_no_more_than_that(declared: int) -> None:
    frame = lying(60_000_000, declared)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"max_bytes|Zstandard"):
            Zstd().decode(frame, CONTEXT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < min(declared, DEFAULT_MAX_BYTES) + 1_000_000


def test_bound_is_inclusive_on_both_ways() -> None:
    step = Zstd(min_bytes=0, max_bytes=1_000)
    assert step.decode(applied(step, bytes(1_000)), CONTEXT) == bytes(1_000)
    with pytest.raises(NotStorable, match=r"1,001 bytes is over max_bytes=1,000.*raise"):
        step.encode(bytes(1_001), CONTEXT)
    with pytest.raises(ValueError, match="max_bytes"):
        step.decode(compressed_zeros(1_001), CONTEXT)


def test_compressed_data_that_hide_their_size_are_refused() -> None:
    with pytest.raises(ValueError, match="size"):
        Zstd().decode(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000)), CONTEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_bytes": -1}, "min_bytes.*-1"),
        ({"level": 0}, "level.*1 or more"),
        ({"level": 23}, "level.*at most 22"),
        ({"max_bytes": 0}, "max_bytes.*1 or more"),
        ({"max_bytes": 1.5}, "max_bytes.*float"),
        ({"max_bytes": True}, "max_bytes.*bool"),
        ({"max_bytes": None}, "max_bytes.*NoneType"),
    ],
    ids=str,
)
def test_option_out_of_range_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Zstd(**options)


@pytest.mark.parametrize(
    "step", [pytest.param(Zstd(min_bytes=0), id="zstd"), pytest.param(Encrypted(b"k" * 32), id="encrypted")]
)
class TestDamage:
    def test_any_changed_bit_is_a_value_error_or_changes_nothing(self, step: Codec) -> None:
        sealed = applied(step, DATA)
        for position in range(8 * len(sealed)):
            damaged = bytearray(sealed)
            damaged[position // 8] ^= 1 << position % 8
            try:
                data = step.decode(bytes(damaged), CONTEXT)
            except ValueError:
                continue
            assert data == DATA, f"bit {position} has changed the data"

    def test_any_missing_end_is_a_value_error(self, step: Codec) -> None:
        sealed = applied(step, DATA)
        for length in range(len(sealed)):
            with pytest.raises(ValueError, match="result"):
                step.decode(sealed[:length], CONTEXT)

    def test_anything_that_follows_is_a_value_error(self, step: Codec) -> None:
        with pytest.raises(ValueError, match="result"):
            step.decode(applied(step, DATA) + b"more", CONTEXT)


def test_encrypted_data_are_bound_to_their_context_and_never_the_same_twice() -> None:
    step = Encrypted(Encrypted.new_key())
    first, second = applied(step, DATA), applied(step, DATA)
    assert first != second
    assert DATA not in first
    assert step.decode(first, CONTEXT) == step.decode(second, CONTEXT) == DATA
    for context in (b"", CONTEXT + b" ", CONTEXT[:-1], CONTEXT.upper()):
        with pytest.raises(ValueError, match="not for this entry"):
            step.decode(first, context)


def test_rotation_reads_with_every_key_and_writes_with_the_first() -> None:
    old, new = Encrypted.new_key(), Encrypted.new_key()
    by_old = applied(Encrypted(old), DATA)
    rotating = Encrypted([new, old])
    assert rotating.decode(by_old, CONTEXT) == DATA
    by_new = applied(rotating, DATA)
    assert Encrypted(new).decode(by_new, CONTEXT) == DATA
    for foreign, sealed in ((old, by_new), (new, by_old), (Encrypted.new_key(), by_new)):
        with pytest.raises(ValueError, match="any of the keys"):
            Encrypted(foreign).decode(sealed, CONTEXT)


@pytest.mark.parametrize(
    "key", [b"", b"k" * 31, b"k" * 33, "k" * 32, [], [b"k" * 32, b"short"], ["k" * 32], [None], None, 5], ids=repr
)
def test_key_of_another_size_or_type_is_refused_with_how_to_make_one_and_never_shown(key: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"32 bytes.*new_key") as caught:
        Encrypted(key)
    assert "kkk" not in str(caught.value)


def test_no_text_of_an_encrypting_step_shows_its_key() -> None:
    key = b"0123456789abcdef0123456789abcdef"
    step = Encrypted([key, b"k" * 32])
    assert repr(step) == str(step) == "Encrypted(<2 keys>)"
    assert "0123456789" not in repr(vars(step))


def test_new_keys_are_random() -> None:
    assert len({Encrypted.new_key() for _ in range(10)}) == 10
    assert all(len(Encrypted.new_key()) == 32 for _ in range(3))


class NamedStep:
    def __init__(self, name: Any, *, required: Any = False) -> None:
        self.name = name
        self.required = required

    def encode(self, data: bytes, context: bytes) -> bytes | None:
        return data + context

    def decode(self, data: bytes, context: bytes) -> bytes:
        return data.removesuffix(context)


def test_one_step_several_or_none_become_a_tuple() -> None:
    zstd, encrypted = Zstd(), Encrypted(b"k" * 32)
    assert check_codecs(None) == check_codecs(()) == check_codecs([]) == check_codecs(JSON) == ()
    assert check_codecs(zstd) == (zstd,)
    assert check_codecs([zstd, encrypted]) == check_codecs((zstd, encrypted)) == (zstd, encrypted)
    assert check_codecs(NamedStep("a@b"))


@pytest.mark.parametrize(
    "names", [["a", "a"], ["a+b"], [""], ["+"], ["a", "b", "a"], [5], [None], ["é"], ["\ud800"]], ids=ascii
)
def test_steps_that_could_not_be_told_apart_are_refused(names: list[Any]) -> None:
    with pytest.raises(ConfigurationError, match="names"):
        check_codecs([NamedStep(name) for name in names])


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("zstd", r"codec must be a codec such as Zstd\(\).*str"),
        (b"zstd", "not bytes"),
        (5, "not int"),
        ({Zstd()}, "not set"),
        ([Zstd(), "zstd"], "str, which has no encode and decode"),
        ([None], "NoneType"),
        (Zstd, r"write Zstd\(\)"),
        ([Zstd], r"write Zstd\(\)"),
        (NamedStep("a", required=None), "required"),
        (NamedStep("a", required=1), "required"),
    ],
    ids=stable_id,
)
def test_what_is_no_codec_is_refused_with_what_to_do(codec: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_codecs(codec)


def test_codec_after_encryption_is_refused_with_why() -> None:
    with pytest.raises(
        ConfigurationError, match=r"Encrypted must be the last.*Zstd comes after.*not be authenticated.*compress"
    ):
        check_codecs([Encrypted(b"k" * 32), Zstd()])
    assert [step.name for step in check_codecs([Zstd(), Encrypted(b"k" * 32)])] == ["zstd", "aesgcm"]


@pytest.mark.parametrize(("extra", "make"), [("zstandard", Zstd), ("cryptography.exceptions", lambda: Encrypted(b"k" * 32))])
def test_step_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, extra: str, make: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'aiokv\["):
        make()
