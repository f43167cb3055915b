"""Autoencoders, from pixels to what the network denoises and back.

A pixel model has the identity, a latent model the SD-VAE.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ditserve.model.spec.bundle import LatentSpec, Manifest, digest
from ditserve.model.spec.errors import ModelError

# Latents of the SD-VAE are multiplied by this, so that their variance is about 1.
SD_SCALE = 0.18215
# The field of a manifest's provenance that holds the `fingerprint` of what made the model's latents.
AUTOENCODER = "autoencoder"


class AutoencoderError(ModelError):
    """An autoencoder that cannot be used; the message is one sentence."""


class Autoencoder(Protocol):
    """A map between images (N, 3, H, W) in [−1, 1] and what the network denoises (N, C, h, w)."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Identity:
    """The autoencoder of pixel models: latents are the image itself."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class SdVae:
    """The autoencoder of Stable Diffusion (diffusers' AutoencoderKL): 4 channels, sides 8 times smaller.

    Latents are scaled by 0.18215, or shifted and scaled as `latents` says.

    Latents with a side above `tile` are decoded in overlapping tiles with blended borders, which bounds the
    memory; with `tile` 0 everything is decoded whole.
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
        """Return latents (N, 4, H/8, W/8): a draw from the posterior, or without a generator its mean."""
        posterior = self.vae.encode(images).latent_dist
        latents: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
        shift, scale = self._normalisation(latents)
        return (latents - shift) / scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (N, 3, 8h, 8w) of latents (N, 4, h, w)."""
        shift, scale = self._normalisation(latents)
        pixels: Tensor = self.vae.decode(latents * scale + shift, return_dict=False)[0]
        return pixels

    def _normalisation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shift and the scale, each (C, 1, 1), with the dtype and on the device of `like`."""
        shift, scale = like.new_tensor([self.spec.shift, self.spec.scale])[..., None, None]
        return shift, scale


def open_autoencoder(
    kind: str,
    folder: Path | None = None,
    latents: LatentSpec | None = None,
    device: torch.device | str = "cpu",
) -> Autoencoder:
    """Open the autoencoder that a bundle names as its decoder.

    `kind` is "identity", or "sd-vae", which is read from `folder` in diffusers' layout. `latents` is the
    latent spec of the bundle.

    Latents and pictures must be on `device`.

    Raises:
        AutoencoderError: an unknown kind, no folder or one too many, an unreadable one, channels other than
            those of `latents`, or no diffusers.
    """
    if kind == "identity":
        if folder is not None:
            raise AutoencoderError(f"this model works on pixels and needs no {folder}: leave --vae out")
        return Identity()
    if kind != "sd-vae":
        raise AutoencoderError(f"there is no decoder {kind!r} here: choose identity or sd-vae")
    if folder is None:
        raise AutoencoderError("this model works on latents: pass the folder of its SD-VAE with --vae")
    _check_class(folder)
    try:
        network = importlib.import_module("diffusers").AutoencoderKL
        # low_cpu_mem_usage would need the package accelerate.
        vae, loading = network.from_pretrained(folder, low_cpu_mem_usage=False, output_loading_info=True)
        if loading["missing_keys"]:
            # diffusers fills them with random numbers.
            raise ValueError(f"its weights lack {loading['missing_keys'][0]}")
        return SdVae(vae.to(device), latents)
    except ModuleNotFoundError:
        raise AutoencoderError("the SD-VAE needs diffusers: pip install diffusers") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise AutoencoderError(
            f"{folder} cannot be read as an AutoencoderKL: {str(error).splitlines()[0]}"
        ) from None


def _check_class(folder: Path) -> None:
    """Refuse a folder that is not that of an AutoencoderKL, by its config.json.

    Raises:
        AutoencoderError: as said; it names the sub-folder of a pipeline.
    """
    file = folder / "config.json"
    if not file.is_file():
        inner = folder / "vae"
        remedy = f"pass {inner}" if (inner / "config.json").is_file() else "pass the folder of its SD-VAE"
        raise AutoencoderError(f"{folder} is not an autoencoder's folder: it has no config.json; {remedy}")
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError):
        raise AutoencoderError(f"{file} is not valid JSON: pass the folder of an AutoencoderKL") from None
    name = fields.get("_class_name", "AutoencoderKL") if isinstance(fields, dict) else "no object"
    if name != "AutoencoderKL":
        raise AutoencoderError(f"{folder} holds {name}: pass the folder of an AutoencoderKL")


def open_decoder(manifest: Manifest, folder: Path | None, device: torch.device | str = "cpu") -> Autoencoder:
    """Open the autoencoder that decodes a model's samples, and check that it is the model's.

    Raises:
        AutoencoderError: as `open_autoencoder`; or it has other channels than the model, or is not the one
            that made the latents of the model's training.
    """
    decoder = open_autoencoder(manifest.decoder, folder, manifest.latents, device)
    if isinstance(decoder, SdVae) and folder is not None:
        channels, own = len(decoder.spec.shift), manifest.config.in_channels
        if channels != own:
            raise AutoencoderError(
                f"{folder} has {channels} latent channels, and the model {own}: pass its own"
            )
        maker = manifest.provenance.get(AUTOENCODER)
        if maker is not None and fingerprint(folder) != maker:
            raise AutoencoderError(
                f"{folder} is not what made the latents that the model learned: pass that one"
            )
    return decoder


def fingerprint(folder: Path) -> str:
    """Return the sha256 over the files of an autoencoder's folder, which latents record as their maker.

    Raises:
        OSError: the folder cannot be read.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin"))
    return hashlib.sha256("".join(digest(file) for file in files).encode()).hexdigest()
