"""The extensions on the wire: what one side writes the other reads, and nothing else is taken."""

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokv.backends.capabilities import OMITTED, Capabilities, ClaimOutcome, Cleared, Entry, KeyInfo, Page
from aiokv.backends.watching import Alive, Changed, Lost, WatchEvent
from aiokv.batch_wire import (
    MAX_BATCH_BODY_BYTES,
    Batch,
    Fault,
    cut_entries,
    cut_keys,
    outcomes_body,
    parse_batch,
    parse_outcomes,
    parse_values,
    values_body,
)
from aiokv.claim_wire import claim_body, claim_path, parse_claim, parse_claim_query, parse_released, released_body
from aiokv.errors import CallError, UnavailableError
from aiokv.event_wire import ALIVE, MAX_EVENT_BYTES, RETRY, EventParser, changed_event, lost_event
from aiokv.extension_wire import (
    Listing,
    cleared_body,
    count_body,
    count_path,
    extensions_of,
    keys_path,
    page_body,
    parse_cleared,
    parse_count,
    parse_db_path,
    parse_extensions,
    parse_listing_query,
    parse_page,
    restore_cursor,
    shorten_cursor,
)
from aiokv.wire import parse_entry_path

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40).filter(
    lambda name: name not in {".", ".."}
)


@given(NAMES.filter(lambda name: "/" not in name), NAMES)
def test_names_travel_as_they_are(db_name: str, name: str) -> None:
    path, _, query = keys_path(db_name, Listing(name, name, 7)).partition("?")
    assert parse_db_path(path.removeprefix("/keys/")) == db_name
    assert parse_listing_query(query, db_name) == Listing(name, name, 7)
    query = count_path(db_name, name).partition("?")[2]
    assert parse_listing_query(query, db_name, allowed=("prefix",)) == Listing(name)
    path, _, query = claim_path(db_name, name, "owner-1", 2.5).partition("?")
    assert parse_entry_path(path.removeprefix("/claims/")) == (db_name, name)
    assert parse_claim_query(query, has_seconds=True) == ("owner-1", 2.5, False)
    query = claim_path(db_name, name, "owner-1", 2.5, is_renewal=True).partition("?")[2]
    assert parse_claim_query(query, has_seconds=True) == ("owner-1", 2.5, True)
    assert (path + query).isascii()


def test_a_listing_without_bounds_has_the_defaults() -> None:
    assert keys_path("db") == "/keys/db?limit=1000"
    assert count_path("db") == "/count/db"
    assert parse_listing_query("", "db") == Listing("", None, 1000)
    assert parse_listing_query("prefix=a+b%20c", "db") == Listing("a+b c")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=1_0",
        "limit=٣",
        "limit=",
        "limit=5&limit=5",
        "prefx=a",
        "prefix=a&prefix=b",
        "prefix=%zz",
        "prefix=%ff",
        "prefix=%00",
        "after=",
        "after=" + "a" * 8_001,
        "prefix=" + "a" * 8_001,
        "&",
        "=",
    ],
)
def test_a_query_that_breaks_a_rule_is_refused(query: str) -> None:
    with pytest.raises(ValueError, match=r"prefix|limit|after"):
        parse_listing_query(query, "db")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "owner=a",
        "seconds=2",
        "owner=a&seconds=0.9",
        "owner=a&seconds=3600.1",
        "owner=a&seconds=nan",
        "owner=a&seconds=1e2",
        "owner=&seconds=2",
        "owner=a%20b&seconds=2",
        "owner=" + "a" * 129 + "&seconds=2",
        "owner=a&owner=b&seconds=2",
        "owner=a&seconds=2&more=1",
        "owner=a&seconds=2&renew=0",
        "owner=a&seconds=2&renew=",
        "owner=a&seconds=2&renew=1&renew=1",
    ],
)
def test_a_claim_that_breaks_a_rule_is_refused_without_its_owner_in_the_message(query: str) -> None:
    with pytest.raises(ValueError, match=r"owner|seconds|renew") as caught:
        parse_claim_query(query, has_seconds=True)
    assert "a b" not in str(caught.value)
    assert "aaa" not in str(caught.value)


