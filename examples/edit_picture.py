"""Draw something, then edit it: at three strengths, and with a mask that keeps its lower half.

make serve                                   # in another terminal
python examples/edit_picture.py --out edits.png
"""

import argparse
import io
from pathlib import Path

from PIL import Image

from ditserve.service.client import Client

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--edits", nargs="+", default=["cat-face:fox", "grinning-face:face-with-tears-of-joy"])
parser.add_argument("--style", default="noto")
parser.add_argument("--seed", type=int, default=7)
parser.add_argument("--out", type=Path, default=Path("edits.png"))
options = parser.parse_args()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def upper_half(size: tuple[int, int]) -> bytes:
    """Return a mask: what is white is drawn anew, what is black stays."""
    width, height = size
    mask, file = Image.new("L", size), io.BytesIO()
    mask.paste(255, (0, 0, width, height // 2))
    mask.save(file, "PNG")
    return file.getvalue()


rows: list[list[Image.Image]] = []
with Client(options.url) as client:
    for before, after in (edit.split(":") for edit in options.edits):
        condition = {"label": after, "style": options.style}
        source = client.generate({**condition, "label": before}, seed=options.seed).images[0].data
        row = [opened(source)]
        for strength in (0.3, 0.5, 0.7):
            edited = client.generate(condition, image=source, strength=strength, seed=options.seed)
            row.append(opened(edited.images[0].data))
        mask = upper_half(row[0].size)
        edited = client.generate(condition, image=source, mask=mask, strength=0.9, seed=options.seed)
        rows.append([*row, opened(edited.images[0].data)])

width, height = rows[0][0].size
sheet = Image.new("RGB", (len(rows[0]) * width, len(rows) * height), "white")
for y, row in enumerate(rows):
    for x, picture in enumerate(row):
        sheet.paste(picture, (x * width, y * height))
sheet.save(options.out)
print(options.out)
