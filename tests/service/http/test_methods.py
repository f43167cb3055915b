"""HEAD, OPTIONS, paths and methods that are not there, and pages of other origins, over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from ditserve.service.http.context import Context
from tests.conftest import wait_until
from tests.service.http.conftest import OpenStage, Serve, Stage

pytestmark = pytest.mark.anyio
PAGE = {"origin": "https://shop.example"}


@pytest.fixture
async def client(stage: Stage, serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client:
        yield client


async def test_head_is_get_without_the_body(stage: Stage, client: httpx.AsyncClient) -> None:
    job = await stage.queued()

    async def done() -> bool:
        return bool((await stage.client.get(job)).json()["state"] == "done")

    await wait_until(done)
    document = (await client.get("/openapi.json")).json()
    paths = [path for path, operations in document["paths"].items() if "get" in operations]
    paths = [path.replace("/jobs/{job_id}", job).format(k=0, name="fruits") for path in paths]
    for path in [*paths, "/", "/docs", "/openapi.json", "/jobs/none", "/no-such-page"]:
        head, got = await client.head(path), await client.get(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        changing = {"date", "x-request-id", "content-length", "transfer-encoding"}
        assert set(head.headers) - changing == set(got.headers) - changing, path


async def test_head_of_a_running_stream_ends_at_once(stage: Stage, client: httpx.AsyncClient) -> None:
    stage.worker.hold = True
    address = f"{await stage.queued()}/events"
    head = await asyncio.wait_for(client.head(address), 5)
    assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


@pytest.mark.parametrize("body", [b"{", b"", b"x" * 100_000])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
async def test_an_unknown_path_is_404_whatever_the_body(stage: Stage, method: str, body: bytes) -> None:
    response = await stage.client.request(method, "/v1/audio/speech", content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/models", "GET, HEAD"),
        ("GET", "/generate", "POST"),
        ("HEAD", "/generate", "POST"),
        ("PUT", "/jobs/1", "DELETE, GET, HEAD"),
        ("OPTIONS", "/generate", "POST"),
    ],
)
async def test_another_method_is_405_and_the_right_ones_are_named(
    stage: Stage, method: str, path: str, allowed: str
) -> None:
    response = await stage.client.request(method, path, content=b"x")
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


def preflight(method: str = "POST") -> dict[str, str]:
    asked = {"access-control-request-method": method, "access-control-request-headers": "authorization"}
    return PAGE | asked


def allowed(response: httpx.Response) -> str | None:
    origin: str | None = response.headers.get("access-control-allow-origin")
    return origin


async def test_pages_of_other_origins_are_kept_out(stage: Stage) -> None:
    response = await stage.client.options("/generate", headers=preflight())
    assert (response.status_code, allowed(response)) == (405, None)
    response = await stage.client.get("/models", headers=PAGE)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", ["https://other.example,https://shop.example", "*"])
async def test_pages_of_an_allowed_origin_are_let_in(
    open_stage: OpenStage, origins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await open_stage(cors_origins=origins)
    granted = "*" if origins == "*" else PAGE["origin"]
    response = await stage.client.options("/generate", headers=preflight())
    assert (response.status_code, allowed(response)) == (200, granted)
    assert response.headers["access-control-allow-headers"] == "authorization"
    assert response.headers["x-request-id"]
    drawn = await stage.generate(PAGE)
    assert (drawn.status_code, allowed(drawn)) == (200, granted)
    assert drawn.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-credentials" not in drawn.headers
    # Errors are readable too: one of a route, one of a layer, and one that nobody foresaw.
    monkeypatch.setattr(Context, "model", lambda *_: 1 / 0)
    wrong = await stage.generate(PAGE, n=0)
    late = await stage.client.post("/generate", content=b"x", headers=PAGE)
    crashed = await stage.generate(PAGE)
    assert [answer.status_code for answer in (wrong, late, crashed)] == [422, 415, 500]
    assert [allowed(answer) for answer in (wrong, late, crashed)] == [granted] * 3


async def test_pages_of_another_origin_than_the_allowed_are_kept_out(open_stage: OpenStage) -> None:
    stage = await open_stage(cors_origins="https://other.example")
    response = await stage.client.options("/generate", headers=preflight())
    assert (response.status_code, allowed(response)) == (400, None)
    assert allowed(await stage.generate(PAGE)) is None