def test_extensions_are_named_by_what_the_backend_has() -> None:
    some: Any = object()
    assert extensions_of(Capabilities()) == ""
    assert extensions_of(Capabilities(some, some, some, some)) == "batch, scan, claims, renew, watch"
    assert parse_extensions("batch,\twatch , later") == {"batch", "watch"}
    assert parse_extensions(None) == parse_extensions("") == frozenset()


@given(st.lists(st.tuples(NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=40)), min_size=1, max_size=20))
def test_a_batch_travels_as_it_is(items: list[tuple[str, str]]) -> None:
    keys = [key for key, _ in items]
    entries = [Entry(key, value, 60 + index) for index, (key, value) in enumerate(items)]
    [(start, end, body)] = cut_keys("delete", keys)
    assert (start, end, parse_batch(body, "db")) == (0, len(keys), Batch("delete", keys))
    [(start, end, body)] = cut_entries(entries)
    assert (start, end, parse_batch(body, "db")) == (0, len(keys), Batch("set", entries=entries))


def test_batches_are_cut_by_keys_and_by_bytes() -> None:
    keys = [f"key-{index}" for index in range(2_500)]
    pieces = list(cut_keys("get", keys))
    assert [(start, end) for start, end, _ in pieces] == [(0, 1_000), (1_000, 2_000), (2_000, 2_500)]
    assert [key for _, _, body in pieces for key in parse_batch(body, "db").keys] == keys
    entries = [Entry(f"key-{index}", "\x01" * 200_000, 60) for index in range(20)]
    pieces = list(cut_entries(entries))
    assert all(len(body) <= MAX_BATCH_BODY_BYTES for _, _, body in pieces)
    assert [entry for _, _, body in pieces for entry in parse_batch(body, "db").entries] == entries
    assert list(cut_keys("get", [])) == []


MALFORMED = [
    b"",
    b"get",
    b"[]",
    b"{}",
    b'{"get": []}',
    b'{"get": ["a"], "set": []}',
    b'{"get": "a"}',
    b'{"get": {"a": 1}}',
    b'{"put": ["a"]}',
    b'{"get": [1]}',
    b'{"get": ["a", null]}',
    b'{"get": [""]}',
    b'{"get": [".."]}',
    b'{"get": ["a\\u0000"]}',
    b'{"get": ["\\ud800"]}',
    b'{"get": ["\xff"]}',
    b'{"get": ["a"]',
    b'{"set": ["a"]}',
    b'{"set": [{"key": "a"}]}',
    b'{"set": [{"key": "a", "value": 1}]}',
    b'{"set": [{"key": "a", "value": "SECRET", "ttl": 59}]}',
    b'{"set": [{"key": "a", "value": "SECRET", "ttl": "60"}]}',
    b'{"set": [{"key": "a", "value": "SECRET", "ttl": 60.5}]}',
    b'{"set": [{"key": "a", "value": "SECRET", "ttl": true}]}',
    b'{"set": [{"key": "a", "value": "SECRET", "ttl": null}]}',
    b'{"set": [{"key": "a", "value": "SECRET", "tll": 60}]}',
    b'{"set": [{"key": "a", "value": "SECRET", "ttl": 1e400}]}',
    b'{"get": ' + b"[" * 2_000 + b"]" * 2_000 + b"}",
    orjson.dumps({"get": ["a"] * 1_001}),
    orjson.dumps({"get": ["a" * 8_001]}),
    orjson.dumps({"set": [{"key": "a", "value": "SECRET" * 400_000}]}),
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: body[:40].decode("latin-1"))
def test_a_malformed_batch_is_refused_without_a_value_in_the_message(body: bytes) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_batch(body, "db")
    error: BaseException | None = caught.value
    while error is not None:
        assert "SECRET" not in str(error)
        assert not isinstance(error, orjson.JSONDecodeError)
        error = error.__cause__ or error.__context__


def test_a_ttl_may_be_written_with_a_point() -> None:
    assert parse_batch(b'{"set": [{"key": "a", "value": "b", "ttl": 60.0}]}', "db").entries == [Entry("a", "b", 60)]


