"""The extensions in `/openapi.json`."""

from typing import Final

from aiokv.backends.capabilities import MAX_BATCH_KEYS, MAX_CLAIM_SECONDS, MIN_CLAIM_SECONDS
from aiokv.batch_wire import MAX_BATCH_BODY_BYTES
from aiokv.limits import DEFAULT_TTL_SECONDS, MAX_TTL_SECONDS, MIN_TTL_SECONDS
from aiokv.server.openapi_parts import BY_THE_BODY, Node, operation_of, ref, success

_KEY: Final[Node] = {"type": "string", "minLength": 1, "pattern": "^[^\\u0000]+$", "not": {"enum": [".", ".."]}}
_INDEX: Final[Node] = {"type": "integer", "minimum": 0, "maximum": MAX_BATCH_KEYS - 1}

PARAMETERS: Final[Node] = {
    "prefix": {
        "name": "prefix",
        "in": "query",
        "description": "What the keys begin with; all keys where it is left out. A `+` stands for itself.",
        "schema": {"type": "string", "pattern": "^[^\\u0000]*$"},
        "example": "user:",
    },
    "limit": {
        "name": "limit",
        "in": "query",
        "description": "Most keys of one answer.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_BATCH_KEYS, "default": MAX_BATCH_KEYS},
    },
    "after": {
        "name": "after",
        "in": "query",
        "description": "The `next` of the page or step before, with the same prefix; left out for the first one.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 8_000},
    },
    "owner": {
        "name": "owner",
        "in": "query",
        "required": True,
        "description": "Who claims, different from everybody else, such as 128 random bits in hexadecimal. A secret.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"},
        "example": "9f86d081884c7d65",
    },
    "seconds": {
        "name": "seconds",
        "in": "query",
        "required": True,
        "description": "How long the claim lasts from now on, with up to twenty decimals.",
        "schema": {"type": "number", "minimum": MIN_CLAIM_SECONDS, "maximum": MAX_CLAIM_SECONDS},
        "example": 15,
    },
    "renew": {
        "name": "renew",
        "in": "query",
        "description": "Take the claim only where the owner holds it already: a late renewal then takes nothing.",
        "schema": {"type": "integer", "enum": [1]},
    },
    "Last-Event-ID": {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "The id of the event after which the stream shall go on, if it can; else it begins with `lost`.",
        "schema": {"type": "string"},
    },
}

SCHEMAS: Final[Node] = {
    "Batch": {
        "type": "object",
        "description": "Exactly one member. A key may come twice; the entries of a set apply in their order.",
        "oneOf": [
            {
                "required": [verb],
                "properties": {verb: {"type": "array", "minItems": 1, "maxItems": MAX_BATCH_KEYS, "items": items}},
                "additionalProperties": False,
            }
            for verb, items in (("get", _KEY), ("set", {"$ref": "#/components/schemas/Entry"}), ("delete", _KEY))
        ],
    },
    "Entry": {
        "type": "object",
        "required": ["key", "value"],
        "properties": {
            "key": _KEY,
            "value": {"type": "string"},
            "ttl": {
                "type": "integer",
                "minimum": MIN_TTL_SECONDS,
                "maximum": MAX_TTL_SECONDS,
                "default": DEFAULT_TTL_SECONDS,
            },
        },
        "additionalProperties": False,
    },
    "BatchResult": {
        "type": "object",
        "description": "`values` for a get, `done` for a set or delete.",
        "properties": {
            "values": {"type": "array", "items": {"type": ["string", "null"]}, "maxItems": MAX_BATCH_KEYS},
            "omitted": {"type": "array", "items": _INDEX, "description": "Keys that had no room; ask for them again."},
            "done": {"type": "integer", "minimum": 0, "maximum": MAX_BATCH_KEYS, "description": "Keys that are done."},
            "errors": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["index", "status", "error"],
                    "properties": {
                        "index": _INDEX,
                        "status": {"type": "integer", "minimum": 400, "maximum": 599},
                        "error": {"type": "string"},
                        "maybe_applied": {"type": "boolean"},
                    },
                },
            },
        },
    },
    "Page": {
        "type": "object",
        "required": ["keys", "next", "ordered"],
        "properties": {
            "keys": {
                "type": "array",
                "maxItems": MAX_BATCH_KEYS,
                "items": {
                    "type": "object",
                    "required": ["key", "expires_at", "value_bytes"],
                    "properties": {
                        "key": {"type": "string"},
                        "expires_at": {"type": "number", "description": "Seconds since the epoch by the store's clock."},
                        "value_bytes": {"type": "integer", "minimum": 0},
                    },
                },
            },
            "next": {"type": ["string", "null"], "description": "`after` of the next page; null at the end."},
            "ordered": {"type": "boolean", "description": "Whether keys come in the order of their code points."},
        },
    },
    "Count": {
        "type": "object",
        "required": ["count"],
        "properties": {"count": {"type": "integer", "minimum": 0}},
    },
    "Deleted": {
        "type": "object",
        "required": ["deleted", "next"],
        "properties": {
            "deleted": {"type": "integer", "minimum": 0, "maximum": MAX_BATCH_KEYS},
            "next": {"type": ["string", "null"], "description": "`after` of the next step; null at the end."},
        },
    },
    "Claim": {
        "type": "object",
        "required": ["held", "seconds_left"],
        "properties": {"held": {"type": "boolean"}, "seconds_left": {"type": "number", "minimum": 0}},
    },
    "Released": {"type": "object", "required": ["released"], "properties": {"released": {"type": "boolean"}}},
}


