"""The pure parts of the protocol: what one side writes, the other reads, and nothing else passes."""

import time
import tracemalloc
from datetime import UTC, datetime

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokv.wire import (
    check_done_body,
    error_detail,
    error_for_status,
    is_loopback,
    parse_retry_after,
    parse_ttl_query,
    parse_value_body,
    redact,
    value_body,
)

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(("query", "seconds"), [("", None), ("x=1", None), ("ttl=60", 60), ("a=1&ttl=2592000&b", 2_592_000)])
def test_ttl_is_read_from_the_query(query: str, seconds: int | None) -> None:
    assert parse_ttl_query(query) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "59", "2592001", "6_0", " 60", "60 ", "+60", "-60", "60.0", "6e1", "0x3c", "٦٠", "６０", "60&ttl=60", "9" * 5000],
)
def test_ttl_that_is_no_plain_number_within_the_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ttl must be"):
        parse_ttl_query(f"ttl={text}")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_value_survives_the_body_of_an_answer(value: str) -> None:
    assert parse_value_body(value_body(value)) == value


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'"v"', b"{}", b'{"value": null}', b'{"value": 1}', b'{"value": "s3cret', b"<html>s3cret", b"\xff"],
)
def test_body_that_is_no_value_is_refused_without_being_shown(body: bytes) -> None:
    with pytest.raises(ValueError, match="is not a JSON object") as caught:
        parse_value_body(body)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__context__ is None


BRACKETS = b"[" + b"[]," * 3_800_000 + b"[]]"
TEXTS = b"[" + b'"",' * 3_800_000 + b'""]'


@pytest.mark.parametrize(
    "body",
    [
        b'{"value": %s}' % BRACKETS,
        b'{"value": "v", "more": %s}' % BRACKETS,
        b'{"more": %s, "value": "v"}' % TEXTS,
        BRACKETS,
        b'"' * 11_000_000,
        b'{"value": "' + b'\\"' * 5_000_000,
    ],
    ids=["value", "beside", "texts", "no object", "quotation marks", "unended"],
)
def test_answer_of_brackets_takes_neither_memory_nor_time(body: bytes) -> None:
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(ValueError, match="is not a JSON object"):
            parse_value_body(body)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * len(body)
    assert time.process_time() - started < 10


def test_done_answer_of_brackets_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is not a JSON object"):
            check_done_body(b'{"done": %s}' % BRACKETS)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * len(BRACKETS)


@pytest.mark.parametrize("text", ["x" * 1_900_000, '"\\\n\0é\U0001f600' * 100_000, "}" * 100_000, '","value":"' * 10_000])
@pytest.mark.parametrize(
    "form", ['{{"value":{0}}}', ' {{\n"value" :\t{0} }}\n', '{{"value":"old","value":{0}}}', '{{"a":{0},"value":{0}}}']
)
def test_large_value_is_read_in_every_form_of_the_object(text: str, form: str) -> None:
    assert parse_value_body(form.format(orjson.dumps(text).decode()).encode()) == text


@pytest.mark.parametrize("more", [b', "n": 1', b', "list": [1, 2, {"a": "]"}]', b', "value": "last"'])
def test_large_value_is_read_beside_other_members(more: bytes) -> None:
    body = b'{"value": "%s"%s}' % (b"x" * 100_000, more)
    assert parse_value_body(body) == orjson.loads(body)["value"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("9" * 400, float("inf")),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 251_635_118_339.0),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("Thu, 01 Jan 2026 12:00:30 GMT", 30.0),
        ("Thu, 01 Jan 2026 12:00:30 -0000", 30.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("٧", None),
        ("", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(text: str | None, seconds: float | None) -> None:
    assert parse_retry_after(text, NOW) == seconds


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"error": "bad ttl"}', "bad ttl"),
        (b"<html>nginx</html>", "an answer of 18 bytes without an error message"),
        (b'{"error": 5}', "an answer of 12 bytes without an error message"),
        (b"", "an empty answer"),
        (b'{"error": "line\\nbreak\\u001b[31m"}', "line break [31m"),
        (orjson.dumps({"error": "x" * 300}), "x" * 200),
        (b'{"error": "token t0k3n is not known"}', "token *** is not known"),
    ],
)
def test_error_shows_what_is_fit_to_be_shown(body: bytes, shown: str) -> None:
    assert error_detail(body, ("t0k3n", "")) == shown


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("10.0.0.1", False),
        ("", False),
        (None, False),
    ],
)
def test_loopback_is_told_by_name(host: str | None, expected: bool) -> None:  # noqa: FBT001 (a table of cases)
    assert is_loopback(host) is expected


@pytest.mark.parametrize("status", [501, 505, 507])
def test_answer_that_says_that_nothing_was_done_leaves_no_doubt(status: int) -> None:
    assert not error_for_status(status, "no room left", write=True).maybe_applied


@pytest.mark.parametrize("status", [204, 500, 502, 503, 504])
def test_answer_that_leaves_the_outcome_of_a_write_open_says_so(status: int) -> None:
    assert error_for_status(status, "failed", write=True).maybe_applied
    assert not error_for_status(status, "failed", write=False).maybe_applied


@pytest.mark.parametrize(
    ("secrets", "redacted"),
    [
        (("a",), "a token was refused: abc"),
        (("abc", "", "a t"), "a token was refused: abc"),
        (("refused",), "a token was ***: abc"),
        (("d: a",), "a token was refuse***bc"),
    ],
)
def test_secrets_are_masked_unless_that_would_shred_the_text(secrets: tuple[str, ...], redacted: str) -> None:
    assert redact("a token was refused: abc", secrets) == redacted


@pytest.mark.parametrize(
    "date",
    ["Fri, 31 Dec 9999 23:59:59 -1200", "Mon, 01 Jan 0001 00:00:00 +1200", "9" * 5000, f"Thu, 01 Jan {'9' * 20} 12:00:30 GMT"],
)
def test_retry_after_at_the_end_of_time_is_read_or_left(date: str) -> None:
    seconds = parse_retry_after(date)
    assert seconds is None or seconds >= 0