def test_the_index_of_a_wrong_entry_is_named() -> None:
    with pytest.raises(ValueError, match=r"^set\[1\]: ttl must be from 60"):
        parse_batch(b'{"set": [{"key": "a", "value": "b"}, {"key": "c", "value": "d", "ttl": 1}]}', "db")


SIZE = 8 * 1024 * 1024


@pytest.mark.parametrize(
    "body",
    [
        b"[" * SIZE,
        b'{"get": [' + b"[]," * (SIZE // 3) + b"1]}",
        b'{"get": [' + b"1," * (SIZE // 2) + b"1]}",
        b'{"get": [' + b'"",' * (SIZE // 3) + b'""]}',
        b'{"get": [' + b'{"a":1},' * (SIZE // 8) + b"1]}",
        b'"' + b'\\"' * (SIZE // 2),
        b"\\" * SIZE,
    ],
    ids=lambda body: body[:14].decode(),
)
@pytest.mark.parametrize("parse", [lambda body: parse_batch(body, "db"), lambda body: parse_values(body, 1_000)])
def test_a_body_of_brackets_takes_little_memory_and_time(body: bytes, parse: Callable[[bytes], object]) -> None:
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(ValueError, match=r"."):
            parse(body)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The parser reserves twelve times the size of any text, and uses little of it.
    assert most < 13 * SIZE
    assert time.process_time() - began < 5


def test_values_full_of_marks_are_taken() -> None:
    entries = [Entry(f"key-{index}", '[{"a": "b\\\\",},{,[' * 100, 60) for index in range(1_000)]
    [(_, _, body)] = cut_entries(entries)
    assert parse_batch(body, "db").entries == entries


def test_outcomes_of_a_get_travel_in_their_order() -> None:
    body = values_body(["a", None, None, OMITTED, "", '"'], {2: Fault(503, "the stored value is damaged")})
    assert orjson.loads(body) == {
        "values": ["a", None, None, None, "", '"'],
        "omitted": [3],
        "errors": [{"index": 2, "status": 503, "error": "the stored value is damaged"}],
    }
    outcomes = parse_values(body, 6)
    assert [outcomes[index] for index in (0, 1, 3, 4, 5)] == ["a", None, OMITTED, "", '"']
    assert isinstance(outcomes[2], UnavailableError)
    assert (outcomes[2].status, outcomes[2].maybe_applied) == (503, False)
    assert values_body(["a"], {}) == b'{"values":["a"]}'


def test_an_answer_is_cut_by_what_its_json_takes() -> None:
    values = ["\x01" * 500_000] * 5 + ["tail"]
    body = values_body(values, {})
    assert len(body) <= MAX_BATCH_BODY_BYTES + 1_000
    assert parse_values(body, 6) == [*values[:2], OMITTED, OMITTED, OMITTED, "tail"]
    first = "\x01" * 1_900_000
    assert parse_values(values_body([first, "second"], {}), 2) == [first, OMITTED]
    assert parse_values(values_body([None, first, "second"], {}), 3) == [None, first, OMITTED]


def test_outcomes_of_a_write_travel_in_their_order() -> None:
    body = outcomes_body(4, {1: Fault(507, "quota"), 3: Fault(503, "busy", maybe_applied=True)})
    assert orjson.loads(body)["done"] == 2
    first, second, third, fourth = parse_outcomes(body, 4)
    assert (first, third) == (None, None)
    assert isinstance(second, CallError)
    assert isinstance(fourth, CallError)
    assert [(error.status, error.reason, error.maybe_applied) for error in (second, fourth)] == [
        (507, "quota", False),
        (503, "busy", True),
    ]
    assert outcomes_body(2, {}) == b'{"done":2}'


def test_an_error_repeats_no_secret() -> None:
    [error] = parse_outcomes(outcomes_body(1, {0: Fault(500, "it is hush-hush\n")}), 1, ("hush-hush",))
    assert isinstance(error, CallError)
    assert error.reason == "it is *** "


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"values": None},
        {"values": ["a"]},
        {"values": ["a", "b", "c"]},
        {"values": ["a", 1]},
        {"values": ["a", None], "omitted": None},
        {"values": ["a", "b"], "omitted": [1]},
        {"values": [None, "b"], "omitted": [0]},
        {"values": ["a", None], "omitted": [2]},
        {"values": ["a", None], "omitted": [True]},
        {"values": ["a", None], "errors": {}},
        {"values": ["a", None], "errors": [1]},
        {"values": ["a", None], "errors": [{"index": 0, "status": 503, "error": ""}]},
        {"values": ["a", None], "errors": [{"index": 1, "status": 200, "error": ""}]},
        {"values": ["a", None], "errors": [{"index": 1, "status": 503, "error": None}]},
        {"values": ["a", None], "errors": [{"index": -1, "status": 503, "error": ""}]},
        {"values": ["a", None], "errors": [{"index": 1, "status": 503, "error": ""}] * 2},
    ],
)
def test_a_get_batchs_answer_that_lies_is_refused(answer: object) -> None:
    with pytest.raises(ValueError, match="answer"):
        parse_values(orjson.dumps(answer), 2)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"done": 1},
        {"done": 3},
        {"done": True},
        {"done": 2.0},
        {"done": -1},
        {"done": 2, "errors": [{"index": 1, "status": 503, "error": ""}]},
    ],
)
def test_a_write_batchs_answer_that_lies_is_refused(answer: object) -> None:
    with pytest.raises(ValueError, match="answer"):
        parse_outcomes(orjson.dumps(answer), 2)


