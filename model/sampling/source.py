"""The picture that sampling starts from, read from a file of the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ditserve.model.nets.autoencoder import PictureAutoencoder
from ditserve.model.sampling.prompt import SampleError
from ditserve.model.spec.source import DEFAULT_STRENGTH, SourceLatent


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The files of a picture to start from and of its mask, and the share of the steps that are walked.

    Without a picture samples start from noise.

    Raises:
        SampleError: a mask or a strength without a picture, or a strength of 0.
    """

    image: Path | None
    mask: Path | None
    strength: float | None

    def __post_init__(self) -> None:
        if self.image is None and (self.mask is not None or self.strength is not None):
            option = "mask" if self.mask is not None else "strength"
            raise SampleError(f"--{option} needs a picture to start from: name one with --image")
        if self.strength == 0.0:
            raise SampleError("--strength must be above 0: at 0 nothing would be drawn")

    @property
    def share(self) -> float:
        """The share of the steps that are walked, the last ones."""
        if self.image is None:
            return 1.0
        return DEFAULT_STRENGTH if self.strength is None else self.strength

    def read(
        self, autoencoder: PictureAutoencoder, size: tuple[int, int], device: torch.device
    ) -> SourceLatent[Tensor] | None:
        """Return the latent of the picture for samples of `size`, H and W of the latent.

        Its middle is cut out and scaled. White in the mask is repainted; a latent is, as far as any pixel
        that it covers.

        Raises:
            SampleError: a file is no picture.
        """
        if self.image is None:
            return None
        factor = autoencoder.factor
        height, width = size[0] * factor, size[1] * factor
        pixels = _read(self.image, "RGB", height, width).permute(2, 0, 1)  # (3, H, W)
        latent = autoencoder.encode((pixels / 127.5 - 1.0)[None].to(device))[0]
        if self.mask is None:
            return SourceLatent(latent)
        repainted = _read(self.mask, "L", height, width)[None] / 255.0  # (1, H, W)
        return SourceLatent(latent, F.max_pool2d(repainted, factor).to(device))


def _read(file: Path, mode: str, height: int, width: int) -> Tensor:
    try:
        with Image.open(file) as picture:
            upright = ImageOps.exif_transpose(picture).convert(mode)
    except OSError as error:
        raise SampleError(f"{file} is no picture that can be read: {error}") from None
    return torch.from_numpy(np.array(ImageOps.fit(upright, (width, height)))).float()
