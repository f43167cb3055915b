"""The U-Net of ADM with the conditions and the interface of the DiT: a baseline to train and serve beside it.

    embedding = unet.embed(labels)
    state     = unet.modulate(timestep, embedding)
    output    = unet.backbone(x, state)

The condition enters every residual block as the scale and shift of a group norm. Source: Dhariwal & Nichol,
arXiv:2105.05233, §3 and Table 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.conditioner import ConditionEmbedder
from ditserve.model.nets.layers import Attention, TimestepEmbedder, check_images, check_rows, check_state
from ditserve.model.spec.unet_config import UNetConfig, UNetStage


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm with as many groups as divide both 32 and the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-5)


class ResBlock(nn.Module):
    """A residual block: (N, C_in, H, W), and scale and shift (N, 2, C_out) → (N, C_out, H', W').

    The size is kept, halved or doubled, as the stage says.
    """

    def __init__(self, stage: UNetStage, embedding_size: int, head_size: int) -> None:
        super().__init__()
        self.resample = stage.resample
        self.norm1, self.norm2 = group_norm(stage.inputs), group_norm(stage.outputs)
        self.conv1 = nn.Conv2d(stage.inputs, stage.outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(stage.outputs, stage.outputs, 3, padding=1)
        self.skip = (
            nn.Conv2d(stage.inputs, stage.outputs, 1) if stage.inputs != stage.outputs else nn.Identity()
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(embedding_size, 2 * stage.outputs))
        self.attention_norm = group_norm(stage.outputs) if stage.attention else None
        self.attention = Attention(stage.outputs, stage.outputs // head_size) if stage.attention else None

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        scale, shift = torch.split(state[..., None, None], 1, dim=1)  # 2 × (N, 1, C, 1, 1)
        inner = self._resample(F.silu(self.norm1(h)))
        inner = self.norm2(self.conv1(inner)) * (1 + scale.squeeze(1)) + shift.squeeze(1)
        h = cast(Tensor, self.skip(self._resample(h)) + self.conv2(F.silu(inner)))  # (N, C, H', W')
        if self.attention is None or self.attention_norm is None:
            return h
        tokens = self.attention_norm(h).flatten(2).transpose(1, 2)  # (N, T, C)
        return h + cast(Tensor, self.attention(tokens)).transpose(1, 2).reshape(h.shape)

    def _resample(self, h: Tensor) -> Tensor:
        if self.resample == "halve":
            return F.avg_pool2d(h, 2)
        return F.interpolate(h, scale_factor=2.0, mode="nearest") if self.resample == "double" else h


class UNet(nn.Module):
    """A U-Net over images or latents (N, C, H, W); H and W must be divisible by 2 at every halving."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config, self.stages = config, config.stages()
        self.state_names = tuple(name for name, _ in config.state())
        width = config.hidden_size
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = ConditionEmbedder(
            config.classes, width, text_size=config.text_size, fusion=config.fusion
        )
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(stage, width, config.head_size) for stage in self.stages)
        self.norm_out = group_norm(self.stages[-1].outputs)
        self.conv_out = nn.Conv2d(self.stages[-1].outputs, config.out_channels, 3, padding=1)
        self.initialise()

    def initialise(self) -> None:
        """Initialise as ADM does: the last layer of every residual branch and the output start at zero."""
        for table in self.y_embedder.tables:
            nn.init.normal_(cast(nn.Embedding, table).weight, std=0.02)
        zeroed: list[nn.Linear | nn.Conv2d] = [self.conv_out]
        for block in self.blocks:
            assert isinstance(block, ResBlock)
            zeroed += [block.conv2, *([block.attention.proj] if block.attention is not None else [])]
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def embed(self, labels: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the condition embedding (N, 4·base) of labels (N, F) and text, as `DiT.embed` does."""
        return cast(Tensor, self.y_embedder(labels, text))

    def modulate(self, timestep: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        """Return the condition state of timesteps (N,) and embeddings (N, D).

        It is a scale and shift (N, 2, channels) for every residual block, in the order of `config.state()`.

        Raises:
            ValueError: not one timestep per embedding.
        """
        check_rows(timestep, embedding)
        c = self.t_embedder(timestep) + embedding
        return tuple(cast(ResBlock, block).modulation(c).reshape(len(c), 2, -1) for block in self.blocks)

    def backbone(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Return the network's output (N, C_out, H, W) for `x` (N, C, H, W) and its condition state.

        Raises:
            ValueError: `x` has other channels, H or W cannot be halved often enough, or `state` is another
                network's.
        """
        check_images(x, self.config.in_channels)
        check_state(state, self.state_names)
        self.config.check_size("size", x.shape[2:])
        h = self.conv_in(x)
        skips = [h]
        for stage, block, modulation in zip(self.stages, self.blocks, state, strict=True):
            h = block(torch.cat([h, skips.pop()], dim=1) if stage.pops else h, modulation)
            if stage.pushes:
                skips.append(h)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(h))))

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the output (N, C_out, H, W) for `x` (N, C, H, W), timesteps (N,) and labels (N, F)."""
        return self.backbone(x, self.modulate(timestep, self.embed(labels, text)))
