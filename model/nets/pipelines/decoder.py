"""The autoencoder of an imported pipeline, of the class that its folder names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ditserve.model.nets.pipelines.network import PipelineError, open_module
from ditserve.model.spec.bundle import LatentSpec

TILE = 128  # a side of a latent from which it is decoded in overlapping tiles


class PipelineDecoder:
    """The decoding half of a pipeline's autoencoder: latents as the network denoises them → images.

    Args:
        folder: that of the autoencoder.
        latents: how its latents are shifted and scaled.
        device: of torch.

    Raises:
        PipelineError: it cannot be read.
    """

    def __init__(self, folder: Path, latents: LatentSpec, *, device: str | torch.device = "cpu") -> None:
        try:
            name = json.loads((folder / "config.json").read_bytes())["_class_name"]
            module_type = getattr(diffusers, name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PipelineError(f"{folder} holds no autoencoder that diffusers knows: {error}") from None
        self._module: Any = open_module(module_type, folder).to(device)
        self._device = torch.device(device)
        self._shift, self._scale = (
            torch.tensor(values, device=device)[:, None, None] for values in (latents.shift, latents.scale)
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (N, 3, H, W) in [−1, 1] of latents (N, C, h, w)."""
        module, z = self._module, latents.to(self._device) * self._scale + self._shift
        if max(z.shape[2:]) > TILE and hasattr(module, "enable_tiling"):
            module.enable_tiling()
        images: Tensor = module.decode(z, return_dict=False)[0]
        return images
