"""`/openapi.json`: the service described for programs, after OpenAPI 3.1."""

import functools
from typing import Final

import orjson

from aiokv.limits import (
    DEFAULT_TTL_SECONDS,
    MAX_ENTRY_PATH_BYTES,
    MAX_TTL_SECONDS,
    MAX_VALUE_BYTES,
    MIN_TTL_SECONDS,
)
from aiokv.server.openapi_extensions import PARAMETERS, SCHEMAS, extension_paths
from aiokv.server.openapi_parts import BY_THE_BODY, HEADERS, REFUSALS, Node, operation_of, ref, refusal, success
from aiokv.wire import METHODS, TOKEN_PATH

_NAME_RULE = "It is not empty, `.` or `..`, holds no NUL, and is percent-encoded as UTF-8."
_PARAMETERS: Final[Node] = {
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

_SCHEMAS: Final[Node] = {
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

_SECURITY_SCHEMES: Final[Node] = {
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
                {
                    "name": "extensions",
                    "description": "Many keys at once, listings, claims and news of changes, where the store can do that.",
                },
                {"name": "access", "description": "Exchange a key for a token."},
                {"name": "operation", "description": "Watch the server."},
            ],
            "paths": _entries() | extension_paths() | _access() | _operation(),
            "components": {
                "schemas": _SCHEMAS | SCHEMAS,
                "parameters": _PARAMETERS | PARAMETERS,
                "headers": HEADERS,
                "securitySchemes": _SECURITY_SCHEMES,
                "responses": {f"Status{status}": refusal(*cells) for status, cells in REFUSALS.items()},
            },
        }
    )


def _entries() -> Node:
    names = [ref("parameters", "db_name"), ref("parameters", "key"), ref("parameters", "X-Request-Id")]
    done = ref("schemas", "Done")
    operations = {
        "get": operation_of(
            "get",
            "values",
            "Read a value.",
            success("The value.", "application/json", ref("schemas", "Value")),
            (401, 404, 429),
            security=("token",),
        ),
        "set": operation_of(
            "set",
            "values",
            "Store a value; replace the present one.",
            success("The value is stored, durably where the store is a file.", "application/json", done),
            (401, 429, *BY_THE_BODY, 507),
            security=("token",),
            parameters=[ref("parameters", "ttl")],
            requestBody={
                "description": (
                    f"The value and nothing around it: UTF-8, {MAX_VALUE_BYTES:,} bytes at most. "
                    "No body is the empty value. The Content-Type is not looked at."
                ),
                "content": {"text/plain": {"schema": {"type": "string", "maxLength": MAX_VALUE_BYTES}}},
            },
        ),
        "delete": operation_of(
            "delete",
            "values",
            "Delete an entry; succeed where there is none.",
            success("There is no such entry now.", "application/json", done),
            (401, 429),
            security=("token",),
        ),
    }
    return {
        f"/{verb}/{{db_name}}/{{key}}": {"parameters": names, METHODS[verb].lower(): operation}
        for verb, operation in operations.items()
    }


def _access() -> Node:
    exchange = operation_of(
        "exchangeToken",
        "access",
        "Exchange a key for a token.",
        success("The token, good for two hours.", "application/json", ref("schemas", "Token")),
        (401, *BY_THE_BODY),
        security=("key",),
        parameters=[ref("parameters", "X-Request-Id")],
        description="A body is not looked at; it may have 64 KiB.",
    )
    return {TOKEN_PATH: {"post": exchange}}


def _operation() -> Node:
    done = ref("schemas", "Done")
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
            "get": operation_of(
                operation_id,
                "operation",
                summary,
                success(description, media_type, schema),
                (401,) if is_guarded else (),
                security=("operator", "key") if is_guarded else (),
                parameters=[ref("parameters", "X-Request-Id")],
            )
        }
        for path, (operation_id, summary, description, media_type, schema, is_guarded) in pages.items()
    }
