"""Autoencoders, from pixels to what the network denoises and back.

A pixel model has the identity. A latent model has an SD-VAE, or the small autoencoder of this project.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from ditserve.model.nets.small_autoencoder import (
    DESCRIPTION,
    ENCODER_OF,
    SmallAutoencoder,
    load_small_autoencoder,
)
from ditserve.model.spec.bundle import PIPELINE, SMALL_AUTOENCODER, digest, whole_of
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import SD_SCALE, DecoderKind, LatentSpec, Manifest
from ditserve.model.spec.pipeline_folder import VAE
from ditserve.model.spec.sizes import frame_by_frame

# The field of a manifest's provenance that holds the `fingerprint` of what made the model's latents.
AUTOENCODER = "autoencoder"


class AutoencoderError(ModelError):
    """An autoencoder that cannot be used; the message is one sentence."""


class PictureDecoder(Protocol):
    """A map from what the network denoises (N, C, h, w) to images (N, 3, H, W) in [−1, 1].

    Clips have their frames between channels and height.
    """

    def decode(self, latents: Tensor) -> Tensor: ...


class PictureAutoencoder(PictureDecoder, Protocol):
    """A decoder and its inverse, from images to latents; a latent covers `factor` pixels on a side."""

    factor: int

    def encode(self, images: Tensor) -> Tensor: ...


class Identity:
    """The autoencoder of pixel models: what they denoise is the image itself."""

    factor = 1

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def encode(self, images: Tensor) -> Tensor:
        return images


class LatentAutoencoder(ABC):
    """An autoencoder whose latents have a mean and a variance, normalised as `spec` says.

    Clips (N, 3, F, H, W) are encoded and decoded frame by frame.

    `network` is the module, `channels` those of a latent, and `factor` the pixels that a latent covers on a
    side.

    Raises:
        AutoencoderError: `spec` is for other channels.
    """

    def __init__(self, network: torch.nn.Module, channels: int, factor: int, spec: LatentSpec) -> None:
        self.network = network.eval().requires_grad_(False)
        self.channels, self.factor, self.spec = channels, factor, spec
        if len(spec.shift) != channels or len(spec.scale) != channels:
            raise AutoencoderError(
                f"the autoencoder has {channels} latent channels, the model's latents {len(spec.shift)}"
            )

    @abstractmethod
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance (N, C, H/f, W/f) each of the latents of images, not normalised."""

    @abstractmethod
    def pixels(self, latents: Tensor) -> Tensor:
        """Return the images of latents that are not normalised."""

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents (N, C, H/f, W/f): a draw, or without a generator the mean."""
        return frame_by_frame(partial(self._encode, generator=generator), images)

    def _encode(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, log_variance = self.moments(images)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            mean = mean + torch.exp(0.5 * log_variance) * noise
        shift, scale = self._normalisation(mean)
        return (mean - shift) / scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (N, 3, f·h, f·w) of latents (N, C, h, w)."""
        return frame_by_frame(self._decode, latents)

    def _decode(self, latents: Tensor) -> Tensor:
        shift, scale = self._normalisation(latents)
        return self.pixels(latents * scale + shift)

    def _normalisation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shift and the scale, each (C, 1, 1), with the dtype and on the device of `like`."""
        shift, scale = like.new_tensor([self.spec.shift, self.spec.scale])[..., None, None]
        return shift, scale


class SdVae(LatentAutoencoder):
    """The autoencoder of Stable Diffusion (diffusers' AutoencoderKL): 4 channels, sides 8 times smaller.

    Latents are scaled by 0.18215, or shifted and scaled as `latents` says.

    Latents with a side above `tile` are decoded in overlapping tiles with blended borders, which bounds the
    memory; with `tile` 0 everything is decoded whole.
    """

    def __init__(self, vae: Any, latents: LatentSpec | None = None, *, tile: int = 96) -> None:
        channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
        spec = latents or LatentSpec(shift=(0.0,) * channels, scale=(1 / SD_SCALE,) * channels)
        super().__init__(vae, channels, factor, spec)
        self.vae = vae
        if tile:
            vae.enable_tiling()
            vae.tile_latent_min_size, vae.tile_sample_min_size = tile, tile * factor

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean, posterior.logvar

    def pixels(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return pixels


class SmallVae(LatentAutoencoder):
    """The small autoencoder of this project."""

    def __init__(self, autoencoder: SmallAutoencoder, latents: LatentSpec | None = None) -> None:
        config = autoencoder.config
        channels = config.latent_channels
        spec = latents or LatentSpec(shift=(0.0,) * channels, scale=(1.0,) * channels)
        super().__init__(autoencoder, channels, config.factor, spec)
        self.autoencoder = autoencoder

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.autoencoder.encode(images)
        return mean, torch.full_like(mean, self.autoencoder.config.log_variance)

    def pixels(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)


def autoencoder_kind(folder: Path) -> DecoderKind:
    """Return the kind of autoencoder that a folder holds, by the file that describes it.

    Raises:
        AutoencoderError: it holds neither a small one nor an AutoencoderKL.
    """
    if (folder / DESCRIPTION).is_file():
        return "small"
    _check_class(folder)
    return "sd-vae"


def open_latent_autoencoder(
    folder: Path, latents: LatentSpec | None = None, device: torch.device | str = "cpu"
) -> LatentAutoencoder:
    """Open the autoencoder in a folder: of diffusers' layout, or a small one.

    `latents` is the latent spec of the bundle. Latents and pictures must be on `device`.

    Raises:
        AutoencoderError: an unreadable folder, channels other than those of `latents`, or no diffusers.
    """
    if autoencoder_kind(folder) == "small":
        try:
            return SmallVae(load_small_autoencoder(folder).to(device), latents)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise AutoencoderError(
                f"{folder} cannot be read as a small autoencoder: {str(error).splitlines()[0]}"
            ) from None
    try:
        network = importlib.import_module("diffusers").AutoencoderKL
        # low_cpu_mem_usage would need the package accelerate.
        vae, loading = network.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
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


def open_autoencoder(
    kind: DecoderKind,
    folder: Path | None = None,
    latents: LatentSpec | None = None,
    device: torch.device | str = "cpu",
) -> PictureAutoencoder:
    """Open the autoencoder that a bundle names as its decoder, from `folder` unless it is the identity.

    Raises:
        AutoencoderError: no folder, one too many, one of another kind, or as `open_latent_autoencoder`.
    """
    if kind == "identity":
        if folder is not None:
            raise AutoencoderError(f"this model works on pixels and needs no {folder}: leave --vae out")
        return Identity()
    if folder is None:
        raise AutoencoderError("this model works on latents: pass the folder of its autoencoder with --vae")
    if autoencoder_kind(folder) != kind:
        raise AutoencoderError(
            f"{folder} is not of the kind of the model's autoencoder ({kind}): pass its own"
        )
    return open_latent_autoencoder(folder, latents, device)


def autoencoder_folder(model: Path, given: Path | None) -> Path | None:
    """Return `given`, or else the autoencoder in the bundle `model`: a pipeline's, or a small one.

    A further backbone without one has that of the bundle that it lies in.
    """
    bundle = whole_of(model) or model
    own = (model / SMALL_AUTOENCODER, bundle / PIPELINE / VAE, bundle / SMALL_AUTOENCODER)
    return given or next((folder for folder in own if folder.is_dir()), None)


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


def open_decoder(
    manifest: Manifest, folder: Path | None, device: torch.device | str = "cpu"
) -> PictureAutoencoder:
    """Open the autoencoder that decodes a model's samples, and check that it is the model's.

    Raises:
        AutoencoderError: as `open_autoencoder`; or it has other channels than the model, or is not the one
            that made the latents of the model's training.
    """
    decoder = open_autoencoder(manifest.decoder, folder, manifest.latents, device)
    if isinstance(decoder, LatentAutoencoder) and folder is not None:
        channels, own = decoder.channels, manifest.config.in_channels
        if channels != own:
            raise AutoencoderError(
                f"{folder} has {channels} latent channels, and the model {own}: pass its own"
            )
        maker = manifest.provenance.get(AUTOENCODER)
        if maker is not None and maker not in (fingerprint(folder), encoder_fingerprint(folder)):
            raise AutoencoderError(
                f"{folder} is not what made the latents that the model learned: pass that one"
            )
    return decoder


def encoder_fingerprint(folder: Path) -> str:
    """Return the fingerprint of the autoencoder whose encoder a folder has.

    It is the folder's own, or that of the one whose decoder was trained on (`decoder_of`).

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        told = json.loads((folder / DESCRIPTION).read_text()).get(ENCODER_OF)
    except (OSError, ValueError, AttributeError):
        told = None  # an imported one, or one that its opening refuses
    return told if isinstance(told, str) else fingerprint(folder)


def fingerprint(folder: Path) -> str:
    """Return the sha256 over the files of an autoencoder's folder, which latents record as their maker.

    Raises:
        OSError: the folder cannot be read.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin"))
    return hashlib.sha256("".join(digest(file) for file in files).encode()).hexdigest()
