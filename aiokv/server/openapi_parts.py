"""What the parts of `/openapi.json` are made of."""

from collections.abc import Mapping
from typing import Any, Final

Node = dict[str, Any]

REFUSALS: Mapping[int, tuple[str, tuple[str, ...]]] = {
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
    501: (
        "The body has a transfer coding other than chunked, the request is for a proxy, or the store cannot do what is asked.",
        (),
    ),
    503: (
        "The store cannot answer now, or the server is full or stopping. Nothing was done unless it was under way.",
        ("Retry-After",),
    ),
    505: ("The request is of another version than HTTP/1.1 and 1.0.", ()),
    507: ("The store has no room left, or a quota would be exceeded. Nothing was stored.", ()),
}
# Any request may meet these, by its head alone.
BY_THE_HEAD = (400, 403, 405, 408, 431, 501, 503, 505)
BY_THE_BODY = (413, 415)

HEADERS: Final[Node] = {
    "Allow": {"description": "The method that the path takes.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "Seconds until a further attempt makes sense. Absent where none does, such as for a damaged value.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {"description": "The scheme of the credentials that are asked for.", "schema": {"type": "string"}},
    "Aiokv-Extensions": {
        "description": "What the server can beyond get, set and delete: some of `batch`, `scan`, `claims` and `watch`.",
        "schema": {"type": "string"},
    },
    "X-Request-Id": {
        "description": "The id of the request: the client's own, or a new one.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
    },
}


def ref(kind: str, name: str) -> Node:
    """Refer to a component."""
    return {"$ref": f"#/components/{kind}/{name}"}


def refusal(description: str, headers: tuple[str, ...]) -> Node:
    """Describe an answer that is an error."""
    return {
        "description": description,
        "headers": {name: ref("headers", name) for name in (*headers, "X-Request-Id")},
        "content": {"application/json": {"schema": ref("schemas", "Error")}},
    }


def success(description: str, media_type: str, schema: Node) -> Node:
    """Describe an answer that is what was asked for."""
    return {
        "description": description,
        "headers": {name: ref("headers", name) for name in ("X-Request-Id", "Aiokv-Extensions")},
        "content": {media_type: {"schema": schema}},
    }


def operation_of(  # noqa: PLR0913 (the parts of an operation)
    operation_id: str,
    tag: str,
    summary: str,
    success: Node,
    refusals: tuple[int, ...] = (),
    *,
    security: tuple[str, ...] = (),
    **further: Any,
) -> Node:
    """Describe a method of a path.

    Args:
        operation_id: Its name for generated clients.
        tag: The group that it belongs to.
        summary: What it does, in one sentence.
        success: Its answer with status 200.
        refusals: Statuses beside those that any request may meet by its head alone.
        security: The credentials that it takes.
        further: Other members, such as `parameters`.

    Returns:
        The operation.
    """
    statuses = sorted({*BY_THE_HEAD, *refusals})
    return {
        "operationId": operation_id,
        "tags": [tag],
        "summary": summary,
        # The empty alternative: a server without accounts asks for no credentials.
        "security": [*({scheme: []} for scheme in security), {}],
        "responses": {"200": success, **{str(status): ref("responses", f"Status{status}") for status in statuses}},
        **further,
    }
