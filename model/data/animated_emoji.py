"""`python -m model.data animated-emoji`: clips of Microsoft's animated Fluent emoji, from the npm registry.

A clip has F frames evenly spaced over the whole animation, which begins again, so that it loops. The set is
one .npz file as that of `model.data.emoji`, with `x` uint8 (N, F, H, W, 3) on white. Its styles are skin
tones: "default", the yellow one and that of all without a tone, and five of the Unicode standard. Drawings
without movement are left out.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.progress import track

from ditserve.model.data.emoji import NAMES, IconSet, check_target, read_json, tarball, write_set
from ditserve.model.data.examples import DataError
from ditserve.model.data.sources import DataCard
from ditserve.model.data.transforms import centre_crop

CREDIT = "Fluent Emoji, © Microsoft (animated; packaged by LobeHub)"
PACKAGES = tuple(IconSet("", f"@lobehub/fluent-emoji-anim-{k}", "1.0.0", "MIT", CREDIT) for k in range(1, 5))
# Modifiers of Unicode, by code point; without one an emoji has the default tone.
TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
STYLES = ("default", *TONES.values())
# A code point that asks for a coloured drawing, which names of files and of emoji have or leave out.
COLOURED = 0xFE0F
MOST_FRAMES = 256


@dataclass(frozen=True, slots=True)
class Clip:
    """The clip of an emoji: frames uint8 (F, H, W, 3), and the seconds of the animation that they are of."""

    name: str
    style: int
    frames: npt.NDArray[np.uint8]
    seconds: float


def build(target: Path, size: int, frames: int, tarballs: Path) -> None:
    """Write the clips of every animated emoji in every tone to `target` (.npz), and its card beside it.

    `size` is in pixels. `tarballs` is the folder of the npm packages; missing ones are fetched into it.

    Raises:
        DataError: a package cannot be found or fetched, the size is not 8..512, there are fewer than 2 frames
            or more than `MOST_FRAMES`, or `target` is no .npz file or another set's.
    """
    credit = tuple(f"{package.credit}, npm {package.package} {package.version}, MIT" for package in PACKAGES)
    card = DataCard(licence="MIT", attribution=credit, first_axis="frames", fps=1.0)
    check_target(target, size, card)
    if not 2 <= frames <= MOST_FRAMES:
        raise DataError(f"frames must be in 2..{MOST_FRAMES}, not {frames}")
    tarballs.mkdir(parents=True, exist_ok=True)
    emoji = read_json(tarball(NAMES, tarballs), "data-by-emoji.json")
    slugs = {_without_colour(tuple(map(ord, character))): entry for character, entry in emoji.items()}
    names = {points: str(entry["slug"]).replace("_", "-") for points, entry in slugs.items()}
    groups = {str(entry["slug"]).replace("_", "-"): str(entry["group"]) for entry in slugs.values()}
    clips = [
        clip
        for package in PACKAGES
        for clip in track(
            _clips(tarball(package, tarballs), names, size, frames), description=package.package
        )
    ]
    if not clips:
        raise DataError(f"the packages in {tarballs} hold no animated emoji")
    drawn = sorted({clip.name for clip in clips})
    index = {name: k for k, name in enumerate(drawn)}
    fps = round(frames / median(clip.seconds for clip in clips), 2)
    write_set(
        target,
        card.model_copy(update={"fps": fps}),
        _card_text(target.name, size, frames, fps, len(clips), len(drawn)),
        x=np.stack([clip.frames for clip in clips]),
        y=np.array([index[clip.name] for clip in clips], np.int16),
        s=np.array([clip.style for clip in clips], np.int8),
        names=np.array(drawn),
        groups=np.array([groups[name] for name in drawn]),
        styles=np.array(STYLES),
    )


def _clips(package: Path, names: dict[tuple[int, ...], str], size: int, frames: int) -> Iterator[Clip]:
    """Yield the clips of a package, in the order of their files. Those of unknown emoji are left out."""
    try:
        with tarfile.open(package) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.name.endswith(".webp") else None
                if stream is None:
                    continue
                points = tuple(int(part, 16) for part in Path(member.name).stem.split("-"))
                tones = {point for point in points if point in TONES}
                name = names.get(_without_colour(tuple(point for point in points if point not in TONES)))
                cut = _cut(stream.read(), size, frames) if name and len(tones) < 2 else None
                if name and cut:
                    style = STYLES.index(TONES[tones.pop()] if tones else STYLES[0])
                    yield Clip(name, style, *cut)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{package} is damaged: delete it and run again ({error})") from None


def _cut(file: bytes, size: int, frames: int) -> tuple[npt.NDArray[np.uint8], float] | None:
    """Return frames of an animation on white, and its seconds; None if it stands still."""
    with Image.open(io.BytesIO(file)) as animation:
        count = int(getattr(animation, "n_frames", 1))
        if count == 1:
            return None
        drawn, starts, end = [], [], 0.0
        for k in range(count):
            animation.seek(k)
            # Pillow tells the duration of a frame when it is decoded.
            drawn.append(animation.convert("RGBA"))
            starts.append(end)
            end += float(animation.info["duration"])
    # The frame that is shown at each of the moments.
    shown = np.searchsorted(starts, np.arange(frames) * end / frames, side="right") - 1
    white = Image.new("RGBA", drawn[0].size, "white")
    chosen = [Image.alpha_composite(white, drawn[k]).convert("RGB") for k in shown]
    return np.stack([centre_crop(np.asarray(frame), (size, size)) for frame in chosen]), end / 1000


def _without_colour(points: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(point for point in points if point != COLOURED)


def _card_text(file: str, size: int, frames: int, fps: float, clips: int, names: int) -> str:
    packages = ", ".join(f"`{package.package}` {package.version}" for package in PACKAGES)
    return (
        f"# {file}\n\n{clips:,} clips of {frames} frames, {size}×{size} RGB on white, {fps:g} a second: "
        f"{names:,} names in up to {len(STYLES)} skin tones.\n"
        "The frames of a clip are evenly spaced over its whole animation, which loops.\n"
        f"Licence: MIT. {CREDIT}: {packages}. Names and groups: unicode-emoji-json (MIT).\n"
    )
