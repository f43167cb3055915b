"""Take the pictures of the playground for the README, from a running service, with a real Chromium.

    python -m service --port 8000 &
    python -m bench.screenshots

Needs `pip install playwright` and a Chromium on the PATH (`apt-get install chromium`). The pictures change
with the page; the images in them come from fixed seeds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ditserve.bench import report
from ditserve.model.spec.errors import ModelError

# The images to make, one after the other: a name of the model's first factor, a seed, and a count.
IMAGES = (("fox", 3, 3), ("rocket", 1, 3), ("strawberry", 7, 4))
STYLE = "noto"
# File → the element at its top, and the screen.
SCREENS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "playground": ("header", {"viewport": {"width": 1120, "height": 820}, "color_scheme": "light"}),
    "playground-phone": (
        ".stage",
        {
            "viewport": {"width": 390, "height": 820},
            "device_scale_factor": 1.5,
            "color_scheme": "dark",
            "is_mobile": True,
            "has_touch": True,
        },
    ),
}


def take(page: Page, top: str) -> bytes:
    """Return the page from the element `top` on as WebP, once all images are made and in the gallery."""
    page.wait_for_selector("#go:enabled")
    for label, seed, count in IMAGES:
        page.fill("#text", f"{label} in {STYLE} style")
        page.fill("#seed", str(seed))
        page.fill("#count", str(count))
        page.click("#go")
        page.wait_for_selector("#facts:not([hidden])", timeout=120_000)
    page.evaluate(
        "() => Promise.all([...document.images].filter(({ src }) => src).map((image) => image.decode()))"
    )
    page.evaluate("() => document.activeElement.blur()")
    page.evaluate("(top) => document.querySelector(top).scrollIntoView()", top)
    shot = Image.open(BytesIO(page.screenshot()))
    file = BytesIO()
    shot.convert("RGB").save(file, "webp", quality=88, method=6)
    return file.getvalue()


def take_all(url: str, folder: Path) -> None:
    """Write a picture of every screen to `folder`."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise ModelError("there is no Chromium on the PATH: apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (top, screen) in SCREENS.items():
            page = browser.new_page(**screen)
            page.goto(url)
            path = folder / f"{name}.webp"
            path.write_bytes(take(page, top))
            print(path, path.stat().st_size)
        browser.close()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("screenshots", __doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/", help="the playground's address")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the pictures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return report.run_command("screenshots", lambda: take_all(options.url, options.out))


if __name__ == "__main__":
    sys.exit(main())
