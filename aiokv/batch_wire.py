"""Batches on the wire: the body of `POST /batch/{db_name}` and its answers, for both sides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson

from aiokv.backends.capabilities import MAX_BATCH_BYTES, MAX_BATCH_KEYS, OMITTED, Entry, Omitted
from aiokv.bounded_json import parse_object_of
from aiokv.errors import CallError
from aiokv.extension_wire import MAX_PARTS, parse_answer
from aiokv.limits import DEFAULT_TTL_SECONDS, check_entry, check_ttl, check_value
from aiokv.wire import Verb, error_for_status, printable, redact

MAX_BATCH_BODY_BYTES: Final = MAX_BATCH_BYTES
"""Largest body of a batch's request, as JSON."""

_MIN_ERROR_STATUS, _MAX_ERROR_STATUS = 400, 599
_MIN_FAILURE_STATUS = 500


class Batch(NamedTuple):
    """The body of `POST /batch/{db_name}`: one verb, and its keys; for `set` its entries in their place."""

    verb: Verb
    keys: Sequence[str] = ()
    entries: Sequence[Entry] = ()


class Fault(NamedTuple):
    """Why one key of a batch failed, as its answer says it."""

    status: int
    message: str
    maybe_applied: bool = False


def cut_keys(verb: Verb, keys: Sequence[str]) -> Iterator[tuple[int, int, bytes]]:
    """Cut a get or delete of any number of keys into bodies that a server takes.

    Args:
        verb: `get` or `delete`.
        keys: Checked keys.

    Yields:
        Where a body's keys begin, where they end, and the body.
    """
    yield from _cut(lambda start, end: orjson.dumps({verb: keys[start:end]}), 0, len(keys))


def cut_entries(entries: Sequence[Entry]) -> Iterator[tuple[int, int, bytes]]:
    """Cut a set of any number of entries into bodies that a server takes.

    Args:
        entries: Checked entries. One whose value takes more than 8 MiB as JSON makes a body that is too large.

    Yields:
        Where a body's entries begin, where they end, and the body.
    """

    def body(start: int, end: int) -> bytes:
        return orjson.dumps({"set": [{"key": key, "value": value, "ttl": ttl} for key, value, ttl in entries[start:end]]})

    yield from _cut(body, 0, len(entries))


def parse_batch(body: bytes | bytearray, db_name: str) -> Batch:
    """Parse the body of a batch.

    Args:
        body: The body, of any size.
        db_name: The namespace.

    Returns:
        The verb, and its keys or entries, each checked.

    Raises:
        ValueError: The body is not of this form, or a key, value or ttl is not acceptable; the index says which.
    """
    parsed = parse_object_of(body, MAX_PARTS)
    verb, items = next(iter(parsed.items())) if parsed is not None and len(parsed) == 1 else ("", None)
    if verb not in {"get", "set", "delete"} or not isinstance(items, list):
        raise ValueError('the body must be JSON with one member, {"get": [...]}, {"set": [...]} or {"delete": [...]}')
    if not 1 <= len(items) <= MAX_BATCH_KEYS:
        raise ValueError(f"a batch must have 1 to {MAX_BATCH_KEYS:,} keys, not {len(items):,}")
    index = 0
    try:
        if verb == "set":
            entries = []
            for index, item in enumerate(items):  # noqa: B007 (for the error)
                entries.append(_parse_entry(item, db_name))
            return Batch("set", entries=entries)
        for index, key in enumerate(items):  # noqa: B007 (likewise)
            check_entry(db_name, key)
    except (TypeError, ValueError) as error:
        reason = f"{verb}[{index}]: {error}"
    else:
        return Batch("get" if verb == "get" else "delete", items)
    # Outside, so that nothing is chained to an error that may hold a value.
    raise ValueError(reason)


def values_body(values: Sequence[str | Omitted | None], faults: Mapping[int, Fault]) -> bytes:
    """Build the answer of a get batch; leave out what fills it beyond 8 MiB, but for the first value.

    Args:
        values: What was read; None for a failed one.
        faults: Why keys failed, by their index.

    Returns:
        `{"values": [...], "omitted": [...], "errors": [...]}` as JSON.
    """
    omitted = [index for index, value in enumerate(values) if value is OMITTED]
    sent: Sequence[str | Omitted | None] = values
    if omitted or 6 * sum(len(value) for value in values if isinstance(value, str)) > MAX_BATCH_BODY_BYTES:
        sent, omitted, size_bytes = [], [], 0
        for index, value in enumerate(values):
            # An escaped character is at most six bytes for one, any other at most four.
            part = orjson.dumps(value) if isinstance(value, str) else b""
            is_first = not size_bytes
            size_bytes += len(part)
            if value is OMITTED or (size_bytes > MAX_BATCH_BODY_BYTES and part and not is_first):
                omitted.append(index)
                sent.append(None)
                size_bytes -= len(part)
            else:
                sent.append(orjson.Fragment(part) if part else None)  # type: ignore[arg-type]  # written as it is
    answer: dict[str, Any] = {"values": sent}
    if omitted:
        answer["omitted"] = omitted
    return orjson.dumps(answer | _errors_member(faults))


