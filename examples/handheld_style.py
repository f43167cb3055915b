"""Write twenty pictures in a style of their own, to train a low-rank adapter on.

    python -m model.data emoji --size 64
    python examples/handheld_style.py data/emoji64.npz handheld

They are drawings of Fluent Emoji (MIT, © Microsoft) in 16 × 16 squares of four greens, like the screen of an
old handheld console: handheld/CLASS/picture.png, a class of the shipped model each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

STYLE = "fluent-flat"
CLASSES = (
    *("alien", "banana", "bread", "burrito", "cat-face", "cherries", "chicken", "cookie", "cow-face"),
    *("dog-face", "doughnut", "elephant", "fox", "frog", "grapes", "hamburger", "melon", "mushroom"),
    *("pizza", "rocket"),
)
GREENS = np.array([[15, 56, 15], [48, 98, 48], [139, 172, 15], [200, 220, 120]], np.uint8)
CARD = {"licence": "MIT", "attribution": ["Fluent Emoji, © Microsoft (npm @iconify-json/fluent-emoji), MIT"]}


def restyled(pixels: np.ndarray) -> Image.Image:
    """Return a picture (H, W, 3) in 16 × 16 squares, each of the green that is as light."""
    small = Image.fromarray(pixels).convert("L").resize((16, 16), Image.Resampling.BOX)
    shades = np.asarray(small).astype(int) * len(GREENS) // 256
    return Image.fromarray(GREENS[shades]).resize(pixels.shape[1::-1], Image.Resampling.NEAREST)


def write_folder(source: Path, folder: Path) -> None:
    """Write the pictures made of those in `source` (.npz), one a class."""
    data = np.load(source)
    names, style = [str(name) for name in data["names"]], list(data["styles"]).index(STYLE)
    drawn = {names[y]: k for k, (y, s) in enumerate(zip(data["y"], data["s"], strict=True)) if s == style}
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        restyled(data["x"][drawn[name]]).save(folder / name / "picture.png")
    (folder / "card.json").write_text(json.dumps(CARD))


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{len(CLASSES)} pictures are in {sys.argv[2]}")
