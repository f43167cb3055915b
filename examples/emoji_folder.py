"""Write the emoji set out as a folder of class folders, as one's own pictures would lie there.

    python -m model.data emoji --size 64
    python examples/emoji_folder.py data/emoji64.npz pictures

The classes are six groups of emoji, the pictures both styles of Fluent Emoji (MIT, © Microsoft). The card
beside them gives every model that is trained on them its licence and credit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {
    "Smileys & Emotion": "smiley",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "place",
    "Activities": "activity",
    "Objects": "object",
}
STYLES = ("fluent", "fluent-flat")
CARD = {"licence": "MIT", "attribution": ["Fluent Emoji, © Microsoft (npm @iconify-json/fluent-emoji), MIT"]}


def write_folder(source: Path, folder: Path) -> int:
    """Write the pictures of `source` (.npz) to `folder`/CLASS/NAME-STYLE.png; return their number."""
    data = np.load(source)
    names, groups, styles = data["names"], data["groups"], list(data["styles"])
    wanted = {styles.index(style) for style in STYLES}
    count = 0
    for pixels, name, style in zip(data["x"], data["y"], data["s"], strict=True):
        if style in wanted and (label := CLASSES.get(str(groups[name]))):
            file = folder / label / f"{names[name]}-{styles[style]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
            count += 1
    (folder / "card.json").write_text(json.dumps(CARD))
    return count


if __name__ == "__main__":
    print(f"{write_folder(Path(sys.argv[1]), Path(sys.argv[2]))} pictures are in {sys.argv[2]}")
