"""The kinds of media that models make, and the file formats of each. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

from ditserve.model.spec.manifest import Manifest

MediaKind = Literal["picture", "clip", "volume"]
MediaFormat = Literal["png", "webp", "jpeg", "gif", "apng", "mp4", "npz"]
ContentType = Literal[
    "image/png", "image/webp", "image/jpeg", "image/gif", "image/apng", "video/mp4", "application/x-npz"
]

CONTENT_TYPES: Final[Mapping[MediaFormat, ContentType]] = dict(
    zip(get_args(MediaFormat), get_args(ContentType), strict=True)
)
# What shows a volume is a clip of it, turning.
CLIP_FORMATS: Final[tuple[MediaFormat, ...]] = ("webp", "gif", "apng", "mp4")
# The formats of each kind, the one that is written unless another is asked for first.
FORMATS: Final[Mapping[MediaKind, tuple[MediaFormat, ...]]] = {
    "picture": ("png", "webp", "jpeg"),
    "clip": CLIP_FORMATS,
    "volume": ("npz", *CLIP_FORMATS),
}
# Formats that workers write only where the extra of their name is installed.
EXTRAS: Final[Mapping[MediaFormat, str]] = {"mp4": "video"}
# The most frames a second: those of screens, and what viewers of GIF show (shorter delays are slowed down).
MAX_FPS: Final = 240.0
GIF_FPS: Final = 50.0


def kind_of(manifest: Manifest) -> MediaKind:
    """Return the kind of what a model makes."""
    kinds: Mapping[str | None, MediaKind] = {None: "picture", "frames": "clip", "depth": "volume"}
    return kinds[manifest.first_axis]


def preview_format(chosen: MediaFormat) -> MediaFormat:
    """Return the format of previews, which are single pictures."""
    return chosen if chosen in FORMATS["picture"] else "webp"