def outcomes_body(count: int, faults: Mapping[int, Fault]) -> bytes:
    """Build the answer of a set or delete batch.

    Args:
        count: How many keys the batch has.
        faults: Why keys failed, by their index.

    Returns:
        `{"done": 998, "errors": [...]}` as JSON.
    """
    return orjson.dumps({"done": count - len(faults), **_errors_member(faults, is_write=True)})


def parse_values(body: bytes, count: int, secrets: tuple[str, ...] = ()) -> list[str | Omitted | CallError | None]:
    """Parse the answer of a get batch.

    Args:
        body: The body of an answer with status 200.
        count: How many keys were asked for.
        secrets: Texts that no message may repeat.

    Returns:
        An outcome for each key, as `BatchBackend.get_many` returns them.

    Raises:
        ValueError: The body is no such answer.
    """
    answer = parse_answer(body)
    values, omitted = answer.get("values"), answer.get("omitted", [])
    if not isinstance(values, list) or len(values) != count or not all(value is None or type(value) is str for value in values):
        raise ValueError(f"the answer must hold {count:,} values, each a text or null")
    outcomes: list[str | Omitted | CallError | None] = values
    if not isinstance(omitted, list):
        raise ValueError("the answer's member omitted must be a list of indices")  # noqa: TRY004 (one kind for every fault)
    if any(type(index) is not int or not 0 < index < count or outcomes[index] is not None for index in omitted):
        raise ValueError(
            "the answer's member omitted must hold indices of values that are null, the first value not among them"
        )
    for index, error in _parse_errors(answer, count, secrets, is_write=False).items():
        if outcomes[index] is not None:
            raise ValueError("the answer's member errors must hold indices of values that are null")
        outcomes[index] = error
    for index in omitted:
        outcomes[index] = OMITTED
    return outcomes


def parse_outcomes(body: bytes, count: int, secrets: tuple[str, ...] = ()) -> list[CallError | None]:
    """Parse the answer of a set or delete batch.

    Args:
        body: The body of an answer with status 200.
        count: How many keys were sent.
        secrets: Texts that no message may repeat.

    Returns:
        None for each key that was stored or deleted, else its error.

    Raises:
        ValueError: The body is no such answer.
    """
    answer = parse_answer(body)
    errors = _parse_errors(answer, count, secrets, is_write=True)
    if type(answer.get("done")) is not int or answer["done"] != count - len(errors):
        raise ValueError(f"the answer's members done and errors must account for {count:,} keys")
    return [errors.get(index) for index in range(count)]


def _cut(make_body: Callable[[int, int], bytes], start: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    while end - start > MAX_BATCH_KEYS:
        yield from _cut(make_body, start, start + MAX_BATCH_KEYS)
        start += MAX_BATCH_KEYS
    if start == end:
        return
    body = make_body(start, end)
    if len(body) <= MAX_BATCH_BODY_BYTES or end - start == 1:
        yield start, end, body
        return
    middle = (start + end) // 2
    yield from _cut(make_body, start, middle)
    yield from _cut(make_body, middle, end)


def _parse_entry(item: object, db_name: str) -> Entry:
    if not isinstance(item, dict) or not {"key", "value"} <= item.keys() <= {"key", "value", "ttl"}:
        raise ValueError('must be {"key": "...", "value": "...", "ttl": 3600}, of which ttl may be left out')
    key, value, ttl = item["key"], item["value"], item.get("ttl", DEFAULT_TTL_SECONDS)
    check_entry(db_name, key)
    check_value(value)
    if ttl is None:
        raise ValueError("ttl must be a number of seconds; leave it out for 30 days")
    return Entry(key, value, check_ttl(_whole(ttl)))


def _whole(number: Any) -> Any:
    # In JSON 60.0 is a whole number, too.
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _errors_member(faults: Mapping[int, Fault], *, is_write: bool = False) -> dict[str, Any]:
    if not faults:
        return {}
    errors = []
    for index, (status, message, maybe_applied) in faults.items():
        error = {"index": index, "status": status, "error": message}
        errors.append({**error, "maybe_applied": maybe_applied} if is_write else error)
    return {"errors": errors}


def _parse_errors(answer: dict[str, Any], count: int, secrets: tuple[str, ...], *, is_write: bool) -> dict[int, CallError]:
    given = answer.get("errors", [])
    if not isinstance(given, list) or len(given) > count:
        raise ValueError(f"the answer's member errors must be a list of at most {count:,}")
    errors: dict[int, CallError] = {}
    for item in given:
        index, status, detail, maybe = (
            (item.get(name) for name in ("index", "status", "error", "maybe_applied"))
            if isinstance(item, dict)
            else (None,) * 4
        )
        if type(index) is not int or not 0 <= index < count or index in errors:
            raise ValueError("each error of the answer must name the index of a key, and no other error that one")
        if type(status) is not int or not _MIN_ERROR_STATUS <= status <= _MAX_ERROR_STATUS or not isinstance(detail, str):
            raise ValueError("each error of the answer must have a status from 400 to 599 and a text")
        error = error_for_status(status, printable(redact(detail, secrets)), write=is_write)
        if is_write and isinstance(maybe, bool):
            # Whatever else the answer says: a 4xx is of a write that was refused.
            error.maybe_applied = maybe and status >= _MIN_FAILURE_STATUS
        errors[index] = error
    return errors