def test_a_page_travels_as_it_is() -> None:
    page = Page([KeyInfo("ä", 1_800_000_000.123456, 5), KeyInfo("ä/b", 1.0, 0)], "next")
    parsed, is_ordered = parse_page(page_body(page, "ä", is_ordered=True), Listing("ä"))
    assert (parsed.infos, restore_cursor(parsed.cursor or "", "ä"), is_ordered) == (page.infos, page.cursor, True)
    assert parse_page(page_body(Page([], None), is_ordered=False), Listing()) == (Page([], None), False)


@given(st.text(min_size=1, max_size=50), st.text(max_size=5))
def test_a_step_of_clearing_travels_whole(cursor: str, prefix: str) -> None:
    parsed = parse_cleared(cleared_body(Cleared(2, cursor), prefix), Listing(prefix))
    assert isinstance(parsed, Cleared)
    assert (parsed.deleted, restore_cursor(parsed.cursor or "", prefix)) == (2, cursor)
    assert parse_cleared(cleared_body(Cleared(0, None), prefix), Listing(prefix)) == Cleared(0, None)


@given(st.text(), st.text())
def test_a_cursor_comes_back_as_it_was(cursor: str, prefix: str) -> None:
    assert restore_cursor(shorten_cursor(cursor, prefix), prefix) == cursor


def test_a_cursor_of_the_longest_key_and_its_prefix_fit_a_request_line() -> None:
    prefix, key = "p" * 5_000, "p" * 5_000 + "k" * 2_990
    path = keys_path("db", Listing(prefix, shorten_cursor(f"k{key}", prefix)))
    assert len(f"DELETE {path} HTTP/1.1") < 8_190


@pytest.mark.parametrize("text", ["", "k", "-1:k", "99999:k", "x:k"])
def test_a_foreign_cursor_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="after"):
        restore_cursor(text, "prefix")


@pytest.mark.parametrize(
    "change",
    [
        {"keys": None},
        {"keys": [{"key": "other", "expires_at": 1.0, "value_bytes": 1}]},
        {"keys": [{"key": "a", "expires_at": True, "value_bytes": 1}]},
        {"keys": [{"key": "a", "expires_at": 1.0, "value_bytes": -1}]},
        {"keys": [{"key": "a", "expires_at": 1.0}]},
        {"keys": [{"key": "a", "expires_at": 1.0, "value_bytes": 1}] * 3},
        {"keys": ["a"]},
        {"next": ""},
        {"next": 5},
        {"next": "a" * 8_001},
        {"ordered": None},
    ],
)
def test_a_page_that_lies_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="answer"):
        parse_page(orjson.dumps({"keys": [], "next": None, "ordered": True} | change), Listing("a", "here", 2))


