"""Bodies of requests that may hold pictures: JSON with data URLs, or a form whose files are the pictures.

A part of a form (RFC 7578) is a field of the JSON object: a file is a picture, any other part a value as it
is in JSON, but texts without their quotes. `image[]` is `image`, as OpenAI's clients call a list of one. A
file without a name and an empty text are left out, as browsers send the fields that nobody filled in.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ditserve.service.errors import InvalidRequest, MalformedRequest, PayloadTooLarge
from ditserve.service.http.operating_point import field_error
from ditserve.service.http.problems import invalid_body, media_type
from ditserve.service.http.routing import FORM
from ditserve.service.settings import Settings

# The fields that are pictures, and the most parts of a form.
PICTURES = frozenset({"image", "mask"})
MAX_FILES, MAX_FIELDS = 8, 64
# A text that begins so holds no more quotes than its own: what is between them is no structure of the JSON.
_PICTURE = re.compile(rb'"data:[^"]*"')

T = TypeVar("T", bound=BaseModel)


async def read_body(request: Request, kind: type[T]) -> T:
    """Return the body of a request as `kind`. Its errors are those of `errors`.

    To be called by the route: FastAPI takes as long to find the arguments of a dependency as to read a body.
    """
    settings: Settings = request.app.state.context.settings
    form = media_type(request.headers) == FORM
    fields = await _form_fields(request, kind, settings) if form else await _json(request, settings)
    try:
        # In a form every value is a text.
        return kind.model_validate(fields, strict=False if form else None)
    except ValidationError as error:
        raise invalid_body(error) from None


async def _json(request: Request, settings: Settings) -> Any:
    """Return the JSON of a body.

    It is bounded without its pictures: objects and lists take up to fifty times the memory of their text.
    """
    body = b"".join([chunk async for chunk in request.stream()])
    if not body:
        raise InvalidRequest("A body is required.")
    if len(body) > settings.max_body_bytes:
        rest = len(body) - sum(len(picture[0]) for picture in _PICTURE.finditer(body))
        if rest > settings.max_body_bytes:
            raise _too_large(settings)
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise MalformedRequest(f"The body is not valid JSON: {error.msg} at position {error.pos}.") from None
    except (RecursionError, ValueError):
        raise MalformedRequest("The body is not valid JSON.") from None


async def _form_fields(request: Request, kind: type[BaseModel], settings: Settings) -> dict[str, Any]:
    """Return the fields of a form by name."""
    # The parts stay in memory: the body is there already, and a disk may not be.
    parser = _WholeForm(
        request.headers,
        request.stream(),
        max_files=MAX_FILES,
        max_fields=MAX_FIELDS,
        max_part_size=settings.max_upload_bytes,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise MalformedRequest(f"The form cannot be read: {error.message}") from None
    try:
        return await _by_name(form, kind, settings)
    finally:
        await form.close()


async def _by_name(form: FormData, kind: type[BaseModel], settings: Settings) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    rest = 0
    for part, value in form.multi_items():
        name = part.removesuffix("[]")
        if name in fields:
            raise field_error(name, "Send it once.")
        if isinstance(value, UploadFile):
            if name not in PICTURES:
                raise field_error(name, "Send it as a text: only pictures are files.")
            if value.filename or value.size:
                fields[name] = await value.read()
            continue
        rest += 0 if name in PICTURES else len(value)
        if rest > settings.max_body_bytes:
            raise _too_large(settings)
        if value:
            fields[name] = _parsed(name, value) if name in _nested(kind) else value
    return fields


def _too_large(settings: Settings) -> PayloadTooLarge:
    return PayloadTooLarge(f"Besides its pictures the body may be {settings.max_body_bytes} bytes.")


class _WholeForm(MultiPartParser):
    """A parser that writes no file to the disk, however large it is, and refuses a form that has no end."""

    spool_max_size = 0
    _ended = False

    async def parse(self) -> FormData:
        self.stream = self._to_the_end(self.stream)
        return await super().parse()

    def on_end(self) -> None:
        self._ended = True

    async def _to_the_end(self, stream: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        async for chunk in stream:
            yield chunk
        if not self._ended:
            raise MultiPartException("It is cut off.")


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        raise field_error(name, "Write it in JSON.") from None


@cache
def _nested(kind: type[BaseModel]) -> frozenset[str]:
    """Return the fields of `kind` that are objects or lists."""
    properties = kind.model_json_schema()["properties"]
    return frozenset(name for name, schema in properties.items() if {"array", "object"} & set(_types(schema)))


def _types(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the types of the values that a schema takes."""
    yield from [schema["type"]] if "type" in schema else []
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _types(choice)
