"""`python -m model.data emoji`: the emoji picture set, rendered from SVG icon sets of the npm registry.

The set has six drawings ("styles") of each emoji, all under free licences; names and groups are from
unicode-emoji-json. It is one .npz file (`x` uint8 (N, H, W, 3) on white, `y` index into `names`, `s` index
into `styles`, `names`, `groups` per name, `styles`, and `captions`: a wording a line, and after an empty line
those kept from training) with a data card beside it. Bundles trained on the set take their licence and
attribution from the card.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.progress import track

from ditserve.model.data.captions import Wordings
from ditserve.model.data.examples import DataError
from ditserve.model.data.sources import DataCard, card_file, read_card
from ditserve.model.spec.bundle import write_atomic

try:
    import resvg_py
except ImportError:
    resvg_py = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class IconSet:
    """An npm package of SVG drawings, one style of the set."""

    style: str
    package: str
    version: str
    licence: str
    credit: str


TWITTER = "Twemoji, © Twitter, Inc. and other contributors"
ICON_SETS = (
    IconSet("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", TWITTER),
    IconSet("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji, © Google"),
    IconSet("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Noto Emoji (v1), © Google"),
    IconSet("fluent", "@iconify-json/fluent-emoji", "1.2.7", "MIT", "Fluent Emoji, © Microsoft"),
    IconSet(
        "fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji Flat, © Microsoft"
    ),
    IconSet("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "EmojiOne 2, © JoyPixels"),
)
NAMES = IconSet("", "unicode-emoji-json", "0.9.0", "MIT", "unicode-emoji-json, © Mu-An Chiou")
KEYWORDS = IconSet("", "emojilib", "4.0.2", "MIT", "emojilib, © Mu-An Chiou")
OVERSAMPLE = 3
CARD = DataCard(
    licence=" AND ".join(sorted({icons.licence for icons in ICON_SETS})),
    attribution=tuple(
        f"{icons.credit} (style {icons.style}; npm {icons.package} {icons.version}), {icons.licence}"
        for icons in ICON_SETS
    ),
)


def build(target: Path, size: int, tarballs: Path) -> None:
    """Render every emoji in every style to `target` (.npz), and write its card beside it.

    The card is written for people (.md) and for programs (.json). `size` is in pixels. `tarballs` is the
    folder of the npm packages; missing ones are fetched into it with `npm pack`.

    Raises:
        DataError: a package cannot be found or fetched, `resvg-py` is missing, or the size is not 8..512; or
            `target` is no .npz file, or there is another file of its name.
    """
    check_target(target, size, CARD)
    tarballs.mkdir(parents=True, exist_ok=True)
    emoji = read_json(tarball(NAMES, tarballs), "data-by-emoji.json")
    groups, wordings = _groups_by_name(emoji), _wordings(emoji, tarballs)
    images, drawn_names, styles = [], [], []
    for style, icon_set in enumerate(ICON_SETS):
        icons = read_json(tarball(icon_set, tarballs), "icons.json")
        drawings = [(name, svg) for name in sorted(groups) if (svg := _svg(icons, name)) is not None]
        for name, svg in track(drawings, description=f"{icon_set.style:12s}"):
            images.append(render(svg, size))
            drawn_names.append(name)
            styles.append(style)
    names = sorted(set(drawn_names))
    index = {name: k for k, name in enumerate(names)}
    write_set(
        target,
        CARD,
        _card_text(target.name, size, len(images), len(names)),
        x=np.stack(images),
        y=np.array([index[name] for name in drawn_names], np.int16),
        s=np.array(styles, np.int8),
        names=np.array(names),
        groups=np.array([groups[name] for name in names]),
        styles=np.array([icon_set.style for icon_set in ICON_SETS]),
        captions=np.array(
            [
                "\n".join(
                    [
                        *wordings(name, ICON_SETS[style].style),
                        "",
                        *wordings.unseen(name, ICON_SETS[style].style),
                    ]
                )
                for name, style in zip(drawn_names, styles, strict=True)
            ]
        ),
    )


def check_target(target: Path, size: int, card: DataCard) -> None:
    """Refuse a size out of 8..512, and a file to write that is another set's, by its licence and credits.

    Raises:
        DataError: it is refused.
    """
    if not 8 <= size <= 512:
        raise DataError(f"size must be in 8..512 pixels, not {size}")
    text = target.with_suffix(".md")
    if target.suffix != ".npz":
        raise DataError(f"{target} must end in .npz")
    there = any(file.exists() for file in (target, text, card_file(target)))
    if there and read_card(target).attribution != card.attribution:
        raise DataError(
            f"{target}, {text.name} or its card is there and not of this set: choose another name"
        )


def write_set(target: Path, card: DataCard, text: str, **arrays: Any) -> None:
    """Write a set's arrays (.npz), and beside them its card for programs (.json) and for people (.md)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    # Pictures have no first axis, and their cards do not say so.
    fields = card.model_dump_json(indent=1, exclude_none=True)
    write_atomic(card_file(target), f"{fields}\n".encode())
    write_atomic(target.with_suffix(".md"), text.encode())
    write_atomic(target, content.getvalue())