def test_small_answers_travel_as_they_are() -> None:
    assert parse_count(count_body(5)) == 5
    assert parse_cleared(b'{"deleted": 2}', Listing("", None, 2)) == 2
    assert parse_claim(claim_body(ClaimOutcome(is_held=False, seconds_left=3.2)), is_held=False)[:2] == (False, 3.2)
    assert parse_released(released_body(was_held=True)) is True


@pytest.mark.parametrize(
    "parse",
    [
        lambda body: parse_cleared(body, Listing("", None, 3)),
        parse_count,
        lambda body: parse_claim(body, is_held=True),
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{}",
        b'{"deleted": 4, "released": 1, "held": true, "seconds_left": "1"}',
        b'{"deleted": -1, "released": null, "held": false, "seconds_left": 1}',
        b'{"deleted": true, "released": "", "held": true, "seconds_left": -1}',
        b'{"deleted": 1.0, "held": true, "seconds_left": 1e9}',
    ],
)
def test_a_small_answer_that_lies_is_refused(parse: Callable[[bytes], object], body: bytes) -> None:
    with pytest.raises(ValueError, match="answer"):
        parse(body)


STREAM = RETRY + lost_event("x-1") + changed_event(Changed("ä\n"), "x-2") + ALIVE + changed_event(Changed("b", True), "x-3")
EVENTS: list[WatchEvent] = [Lost(), Changed("ä\n"), Alive(), Changed("b", is_delete=True)]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1_000])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_stream_is_parsed_wherever_it_is_cut(step: int, line_end: bytes) -> None:
    parser = EventParser()
    stream = b"\xef\xbb\xbf: a comment\n\n" + STREAM + b"event: later\ndata: {}\n\n:\n"
    stream = stream.replace(b"\n", line_end)
    events = [event for start in range(0, len(stream), step) for event in parser.feed(stream[start : start + step])]
    assert events == EVENTS
    # A Lost and an Alive are equal.
    assert list(map(type, events)) == list(map(type, EVENTS))
    assert (parser.last_event_id, parser.retry_seconds) == ("x-3", 1.0)


def test_the_id_is_that_of_the_last_whole_event() -> None:
    parser = EventParser()
    assert parser.feed(lost_event("x-1") + b"id: x-2\nevent: changed\ndata: {") == [Lost()]
    assert parser.last_event_id == "x-1"
    assert parser.feed(b'"key": "a"}\n\n') == [Changed("a")]
    assert parser.last_event_id == "x-2"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b'{"key": 1}', b'{"key": ""}', b'{"key": "a", "delete": 1}', b'{"key": "\xff"}']
)
def test_a_change_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="stream"):
        EventParser().feed(b"event: changed\ndata: %b\n\n" % data)


@pytest.mark.parametrize("piece", [b"a" * 1_000, b"data: a\n" * 100, b":" + b"a" * 999 + b"\r"])
def test_an_event_without_end_is_refused(piece: bytes) -> None:
    parser = EventParser()

    def feed() -> None:
        for _ in range(2 * MAX_EVENT_BYTES // len(piece)):
            parser.feed(piece)

    with pytest.raises(ValueError, match="larger"):
        feed()


def test_an_id_that_no_header_can_bear_is_none() -> None:
    parser = EventParser()
    assert parser.feed(b"id: a\xc3\xa4\nevent: lost\ndata: {}\n\n") == [Lost()]
    assert parser.last_event_id == ""


@pytest.mark.parametrize(("status", "is_told"), [(400, False), (409, False), (429, False), (500, True), (503, True)])
def test_write_that_was_refused_is_never_told_as_applied(status: int, *, is_told: bool) -> None:
    [error] = parse_outcomes(outcomes_body(1, {0: Fault(status, "no", maybe_applied=True)}), 1)
    assert isinstance(error, CallError)
    assert error.maybe_applied is is_told


def test_listing_with_an_empty_key_is_refused() -> None:
    body = b'{"keys": [{"key": "", "expires_at": 1.5, "value_bytes": 1}], "next": null, "ordered": true}'
    with pytest.raises(ValueError, match="each key of the answer must have a key"):
        parse_page(body, Listing())
