"""Sizes of two or three axes: height and width, before which a clip has frames and a volume has depth.

A network treats all axes alike; a manifest says what the first of three is. Pure: no torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from ditserve.model.spec.diffusion import Array

# Along each axis: pixels, latent pixels or tokens. Height and width are the last two.
Size = tuple[int, ...]
FirstAxis = Literal["frames", "depth"]
# The names of the axes in the messages of errors, by their number.
AXES = {2: "(height, width)", 3: "(frames or depth, height, width)"}


def size_name(size: Sequence[int], sign: str = "x") -> str:
    """Return a size as requests write it, such as "8x48x48"; with the sign "×" as people do."""
    return sign.join(map(str, size))


def patch_along(patch_size: int | Sequence[int], axes: int) -> Size:
    """Return the patch along every axis: one number stands for height and width, and for 1 along a third."""
    if isinstance(patch_size, int):
        return (1,) * (axes - 2) + (patch_size, patch_size)
    return tuple(patch_size)


def scaled(size: Size, factor: int) -> Size:
    """Return a size with height and width multiplied; no autoencoder here changes a third axis."""
    return (*size[:-2], size[-2] * factor, size[-1] * factor)


def frame_by_frame(of_pictures: Callable[[Array], Array], x: Array) -> Array:
    """Return what a map of pictures (N, C, h, w) makes of `x`, which may be clips (N, C, F, h, w).

    They are F pictures each, and come back as clips.
    """
    if x.ndim == 4:
        return of_pictures(x)
    rows, frames = x.shape[0], x.shape[2]
    made = of_pictures(x.swapaxes(1, 2).reshape(rows * frames, x.shape[1], *x.shape[3:]))
    clips: Array = made.reshape(rows, frames, *made.shape[1:]).swapaxes(1, 2)
    return clips


def check_size(
    field: str,
    size: Sequence[int],
    multiple: int | Sequence[int],
    of: str = "patch_size",
    *,
    axes: Sequence[int] = (2,),
) -> None:
    """Raise ValueError unless `size` has a legal number of axes, each a positive multiple of `multiple`.

    The multiple is one for height and width, or one along each axis; messages call it `of`.
    """
    whole = isinstance(size, Sequence) and len(size) in axes and all(isinstance(side, int) for side in size)
    if not whole or min(size) <= 0:
        count = " or ".join({2: "two", 3: "three"}[number] for number in axes)
        forms = " or ".join(AXES[number] for number in axes)
        raise ValueError(f"{field} must be {count} positive numbers {forms}, not {size!r}")
    parts = patch_along(multiple, len(size))
    if any(side % part for side, part in zip(size, parts, strict=True)):
        raise ValueError(
            f"{field} {size_name(size)} is not divisible by {of} {multiple_name(parts)}: change one of them"
        )


def multiple_name(parts: Size) -> str:
    """Return multiples along every axis as messages write them: one number if it says all."""
    return str(parts[-1]) if parts == patch_along(parts[-1], len(parts)) else size_name(parts)
