"""The stored text of a result: the head, which is a line of JSON, and the result. A persistent format. Pure.

The head is a list: format version, key, schema, start, end of freshness, seconds of computation, names of the codecs that were
applied, joined by `+`. After the line break follows the result's JSON, or base85 of what the codecs made.
"""

import base64
from typing import Any, Final, NamedTuple

import orjson

from aiokv.caching.codecs import Codec
from aiokv.caching.results import NotStorable

FORMAT_VERSION: Final = 2

_WITH_LINE_BREAK: Final = orjson.OPT_APPEND_NEWLINE
_NUMBERS = frozenset({int, float})


class Entry(NamedTuple):
    """A stored result.

    Args:
        json: The result's JSON.
        started: When its computation began, in seconds since the epoch.
        fresh_until: When it stops being fresh, likewise.
        compute_seconds: How long the computation took.
    """

    json: bytes | str
    started: float
    fresh_until: float
    compute_seconds: float


# Faster than Entry(...), which runs a function of Python.
_new_entry: Any = tuple.__new__


def pack(entry: Entry, namespace: str, key: str, schema: str, codecs: tuple[Codec, ...]) -> str:
    """Make the text that is stored.

    Args:
        entry: The result and its times.
        namespace: The store's namespace, which codecs may bind to.
        key: The whole key, which a reader compares.
        schema: The mark of the result's type, which a reader compares.
        codecs: The steps to apply.

    Returns:
        The text for `unpack`.

    Raises:
        NotStorable: A codec refuses the result; the text names the codec.
    """
    json, started, fresh_until, compute_seconds = entry
    applied = ""
    if codecs:
        claims = [FORMAT_VERSION, namespace, key, schema, started, fresh_until, compute_seconds]
        data = json.encode() if isinstance(json, str) else json
        for codec in codecs:
            changed = _encode(codec, data, _context(claims, applied))
            if changed is not None:
                data = changed
                applied = f"{applied}+{codec.name}" if applied else codec.name
        json = base64.b85encode(data) if applied else data
    head = orjson.dumps([FORMAT_VERSION, key, schema, started, fresh_until, compute_seconds, applied], None, _WITH_LINE_BREAK)
    return (head + (json if isinstance(json, bytes) else json.encode())).decode()


def unpack(text: str, namespace: str, key: str, schema: str, codecs: tuple[Codec, ...]) -> Entry | None:  # noqa: PLR0911 (one for each check)
    """Read what is stored.

    Args:
        text: The text that the store holds.
        namespace: The store's namespace.
        key: The key that was asked for.
        schema: The mark of the result's type today.
        codecs: The steps that are configured today.

    Returns:
        The entry. None, which is a miss, where the text is of another version, key, type or codec, was changed, exceeds the
        bound of a codec, or is no entry at all.
    """
    head, separator, payload = text.partition("\n")
    if not separator:
        return None
    try:
        version, own_key, own_schema, started, fresh_until, compute_seconds, applied = orjson.loads(head)
    except (ValueError, TypeError):
        return None
    if own_key != key or version != FORMAT_VERSION or own_schema != schema or type(version) is not int:
        return None
    kinds_are_equal = type(started) is type(fresh_until) is type(compute_seconds)
    if not (kinds_are_equal and type(started) is float) and not _NUMBERS.issuperset(
        (type(started), type(fresh_until), type(compute_seconds))
    ):
        return None
    if compute_seconds < 0:
        return None
    if applied == "" and not codecs:
        return _new_entry(Entry, (payload, started, fresh_until, compute_seconds))  # type: ignore[no-any-return]
    if type(applied) is not str:
        return None
    claims = [FORMAT_VERSION, namespace, key, schema, started, fresh_until, compute_seconds]
    json = _decode(payload, applied, claims, codecs)
    return None if json is None else Entry(json, started, fresh_until, compute_seconds)


def _context(claims: list[object], applied: str) -> bytes:
    return orjson.dumps([*claims, applied])


def _encode(codec: Codec, data: bytes, context: bytes) -> bytes | None:
    try:
        changed: object = codec.encode(data, context)
    except NotStorable as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 (a codec of the program's may fail in its own way)
        # Without its text, which may quote the data.
        reason = f"it failed with {type(error).__qualname__}"
    else:
        if changed is None or isinstance(changed, bytes):
            return changed
        reason = f"encode returned a {type(changed).__qualname__} in place of bytes"
    raise NotStorable(f"the codec {codec.name} refuses the result: {reason}")


def _decode(payload: str, applied: str, claims: list[object], codecs: tuple[Codec, ...]) -> bytes | str | None:
    """Undo the codecs; return None where other codecs were applied than are configured, or one of them refuses."""
    names = applied.split("+") if applied else []
    used = [codec for codec in codecs if codec.name in names]
    if [codec.name for codec in used] != names or any(codec.required and codec.name not in names for codec in codecs):
        return None
    if not names:
        return payload
    try:
        data: Any = base64.b85decode(payload)
        while names:
            names.pop()
            data = used[len(names)].decode(data, _context(claims, "+".join(names)))
    except Exception:  # noqa: BLE001 (a codec of the program's may fail in its own way)
        return None
    return data if isinstance(data, bytes) else None
