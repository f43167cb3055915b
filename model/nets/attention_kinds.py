"""Self-attention of other kinds than the full one, and the convolutional MLP that linear attention needs.

`spec.attention_kinds` lists the kinds. All of them have the parameters of full attention, and change only the
rule by which values are mixed. N batch, H heads, T = R·C tokens in R rows and C columns, or T = F·R·C with a
third axis, d head size; shapes are written for two axes. None but `probabilities`, which is for pictures of
attention, forms anything of T×T.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.layers import CONVOLUTIONS, Attention, AttentionOptions, Grid, QkNorm, SwiGlu
from ditserve.model.spec.attention_kinds import AttentionKind
from ditserve.model.spec.dit_config import DiTConfig

# Added to sums that are divided by, which may be zero.
TINY = 1e-6


class LocalAttention(Attention, ABC):
    """Attention of every token to some tokens, by their places in the grid."""

    @abstractmethod
    def allowed(self, grid: Grid) -> Tensor:
        """Return which token attends to which, (T, T) or (H, T, T) bool."""

    def probabilities(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return torch.softmax(scores.masked_fill(~self.allowed(grid).to(q.device), -math.inf), dim=-1)


class BlockAttention(LocalAttention, ABC):
    """Attention within blocks of tokens, each a box of the grid."""

    @abstractmethod
    def sides(self, grid: Grid) -> Grid:
        """Return the sides of a block."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        sides = self.sides(grid)
        q, k, v = (to_blocks(part, grid, sides) for part in (q, k, v))
        return from_blocks(F.scaled_dot_product_attention(q, k, v), grid, sides)

    def allowed(self, grid: Grid) -> Tensor:
        blocks = [torch.arange(count) // side for count, side in zip(grid, self.sides(grid), strict=True)]
        return _along_all_axes([block[:, None] == block for block in blocks])


class SpaceAttention(BlockAttention):
    """Attention within a frame, or a slice of a volume (Ma et al., arXiv:2401.03048, §3.1)."""

    def sides(self, grid: Grid) -> Grid:
        return (1, *grid[1:])


class TimeAttention(BlockAttention):
    """Attention of the tokens at one place of all frames (Ma et al., arXiv:2401.03048, §3.1)."""

    def sides(self, grid: Grid) -> Grid:
        return (grid[0], *(1 for _ in grid[1:]))


class WindowAttention(LocalAttention):
    """Attention within windows of side S, cut at multiples of S plus a shift; at the border they are smaller.

    Source: Liu et al., arXiv:2103.14030, §3.2, without the bias by relative position. The windows of a
    shifted grid are rolled to whole ones, whose parts from opposite borders do not see each other.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        sides = (self.kind.size,) * len(grid)
        mask = self._same_part(grid, q.device) if self.kind.shift else None  # (1, w·H, S², S²)
        q, k, v = (to_blocks(self._rolled(part, grid, -1), grid, sides) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (N, w·H, S², d)
        return self._rolled(from_blocks(out, grid, sides), grid, 1)

    def _rolled(self, x: Tensor, grid: Grid, sign: int) -> Tensor:
        """Roll (N, H, T, d) along every axis of the grid by the shift."""
        shift, axes = sign * self.kind.shift, len(grid)
        if not shift:
            return x
        rolled = x.unflatten(2, grid).roll((shift,) * axes, tuple(range(2, 2 + axes)))
        return cast(Tensor, rolled.flatten(2, 1 + axes))

    def _same_part(self, grid: Grid, device: torch.device) -> Tensor:
        """Return the pairs of a rolled window that were neighbours before."""
        part = torch.zeros((), dtype=torch.int32, device=device)
        for count in grid:
            # True for the rolled ones.
            rolled = torch.arange(count, device=device) >= count - self.kind.shift
            part = 2 * part[..., None] + rolled.int()  # (R,), then (R, C)
        part = to_blocks(part.reshape(1, 1, -1, 1), grid, (self.kind.size,) * len(grid))[0, ..., 0]
        same = part[:, :, None] == part[:, None, :]  # (w, S², S²)
        return same[:, None].expand(-1, self.num_heads, -1, -1).flatten(0, 1)[None]

    def allowed(self, grid: Grid) -> Tensor:
        windows = [
            torch.arange(count).sub(self.kind.shift).div(self.kind.size, rounding_mode="floor")
            for count in grid
        ]
        return _along_all_axes([window[:, None] == window for window in windows])


class NeighbourhoodAttention(LocalAttention):
    """Attention to tokens at most r rows and r columns away (Hassani et al., arXiv:2204.07143).

    Computed in blocks of 2r×2r queries, whose keys are the 4r×4r tokens around; a mask keeps the near ones.
    Nearer to the border than r, there are fewer keys.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        sides = (2 * self.kind.size,) * len(grid)
        first, *others = (self._near(count, q.device) for count in grid)  # (w, 2r, 4r) along each axis
        mask = first
        for near in others:
            mask = mask[:, None, :, None, :, None] & near[None, :, None, :, None, :]
            mask = mask.flatten(4).flatten(2, 3).flatten(0, 1)  # (w, 4r², 16r²)
        mask = mask[:, None].expand(-1, self.num_heads, -1, -1).flatten(0, 1)[None]
        k, v = (self._around(part, grid) for part in (k, v))
        out = F.scaled_dot_product_attention(to_blocks(q, grid, sides), k, v, attn_mask=mask)
        return from_blocks(out, grid, sides)

    def _near(self, count: int, device: torch.device) -> Tensor:
        """Return, for every block along an axis, which of its queries (2r) sees which of its keys (4r)."""
        radius = self.kind.size
        query, key = torch.arange(2 * radius, device=device), torch.arange(4 * radius, device=device) - radius
        near = (query[:, None] - key[None, :]).abs() <= radius
        place = key + torch.arange(0, count, 2 * radius, device=device)[:, None]  # (w, 4r)
        return near & ((place >= 0) & (place < count))[:, None, :]

    def _around(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the tokens around each block: (N, H, T, d) → (N, w·H, 16r², d)."""
        radius, axes = self.kind.size, len(grid)
        x = F.pad(x.unflatten(2, grid), (0, 0, *[radius] * (2 * axes)))  # (N, H, R + 2r, C + 2r, d)
        for axis in range(2, 2 + 2 * axes, 2):
            # 4r tokens around are two blocks of the padded grid.
            x = x.unflatten(axis, (-1, 2 * radius))
            first, second = x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1)
            x = torch.cat([first, second], dim=axis + 1)
        blocks, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
        x = x.permute(0, *blocks, 1, *inner, -1)
        return x.flatten(2 + axes, 1 + 2 * axes).flatten(1, 1 + axes)

    def allowed(self, grid: Grid) -> Tensor:
        places = [torch.arange(count) for count in grid]
        return _along_all_axes([(place[:, None] - place).abs() <= self.kind.size for place in places])


class AxialAttention(LocalAttention):
    """Attention within rows by half of the heads, and within columns by the others.

    With a third axis, a third of the heads attends along each. Source: Ho et al., arXiv:1912.12180, all axes
    at once as in arXiv:2107.00652, with stripes of one token.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        share, mixed = self.num_heads // len(grid), []
        parts = [x.unflatten(2, grid).split(share, dim=1) for x in (q, k, v)]  # 3 × (N, H/2, R, C, d) twice
        # Along the last axis first: tokens of one row.
        for group, axis in enumerate(range(len(grid) + 1, 1, -1)):
            lines = [x[group].movedim(axis, -2) for x in parts]  # (N, H/2, R, C, d), then (N, H/2, C, R, d)
            out = F.scaled_dot_product_attention(*(line.flatten(1, -3) for line in lines))
            mixed.append(out.reshape(lines[0].shape).movedim(-2, axis))
        return torch.cat(mixed, dim=1).flatten(2, 1 + len(grid))

    def allowed(self, grid: Grid) -> Tensor:
        lines = []
        for along in reversed(range(len(grid))):
            same = [
                torch.ones(count, count, dtype=torch.bool) if axis == along else torch.eye(count).bool()
                for axis, count in enumerate(grid)
            ]
            lines += [_along_all_axes(same)] * (self.num_heads // len(grid))
        return torch.stack(lines)


class LinearAttention(Attention):
    """φ(q)·(φ(k)ᵀ·v) / φ(q)·Σφ(k) with φ = ReLU, in fp32 (Xie et al., arXiv:2410.10629, §2.2)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        wide_q, wide_k = F.relu(q).float(), F.relu(k).float()
        summary = wide_k.transpose(-1, -2) @ v.float()  # (N, H, d, d)
        total = (wide_q * wide_k.sum(2, keepdim=True)).sum(-1, keepdim=True)  # (N, H, T, 1)
        return (wide_q @ summary / (total + TINY)).to(v.dtype)

    def probabilities(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        weights = F.relu(q) @ F.relu(k).transpose(-1, -2)
        return weights / (weights.sum(-1, keepdim=True) + TINY)


class LowRankAttention(Attention):
    """Attention to r mixes of the keys and of the values: softmax(q·(P·k)ᵀ)·(P·v) with P (r, T).

    Linformer (Wang et al., arXiv:2006.04768) learns P, which fixes the number of tokens. Here r learned
    queries attend to the keys and so make P, for any size (Lee et al., arXiv:1810.00825, §3.1).
    """

    def __init__(self, hidden_size: int, num_heads: int, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(hidden_size, num_heads, **options)
        self.landmarks = nn.Parameter(torch.randn(num_heads, self.kind.size, self.head_size))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        mixing = self._mixing(k)  # (N, H, r, T)
        return F.scaled_dot_product_attention(q, mixing @ k, mixing @ v)

    def _mixing(self, k: Tensor) -> Tensor:
        scores = self.landmarks.to(k.dtype) @ k.transpose(-1, -2) / math.sqrt(self.head_size)
        return torch.softmax(scores.float(), dim=-1).to(k.dtype)

    def probabilities(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        mixing = self._mixing(k)
        scores = q @ (mixing @ k).transpose(-1, -2) / math.sqrt(self.head_size)
        return torch.softmax(scores, dim=-1) @ mixing


class ChannelAttention(Attention):
    """Attention of the channels of a head to one another, over all tokens: no token looks at another.

    softmax(τ·q̂ᵀ·k̂) mixes channels, with q̂ and k̂ of length 1 over the tokens and a learned τ per head
    (El-Nouby et al., arXiv:2106.09681, §3.2). With a spatial kind in the other blocks, as a list, it is the
    "depthwise-separable" attention of arXiv:2204.03645.
    """

    over_tokens: ClassVar[bool] = False

    def __init__(self, hidden_size: int, num_heads: int, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(hidden_size, num_heads, **options)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        q, k = (F.normalize(part.float(), dim=2, eps=TINY) for part in (q, k))
        mixing = torch.softmax(self.temperature.float() * (q.transpose(-1, -2) @ k), dim=-1)  # (N, H, d, d)
        return v @ mixing.to(v.dtype).transpose(-1, -2)


class ConvMlp(nn.Module):
    """A gated MLP whose hidden channels are convolved over the 3×3 tokens around, (N, T, D) → (N, T, D).

    Linear–SiLU–depthwise convolution–gate–linear: the Mix-FFN of Sana (arXiv:2410.10629, §2.2), which gives
    linear attention the neighbourhood that its kernel blurs. It is as wide as `SwiGlu`. With three axes it is
    convolved over 3×3×3 tokens.
    """

    def __init__(self, hidden_size: int, mlp_size: int, axes: int = 2) -> None:
        super().__init__()
        plain = SwiGlu(hidden_size, mlp_size)
        self.fc1, self.fc2 = plain.fc1, plain.fc2
        inner = self.fc1.out_features
        self.conv = CONVOLUTIONS[axes](inner, inner, 3, padding=1, groups=inner)

    def forward(self, h: Tensor, grid: Grid) -> Tensor:
        inner = F.silu(self.fc1(h)).transpose(1, 2).unflatten(2, grid)  # (N, 2·inner, R, C)
        value, gate = cast(Tensor, self.conv(inner)).flatten(2).transpose(1, 2).chunk(2, dim=-1)
        return cast(Tensor, self.fc2(value * F.silu(gate)))


def _along_all_axes(pairs: Sequence[Tensor]) -> Tensor:
    """Return which token attends to which (T, T), from the same along each axis (R, R), (C, C)."""
    allowed = pairs[0]
    for pair in pairs[1:]:
        allowed = (allowed[:, None, :, None] & pair[None, :, None, :]).flatten(2).flatten(0, 1)
    return allowed


def to_blocks(x: Tensor, grid: Grid, sides: Grid) -> Tensor:
    """Cut tokens (N, H, T, d) into blocks of S×S, row by row: (N, w·H, S², d)."""
    n, heads, _, d = x.shape
    counts = [count // side for count, side in zip(grid, sides, strict=True)]
    pairs = [number for pair in zip(counts, sides, strict=True) for number in pair]
    axes = len(grid)
    # (N, H, w, S, w, S, d) → (N, w, w, H, S, S, d)
    blocks = [2 + 2 * axis for axis in range(axes)]
    x = x.reshape(n, heads, *pairs, d).permute(0, *blocks, 1, *(axis + 1 for axis in blocks), 2 + 2 * axes)
    return x.reshape(n, math.prod(counts) * heads, math.prod(sides), d)


def from_blocks(x: Tensor, grid: Grid, sides: Grid) -> Tensor:
    """Join blocks (N, w·H, S², d) again to tokens (N, H, T, d)."""
    n, _, _, d = x.shape
    counts = [count // side for count, side in zip(grid, sides, strict=True)]
    axes = len(grid)
    # (N, w, w, H, S, S, d) → (N, H, w, S, w, S, d)
    pairs = [number for axis in range(axes) for number in (1 + axis, 2 + axes + axis)]
    x = x.reshape(n, *counts, -1, *sides, d).permute(0, 1 + axes, *pairs, 2 + 2 * axes)
    return x.reshape(n, -1, math.prod(grid), d)


_LAYERS: dict[str, type[Attention]] = {
    "full": Attention,
    "space": SpaceAttention,
    "time": TimeAttention,
    "window": WindowAttention,
    "neighbourhood": NeighbourhoodAttention,
    "axial": AxialAttention,
    "linear": LinearAttention,
    "low_rank": LowRankAttention,
    "channel": ChannelAttention,
}


def make_attention(config: DiTConfig, kind: AttentionKind, qk_norm: QkNorm | None) -> Attention:
    """Return the attention of a block."""
    layer = _LAYERS[kind.name]
    return layer(config.hidden_size, config.num_heads, width=config.heads_width, qk_norm=qk_norm, kind=kind)