def extension_paths() -> Node:
    """Return the paths of the extensions."""
    request_id, db_name, key = (ref("parameters", name) for name in ("X-Request-Id", "db_name", "key"))

    def described(
        operation_id: str,
        summary: str,
        success: Node,
        parameters: tuple[str, ...],
        refusals: tuple[int, ...],
        **further: object,
    ) -> Node:
        return operation_of(
            operation_id,
            "extensions",
            summary,
            success,
            (401, 429, *refusals),
            security=("token",),
            parameters=[ref("parameters", name) for name in parameters],
            **further,
        )

    def answer(description: str, schema: str) -> Node:
        return success(description, "application/json", ref("schemas", schema))

    not_held = answer(
        "Another owner holds it; `seconds_left` is how long, unless it renews or releases it. A renewal may find no holder.",
        "Claim",
    )
    claim = described("claim", "Take or renew a claim.", answer("It is held.", "Claim"), ("owner", "seconds", "renew"), (507,))
    claim["responses"]["409"] = not_held
    operations: dict[str, tuple[list[Node], Node]] = {
        "/batch/{db_name}": (
            [db_name],
            {
                "post": described(
                    "batch",
                    "Get, set or delete up to 1,000 keys.",
                    answer("An outcome for each key.", "BatchResult"),
                    (),
                    (*BY_THE_BODY, 507),
                    requestBody={
                        "required": True,
                        "description": f"JSON of {MAX_BATCH_BODY_BYTES:,} bytes at most. The Content-Type is not looked at.",
                        "content": {"application/json": {"schema": ref("schemas", "Batch")}},
                    },
                )
            },
        ),
        "/keys/{db_name}": (
            [db_name, ref("parameters", "prefix"), ref("parameters", "limit")],
            {
                "get": described("listKeys", "List keys, in pages.", answer("A page.", "Page"), ("after",), ()),
                "delete": described(
                    "clear",
                    "Delete some entries; repeat with `after` until `next` is null.",
                    answer("How many were deleted.", "Deleted"),
                    ("after",),
                    (),
                ),
            },
        ),
        "/count/{db_name}": (
            [db_name, ref("parameters", "prefix")],
            {"get": described("count", "Count entries.", answer("Their number.", "Count"), (), ())},
        ),
        "/claims/{db_name}/{key}": (
            [db_name, key],
            {
                "put": claim,
                "delete": described(
                    "release",
                    "Give a claim back.",
                    answer("Whether the owner held it until now.", "Released"),
                    ("owner",),
                    (),
                ),
            },
        ),
        "/watch/{db_name}": (
            [db_name],
            {
                "get": described(
                    "watch",
                    "Be told of changes, as server-sent events, until either side ends the stream.",
                    success(
                        "Events `changed` with `{key, delete}`, `lost` where some may be missing, and `alive` in between.",
                        "text/event-stream",
                        {"type": "string"},
                    ),
                    ("Last-Event-ID",),
                    (),
                )
            },
        ),
    }
    return {path: {"parameters": [*names, request_id], **methods} for path, (names, methods) in operations.items()}
