"""The small autoencoder: a convolutional network of about two million parameters, trained by this project.

Its folder holds autoencoder.json (`SmallAutoencoderConfig`) and weights.safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ditserve.model.spec.bundle import WEIGHTS, write_atomic


@dataclass(frozen=True)
class SmallAutoencoderConfig:
    """The sizes of a small autoencoder.

    `widths` are the channels at half the size of the picture, and after each further halving: three widths
    make latents with sides 8 times smaller. `blocks` are the residual blocks at each width. A decoder whose
    `decoder_widths` and `decoder_blocks` are empty has those of the encoder. It ends with a residual block of
    `full_width` channels at the full size of the picture; 0: without. `noise` is the standard deviation of a
    latent's draws.

    Raises:
        ValueError: a size that cannot be; the message names the field.
    """

    latent_channels: int = 8
    widths: tuple[int, ...] = (48, 96, 128)
    blocks: tuple[int, ...] = (1, 2, 3)
    noise: float = 0.1
    decoder_widths: tuple[int, ...] = ()
    decoder_blocks: tuple[int, ...] = ()
    full_width: int = 16

    def __post_init__(self) -> None:
        if self.latent_channels < 1:
            raise ValueError(f"latent_channels must be at least 1, not {self.latent_channels}")
        if not self.widths:
            raise ValueError("widths must be positive channels, one or more, not none")
        for prefix, (widths, blocks) in {"": (self.widths, self.blocks), "decoder_": self.decoder}.items():
            if len(widths) != len(self.widths) or min(widths) < 1:
                raise ValueError(f"{prefix}widths must be {len(self.widths)} positive channels, not {widths}")
            if len(blocks) != len(widths) or min(blocks) < 0:
                raise ValueError(
                    f"{prefix}blocks must be {len(widths)} counts, one for each width, not {blocks}"
                )
        if self.full_width < 0:
            raise ValueError(f"full_width must be channels, or 0 for no block there, not {self.full_width}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be a standard deviation, not {self.noise}")

    @property
    def decoder(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The widths and the blocks of the decoder."""
        return self.decoder_widths or self.widths, self.decoder_blocks or self.blocks

    @property
    def log_variance(self) -> float:
        """The logarithm of the variance of a latent's draws."""
        return 2 * math.log(max(self.noise, 1e-10))

    @property
    def factor(self) -> int:
        """The pixels that a latent covers on a side."""
        return 1 << len(self.widths)


# The file that describes a small autoencoder, beside its weights.
DESCRIPTION = "autoencoder.json"
ENCODER_OF = "encoder_of"  # the fingerprint of the autoencoder that the encoder was trained in
SCHEMA_VERSION = 1


class PixelNorm(nn.Module):
    """(N, C, H, W) → the same: each position divided by its root mean square over the channels, and scaled.

    It looks at one position alone, so a picture decoded in parts is the picture decoded whole.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)  # (N, 1, H, W)
        scaled: Tensor = x * scale * self.weight[:, None, None]
        return scaled


class ConvBlock(nn.Module):
    """(N, C, H, W) → the same: two 3×3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = PixelNorm(channels), PixelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return cast(Tensor, x + self.conv2(F.silu(self.norm2(h))))


class Halving(nn.Module):
    """(N, C, H, W) → (N, C', H/2, W/2), beside the mean over groups of unshuffled channels.

    The path without parameters is of DC-AE (Chen et al., arXiv:2410.10733).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs, self.group = outputs, math.gcd(4 * inputs, outputs)
        self.conv = nn.Conv2d(4 * inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        unshuffled = F.pixel_unshuffle(x, 2)  # (N, 4C, H/2, W/2)
        means = unshuffled.unflatten(1, (self.group, -1)).mean(2)  # (N, group, H/2, W/2)
        return cast(Tensor, self.conv(unshuffled) + means.repeat_interleave(self.outputs // self.group, 1))


class Doubling(nn.Module):
    """(N, C, H, W) → (N, C', 2H, 2W), beside repeated channels, shuffled; the counterpart of `Halving`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs, self.group = outputs, math.gcd(inputs, 4 * outputs)
        self.conv = nn.Conv2d(inputs, 4 * outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.unflatten(1, (self.group, -1)).mean(2)  # (N, group, H, W)
        repeated = means.repeat_interleave(4 * self.outputs // self.group, 1)  # (N, 4C', H, W)
        return F.pixel_shuffle(self.conv(x) + repeated, 2)


class SmallAutoencoder(nn.Module):
    """Pictures (N, 3, H, W) in [−1, 1] ↔ latents (N, C, H/f, W/f) within ±3."""

    def __init__(self, config: SmallAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config.widths, config.blocks, config.latent_channels)
        self.decoder = _decoder(*config.decoder, config.latent_channels, config.full_width)

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents (N, C, H/f, W/f) of pictures: the mean of their draws."""
        return 3 * torch.tanh(self.encoder(images) / 3)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures (N, 3, H, W) of latents."""
        pixels: Tensor = self.decoder(latents)
        return pixels

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return pictures (N, 3, H, W) encoded, with `noise` (N, C, H/f, W/f) of the config, and decoded."""
        return self.decode(self.encode(images) + self.config.noise * noise)


def _encoder(widths: Sequence[int], blocks: Sequence[int], channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for width, count in zip(widths, blocks, strict=True):
        layers += [Halving(inputs, width), *(ConvBlock(width) for _ in range(count))]
        inputs = width
    return nn.Sequential(*layers, PixelNorm(inputs), nn.Conv2d(inputs, channels, 3, padding=1))


def _decoder(widths: Sequence[int], blocks: Sequence[int], channels: int, full_width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1)]
    for width, count, outputs in zip(
        widths[::-1], blocks[::-1], (*widths[-2::-1], full_width or 3), strict=True
    ):
        layers += [*(ConvBlock(width) for _ in range(count)), Doubling(width, outputs)]
    if not full_width:
        return nn.Sequential(*layers)
    # Two thin convolutions at the full size, where fine lines are drawn.
    return nn.Sequential(*layers, ConvBlock(full_width), nn.Conv2d(full_width, 3, 3, padding=1))


def load_small_autoencoder(folder: Path) -> SmallAutoencoder:
    """Load the autoencoder of a folder, in evaluation mode.

    Raises:
        OSError, KeyError, ValueError, RuntimeError, SafetensorError: a file is missing, damaged, of another
            release, or does not fit the other.
    """
    fields = json.loads((folder / DESCRIPTION).read_text())
    if fields["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"{DESCRIPTION} has another schema_version than {SCHEMA_VERSION}")
    config = TypeAdapter(SmallAutoencoderConfig).validate_python(fields["config"])
    network = SmallAutoencoder(config)
    network.load_state_dict(load_file(folder / WEIGHTS))
    return network.eval().requires_grad_(False)


def save_small_autoencoder(folder: Path, network: SmallAutoencoder, card: Mapping[str, Any]) -> None:
    """Write an autoencoder to a folder, in half precision.

    `card` holds further fields of its description: figures, licence, training.
    """
    weights = {name: tensor.detach().half().contiguous() for name, tensor in network.state_dict().items()}
    write_atomic(folder / WEIGHTS, save(weights))
    description = {"schema_version": SCHEMA_VERSION, "config": asdict(network.config), **card}
    write_atomic(
        folder / DESCRIPTION, (json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode()
    )
