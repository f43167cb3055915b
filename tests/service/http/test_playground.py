"""The playground and the reference: self-contained, and in a real browser they do what they promise."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.keyring import add
from tests.conftest import wait_until
from tests.service.http.conftest import OpenStage, Serve, Stage

pytestmark = pytest.mark.anyio

PAGES = ("/", "/docs")


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_asks_nobody_else(stage: Stage, path: str) -> None:
    response = await stage.client.get(path)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"""(src|href|url\(|@import|fetch\()\s*=?\s*["']?(https?:)?//""", response.text)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "style=" not in response.text
    assert not re.search(r"\son[a-z]+=", response.text)


async def test_every_control_has_a_name(stage: Stage) -> None:
    page = (await stage.client.get("/")).text
    labelled = set(re.findall(r'<label for="([\w-]+)"', page))
    controls = re.findall(r'<(?:input|select) (?:[^>]*?)id="([\w-]+)"', page)
    wrapped = set(re.findall(r'<label class="check"><input type="checkbox" id="([\w-]+)"', page))
    assert controls
    assert set(controls) <= labelled | wrapped


@asynccontextmanager
async def browsing(port: int, *, refusal: str) -> AsyncIterator[Any]:
    """The playground in a real browser. No fault may show in its console but answers of status `refusal`."""
    playwright = pytest.importorskip("playwright.async_api", reason="needs: pip install playwright")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    faults: list[str] = []
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = await browser.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        await page.goto(f"http://127.0.0.1:{port}/")
        yield page
        await browser.close()
    assert [fault for fault in faults if refusal not in fault] == []


class TestInChromium:
    """Needs `pip install playwright` and a Chromium on the PATH (`apt-get install chromium`)."""

    @pytest.fixture
    async def page(self, stage: Stage, serve: Serve) -> AsyncIterator[Any]:
        async with browsing(await serve(stage), refusal="422") as page:
            await page.wait_for_selector("#go:enabled")
            yield page

    async def test_generates_with_a_preview_and_keeps_it(self, stage: Stage, page: Any) -> None:
        stage.worker.hold = True
        await page.select_option("#factor-label", "lemon")
        await page.fill("#seed", "41")
        await page.fill("#count", "2")
        await page.click("#go")
        await page.wait_for_selector("figure.waiting img")
        await wait_until(lambda: stage.worker.claimed)
        (claim,) = stage.worker.claimed
        await stage.broker.finish(claim.lease, stage.worker.result(claim))
        await page.wait_for_selector("#facts:not([hidden])")
        assert await page.locator("#frames figcaption span").all_inner_texts() == ["seed 41", "seed 42"]
        assert "full" in await page.inner_text("#facts")
        assert await page.locator("#wall img").count() == 2
        assert claim.job.condition[0].labels[0] == 3

    async def test_cancels(self, stage: Stage, page: Any) -> None:
        stage.worker.hold = True
        await page.click("#go")
        await page.click("#stop")
        await page.get_by_text("Cancelled.", exact=True).wait_for()
        assert await page.is_enabled("#go")

    async def test_shows_an_error(self, stage: Stage, page: Any) -> None:
        stage.worker.fail_with = {"code": "numerical-error", "detail": "NaN at step 3.", "extra": {}}
        await page.click("#go")
        await page.wait_for_selector("#error:not([hidden])")
        assert "NaN at step 3." in await page.inner_text("#error")

    async def test_the_reference_lists_every_operation(self, page: Any) -> None:
        await page.goto(page.url + "docs")
        await page.wait_for_selector("h2")
        assert "/generate" in await page.locator("summary code").all_inner_texts()

    async def test_asks_for_a_key_once(self, open_stage: OpenStage, serve: Serve, tmp_path: Path) -> None:
        keys = tmp_path / "keys.json"
        _, text = add(keys, "visitor")
        async with browsing(await serve(await open_stage(keys_file=keys)), refusal="401") as page:
            await page.fill("#key", "dit_guess")
            await page.press("#key", "Enter")
            await page.get_by_text("unknown or was revoked").wait_for()
            await page.fill("#key", text)
            await page.press("#key", "Enter")
            await page.click("#go:enabled")
            await page.wait_for_selector(
                "#frames figure:not(.waiting) img"
            )  # an event stream and a picture: no header of ours
            assert await page.evaluate("document.cookie") == ""
            await page.reload()
            await page.wait_for_selector("#go:enabled")
