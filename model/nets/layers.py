"""The parts of a Diffusion Transformer, each one formula with its source.

Half precision: the timestep embedding, LayerNorm statistics and softmax are computed in fp32 whatever the
weights are. Shapes: N batch, T tokens, D hidden, H heads, P patch, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def positions(hidden_size: int, rows: int, columns: int, scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """2-D sine-cosine position embedding, (rows·columns, hidden_size) fp32, computed in float64.

    Quarters sin(j·ω), cos(j·ω), sin(i·ω), cos(i·ω) concatenated, column j first, ω_k = 10000^(−k/(D/4)), as
    in MAE and the published DiT. `scale` is the spacing of (rows, columns); below 1 it squeezes a larger grid
    into the trained.
    """
    row, column = _angles(hidden_size // 4, rows, columns, scale)  # 2 × (T, D/4)
    return torch.cat([torch.sin(column), torch.cos(column), torch.sin(row), torch.cos(row)], dim=1).float()


def timestep_frequencies(t: Tensor, width: int = 256, *, shift: int = 0) -> Tensor:
    """Sinusoidal features of raw timesteps `t` (N,), (N, width) fp32: cos first, then sin.

    Frequencies are 10000^(−k/(width/2 − shift)), k from 0.
    """
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * k / (half - shift))[None, :]  # (N, half)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`h·(1 + scale) + shift`, (N, T, D) with (N, 1, D): adaptive layer norm once normalised (§3.2)."""
    return h * (1 + scale) + shift


def layer_norm(h: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over D without affine parameters; statistics in fp32."""
    return F.layer_norm(h.float(), h.shape[-1:], eps=eps).to(h.dtype)


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (k, k + head/2) of (N, H, T, head) by angles (T, head/2) (RoFormer, arXiv:2104.09864)."""
    a, b = q.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(q.dtype)


def rotary_tables(
    head_size: int, rows: int, columns: int, scale: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, head_size/2) fp32 of axial 2-D rotary angles, computed in float64.

    The first half of the pairs turns with the row, the second with the column; `scale` as in `positions`.
    """
    angles = torch.cat(_angles(head_size // 4, rows, columns, scale), dim=1)  # (T, head/2)
    return torch.cos(angles).float(), torch.sin(angles).float()


def _angles(count: int, rows: int, columns: int, scale: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Row and column of every token times `count` frequencies 10000^(−k/count): two (T, count) float64."""
    omega = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    i = torch.arange(rows, dtype=torch.float64) * scale[0]
    j = torch.arange(columns, dtype=torch.float64) * scale[1]
    row, column = i[:, None].expand(rows, columns), j[None, :].expand(rows, columns)
    return row.reshape(-1, 1) * omega, column.reshape(-1, 1) * omega


def check_rows(timestep: Tensor, embedding: Tensor) -> None:
    """Raises ValueError unless there is a timestep (N,) for every condition embedding (N, D)."""
    if timestep.ndim != 1 or embedding.ndim != 2 or len(timestep) != len(embedding):
        raise ValueError(
            "pass one timestep per row, timestep (N,) and embedding (N, D), "
            f"not {tuple(timestep.shape)} and {tuple(embedding.shape)}"
        )


def check_state(state: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises ValueError unless the condition state has one tensor for each of the names."""
    if len(state) != len(names):
        raise ValueError(
            f"the condition state must hold {len(names)} tensors ({', '.join(names)}), not {len(state)}"
        )


def check_images(x: Tensor, channels: int) -> None:
    """Raises ValueError unless x is (N, channels, H, W)."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be (N, {channels}, H, W), not {tuple(x.shape)}")


class PatchEmbed(nn.Module):
    """Non-overlapping P×P patches to tokens: (N, C, H, W) → (N, T, D)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)  # (N, D, h, w) → (N, T, D)


class TimestepEmbedder(nn.Module):
    """Raw timesteps (N,) → (N, D): 256 sinusoids, then Linear–SiLU–Linear."""

    def __init__(self, hidden_size: int, *, shift: int = 0, width: int = 256) -> None:
        super().__init__()
        self.width, self.shift = width, shift
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_frequencies(t, self.width, shift=self.shift)  # (N, 256) fp32
        return cast(Tensor, self.mlp(features.to(cast(nn.Linear, self.mlp[0]).weight.dtype)))  # (N, D)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D) by scaled_dot_product_attention; `width` W of all heads is D unless given."""

    def __init__(
        self, hidden_size: int, num_heads: int, *, width: int | None = None, qk_norm: bool = False
    ) -> None:
        super().__init__()
        width = width or hidden_size
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * width)
        self.proj = nn.Linear(width, hidden_size)
        self.head_size = head = width // num_heads
        self.q_norm = nn.LayerNorm(head, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, h: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = self.heads(h, rotary)
        out = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, W/H)
        return cast(Tensor, self.proj(out.transpose(1, 2).flatten(2)))  # (N, T, D)

    def heads(self, h: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, H, T, W/H), normalised and rotated as configured."""
        n, t, _ = h.shape
        qkv = self.qkv(h).reshape(n, t, 3, self.num_heads, self.head_size)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, N, H, T, W/H)
        q, k, v = (part.squeeze(0) for part in torch.split(qkv, 1, dim=0))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q, k, v

    def weights(self, h: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attention probabilities (N, H, T, T) fp32, for looking at; the forward pass never forms them."""
        q, k, _ = self.heads(h, rotary)
        return torch.softmax(q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)


class CrossAttention(nn.Module):
    """Attention from image tokens (N, T, D) to condition tokens (N, S, D); `width` W of all heads is D unless given."""

    def __init__(self, hidden_size: int, num_heads: int, *, width: int | None = None) -> None:
        super().__init__()
        width = width or hidden_size
        self.num_heads, self.head_size = num_heads, width // num_heads
        self.q = nn.Linear(hidden_size, width)
        self.kv = nn.Linear(hidden_size, 2 * width)
        self.proj = nn.Linear(width, hidden_size)

    def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
        n, t, _ = h.shape
        q = self.q(h).reshape(n, t, self.num_heads, self.head_size).transpose(1, 2)  # (N, H, T, W/H)
        kv = self.kv(tokens).reshape(n, tokens.shape[1], 2, self.num_heads, self.head_size)
        kv = kv.permute(2, 0, 3, 1, 4)  # (2, N, H, S, W/H)
        k, v = (part.squeeze(0) for part in torch.split(kv, 1, dim=0))
        out = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.proj(out.transpose(1, 2).flatten(2)))  # (N, T, D)


class Mlp(nn.Module):
    """Linear–GELU(tanh)–Linear."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(h), approximate="tanh")))


class SwiGlu(nn.Module):
    """SiLU-gated MLP (arXiv:2002.05202), two thirds as wide: it has as many parameters as the plain one."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        inner = (2 * mlp_size // 3 + 7) // 8 * 8
        self.fc1 = nn.Linear(hidden_size, 2 * inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.fc1(h).chunk(2, dim=-1)
        return cast(Tensor, self.fc2(F.silu(gate) * value))


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """(N, T, C·P·P) → (N, C, rows·P, columns·P); a token is laid out (C, P, P)."""
    n, _, width = tokens.shape
    channels = width // (patch * patch)
    grid = tokens.reshape(n, rows, columns, channels, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, rows * patch, columns * patch)