def render(svg: str, size: int) -> npt.NDArray[np.uint8]:
    """Return an SVG on white, uint8 (size, size, 3): drawn `OVERSAMPLE` times larger, then box-reduced.

    Raises:
        DataError: `resvg-py` is not installed.
    """
    if resvg_py is None:
        raise DataError("rendering needs resvg-py: pip install resvg-py (it is in the train extra)")
    side = size * OVERSAMPLE
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(drawn.crop((0, 0, *canvas.size)))
    return np.asarray(canvas.convert("RGB").reduce(OVERSAMPLE))


def tarball(icons: IconSet, folder: Path) -> Path:
    """Return the file of an npm package in `folder`, into which it is fetched if it is not there.

    Raises:
        DataError: it is not there and cannot be fetched.
    """
    file = folder / f"{icons.package.lstrip('@').replace('/', '-')}-{icons.version}.tgz"
    if file.is_file():
        return file
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"{file} is missing and npm is not installed: install npm, or put that tarball there")
    package = f"{icons.package}@{icons.version}"
    command = [npm, "pack", package, "--silent", "--pack-destination", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode or not file.is_file():
        raise DataError(f"npm could not fetch {package}: put {file.name} into {folder}")
    return file


def read_json(tarball: Path, name: str) -> dict[str, Any]:
    """Return a JSON object in a package. Raises `DataError` if it is not there."""
    try:
        with tarfile.open(tarball) as archive:
            stream = archive.extractfile(f"package/{name}")
            return dict(json.load(stream)) if stream else {}
    except (tarfile.TarError, KeyError, ValueError):
        raise DataError(f"{tarball} is damaged or lacks {name}: delete it and run again") from None


def _wordings(emoji: dict[str, Any], tarballs: Path) -> Wordings:
    keywords = read_json(tarball(KEYWORDS, tarballs), "dist/emoji-en-US.json")
    named = {
        entry["slug"].replace("_", "-"): (character, entry["name"]) for character, entry in emoji.items()
    }
    return Wordings(
        {name: spoken for name, (_, spoken) in named.items()},
        {name: keywords.get(character, []) for name, (character, _) in named.items()},
    )


def _groups_by_name(emoji: dict[str, Any]) -> dict[str, str]:
    pairs: Iterator[tuple[str, str]] = (
        (entry["slug"].replace("_", "-"), entry["group"]) for entry in emoji.values()
    )
    return {name: group for name, group in pairs if group != "Flags"}


def _svg(icons: dict[str, Any], name: str) -> str | None:
    alias = icons.get("aliases", {}).get(name)
    icon = icons["icons"].get(alias["parent"] if alias else name)
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    # A drawing that is not square is centred in its square.
    side = max(width, height)
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    box = f'viewBox="{left} {top} {side} {side}" width="{side}" height="{side}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{icon["body"]}</svg>'


def _card_text(file: str, size: int, pictures: int, names: int) -> str:
    rows = "\n".join(
        f"| {icons.style} | `{icons.package}` {icons.version} | {icons.licence} | {icons.credit} |"
        for icons in ICON_SETS
    )
    return (
        f"# {file}\n\n{pictures:,} emoji pictures, {size}×{size} RGB on white: "
        f"{names:,} names, {len(ICON_SETS)} styles.\n"
        "Flags and skin-tone variants are left out. Names and groups: unicode-emoji-json (MIT). "
        "Captions: those names and the keywords of emojilib (MIT).\n\n"
        f"| style | package | licence | credit |\n|---|---|---|---|\n{rows}\n"
    )
