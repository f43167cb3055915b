"""The autoencoder of an imported pipeline, of the class that its folder names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ditserve.model.nets.pipelines.network import PipelineError, open_module
from ditserve.model.spec.manifest import LatentSpec

TILE = 1024  # pixels of a side from which a picture is decoded in overlapping tiles


class PipelineDecoder:
    """A pipeline's autoencoder: latents as the network denoises them → images, and back.

    `network` is the module. A latent with a side longer than `tile` is decoded in tiles, and so encoded.

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
        self.network: Any = open_module(module_type, folder).to(device)
        self._device, self.factor = torch.device(device), latents.factor
        # Those of videos take and give one frame.
        config: Any = self.network.config
        self._frames = "temperal_downsample" in config
        self.tile = TILE // latents.factor
        self._shift, self._scale = (
            torch.tensor(values, device=device)[:, None, None] for values in (latents.shift, latents.scale)
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (N, 3, H, W) in [−1, 1] of latents (N, C, h, w)."""
        module, z = self.network, latents.to(self._device) * self._scale + self._shift
        # What is decoded before or after has no say in it.
        module.use_tiling = max(z.shape[2:]) > self.tile
        images: Tensor = module.decode(z[:, :, None] if self._frames else z, return_dict=False)[0]
        return images[:, :, 0] if self._frames else images

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the latents (N, C, h, w) of images (N, 3, H, W) in [−1, 1]: the mean, not a draw."""
        module, x = self.network, images.to(self._device)
        module.use_tiling = max(x.shape[2:]) > self.tile * self.factor
        encoded = module.encode(x[:, :, None] if self._frames else x, return_dict=False)[0]
        # That of Sana is deterministic: it gives the latents themselves.
        z: Tensor = encoded if isinstance(encoded, Tensor) else encoded.mean
        return ((z[:, :, 0] if self._frames else z) - self._shift) / self._scale
