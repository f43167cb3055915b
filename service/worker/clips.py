"""Clips as files that play: animated WebP, GIF and PNG by Pillow, MP4 by PyAV where it is installed.

Each frame is shown for a whole number of the container's ticks, so that the whole clip lasts as long as its
frames at their rate. Frames that are equal to the one before them are stored once by Pillow, and shown
longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from ditserve.service.errors import InvalidRequest
from ditserve.service.formats import CLIP_FORMATS, MediaFormat
from ditserve.service.images import comment, metadata_options

Pixels = npt.NDArray[np.uint8]

# The milliseconds of a container's tick, and the format's name and options in Pillow.
_TICK_MS: Final[Mapping[str, int]] = {"webp": 1, "apng": 1, "gif": 10}
_OPTIONS: Final[Mapping[str, dict[str, Any]]] = {
    "webp": {"format": "webp", "quality": 90, "method": 4},
    "apng": {"format": "png", "compress_level": 6},
    "gif": {"format": "gif", "disposal": 1, "optimize": False},
}
# The formats that need a package which is not installed everywhere: the package, and the module that uses it.
_EXTRA: Final[Mapping[MediaFormat, tuple[str, str]]] = {"mp4": ("av", f"{__package__}.mp4")}


def extra_formats() -> tuple[MediaFormat, ...]:
    """Return the formats that this machine writes thanks to a package that is not installed everywhere."""
    return tuple(name for name, (package, _) in _EXTRA.items() if find_spec(package) is not None)


def encode_clip(frames: Pixels, format: MediaFormat, *, fps: float, metadata: Mapping[str, str]) -> bytes:
    """Return frames (F, H, W, 3), shown at `fps` a second for ever, as a file that carries `metadata`.

    Raises:
        InvalidRequest: the package for it is not installed here.
        ValueError: another format.
    """
    if format in _EXTRA:
        if format not in extra_formats():
            raise InvalidRequest(f"format: This worker has no package to write {format}: choose webp.")
        written: bytes = import_module(_EXTRA[format][1]).encode(frames, fps=fps, comment=comment(metadata))
        return written
    if format not in _OPTIONS:
        raise ValueError(f"unknown clip format {format!r}: choose among {', '.join(CLIP_FORMATS)}")
    first, *others = _palette_frames(frames) if format == "gif" else map(Image.fromarray, frames)
    out, options = BytesIO(), {**_OPTIONS[format], **metadata_options(format, metadata)}
    durations = frame_durations(len(frames), fps, tick_ms=_TICK_MS[format])
    if others:
        options |= {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    first.save(out, **options)
    return out.getvalue()


def frame_durations(frames: int, fps: float, *, tick_ms: int) -> list[int]:
    """Return the milliseconds of each frame, in whole ticks of at least one.

    Example: at 24 frames a second, ticks of 10 ms give 40, 40, 50, 40, 40, 40 …, which sum up to 1 s.
    """
    ends = [max(k, round(1000 * k / (fps * tick_ms))) for k in range(frames + 1)]
    return [tick_ms * (end - start) for start, end in pairwise(ends)]


def _palette_frames(frames: Pixels) -> Sequence[Image.Image]:
    """Return frames in the colours of one palette, without dithering: neither flickers."""
    count, height, width, _ = frames.shape
    palette = Image.fromarray(frames.reshape(count * height, width, 3)).quantize(256)
    pictures = map(Image.fromarray, frames)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
