"""`/openapi.json`: the service described for programs, after OpenAPI 3.1."""

import functools
from collections.abc import Mapping
from typing import Any, Final

import orjson

from aiokv.limits import (
    DEFAULT_TTL_SECONDS,
    MAX_ENTRY_PATH_BYTES,
    MAX_TTL_SECONDS,
    MAX_VALUE_BYTES,
    MIN_TTL_SECONDS,
)
from aiokv.wire import METHODS, TOKEN_PATH

_Node = dict[str, Any]

_REFUSALS: Mapping[int, tuple[str, tuple[str, ...]]] = {
    400: ("The request is malformed, or an argument is outside its range.", ()),
    401: ("The credentials are missing, expired or not known.", ("WWW-Authenticate",)),
    403: ("The key may not do this; or, without accounts, the request came from a foreign host name or web page.", ()),
    404: ("There is no such key, or it has expired.", ()),
    405: ("The path takes another method.", ("Allow",)),
    408: ("The request did not arrive in time.", ()),
    413: ("The body is too large.", ()),
    415: ("The body has a Content-Encoding.", ()),
    429: ("The account's requests come faster than its limit.", ("Retry-After",)),
    431: ("The head of the request is too large.", ()),
    501: ("The body has a transfer coding other than chunked, or the request is one for a proxy.", ()),
    503: (
        "The store cannot answer now, or the server is full or stopping. Nothing was done unless it was under way.",
        ("Retry-After",),
    ),
    505: ("The request is of another version than HTTP/1.1 and 1.0.", ()),
    507: ("The store has no room left, or a quota would be exceeded. Nothing was stored.", ()),
}
# Any request may meet these, by its head alone.
_BY_THE_HEAD = (400, 403, 405, 408, 431, 501, 503, 505)
_BY_THE_BODY = (413, 415)

_HEADERS: Final[_Node] = {
    "Allow": {"description": "The method that the path takes.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "Seconds until a further attempt makes sense. Absent where none does, such as for a damaged value.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {"description": "The scheme of the credentials that are asked for.", "schema": {"type": "string"}},
    "X-Request-Id": {
        "description": "The id of the request: the client's own, or a new one.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
    },
}

_NAME_RULE = "It is not empty, `.` or `..`, holds no NUL, and is percent-encoded as UTF-8."
_PARAMETERS: Final[_Node] = {
    "db_name": {
        "name": "db_name",
        "in": "path",
        "required": True,
        "description": f"The namespace, isolated from every other. {_NAME_RULE} It holds no `/`.",
        "schema": {"type": "string", "minLength": 1, "pattern": "^[^/\\u0000]+$", "not": {"enum": [".", ".."]}},
        "example": "sessions",
    },
    "key": {
        "name": "key",
        "in": "path",
        "required": True,
        "description": (
            f"The key: everything after the slash behind `db_name`, further slashes included. {_NAME_RULE} `db_name` and `key` "
            f"are {MAX_ENTRY_PATH_BYTES:,} bytes at most together, as they are sent."
        ),
        "schema": {"type": "string", "minLength": 1, "pattern": "^[^\\u0000]+$", "not": {"enum": [".", ".."]}},
        "example": "user:1",
    },
    "ttl": {
        "name": "ttl",
        "in": "query",
        "description": "Seconds until the entry expires; 30 days where it is left out.",
        "schema": {
            "type": "integer",
            "minimum": MIN_TTL_SECONDS,
            "maximum": MAX_TTL_SECONDS,
            "default": DEFAULT_TTL_SECONDS,
        },
    },
    "X-Request-Id": {
        "name": "X-Request-Id",
        "in": "header",
        "description": (
            "An id for the logs of both sides: 1 to 128 characters of ASCII that can be printed, without quotes. "
            "Another one is made in place of any other text."
        ),
        "schema": {"type": "string"},
    },
}

_SCHEMAS: Final[_Node] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string", "minLength": 1, "description": "The cause and the way out, for a person."}},
    },
    "Value": {"type": "object", "required": ["value"], "properties": {"value": {"type": "string"}}},
    "Done": {"type": "object", "required": ["ok"], "properties": {"ok": {"const": True}}},
    "Token": {
        "type": "object",
        "required": ["token", "token_type", "base_url", "expires_at"],
        "properties": {
            "token": {"type": "string", "minLength": 1},
            "token_type": {"const": "Bearer"},
            "base_url": {"type": "string", "format": "uri", "description": "The address at which the token is good."},
            "expires_at": {"type": "string", "format": "date-time"},
        },
    },
}

_SECURITY_SCHEMES: Final[_Node] = {
    "token": {"type": "http", "scheme": "bearer", "description": f"A token of `POST {TOKEN_PATH}`."},
    "key": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "`Key <id>:<secret>`, as `aiokv access add` prints it.",
    },
    "operator": {
        "type": "http",
        "scheme": "basic",
        "description": "The id and the secret of a key with the flag `operator`.",
    },
}


