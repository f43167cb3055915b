"""Between pixels and what the network denoises: nothing for pixel models, the SD-VAE for latent ones."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ditserve.model.spec.bundle import LatentSpec, digest
from ditserve.model.spec.errors import ModelError

SD_SCALE = 0.18215  # latents of the SD-VAE are multiplied by this, so that their variance is about 1


class AutoencoderError(ModelError):
    """An autoencoder that cannot be used; the message is one sentence."""


class Autoencoder(Protocol):
    """Images (N, 3, H, W) in [−1, 1] ↔ what the network denoises (N, C, h, w)."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Identity:
    """Pixel models: the image itself."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class SdVae:
    """Stable Diffusion's autoencoder, a diffusers AutoencoderKL: 8× smaller, 4 channels, scaled by 0.18215 or
    as `latents` says.

    Latents larger than `tile` on a side are decoded in overlapping tiles whose borders are blended, so that
    memory is bounded; 0 decodes everything whole.
    """

    def __init__(self, vae: Any, latents: LatentSpec | None = None, *, tile: int = 96) -> None:
        self.vae = vae.eval().requires_grad_(False)
        channels = vae.config.latent_channels
        self.spec = latents or LatentSpec(shift=(0.0,) * channels, scale=(1 / SD_SCALE,) * channels)
        if len(self.spec.shift) != channels or len(self.spec.scale) != channels:
            raise AutoencoderError(
                f"the autoencoder has {channels} latent channels, the model's latents {len(self.spec.shift)}"
            )
        if tile:
            factor = 2 ** (len(vae.config.block_out_channels) - 1)
            vae.enable_tiling()
            vae.tile_latent_min_size, vae.tile_sample_min_size = tile, tile * factor

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw from the posterior with a generator, its mean without; (N, 3, H, W) → (N, 4, H/8, W/8)."""
        posterior = self.vae.encode(images).latent_dist
        latents: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
        shift, scale = self._normalisation(latents)
        return (latents - shift) / scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, 4, h, w) → (N, 3, 8h, 8w)."""
        shift, scale = self._normalisation(latents)
        pixels: Tensor = self.vae.decode(latents * scale + shift, return_dict=False)[0]
        return pixels

    def _normalisation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale (C, 1, 1)."""
        shift, scale = like.new_tensor([self.spec.shift, self.spec.scale])[..., None, None]
        return shift, scale


def open_autoencoder(
    kind: str,
    folder: Path | None = None,
    latents: LatentSpec | None = None,
    device: torch.device | str = "cpu",
) -> Autoencoder:
    """The decoder a bundle names: "identity", or "sd-vae" from a folder in diffusers' layout; `latents` as
    the bundle has it.

    Latents and pictures are to be on `device`.

    Raises:
        AutoencoderError: an unknown kind, no folder or an unreadable one, other channels than the model's
            latents, or diffusers is not installed.
    """
    if kind == "identity":
        return Identity()
    if kind != "sd-vae":
        raise AutoencoderError(f"there is no decoder {kind!r} here: choose identity or sd-vae")
    if folder is None:
        raise AutoencoderError("this model works on latents: pass the folder of its SD-VAE with --vae")
    if not (folder / "config.json").is_file():
        raise AutoencoderError(f"{folder} is not an autoencoder's folder: it has no config.json")
    try:
        vae = importlib.import_module("diffusers").AutoencoderKL.from_pretrained(
            folder,
            low_cpu_mem_usage=False,  # which would need accelerate
        )
        return SdVae(vae.to(device), latents)
    except ModuleNotFoundError:
        raise AutoencoderError("the SD-VAE needs diffusers: pip install diffusers") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise AutoencoderError(
            f"{folder} cannot be read as an AutoencoderKL: {str(error).splitlines()[0]}"
        ) from None


def fingerprint(folder: Path) -> str:
    """sha256 over the files of an autoencoder's folder, by which latents know what they were made with.

    Raises:
        OSError: the folder cannot be read.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin"))
    return hashlib.sha256("".join(digest(file) for file in files).encode()).hexdigest()
