"""The parts of a DiT: its blocks, its final layer, and the convolutional head that may follow."""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.attention_kinds import ConvMlp, make_attention
from ditserve.model.nets.experts import ExpertMlp
from ditserve.model.nets.layers import (
    CONVOLUTIONS,
    CrossAttention,
    Grid,
    Mlp,
    QkNorm,
    SwiGlu,
    layer_norm,
    rms_norm,
    shift_and_scale,
)
from ditserve.model.nets.modulation import ConditionGate, ModulationTable
from ditserve.model.nets.rotary import CosSin
from ditserve.model.nets.token_merging import TokenMerging
from ditserve.model.spec.attention_kinds import AttentionKind
from ditserve.model.spec.dit_config import BlockKind, DiTConfig

Rotary = CosSin | None
# Tokens (N, 1 + S, D) and the mask (N, 1, 1, 1 + S) of those that are there.
Text = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One transformer block. Its kind (`BlockKind`) says how the condition enters it."""

    def __init__(self, config: DiTConfig, kind: BlockKind, attention: AttentionKind) -> None:
        super().__init__()
        self.kind, self.mlp_norm_eps, self.merge_tokens = kind, config.mlp_norm_eps, config.merge_tokens
        self.norm = rms_norm if config.rms_norm else layer_norm
        d, width = config.hidden_size, config.heads_width
        qk_norm: QkNorm | None = ("rms" if config.rms_norm else "layer") if config.qk_norm else None
        self.attn = make_attention(config, attention, qk_norm)
        mlp = partial(ConvMlp, axes=config.axes) if config.conv_mlp else SwiGlu if config.swiglu else Mlp
        self.mlp: nn.Module = ExpertMlp(config) if config.experts else mlp(d, config.mlp_size)
        if kind == "cross_attention" or config.text_tokens:
            cross_norm = qk_norm if config.text_tokens else None
            self.cross = CrossAttention(d, config.num_heads, width=width, qk_norm=cross_norm)
        if width := config.modulation_vectors(kind) * d:
            self.adaLN_modulation: nn.Module = (
                ModulationTable(width)
                if config.shared_modulation
                else nn.Sequential(nn.SiLU(), nn.Linear(d, width))
            )
        self.condition_gate = ConditionGate(d) if config.condition_gate else None

    def forward(
        self,
        h: Tensor,
        state: Tensor | None,
        rotary: Rotary = None,
        text: Text | None = None,
        grid: Grid = (),
    ) -> Tensor:
        """Return the block's output: (N, T, D) → (N, T, D), of tokens in a grid.

        `state` is the modulation (N, 6, D) of adaLN-Zero or (N, 4, D) of adaLN, or the condition tokens
        (N, 2, D) for cross-attention. An in-context block has None: its condition tokens are part of `h`.
        A block of adaLN-Zero attends to `text`, if there is one, between its two halves. A gate's part of the
        condition is the last vector of a modulation.
        """
        merging = TokenMerging(h, self.merge_tokens) if self.merge_tokens else None
        attn, mlp = partial(self._attn, merging, rotary, grid), partial(self._mlp, merging, grid)
        if self.kind == "adaln_zero":
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(h, state)
            h = h + gate_a * attn(shift_and_scale(self.norm(h), shift_a, scale_a))
            if text is not None:
                h = h + self.cross(self.norm(h), *text)
            h = h + gate_m * mlp(shift_and_scale(self.norm(h, self.mlp_norm_eps), shift_m, scale_m))
            return h
        if self.kind == "adaln":
            shift_a, scale_a, shift_m, scale_m = self._modulation(h, state)
            h = h + attn(shift_and_scale(self.norm(h), shift_a, scale_a))
            h = h + mlp(shift_and_scale(self.norm(h, self.mlp_norm_eps), shift_m, scale_m))
            return h
        h = h + attn(self.norm(h))
        if self.kind == "cross_attention":
            h = h + self.cross(self.norm(h), cast(Tensor, state))
        return h + mlp(self.norm(h, self.mlp_norm_eps))

    def _attn(self, merging: TokenMerging | None, rotary: Rotary, grid: Grid, h: Tensor) -> Tensor:
        if merging is not None:
            return merging.spread(self.attn(merging.merge(h)))
        return cast(Tensor, self.attn(h, rotary, grid))

    def _mlp(self, merging: TokenMerging | None, grid: Grid, h: Tensor) -> Tensor:
        if merging is not None:
            return merging.spread(self.mlp(merging.merge(h)))
        return cast(Tensor, self.mlp(h, grid) if isinstance(self.mlp, ConvMlp) else self.mlp(h))

    def _modulation(self, h: Tensor, state: Tensor | None) -> list[Tensor]:
        """Return the vectors of the modulation, each (N, 1, D), or (N, T, D) where a gate acts on tokens."""
        vectors = list(torch.split(cast(Tensor, state), 1, dim=1))
        if self.condition_gate is None:
            return vectors
        alpha = self.condition_gate(self.norm(h), vectors.pop())  # (N, T, 1)
        # The gates of adaLN-Zero, numbers 2 and 5, stay as they are.
        kept = (2, 5) if len(vectors) == 6 else ()
        return [vector if k in kept else alpha * vector for k, vector in enumerate(vectors)]


class FinalLayer(nn.Module):
    """The final layer, (N, T, D) → (N, T, C·P·P): norm, modulation if the blocks have it, linear map.

    The published weights lay a patch out as (P, P, C). The weights are transposed to (C, P, P) here, because
    transposing the pixels instead would move far more data.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.channels = config.head_channels or config.out_channels
        self.norm = rms_norm if config.rms_norm else layer_norm
        self.linear = nn.Linear(config.hidden_size, math.prod(config.patch) * self.channels)
        if config.adaptive_final:
            d = config.hidden_size
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, h: Tensor, state: Tensor | None) -> Tensor:
        h = self.norm(h)
        if state is not None:
            shift, scale = torch.split(state, 1, dim=1)  # 2 × (N, 1, D)
            h = shift_and_scale(h, shift, scale)
        return F.linear(h, self._channels_first(self.linear.weight), self._channels_first(self.linear.bias))

    def _channels_first(self, parameter: Tensor) -> Tensor:
        """Return `parameter` with its rows laid out (C, P·P) instead of (P·P, C)."""
        return cast(Tensor, parameter.unflatten(0, (-1, self.channels))).transpose(0, 1).flatten(0, 1)


class ConvHead(nn.Module):
    """A small convolution that removes the seams between patches: h[:C] + Conv3×3(SiLU(Conv3×3([x, h]))).

    `x` is the noisy image (N, C, H, W), `h` (N, head_channels, H, W) the unpatchified final layer. With three
    axes the convolutions are over 3×3×3.
    """

    def __init__(self, in_channels: int, head_channels: int, axes: int = 2, width: int = 24) -> None:
        super().__init__()
        self.in_channels, layer = in_channels, CONVOLUTIONS[axes]
        self.conv1 = layer(in_channels + head_channels, width, 3, padding=1)
        self.conv2 = layer(width, in_channels, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        detail: Tensor = self.conv2(F.silu(self.conv1(torch.cat([x, h], dim=1))))
        return h[:, : self.in_channels] + detail
