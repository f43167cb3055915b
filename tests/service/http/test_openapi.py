"""The OpenAPI document: complete, true to its own schemas, and the same as the agreed one.

The agreed one is `openapi.json` beside this file. After an intended change:

    make test ARGS="tests/service/http/test_openapi.py --write-openapi"
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ditserve.service.api_keys import add
from ditserve.service.formats import CONTENT_TYPES
from tests.service.http.conftest import OpenStage, Stage

pytestmark = pytest.mark.anyio

AGREED = Path(__file__).with_name("openapi.json")
REWRITE = f"if this is meant: make test ARGS='tests/service/http/{Path(__file__).name} --write-openapi'"


@pytest.fixture
async def document(open_stage: OpenStage, tmp_path: Path) -> dict[str, Any]:
    """Return the document of an API that asks for keys, which has the most entries."""
    add(tmp_path / "keys.json", "anybody")
    stage = await open_stage(keys_file=tmp_path / "keys.json")
    document: dict[str, Any] = (await stage.client.get("/openapi.json")).json()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the description of each request and response that is text."""
    for name, operation in operations(document):
        contents = {"request": operation.get("requestBody", {}).get("content", {})}
        contents |= {
            status: response.get("content", {}) for status, response in operation["responses"].items()
        }
        for part, content in contents.items():
            for media_type, body in content.items():
                if media_type not in CONTENT_TYPES.values():
                    yield f"{name} {part} {media_type}", body


async def test_the_document_is_the_agreed_one(
    document: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--write-openapi"):
        AGREED.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    assert document == json.loads(AGREED.read_text()), REWRITE


async def test_without_keys_it_is_the_same_but_for_them(stage: Stage, document: dict[str, Any]) -> None:
    bare = (await stage.client.get("/openapi.json")).json()
    del document["components"]["securitySchemes"]
    for _, operation in operations(document):
        if operation.pop("security", None):
            for status in ("401", "403", "429"):
                del operation["responses"][status]
    # Without keys only event streams are limited.
    limited = [name for name, operation in operations(bare) if operation["responses"].pop("429", None)]
    assert len(limited) == 3
    assert bare == document


async def test_every_request_answer_and_parameter_has_an_example(document: dict[str, Any]) -> None:
    lacking = [name for name, body in bodies(document) if not body.get("examples") and "example" not in body]
    lacking += [
        f"{name} {parameter['name']}"
        for name, operation in operations(document)
        for parameter in operation.get("parameters", ())
        if "example" not in parameter
    ]
    assert lacking == [], "give it one in service/http/examples.py"


async def test_every_example_follows_its_schema(document: dict[str, Any]) -> None:
    for name, body in bodies(document):
        schema = {**body.get("schema", {}), "components": document["components"]}
        values = [example["value"] for example in body.get("examples", {}).values()]
        values += [body["example"]] if "example" in body else []
        for value in values:
            jsonschema.validate(value, schema)
            assert set(value) <= properties(schema) or not properties(schema), name


def properties(schema: dict[str, Any]) -> set[str]:
    """Return the members that a referenced schema names, none if it allows others."""
    named = schema.get("$ref", "").rpartition("/")[2]
    described = schema["components"]["schemas"].get(named, {})
    return set() if described.get("additionalProperties") is True else set(described.get("properties", ()))


async def test_a_wrong_example_is_noticed(document: dict[str, Any]) -> None:
    body = document["paths"]["/generate"]["post"]["responses"]["202"]["content"]["application/json"]
    body["example"] = {**body["example"], "state": "asleep"}
    with pytest.raises(jsonschema.ValidationError):
        await test_every_example_follows_its_schema(document)


async def test_names_are_unique_and_nothing_is_left_of_the_framework(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(names)) == len(names)
    assert "HTTPValidationError" not in str(document)


async def test_example_requests_are_accepted(stage: Stage) -> None:
    document = (await stage.client.get("/openapi.json")).json()
    for path in ("/generate", "/v1/images/generations"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            response = await stage.client.post(path, json=example["value"])
            assert response.status_code == 200, response.text


async def test_documented_headers_are_sent(open_stage: OpenStage) -> None:
    stage = await open_stage(reuse_s=60)
    document = (await stage.client.get("/openapi.json")).json()
    answers = document["paths"]["/generate"]["post"]["responses"]
    drawn, queued = await stage.generate(), await stage.generate({"prefer": "respond-async"})
    for response in (drawn, queued):
        described = answers[str(response.status_code)]["headers"]
        assert {name.lower() for name in described} <= set(response.headers)
