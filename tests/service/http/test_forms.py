"""Pictures through `POST /generate` as JSON and as a form, and bodies that mean harm."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ditserve.service.http import middleware, protocol
from ditserve.service.http.body_reader import MAX_FIELDS
from ditserve.service.source_picture import decode
from tests.conftest import wait_until
from tests.service.http.conftest import OpenStage, Serve, Stage
from tests.service.http.test_pictures import halves, saved

pytestmark = pytest.mark.anyio

PICTURE = saved(halves(32, 16))
MASK = saved(Image.new("L", (16, 8), 255))
KEY = {"idempotency-key": "order-1"}


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def files(**more: bytes) -> dict[str, tuple[str, bytes]]:
    return {name: ("a.png", data) for name, data in ({"image": PICTURE} | more).items()}


async def send(stage: Stage, *parts: bytes, boundary: str = "b", **headers: str) -> httpx.Response:
    """Send a form that is written by hand."""
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return await stage.client.post("/generate", content=body, headers=kind | headers)


def part(name: str, content: bytes = b"1", more: str = "") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content


async def test_json_and_a_form_are_one_request(stage: Stage) -> None:
    fields: dict[str, Any] = {"strength": 0.5, "seed": 3, "steps": 10, "allow_degraded": False}
    condition = {"label": "lemon", "style": 1}
    sent = await stage.generate(KEY, image=url(PICTURE), mask=url(MASK), condition=condition, **fields)
    assert sent.status_code == 200, sent.text
    written = {name: json.dumps(value) for name, value in (fields | {"condition": condition}).items()}
    again = await stage.client.post("/generate", data=written, files=files(mask=MASK), headers=KEY)
    assert again.headers["idempotency-replayed"] == "true", again.text
    (claim,) = stage.worker.claimed
    source = claim.job.source
    assert source is not None
    assert source.mask is not None
    # The middle half of the picture, of the size that the model draws.
    assert np.array_equal(decode(source.image), np.asarray(halves(16, 16)))
    assert decode(source.mask).shape == (16, 16)
    assert (source.strength, claim.job.seeds, claim.job.steps) == (0.5, (3,), 5)


async def test_another_picture_is_another_request(stage: Stage) -> None:
    await stage.client.post("/generate", files=files(), headers=KEY)
    other = await stage.client.post("/generate", files=files(mask=MASK), headers=KEY)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency-mismatch")


async def test_a_form_needs_no_picture_and_texts_no_quotes(stage: Stage) -> None:
    data = {"prompt": "a lemon, noto", "n": "2", "size": "16x16", "format": "webp", "seed": ""}
    response = await stage.client.post("/generate", data=data, files={"mask": ("", b"")})
    assert response.status_code == 200, response.text
    job = stage.worker.claimed[-1].job
    assert (len(job.seeds), job.format, job.source) == (2, "webp", None)


async def test_asynchronously_and_as_one_file(stage: Stage) -> None:
    accepted = await stage.client.post("/generate", files=files(), headers={"prefer": "respond-async"})
    assert (accepted.status_code, accepted.headers["location"][:6]) == (202, "/jobs/")
    image = await stage.client.post("/generate", files=files(), headers={"accept": "image/png"})
    assert image.headers["content-type"] == "image/png"


async def test_a_data_url_may_be_written_as_php_does_and_be_large(open_stage: OpenStage) -> None:
    stage = await open_stage(max_body_bytes=256)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    body = json.dumps({"image": url(saved(Image.fromarray(noise)))}).replace("/", "\\/")
    kind = {"content-type": "application/json"}
    assert (await stage.client.post("/generate", content=body, headers=kind)).status_code == 200
    body = json.dumps({"image": url(PICTURE), "condition": {"label": "x" * 300}})
    response = await stage.client.post("/generate", content=body, headers=kind)
    assert (response.status_code, response.json()["code"]) == (413, "payload-too-large")
    assert "Besides its pictures" in response.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"image": "https://example.org/a.png"}, "image"),
        ({"image": url(b"GIF89a")}, "image"),
        ({"image": url(PICTURE)[:-3]}, "image"),
        ({"image": 7}, "image"),
        ({"image": url(PICTURE), "mask": url(PICTURE[:60])}, "mask"),
        ({"image": url(PICTURE), "mask": url(saved(halves(16, 16)))}, "mask"),
        ({"image": url(PICTURE), "strength": 0}, "strength"),
        ({"image": url(PICTURE), "strength": 1.5}, "strength"),
        ({"mask": url(MASK)}, "mask"),
        ({"strength": 0.5}, "strength"),
    ],
)
async def test_a_wrong_picture_is_422_and_its_field_named(
    stage: Stage, fields: dict[str, Any], pointer: str
) -> None:
    response = await stage.generate(**fields)
    assert (response.status_code, response.json()["code"]) == (422, "invalid-request"), response.text
    assert response.json()["errors"][0]["pointer"] == f"#/{pointer}"
    assert not stage.worker.claimed


PARTS: dict[str, tuple[tuple[bytes, ...], int, str]] = {
    "a field twice": ((part("seed"), part("seed")), 422, "seed: Send it once"),
    "two pictures": ((part("image[]", PICTURE, '; filename="a"'),) * 2, 422, "image: Send it once"),
    "an unknown field": ((part("colour"),), 422, "#/colour"),
    "an unknown file": ((part("colour", PICTURE, '; filename="a"'),), 422, "colour: Send it as a text"),
    "a file for a field": ((part("seed", b"1", '; filename="a"'),), 422, "seed: Send it as a text"),
    "not a number": ((part("seed", b"one"),), 422, "#/seed"),
    "not json": ((part("condition", b"lemon"),), 422, "condition: Write it in JSON"),
    "deep json": ((part("condition", b"[" * 60000),), 422, "condition: Write it in JSON"),
    "an empty picture": ((part("image", b"", '; filename="a"'),), 422, "#/image"),
    "no name": ((b'Content-Disposition: form-data; filename="a"\r\n\r\n1',), 400, "cannot be read"),
    "no disposition": ((b"Content-Type: text/plain\r\n\r\n1",), 400, "cannot be read"),
    "no headers": ((b"1",), 400, "cannot be read"),
    "a giant header": ((part("seed", b"1", "; x=" + "x" * 20000),), 400, "cannot be read"),
    "many headers": ((b"A: b\r\n" * 300 + part("seed"),), 400, "cannot be read"),
    "many tiny parts": (tuple(part(f"f{k}") for k in range(10000)), 400, f"{MAX_FIELDS}"),
    "many tiny files": (tuple(part(f"f{k}", b"", '; filename="a"') for k in range(10000)), 400, "files"),
    "a name of bytes": ((b'Content-Disposition: form-data; name="\xff\x00"\r\n\r\n1',), 422, "no such field"),
    "too much text": ((part("prompt", b"x" * 60000), part("model", b"x" * 60000)), 413, "Besides"),
}


@pytest.mark.parametrize(("parts", "status", "sentence"), PARTS.values(), ids=PARTS)
async def test_a_form_that_means_harm_is_refused(
    stage: Stage, parts: tuple[bytes, ...], status: int, sentence: str
) -> None:
    response = await send(stage, *parts)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert sentence in response.text
    assert not stage.worker.claimed


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=other"])
async def test_a_form_without_its_boundary_is_400(stage: Stage, kind: str) -> None:
    response = await stage.client.post("/generate", content=b"--b--\r\n", headers={"content-type": kind})
    assert (response.status_code, response.json()["code"]) == (400, "malformed-request")


async def test_a_form_that_was_cut_off_draws_nothing(stage: Stage) -> None:
    whole = (
        b"--b\r\n" + part("seed") + b"\r\n--b\r\n" + part("image", PICTURE, '; filename="a"') + b"\r\n--b--"
    )
    kind = {"content-type": "multipart/form-data; boundary=b"}
    for length in range(1, len(whole) - 6, 23):
        response = await stage.client.post("/generate", content=whole[:length], headers=kind)
        assert response.status_code in (400, 422), (length, response.text)
    assert not stage.worker.claimed


async def test_only_routes_of_pictures_take_forms(stage: Stage) -> None:
    for path in ("/v1/images/generations", "/session"):
        response = await stage.client.post(path, data={"prompt": "lemon"}, files=files())
        assert response.status_code == 415, path
    for path in ("/v1/images/edits", "/v1/images/variations"):
        response = await stage.client.post(path, json={"prompt": "lemon", "image": url(PICTURE)})
        assert response.status_code == 415, path


async def test_a_large_file_is_413_and_a_larger_body_too(open_stage: OpenStage) -> None:
    stage = await open_stage(max_picture_bytes=300)
    response = await stage.client.post("/generate", files=files(image=PICTURE + bytes(300)))
    assert (response.status_code, response.json()["code"]) == (413, "payload-too-large")
    assert "A picture may be 300 bytes" in response.json()["detail"]
    response = await stage.client.post("/generate", files=files(image=bytes(70000)))
    assert (response.status_code, response.json()["code"]) == (413, "payload-too-large")
    # Where no picture belongs, the body stays as small as it was.
    wide = {"prompt": "lemon", "user": "x" * 66000}
    assert (await stage.client.post("/v1/images/generations", json=wide)).status_code == 413


async def test_a_foreign_page_sends_no_form(open_stage: OpenStage) -> None:
    stage = await open_stage(cors_origins="https://shop.example")
    for origin in ("http://test", "http://test:8000", "https://shop.example"):
        assert (await send(stage, part("seed"), origin=origin)).status_code == 200, origin
    for origin in ("https://evil.example", "null", "http://test.evil.example", "http://"):
        response = await send(stage, part("seed"), origin=origin)
        assert (response.status_code, response.json()["code"]) == (415, "unsupported-media-type"), origin
    assert len(stage.worker.claimed) == 3


async def test_bodies_share_one_bound_until_they_are_answered(
    open_stage: OpenStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "HELD_BYTES", 0)
    stage = await open_stage(max_body_bytes=1000, max_picture_bytes=3000)  # one body of 9000 bytes fits
    stage.worker.hold = True
    padded = PICTURE + bytes(2500)
    first = [asyncio.create_task(stage.client.post("/generate", files=files(image=padded))) for _ in range(3)]
    await wait_until(lambda: len(stage.worker.claimed) == 3)
    refused = await stage.client.post("/generate", files=files(image=padded))
    assert (refused.status_code, refused.json()["code"]) == (503, "too-many-uploads")
    assert refused.headers["retry-after"] == "1"
    # Small bodies are let in, however many pictures there are.
    accepted = await stage.generate({"prefer": "respond-async"})
    assert accepted.status_code == 202
    for claim in stage.worker.claimed[:3]:
        await stage.broker.finish(claim.lease, stage.worker.result(claim))
    assert [response.status_code for response in await asyncio.gather(*first)] == [200] * 3
    stage.worker.hold = False
    assert (await stage.client.post("/generate", files=files(image=padded))).status_code == 200


async def test_a_slow_body_has_a_second_for_every_so_many_bytes(
    open_stage: OpenStage, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (middleware, protocol):
        monkeypatch.setattr(module, "BYTES_PER_S", 1000)
    stage = await open_stage(body_timeout_s=0.2)
    head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "

    async def answered(pieces: list[bytes], *, seconds: float) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + str(sum(map(len, pieces))).encode() + b"\r\nconnection: close\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(seconds)
        answer = await reader.read(15)
        writer.close()
        return answer

    port = await serve(stage)
    body = json.dumps({"image": url(PICTURE + bytes(3000))}).encode()
    pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    assert b" 200 " in await answered(pieces, seconds=0.3)
    assert b" 408 " in await answered([b"{", b"}"], seconds=0.5)
