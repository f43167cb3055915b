"""The playground and the reference: self-contained, and in a real browser they do what they promise."""

import asyncio
import copy
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.service.api_keys import add
from ditserve.service.fleet import Network
from ditserve.service.images import encode
from ditserve.service.jobs import ConditionTerm
from ditserve.service.source_picture import decode
from tests.conftest import wait_until
from tests.service.http.conftest import MANIFEST, Browse, OpenStage, Serve, Stage
from tests.service.http.test_clips import clip_manifest
from tests.service.http.test_pictures import halves, saved

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


def home(port: int) -> str:
    return f"http://127.0.0.1:{port}/"


# WCAG 2.2 contrast ratio of the text of each element that is shown, on the nearest opaque ground behind it.
CONTRAST = """(elements) => elements.filter((e) => e.checkVisibility() && !e.disabled).map((element) => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const background = (e) => getComputedStyle(e).backgroundColor;
  let ground = element;
  while (ground.parentElement && numbers(background(ground))[3] === 0) ground = ground.parentElement;
  const light = (colour) => numbers(colour).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, k) => sum + value * [0.2126, 0.7152, 0.0722][k], 0);
  const colours = [getComputedStyle(element).color, background(ground)];
  const [dark, bright] = colours.map(light).sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
})"""


# Drops a file of these bytes on the page.
DROP = """([name, bytes]) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([new Uint8Array(bytes)], name));
  const how = { dataTransfer, bubbles: true, cancelable: true };
  const target = document.querySelector("main");
  for (const kind of ["dragover", "drop"]) target.dispatchEvent(new DragEvent(kind, how));
}"""


