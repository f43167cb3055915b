"""The picture or clip that sampling starts from, read from a file of the user."""

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
from ditserve.model.spec.sizes import Size, scaled
from ditserve.model.spec.source import DEFAULT_STRENGTH, SourceLatent


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The files of a picture to start from and of its mask, and the share of the steps that are walked.

    Without a picture samples start from noise. A model that `moves`, of clips or volumes, takes a picture as
    the first frame, which stays, or a moving picture as the clip to start from.

    Raises:
        SampleError: a mask or a strength without a picture, a strength of 0, or a mask for a clip.
    """

    image: Path | None
    mask: Path | None
    strength: float | None
    moves: bool = False

    def __post_init__(self) -> None:
        if self.image is None and (self.mask is not None or self.strength is not None):
            option = "mask" if self.mask is not None else "strength"
            raise SampleError(f"--{option} needs a picture to start from: name one with --image")
        if self.strength == 0.0:
            raise SampleError("--strength must be above 0: at 0 nothing would be drawn")
        if self.moves and self.mask is not None:
            raise SampleError("--mask is for models of pictures: leave it out")

    @property
    def share(self) -> float:
        """The share of the steps that are walked, the last ones."""
        # What follows a first frame is not in it.
        if self.image is None or (self.moves and self.strength is None and _frame_count(self.image) == 1):
            return 1.0
        return DEFAULT_STRENGTH if self.strength is None else self.strength

    def read(
        self, autoencoder: PictureAutoencoder, size: Size, device: torch.device
    ) -> SourceLatent[Tensor] | None:
        """Return the latent of the picture for samples of `size`, that of the latent.

        Its middle is cut out and scaled. White in the mask is repainted; a latent is, as far as any pixel
        that it covers.

        Raises:
            SampleError: a file is no picture, or a clip of other frames.
        """
        if self.image is None:
            return None
        factor = autoencoder.factor
        height, width = size[-2] * factor, size[-1] * factor
        if self.moves:
            return self._read_clip(size, autoencoder, device)
        pixels = _read(self.image, "RGB", height, width).permute(2, 0, 1)  # (3, H, W)
        latent = autoencoder.encode((pixels / 127.5 - 1.0)[None].to(device))[0]
        if self.mask is None:
            return SourceLatent(latent)
        repainted = _read(self.mask, "L", height, width)[None] / 255.0  # (1, H, W)
        return SourceLatent(latent, F.max_pool2d(repainted, factor).to(device))

    def _read_clip(
        self, size: Size, autoencoder: PictureAutoencoder, device: torch.device
    ) -> SourceLatent[Tensor]:
        """Return a clip's latent (C, F, h, w): of the file's frames, or of one frame, which alone stays."""
        assert self.image is not None
        (frames, height, width), count = scaled(size, autoencoder.factor), _frame_count(self.image)
        if count not in (1, frames):
            raise SampleError(
                f"{self.image} has {count} frames, and a clip here has {frames}: give as many, or one to "
                "begin with"
            )
        read = [_read(self.image, "RGB", height, width, k) for k in range(count)]
        pixels = torch.stack(read).permute(3, 0, 1, 2) / 127.5 - 1.0  # (3, F or 1, H, W)
        clip = autoencoder.encode(pixels[None].to(device))[0].expand(-1, frames, -1, -1)
        if count > 1 or frames == 1:
            return SourceLatent(clip)
        drawn = torch.ones(1, *size, device=device)
        drawn[:, 0] = 0
        return SourceLatent(clip, drawn)


def _frame_count(file: Path) -> int:
    try:
        with Image.open(file) as picture:
            return int(getattr(picture, "n_frames", 1))
    except OSError as error:
        raise SampleError(f"{file} is no picture that can be read: {error}") from None


def _read(file: Path, mode: str, height: int, width: int, frame: int = 0) -> Tensor:
    try:
        with Image.open(file) as picture:
            picture.seek(frame)
            upright = ImageOps.exif_transpose(picture).convert(mode)
    except (OSError, EOFError) as error:
        raise SampleError(f"{file} is no picture that can be read: {error}") from None
    return torch.from_numpy(np.array(ImageOps.fit(upright, (width, height)))).float()
