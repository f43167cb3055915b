"""The API below a path of a real nginx (apt-get install nginx-light), which removes the path or not."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from ditserve.service.api_keys import add
from tests.conftest import wait_until
from tests.service.http.conftest import Browse, OpenStage, Serve, Stage
from tests.service.queue.servers import free_port

pytestmark = pytest.mark.anyio

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
CONFIGURATION = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location /dit/ {{
      proxy_pass http://127.0.0.1:{upstream}{slash};
      proxy_http_version 1.1;
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto https;
    }}
  }}
}}
"""
Proxy = Callable[..., Awaitable[str]]


@pytest.fixture
async def proxy(serve: Serve, tmp_path: Path) -> AsyncIterator[Proxy]:
    """Serve a stage behind nginx; return the API's address there. `slash` makes nginx remove the path."""
    if NGINX is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    async with AsyncExitStack() as stack:

        async def start(stage: Stage, *, slash: str = "/") -> str:
            port, path = free_port(), tmp_path / "nginx.conf"
            upstream = await serve(stage)
            path.write_text(CONFIGURATION.format(folder=tmp_path, port=port, upstream=upstream, slash=slash))
            process = await asyncio.create_subprocess_exec(NGINX, "-c", str(path), "-p", str(tmp_path))

            async def stop() -> None:
                process.terminate()
                await process.wait()

            stack.push_async_callback(stop)
            await wait_until(lambda: listening(port))
            return f"http://127.0.0.1:{port}/dit"

        yield start


async def listening(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@pytest.mark.parametrize("slash", ["/", ""], ids=["removed", "kept"])
async def test_every_address_leads_back_through_the_proxy(
    open_stage: OpenStage, proxy: Proxy, slash: str
) -> None:
    stage = await open_stage(root_path="/dit", trusted_proxies="127.0.0.1")
    url = await proxy(stage, slash=slash)
    host = url.removesuffix("/dit")
    async with httpx.AsyncClient() as client:
        queued = await client.post(f"{url}/generate", json={}, headers={"prefer": "respond-async"})
        job = queued.json()
        assert queued.headers["location"] == job["links"]["self"] == f"/dit/jobs/{job['id']}"
        events = await client.get(host + job["links"]["events"])
        assert "event: done" in events.text
        for link in (job["links"]["self"], *job["links"]["images"]):
            assert (await client.get(host + link)).status_code == 200
        missing = await client.get(f"{url}/jobs/none")
        assert missing.json()["instance"] == "/dit/jobs/none"
        document = (await client.get(f"{url}/openapi.json")).json()
        assert document["servers"] == [{"url": "/dit"}]
        foreign = await client.get(f"{url}/models", headers={"host": "evil.example"})
        assert foreign.status_code == 421


async def test_the_playground_draws_behind_the_proxy(
    open_stage: OpenStage, proxy: Proxy, browse: Browse
) -> None:
    url = await proxy(await open_stage(root_path="/dit", trusted_proxies="127.0.0.1"))
    async with browse(f"{url}/") as page:
        await page.click("#go:enabled")
        await page.wait_for_selector("#frames figure:not(.waiting) img")
        await page.click("text=API")
        await page.wait_for_selector("h2")
        await page.click("text=Playground")
        await page.wait_for_selector("#go:enabled")


async def test_a_key_is_kept_for_this_path_and_for_https(
    open_stage: OpenStage, proxy: Proxy, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    _, text = add(keys, "visitor")
    url = await proxy(await open_stage(root_path="/dit", trusted_proxies="127.0.0.1", keys_file=keys))
    async with httpx.AsyncClient() as client:
        cookie: Any = (await client.post(f"{url}/session", json={"key": text})).headers["set-cookie"]
    assert "Path=/dit/" in cookie
    assert "Secure" in cookie