def file(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


@pytest.fixture
def many_fruits(tmp_path: Path) -> Path:
    """A bundle with more names than a drop-down should hold."""
    manifest = copy.deepcopy(MANIFEST)
    manifest["factors"][0]["classes"] += [f"fruit-{number}" for number in range(20)]
    manifest["config"]["classes"][0] += 20
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


class TestInChromium:
    """Needs `pip install playwright` and a Chromium on the PATH (`apt-get install chromium`)."""

    @pytest.fixture
    async def page(self, stage: Stage, serve: Serve, browse: Browse) -> AsyncIterator[Any]:
        async with browse(home(await serve(stage))) as page:
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

    async def test_classes_of_one_name_are_told_apart_by_number(
        self, open_stage: OpenStage, serve: Serve, many_fruits: Path, browse: Browse
    ) -> None:
        manifest = json.loads((many_fruits / "manifest.json").read_text())
        manifest["factors"][0]["classes"][2:5] = ["crane", "lemon", "crane"]
        (many_fruits / "manifest.json").write_text(json.dumps(manifest))
        stage = await open_stage(bundle=many_fruits)
        async with browse(home(await serve(stage))) as page:
            await page.wait_for_selector("#go:enabled")
            await page.fill("#factor-label", "crane")
            assert await page.locator("#factor-label-list li").all_inner_texts() == ["crane (2)", "crane (4)"]
            await page.get_by_text("crane (4)", exact=True).click()
            await page.click("#go")
            await page.wait_for_selector("#facts:not([hidden])")
            assert stage.worker.claimed[-1].job.condition[0].labels[0] == 4
            await page.locator("#wall button").first.click()
            assert await page.input_value("#factor-label") == "crane (4)"

    async def test_a_model_that_reads_text_is_asked_in_words(
        self, open_stage: OpenStage, serve: Serve, many_fruits: Path, browse: Browse
    ) -> None:
        manifest = json.loads((many_fruits / "manifest.json").read_text())
        manifest["config"]["text_size"] = 8
        usual, other, *_ = manifest["factors"][1]["classes"]
        manifest["factors"][1]["default"] = usual
        (many_fruits / "manifest.json").write_text(json.dumps(manifest))
        stage = await open_stage(bundle=many_fruits)
        async with browse(home(await serve(stage))) as page:
            await page.wait_for_selector("#go:enabled")
            classes = manifest["factors"][0]["classes"]
            ideas = await page.locator("#ideas option").evaluate_all("all => all.map((one) => one.value)")
            assert ideas == [name.replace("-", " ") for name in classes]
            asked = await page.input_value("#text")
            assert asked.split(", ")[0] in ideas
            await page.click("#go")
            await page.wait_for_selector("#facts:not([hidden])")
            (term,) = stage.worker.claimed[-1].job.condition
            named = [factor["classes"][k] for factor, k in zip(manifest["factors"], term.labels, strict=True)]
            assert (term.text, ", ".join(named).replace("-", " ")) == ("", asked)
            await page.fill("#text", f"{asked} with a hat")
            await page.click("#go")
            await page.wait_for_selector(f"#wall button[title^='{asked} with a hat']")
            (term,) = stage.worker.claimed[-1].job.condition
            assert (term.text, term.labels[0]) == (f"{asked} with a hat", None)
            # A style that nobody names is the model's own, and one that is chosen is certain.
            assert await page.inner_text("#factor-style option >> nth=0") == f"{usual} unless named"
            for chosen, index in (("", 0), (other, 1)):
                await page.fill("#text", "a hat")
                await page.select_option("#factor-style", chosen)
                before = await page.locator("#wall button").count()
                await page.click("#go")
                await page.locator("#wall button").nth(before).wait_for()
                (term,) = stage.worker.claimed[-1].job.condition
                assert term == ConditionTerm((None, index), text="a hat")

    async def test_by_keyboard_alone(
        self, open_stage: OpenStage, serve: Serve, many_fruits: Path, browse: Browse
    ) -> None:
        stage = await open_stage(bundle=many_fruits)
        stage.worker.hold = True
        async with browse(home(await serve(stage))) as page:
            await page.wait_for_selector("#go:enabled")
            await page.focus("#factor-label")
            await page.keyboard.type("lem")
            assert await page.get_attribute("#factor-label", "aria-expanded") == "true"
            await page.keyboard.press("Enter")  # takes the first that fits
            assert await page.input_value("#factor-label") == "lemon"
            assert await page.get_attribute("#factor-label", "aria-expanded") == "false"
            await page.keyboard.press("ArrowDown")
            await page.keyboard.press("ArrowDown")
            chosen = await page.get_attribute("#factor-label", "aria-activedescendant")
            assert await page.get_attribute(f"#{chosen}", "aria-selected") == "true"
            await page.keyboard.press("Escape")
            assert await page.input_value("#factor-label") == "lemon"
            await page.focus("#go")
            await page.keyboard.press("Enter")
            await page.wait_for_selector("#stop:focus")  # not lost with the button that cannot be pressed now
            await page.keyboard.press("Enter")
            await page.get_by_text("Cancelled.", exact=True).wait_for()
            await page.wait_for_selector("#go:focus")
        assert stage.worker.claimed[0].job.condition[0].labels[0] == 3

    async def test_cancelled_before_the_server_has_answered(self, stage: Stage, page: Any) -> None:
        stage.worker.hold = True
        pressed = asyncio.Event()

        async def late(route: Any) -> None:
            await pressed.wait()
            await route.continue_()

        await page.route("**/generate", late)
        await page.click("#go")
        await page.click("#stop")
        pressed.set()
        await page.get_by_text("Cancelled.", exact=True).wait_for()

    async def test_a_screen_reader_is_told_what_happens_but_not_every_step(
        self, stage: Stage, page: Any
    ) -> None:
        stage.worker.hold = True
        await page.evaluate(
            """() => { window.heard = []; const status = document.getElementById("status");
            new MutationObserver(() => heard.push(status.textContent))
            .observe(status, { childList: true, subtree: true }); }"""
        )
        await page.fill("#count", "1")
        await page.click("#go")
        await page.get_by_text("step 18 of 20").wait_for()
        heard = await page.evaluate("heard")
        assert heard.count("Drawing:") == 1
        assert not any("step" in announcement for announcement in heard)
        tree = await page.locator("main").aria_snapshot()
        for named in (
            'combobox "Label"',
            'slider "Steps',
            'button "Cancel"',
            'progressbar "Progress"',
            "status",
        ):
            assert named in tree, tree

    async def test_fits_every_screen_and_can_be_read(self, page: Any) -> None:
        home = page.url
        for path, ready in (("", "#go:enabled"), ("docs", "h2")):
            await page.goto(home + path)
            await page.wait_for_selector(ready)
            for width in (320, 390, 820, 1600):
                await page.set_viewport_size({"width": width, "height": 700})
                assert await page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
            for scheme in ("light", "dark"):
                await page.emulate_media(color_scheme=scheme)
                for shown in ("p", "a", "label", "button", "summary"):
                    contrasts = await page.locator(shown).evaluate_all(CONTRAST)
                    assert min(contrasts, default=21.0) >= 4.5, (path, scheme, shown)

    async def test_starts_from_a_picture_and_repaints_what_is_drawn_on_it(
        self, stage: Stage, page: Any
    ) -> None:
        assert await page.is_hidden("#easel")
        await page.set_input_files("#file", files=[file("photo.jpg", saved(halves(96, 48), "JPEG"))])
        await page.wait_for_selector("#easel")
        assert await page.is_visible("#used")  # the middle half
        area = await page.locator("#mask").bounding_box()
        await page.fill("#brush", "160")
        for down in (0.1, 0.5, 0.9):
            await page.mouse.move(area["x"] + 0.3 * area["width"], area["y"] + down * area["height"])
            await page.mouse.down()
            await page.mouse.move(area["x"] + 0.31 * area["width"], area["y"] + down * area["height"])
            await page.mouse.up()
        assert "% of it is repainted" in await page.inner_text("#mask-out")
        await page.fill("#strength", "0.5")
        await page.click("#go")
        await page.wait_for_selector("#facts:not([hidden])")
        source = stage.worker.claimed[-1].job.source
        assert source is not None
        assert source.mask is not None
        assert source.strength == 0.5
        levels = decode(source.mask)
        assert (levels[:, 1] == 255).all()
        assert (levels[:, 10:] == 0).all()
        await page.click("#unmask")
        await page.click("#go")
        await page.wait_for_selector("#facts:not([hidden])")
        source = stage.worker.claimed[-1].job.source
        assert source is not None
        assert source.mask is None
        await page.click("#unstart")
        await page.click("#go")
        await page.wait_for_selector("#facts:not([hidden])")
        assert stage.worker.claimed[-1].job.source is None

    async def test_a_mask_is_drawn_by_keyboard_alone(self, stage: Stage, page: Any) -> None:
        await page.set_input_files("#file", files=[file("a.png", saved(halves(16, 16)))])
        await page.wait_for_selector("#easel")
        await page.focus("#mask")
        assert await page.is_visible("#ring")
        for key in ("ArrowLeft", "ArrowLeft", "Shift+ArrowUp", "Space"):
            await page.keyboard.press(key)
        assert "% of it is repainted" in await page.inner_text("#mask-out")
        await page.focus("#go")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#facts:not([hidden])")
        source = stage.worker.claimed[-1].job.source
        assert source is not None
        assert source.mask is not None
        assert 0 < (decode(source.mask) > 127).mean() < 0.2

    async def test_a_result_is_edited_further(self, stage: Stage, page: Any) -> None:
        await page.click("#go")
        await page.wait_for_selector("#facts:not([hidden])")
        await page.get_by_role("button", name="edit").click()
        await page.wait_for_selector("#easel")
        await page.click("#go")
        await page.wait_for_selector("#facts:not([hidden])")
        assert stage.worker.claimed[-1].job.source is not None

    @pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
    async def test_one_of_our_pictures_brings_its_request_back(
        self, stage: Stage, page: Any, format: str
    ) -> None:
        condition = {"label": "lemon", "style": "noto"}
        written = {"model": "fruits", "condition": json.dumps(condition), "seed": "77", "steps": "33"}
        written |= {"sampler": "ddim", "grid": "linspace", "guidance_scale": "2.25"}
        written |= {"guidance_interval": "[0.1, 0.9]", "guidance_decay": "0.5"}
        data = encode(np.asarray(halves(16, 16)), format, metadata=written)
        # Dropped anywhere on the page, as a person does it.
        await page.evaluate(DROP, [f"a.{format}", list(data)])
        await page.get_by_text("The request of this picture is in the form.").wait_for()
        assert await page.is_hidden("#easel")
        await page.click("#go")
        await page.wait_for_selector("#facts:not([hidden])")
        job = stage.worker.claimed[-1].job
        assert (job.condition, job.seeds, job.steps) == ((ConditionTerm((3, 0)),), (77,), 33)
        assert (job.solver, job.grid, job.guidance_scale) == ("ddim", "linspace", 2.25)
        assert job.guidance_interval == (0.1, 0.9)
        assert job.requested is not None
        assert job.requested.guidance_decay == 0.5
        await page.click("#forget")
        assert await page.is_hidden("#kept")
        await page.evaluate(DROP, [f"a.{format}", list(data)])
        await page.get_by_text("The request of this picture is in the form.").wait_for()
        await page.get_by_role("button", name="edit").click()
        await page.wait_for_selector("#easel")

    async def test_another_file_is_told_about(self, page: Any) -> None:
        elsewhere = encode(np.zeros((8, 8, 3), np.uint8), "png", metadata={"model": "x", "condition": "{}"})
        # In an order in which a sentence is not the one before.
        for data, sentence in [
            (b"<svg>", "no picture"),
            (bytes(2**23 + 1), "A picture may be 8388608 bytes"),
            (saved(halves(8, 8))[:40], "no picture"),
            (elsewhere, "x, wh"),
        ]:
            await page.set_input_files("#file", files=[file("a.png", data)])
            await page.get_by_text(sentence).wait_for()
            assert await page.is_hidden("#easel")

    async def test_a_model_that_starts_from_no_picture_shows_nothing_of_it(
        self, open_stage: OpenStage, serve: Serve, tmp_path: Path, browse: Browse
    ) -> None:
        config = {**MANIFEST["config"], "in_channels": 4}
        manifest = {
            **MANIFEST,
            "config": config,
            "decoder": "sd-vae",
            "diffusion": {**MANIFEST["diffusion"], "clip_x0": False},
        }
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        async with browse(home(await serve(await open_stage(bundle=tmp_path)))) as page:
            await page.wait_for_selector("#go:enabled")
            assert await page.is_hidden("#starting")
            await page.click("#go")
            await page.wait_for_selector("#facts:not([hidden])")
            assert await page.get_by_role("button", name="edit").count() == 0

    async def test_shows_an_error(self, stage: Stage, page: Any) -> None:
        stage.worker.fail_with = {"code": "numerical-error", "detail": "NaN at step 3.", "extra": {}}
        await page.click("#go")
        await page.wait_for_selector("#error:not([hidden])")
        assert "NaN at step 3." in await page.inner_text("#error")

    async def test_the_reference_lists_every_operation(self, page: Any) -> None:
        await page.goto(page.url + "docs")
        await page.wait_for_selector("h2")
        assert "/generate" in await page.locator("summary code").all_inner_texts()

    async def test_asks_for_a_key_once(
        self, open_stage: OpenStage, serve: Serve, tmp_path: Path, browse: Browse
    ) -> None:
        keys = tmp_path / "keys.json"
        _, text = add(keys, "visitor")
        url = home(await serve(await open_stage(keys_file=keys)))
        async with browse(url, refusal="401") as page:
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

    async def test_a_model_of_clips_is_asked_for_frames_and_shown_moving(
        self, open_stage: OpenStage, serve: Serve, tmp_path: Path, browse: Browse
    ) -> None:
        (tmp_path / "manifest.json").write_text(json.dumps(clip_manifest("frames", fps=12.0)))
        stage = await open_stage(bundle=tmp_path)
        await stage.worker.report(formats=("mp4",), network=Network("stub", "fp32", 4, first_multiple=2))
        async with browse(home(await serve(stage))) as page:
            await page.wait_for_selector("#go:enabled")
            assert await page.locator("#format option").all_text_contents() == ["webp", "gif", "apng", "mp4"]
            await page.fill("#clip-frames", "16")
            await page.fill("#fps", "10")
            await page.click("#go")
            await page.wait_for_selector("#facts:not([hidden])")
            job = stage.worker.claimed[-1].job
            assert (job.size, job.fps, job.format) == ((16, 16, 16), 10.0, "webp")
            await page.click("summary")
            await page.select_option("#format", "mp4")
            await page.click("#go")
            await page.wait_for_selector("figure:not(.waiting) video")
            await page.locator("#wall button").first.click()
            assert await page.input_value("#clip-frames") == "16"
