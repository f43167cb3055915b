"""The requests that peers are asked, and the files that they answer with.

Runs in the peers' own environment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

CONTENT_TYPE = "image/png"
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """A request for a picture of a condition, such as {"label": 3}; a `guidance` of 1 is none."""

    condition: Mapping[str, Any]
    steps: int
    guidance: float
    seed: int

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> PeerRequest:
        return cls(
            dict(fields["condition"]), int(fields["steps"]), float(fields["guidance"]), int(fields["seed"])
        )


def draw_files(
    requests: Sequence[PeerRequest], draw: Callable[[Sequence[PeerRequest], int], Pixels]
) -> list[bytes]:
    """Return the PNG files of a batch, in order; `draw` gets the requests of each count of steps together."""
    files: dict[int, bytes] = {}
    for steps in dict.fromkeys(request.steps for request in requests):
        indices = [k for k, request in enumerate(requests) if request.steps == steps]
        pictures = draw([requests[k] for k in indices], steps)
        files |= dict(zip(indices, map(png, pictures), strict=True))
    return [files[k] for k in range(len(requests))]


def noise(requests: Sequence[PeerRequest], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return the noise (N, *shape) that our service draws for the same seeds."""
    generators = [np.random.Generator(np.random.Philox(request.seed)) for request in requests]
    return np.stack([random.standard_normal(shape, dtype=np.float32) for random in generators])


def png(image: Pixels) -> bytes:
    """Return a picture (H, W, 3) as a PNG file, by the encoder and with the settings of our service."""
    out = BytesIO()
    Image.fromarray(image).save(out, format="png", compress_level=6)
    return out.getvalue()
