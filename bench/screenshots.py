"""Pictures of the playground for the README, taken of a running service by a real Chromium.

    python -m service --port 8000 &
    python -m bench.screenshots

Needs `pip install playwright` and a Chromium on the PATH (`apt-get install chromium`). The pictures change with the page; what is
drawn in them comes from fixed seeds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUT = Path("bench/results")
# What is drawn, one after the other: a name of the model's first factor, a seed, and how many.
DRAWN = (("fox", 3, 3), ("rocket", 1, 3), ("strawberry", 7, 4))
STYLE = "noto"
# File → what is at its top, and the screen.
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


def main() -> int:
    options = _parser().parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        print("error: there is no Chromium on the PATH: apt-get install chromium", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, (top, screen) in SCREENS.items():
            page = browser.new_page(**screen)
            page.goto(options.url)
            path = options.out / f"{name}.webp"
            path.write_bytes(taken(page, top))
            print(path, path.stat().st_size)
        browser.close()
    return 0


def taken(page: Page, top: str) -> bytes:
    """The page from `top` on as WebP, once it has drawn everything and filled its gallery."""
    page.wait_for_selector("#go:enabled")
    for label, seed, count in DRAWN:
        page.fill("#factor-label", label)
        page.keyboard.press("Escape")
        page.select_option("#factor-style", STYLE)
        page.fill("#seed", str(seed))
        page.fill("#count", str(count))
        page.click("#go")
        page.wait_for_selector("#facts:not([hidden])", timeout=120_000)
    page.evaluate("() => Promise.all([...document.images].map((image) => image.decode()))")
    page.evaluate("() => document.activeElement.blur()")
    page.evaluate("(top) => document.querySelector(top).scrollIntoView()", top)
    shot = Image.open(BytesIO(page.screenshot()))
    file = BytesIO()
    shot.convert("RGB").save(file, "webp", quality=88, method=6)
    return file.getvalue()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.screenshots", description="Pictures of the playground for the README."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/", help="the playground's address")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
