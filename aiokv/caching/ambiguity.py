"""Unions in which a stored array or table could be read back as a text. Pure.

Both are texts in JSON. An entry that cannot be read as the one, such as a damaged one, would be taken for the other.
"""

from collections.abc import Iterator
from typing import Any, Final

PACKED: Final = "aiokv_packed"
"""The key in the metadata of a core schema that marks binary content."""

# What accepts no text of base64.
_NOT_TEXT: Final = frozenset(
    {"none", "bool", "int", "float", "decimal", "complex", "date", "time", "datetime", "timedelta", "uuid", "literal", "enum"}
    | {"never", "is-instance", "is-subclass", "callable", "missing-sentinel"}
)
# What a schema holds of the program's own.
_NO_SCHEMAS: Final = frozenset({"metadata", "serialization", "config", "default", "expected", "members"})
_TEXT: Final = frozenset({"str", "bytes", "url", "multi-host-url", "json"})
_INNER: Final = ("schema", "json_schema", "lax_schema", "strict_schema", "arguments_schema")
_ITEM, _VALUE, _ANY_PART = "[]", "{}", "*"
_Path = tuple[str, ...]


def holds_packed(schema: Any) -> bool:
    """Return whether a core schema of pydantic holds binary content at any depth.

    Args:
        schema: The schema, or a part of it.
    """
    return any(_is_packed(part) for part in _parts(schema))


def is_ambiguous(schema: Any) -> bool:
    """Return whether a union in a core schema has binary content and another text in one place.

    Args:
        schema: The schema.
    """
    definitions = {part["ref"]: part for part in _parts(schema) if isinstance(part.get("ref"), str)}
    return any(
        _collides(list(_choices(part)), definitions) for part in _parts(schema) if part.get("type") in {"union", "tagged-union"}
    )


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            is_schema = isinstance(part.get("type"), str)
            if is_schema:
                yield part
            waiting.extend(value for key, value in part.items() if not (is_schema and key in _NO_SCHEMAS))
        elif isinstance(part, list | tuple):
            waiting.extend(part)


def _is_packed(schema: dict[str, Any]) -> bool:
    return bool((schema.get("metadata") or {}).get(PACKED))


def _choices(union: dict[str, Any]) -> Iterator[Any]:
    choices = union["choices"]
    for choice in choices.values() if isinstance(choices, dict) else choices:
        yield choice[0] if isinstance(choice, tuple) else choice


def _collides(choices: list[Any], definitions: dict[str, Any]) -> bool:
    places = [list(_places(choice, (), definitions, frozenset())) for choice in choices]
    return any(
        kind == PACKED and other_kind != PACKED and _meet(path, other, is_all=other_kind == "any")
        for number, own in enumerate(places)
        for path, kind in own
        for other_number, others in enumerate(places)
        if other_number != number
        for other, other_kind in others
    )


def _meet(path: _Path, other: _Path, *, is_all: bool) -> bool:
    """Return whether JSON may have both in one place; what takes all takes what is inside, too."""
    if len(other) > len(path) or (len(other) < len(path) and not is_all):
        return False
    return all(map(_may_be_one, path, other))


def _may_be_one(part: str, other: str) -> bool:
    return part == other or _ANY_PART in {part, other} or (_VALUE in {part, other} and _ITEM not in {part, other})


def _places(schema: Any, path: _Path, definitions: dict[str, Any], active: frozenset[str]) -> Iterator[tuple[_Path, str]]:  # noqa: C901, PLR0912 (one for each kind of schema)
    """Find where JSON may have binary content, texts, or anything."""
    kind = schema["type"]
    if "allow" in {schema.get("extra_behavior"), (schema.get("config") or {}).get("extra_fields_behavior")}:
        yield (*path, _VALUE), "any"
    if _is_packed(schema):
        yield path, PACKED
    elif kind in _NOT_TEXT:
        return
    elif kind in _TEXT:
        yield path, "text"
    elif kind == "definition-ref":
        ref = schema["schema_ref"]
        if ref not in active and ref in definitions:
            yield from _places(definitions[ref], path, definitions, active | {ref})
    elif kind in {"union", "tagged-union"}:
        for choice in _choices(schema):
            yield from _places(choice, path, definitions, active)
    elif kind == "chain":
        yield from _places(schema["steps"][0], path, definitions, active)
    elif kind in {"list", "set", "frozenset", "generator", "tuple"}:
        items = schema.get("items_schema", {"type": "any"})
        for item in items if isinstance(items, list) else [items]:
            yield from _places(item, (*path, _ITEM), definitions, active)
    elif kind == "dict":
        yield from _places(schema.get("values_schema", {"type": "any"}), (*path, _VALUE), definitions, active)
    elif kind in {"model-fields", "typed-dict", "dataclass-args"}:
        fields = schema["fields"]
        pairs = fields.items() if isinstance(fields, dict) else [(field["name"], field) for field in fields]
        for name, field in pairs:
            for shown in {name, str(field.get("validation_alias", name))}:
                yield from _places(field["schema"], (*path, "." + shown), definitions, active)
    elif kind in {"arguments", "named-tuple"}:
        for argument in schema["arguments_schema" if kind == "arguments" else "fields"]:
            yield from _places(argument["schema"], (*path, _ANY_PART), definitions, active)
    else:
        inner = [schema[name] for name in _INNER if name in schema]
        if not inner:
            yield path, "any"
            if holds_packed(schema):
                yield (*path, _ANY_PART), PACKED
        for part in inner:
            yield from _places(part, path, definitions, active)