@functools.lru_cache(maxsize=1)
def document(version: str = "1") -> bytes:
    """Build the document.

    Args:
        version: The version of the server.

    Returns:
        JSON in UTF-8, of the media type `application/json`; made once.
    """
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "aiokv",
                "version": version,
                "summary": "An expiring key-value store of text values.",
                "description": (
                    "Every value expires. The last write of a key wins. A set or delete that was answered with 200 is kept.\n\n"
                    "Without an access file the server takes any credentials or none, but only from programs of its machine."
                ),
                "license": {"name": "MIT", "identifier": "MIT"},
            },
            "servers": [{"url": "/"}],
            "tags": [
                {"name": "values", "description": "Read and write values."},
                {"name": "access", "description": "Exchange a key for a token."},
                {"name": "operation", "description": "Watch the server."},
            ],
            "paths": _entries() | _access() | _operation(),
            "components": {
                "schemas": _SCHEMAS,
                "parameters": _PARAMETERS,
                "headers": _HEADERS,
                "securitySchemes": _SECURITY_SCHEMES,
                "responses": {f"Status{status}": _refusal(*cells) for status, cells in _REFUSALS.items()},
            },
        }
    )


def _ref(kind: str, name: str) -> _Node:
    return {"$ref": f"#/components/{kind}/{name}"}


def _refusal(description: str, headers: tuple[str, ...]) -> _Node:
    return {
        "description": description,
        "headers": {name: _ref("headers", name) for name in (*headers, "X-Request-Id")},
        "content": {"application/json": {"schema": _ref("schemas", "Error")}},
    }


def _success(description: str, media_type: str, schema: _Node) -> _Node:
    return {
        "description": description,
        "headers": {"X-Request-Id": _ref("headers", "X-Request-Id")},
        "content": {media_type: {"schema": schema}},
    }


def _operation_of(  # noqa: PLR0913 (the parts of an operation)
    operation_id: str,
    tag: str,
    summary: str,
    success: _Node,
    refusals: tuple[int, ...] = (),
    *,
    security: tuple[str, ...] = (),
    **further: Any,
) -> _Node:
    statuses = sorted({*_BY_THE_HEAD, *refusals})
    return {
        "operationId": operation_id,
        "tags": [tag],
        "summary": summary,
        # The empty alternative: a server without accounts asks for no credentials.
        "security": [*({scheme: []} for scheme in security), {}],
        "responses": {"200": success, **{str(status): _ref("responses", f"Status{status}") for status in statuses}},
        **further,
    }


def _entries() -> _Node:
    names = [_ref("parameters", "db_name"), _ref("parameters", "key"), _ref("parameters", "X-Request-Id")]
    done = _ref("schemas", "Done")
    operations = {
        "get": _operation_of(
            "get",
            "values",
            "Read a value.",
            _success("The value.", "application/json", _ref("schemas", "Value")),
            (401, 404, 429),
            security=("token",),
        ),
        "set": _operation_of(
            "set",
            "values",
            "Store a value; replace the present one.",
            _success("The value is stored, durably where the store is a file.", "application/json", done),
            (401, 429, *_BY_THE_BODY, 507),
            security=("token",),
            parameters=[_ref("parameters", "ttl")],
            requestBody={
                "description": (
                    f"The value and nothing around it: UTF-8, {MAX_VALUE_BYTES:,} bytes at most. "
                    "No body is the empty value. The Content-Type is not looked at."
                ),
                "content": {"text/plain": {"schema": {"type": "string", "maxLength": MAX_VALUE_BYTES}}},
            },
        ),
        "delete": _operation_of(
            "delete",
            "values",
            "Delete an entry; succeed where there is none.",
            _success("There is no such entry now.", "application/json", done),
            (401, 429),
            security=("token",),
        ),
    }
    return {
        f"/{verb}/{{db_name}}/{{key}}": {"parameters": names, METHODS[verb].lower(): operation}
        for verb, operation in operations.items()
    }


def _access() -> _Node:
    exchange = _operation_of(
        "exchangeToken",
        "access",
        "Exchange a key for a token.",
        _success("The token, good for two hours.", "application/json", _ref("schemas", "Token")),
        (401, *_BY_THE_BODY),
        security=("key",),
        parameters=[_ref("parameters", "X-Request-Id")],
        description="A body is not looked at; it may have 64 KiB.",
    )
    return {TOKEN_PATH: {"post": exchange}}


def _operation() -> _Node:
    done = _ref("schemas", "Done")
    pages = {
        "/livez": ("isAlive", "Learn whether the process runs.", "It runs.", "application/json", done, False),
        "/readyz": (
            "isReady",
            "Learn whether requests would succeed; 503 with the reason where not.",
            "They would.",
            "application/json",
            done,
            False,
        ),
        "/metrics": (
            "readMetrics",
            "Read the figures, as Prometheus does.",
            "The figures.",
            "text/plain",
            {"type": "string"},
            True,
        ),
        "/status": ("showStatus", "Look at the figures as a page.", "The page.", "text/html", {"type": "string"}, True),
        "/status.json": (
            "readStatus",
            "Read the figures of that page.",
            "The figures.",
            "application/json",
            {"type": "object"},
            True,
        ),
        "/openapi.json": (
            "describe",
            "Read this document.",
            "This document.",
            "application/json",
            {"type": "object"},
            False,
        ),
    }
    return {
        path: {
            "get": _operation_of(
                operation_id,
                "operation",
                summary,
                _success(description, media_type, schema),
                (401,) if is_guarded else (),
                security=("operator", "key") if is_guarded else (),
                parameters=[_ref("parameters", "X-Request-Id")],
            )
        }
        for path, (operation_id, summary, description, media_type, schema, is_guarded) in pages.items()
    }
