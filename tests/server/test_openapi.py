"""`/openapi.json`: a valid document that says what the service does."""

from typing import Any

import orjson
import pytest

from aiokv.server.openapi import document
from aiokv.wire import METHODS, TOKEN_PATH, parse_entry_path, parse_ttl_query

METHOD_NAMES = {"get", "put", "post", "delete"}


@pytest.fixture
def described() -> dict[str, Any]:
    value: dict[str, Any] = orjson.loads(document())
    return value


def operations(described: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (path, method): operation
        for path, item in described["paths"].items()
        for method, operation in item.items()
        if method in METHOD_NAMES
    }


def follow(described: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Return what a node refers to, or itself."""
    reference = node.get("$ref")
    if reference is None:
        return node
    target: Any = described
    for step in reference.removeprefix("#/").split("/"):
        target = target[step]
    assert isinstance(target, dict)
    return target


def test_the_document_is_valid(described: dict[str, Any]) -> None:
    validator = pytest.importorskip("openapi_spec_validator", reason="pip install openapi-spec-validator")
    validator.validate(described)
    assert described["openapi"].startswith("3.1.")


def test_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    pending: list[Any] = [described]
    followed = 0
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            follow(described, node)
            followed += "$ref" in node
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    assert followed > 100


def test_every_path_of_the_service_is_there_with_its_method(described: dict[str, Any]) -> None:
    expected = {(f"/{verb}/{{db_name}}/{{key}}", method.lower()) for verb, method in METHODS.items()}
    expected |= {(TOKEN_PATH, "post"), ("/batch/{db_name}", "post"), ("/keys/{db_name}", "get"), ("/keys/{db_name}", "delete")}
    expected |= {("/count/{db_name}", "get"), ("/watch/{db_name}", "get")}
    expected |= {("/claims/{db_name}/{key}", method) for method in ("put", "delete")}
    expected |= {(path, "get") for path in ("/livez", "/readyz", "/metrics", "/status", "/status.json", "/openapi.json")}
    assert set(operations(described)) == expected


def test_each_operation_has_an_id_of_its_own(described: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(described).values()]
    assert len(set(ids)) == len(ids)


def test_every_refusal_is_an_error_in_json(described: dict[str, Any]) -> None:
    error = {"$ref": "#/components/schemas/Error"}
    for operation in operations(described).values():
        for status, response in operation["responses"].items():
            content = follow(described, response)["content"]
            # A claim that another owner holds is no error.
            assert (content == {"application/json": {"schema": error}}) == (status not in {"200", "409"})
    schema = described["components"]["schemas"]["Error"]
    assert schema["required"] == ["error"]
    assert schema["properties"]["error"]["type"] == "string"


@pytest.mark.parametrize(
    ("verb", "method", "statuses"),
    [
        ("get", "get", {200, 400, 401, 403, 404, 405, 408, 429, 431, 501, 503, 505}),
        ("set", "put", {200, 400, 401, 403, 405, 408, 413, 415, 429, 431, 501, 503, 505, 507}),
        ("delete", "delete", {200, 400, 401, 403, 405, 408, 429, 431, 501, 503, 505}),
    ],
)
def test_the_statuses_of_a_verb_are_declared(described: dict[str, Any], verb: str, method: str, statuses: set[int]) -> None:
    responses = described["paths"][f"/{verb}/{{db_name}}/{{key}}"][method]["responses"]
    assert {int(status) for status in responses} == statuses


@pytest.mark.parametrize(
    ("status", "header"), [(401, "WWW-Authenticate"), (405, "Allow"), (429, "Retry-After"), (503, "Retry-After")]
)
def test_the_headers_of_a_refusal_are_declared(described: dict[str, Any], status: int, header: str) -> None:
    headers = described["components"]["responses"][f"Status{status}"]["headers"]
    assert follow(described, headers[header])["schema"]


def test_no_operation_declares_an_internal_error(described: dict[str, Any]) -> None:
    assert all("500" not in operation["responses"] for operation in operations(described).values())


@pytest.mark.parametrize(
    ("path", "method", "more"),
    [
        ("/batch/{db_name}", "post", {413, 415, 507}),
        ("/keys/{db_name}", "get", set[int]()),
        ("/keys/{db_name}", "delete", set[int]()),
        ("/count/{db_name}", "get", set[int]()),
        ("/claims/{db_name}/{key}", "put", {409, 507}),
        ("/claims/{db_name}/{key}", "delete", set[int]()),
        ("/watch/{db_name}", "get", set[int]()),
    ],
)
def test_the_statuses_of_an_extension_are_declared(described: dict[str, Any], path: str, method: str, more: set[int]) -> None:
    responses = described["paths"][path][method]["responses"]
    assert {int(status) for status in responses} == {200, 400, 401, 403, 405, 408, 429, 431, 501, 503, 505} | more


def test_the_range_of_the_ttl_is_that_of_the_service(described: dict[str, Any]) -> None:
    schema = described["components"]["parameters"]["ttl"]["schema"]
    for inside in (schema["minimum"], schema["maximum"], schema["default"]):
        assert parse_ttl_query(f"ttl={inside}") == inside
    for outside in (schema["minimum"] - 1, schema["maximum"] + 1):
        with pytest.raises(ValueError, match="ttl"):
            parse_ttl_query(f"ttl={outside}")


def test_the_examples_of_names_are_taken(described: dict[str, Any]) -> None:
    parameters = described["components"]["parameters"]
    names = parameters["db_name"]["example"], parameters["key"]["example"]
    assert parse_entry_path("/".join(names)) == names


def test_the_document_is_made_once_and_names_the_version() -> None:
    assert document("7.8") is document("7.8")
    assert orjson.loads(document("7.8"))["info"]["version"] == "7.8"
