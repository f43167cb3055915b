"""The layers of a Diffusion Transformer: each is one formula with its source.

Letters in shapes: N batch, T tokens, D hidden size, H heads, P patch size, C channels. The timestep
embedding, the statistics of norms and softmax are computed in fp32, whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.spec.attention_kinds import FULL, AttentionKind
from ditserve.model.spec.dit_config import SWIGLU_MULTIPLE

# Distance between neighbouring tokens along each axis; tensors where a traced graph computes it.
Spacing = tuple[float | Tensor, ...]
# Tokens along each axis: rows and columns, and before them frames or depth.
Grid = tuple[int, ...]


def sincos_positions(hidden_size: int, grid: Grid, spacing: Spacing | None = None) -> Tensor:
    """Return the sine-cosine position embedding of a grid of tokens, (T, D) fp32, computed in float64.

    The token in row i and column j gets the four quarters sin(j·ω), cos(j·ω), sin(i·ω), cos(i·ω), with
    ω_k = 10000^(−k/(D/4)), as in MAE and in the published DiT. i and j advance by `spacing`, 1 unless given:
    below 1, a larger grid is squeezed into the range of positions that the network was trained on. With a
    third axis each has a third of D, and that of frames or depth comes last.
    """
    angles = _angles(hidden_size // 2, grid, spacing)  # one (T, D/4) of each axis, with three about D/6
    return torch.cat([wave(axis) for axis in reversed(angles) for wave in (torch.sin, torch.cos)], 1).float()


def timestep_features(t: Tensor, width: int = 256, *, shift: int = 0) -> Tensor:
    """Return sinusoidal features (N, width) fp32 of raw timesteps `t` (N,): all cosines, then all sines.

    Frequency k is 10000^(−k/(width/2 − shift)), k from 0; `shift` is 0 as published, 1 in diffusers.
    """
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * k / (half - shift))[None, :]  # (N, half)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def shift_and_scale(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return h·(1 + scale) + shift: (N, T, D), and (N, 1, D) twice → (N, T, D).

    With a normalised `h` this is adaptive layer norm (adaLN, arXiv:2212.09748 §3.2).
    """
    return h * (1 + scale) + shift


def layer_norm(h: Tensor, eps: float = 1e-6) -> Tensor:
    """Return LayerNorm over D, without affine parameters; the statistics are computed in fp32."""
    return F.layer_norm(h.float(), h.shape[-1:], eps=eps).to(h.dtype)


def rms_norm(h: Tensor, eps: float = 1e-6) -> Tensor:
    """Return h / sqrt(mean of h² over D + eps), arXiv:1910.07467; the mean is computed in fp32."""
    wide = h.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(h.dtype)


def apply_rotary(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (k, k + head/2) of `q` (N, H, T, head) by angles (T, head/2), arXiv:2104.09864."""
    a, b = q.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(q.dtype)


def rotary_tables(head_size: int, grid: Grid, spacing: Spacing | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (T, head_size/2) fp32, of axial rotary angles, computed in float64.

    The first half of the pairs turns with the row, the second with the column; with a third axis, a third
    each. `spacing` is as above.
    """
    angles = torch.cat(_angles(head_size // 2, grid, spacing), dim=1)  # (T, head/2)
    return torch.cos(angles).float(), torch.sin(angles).float()


def _angles(pairs: int, grid: Grid, spacing: Spacing | None) -> list[Tensor]:
    """Return place·ω of every token along each axis, (T, count) float64, with ω_k = 10000^(−k/count).

    The counts share out `pairs` evenly; the last axes have one more where that leaves a rest.
    """
    angles = []
    for axis, distance in enumerate(spacing or (1.0,) * len(grid)):
        count = (pairs + axis) // len(grid)
        omega = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
        place = torch.arange(grid[axis], dtype=torch.float64) * distance
        lone = [1] * axis + [-1] + [1] * (len(grid) - axis - 1)
        angles.append(place.reshape(lone).expand(grid).reshape(-1, 1) * omega)
    return angles


def check_rows(timestep: Tensor, embedding: Tensor) -> None:
    """Raise ValueError unless there is one timestep (N,) for every condition embedding (N, D)."""
    if timestep.ndim != 1 or embedding.ndim != 2 or len(timestep) != len(embedding):
        raise ValueError(
            "pass one timestep per row, timestep (N,) and embedding (N, D), "
            f"not {tuple(timestep.shape)} and {tuple(embedding.shape)}"
        )


def check_state(state: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError unless the condition state has one tensor for each of `names`."""
    if len(state) != len(names):
        raise ValueError(
            f"the condition state must hold {len(names)} tensors ({', '.join(names)}), not {len(state)}"
        )


def check_images(x: Tensor, channels: int, axes: int = 2) -> None:
    """Raise ValueError unless `x` is (N, channels, H, W), or with three axes (N, channels, F, H, W)."""
    if x.ndim != 2 + axes or x.shape[1] != channels:
        sides = "H, W" if axes == 2 else "F, H, W"
        raise ValueError(f"x must be (N, {channels}, {sides}), not {tuple(x.shape)}")


# The convolution over pixels or tokens, by the number of their axes.
CONVOLUTIONS: dict[int, Callable[..., nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class PatchEmbed(nn.Module):
    """The patch embedding: one token for each patch, without overlap, (N, C, H, W) → (N, T, D)."""

    def __init__(self, patch: Grid, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = CONVOLUTIONS[len(patch)](in_channels, hidden_size, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)  # (N, D, h, w) → (N, T, D)


class TimestepEmbedder(nn.Module):
    """The timestep embedding: 256 sinusoids, then Linear–SiLU–Linear; raw timesteps (N,) → (N, D)."""

    def __init__(self, hidden_size: int, *, shift: int = 0, width: int = 256) -> None:
        super().__init__()
        self.width, self.shift = width, shift
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.width, shift=self.shift)  # (N, 256) fp32
        return cast(Tensor, self.mlp(features.to(cast(nn.Linear, self.mlp[0]).weight.dtype)))  # (N, D)


class RmsNorm(nn.Module):
    """`rms_norm` times a weight, (…, D) → (…, D)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, h: Tensor) -> Tensor:
        return rms_norm(h) * self.weight


QkNorm = Literal["layer", "rms"]


def _head_norm(kind: QkNorm | None, head_size: int) -> nn.Module:
    """Return the norm of the queries or the keys of every head; None: no norm."""
    if kind is None:
        return nn.Identity()
    return RmsNorm(head_size) if kind == "rms" else nn.LayerNorm(head_size, eps=1e-6)


class AttentionOptions(TypedDict, total=False):
    """The options of a self-attention: the width of all heads together, a norm within heads, and its kind."""

    width: int | None
    qk_norm: QkNorm | None
    kind: AttentionKind


def padded_attention(q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
    """Return the attention of (N, H, T, head) three times, computed with heads `width` wide: (N, H, T, head).

    The further numbers of each head are zeros, which change no product. Some kernels are for some widths.
    """
    head = q.shape[-1]
    if width == head:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (F.pad(part, (0, width - head)) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=head**-0.5)[..., :head]


class Attention(nn.Module):
    """Multi-head self-attention, (N, T, D) → (N, T, D), by torch's scaled_dot_product_attention.

    `width` W is the width of all heads together; it is D unless given. `attention_kinds` has the layers of
    other kinds, which mix values by another rule.
    """

    # Whether tokens attend to tokens.
    over_tokens: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        width: int | None = None,
        qk_norm: QkNorm | None = None,
        kind: AttentionKind = FULL,
    ) -> None:
        super().__init__()
        width = width or hidden_size
        self.num_heads, self.kind = num_heads, kind
        self.qkv = nn.Linear(hidden_size, 3 * width)
        self.proj = nn.Linear(width, hidden_size)
        self.head_size = self.computed_width = head = width // num_heads
        self.q_norm, self.k_norm = (_head_norm(qk_norm, head) for _ in range(2))

    def forward(self, h: Tensor, rotary: tuple[Tensor, Tensor] | None = None, grid: Grid = ()) -> Tensor:
        """Attend within `h`, whose T tokens lie in a grid; only other kinds need it."""
        out = self.attend(*self.heads(h, rotary), grid)  # (N, H, T, W/H)
        return cast(Tensor, self.proj(out.transpose(1, 2).flatten(2)))  # (N, T, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Return the mixes of values (N, H, T, W/H)."""
        return padded_attention(q, k, v, self.computed_width)

    def heads(self, h: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (N, H, T, W/H), normalised and rotated as configured."""
        n, t, _ = h.shape
        qkv = self.qkv(h).reshape(n, t, 3, self.num_heads, self.head_size)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, N, H, T, W/H)
        q, k, v = (part.squeeze(0) for part in torch.split(qkv, 1, dim=0))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return q, k, v

    def weights(self, h: Tensor, rotary: tuple[Tensor, Tensor] | None = None, grid: Grid = ()) -> Tensor:
        """Return attention probabilities (N, H, T, T) fp32, which the forward pass never forms."""
        q, k, _ = self.heads(h, rotary)
        return self.probabilities(q.float(), k.float(), grid)

    def probabilities(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Return the weights (N, H, T, T) by which values are mixed."""
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)


class CrossAttention(nn.Module):
    """Attention from image tokens (N, T, D) to condition tokens (N, S, D) → (N, T, D).

    `width` W is the width of all heads together; it is D unless given.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, width: int | None = None, qk_norm: QkNorm | None = None
    ) -> None:
        super().__init__()
        width = width or hidden_size
        self.num_heads, self.head_size = num_heads, width // num_heads
        self.q = nn.Linear(hidden_size, width)
        self.kv = nn.Linear(hidden_size, 2 * width)
        self.proj = nn.Linear(width, hidden_size)
        self.q_norm, self.k_norm = (_head_norm(qk_norm, self.head_size) for _ in range(2))

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend to the tokens that the mask (N, 1, 1, S) bool keeps; None: to all."""
        n, t, _ = h.shape
        q = self.q(h).reshape(n, t, self.num_heads, self.head_size).transpose(1, 2)  # (N, H, T, W/H)
        kv = self.kv(tokens).reshape(n, tokens.shape[1], 2, self.num_heads, self.head_size)
        kv = kv.permute(2, 0, 3, 1, 4)  # (2, N, H, S, W/H)
        k, v = (part.squeeze(0) for part in torch.split(kv, 1, dim=0))
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=mask)
        return cast(Tensor, self.proj(out.transpose(1, 2).flatten(2)))  # (N, T, D)


class Mlp(nn.Module):
    """The MLP of a block: Linear–GELU(tanh)–Linear, (N, T, D) → (N, T, D)."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(h), approximate="tanh")))


class SwiGlu(nn.Module):
    """A SiLU-gated MLP (arXiv:2002.05202), (N, T, D) → (N, T, D).

    It is two thirds as wide as `Mlp`, rounded up to a multiple of 8: both have about as many parameters.
    """

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        inner = math.ceil(2 * mlp_size // 3 / SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE
        self.fc1 = nn.Linear(hidden_size, 2 * inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.fc1(h).chunk(2, dim=-1)
        return cast(Tensor, self.fc2(F.silu(gate) * value))


def along_rows(column: Tensor, rows: Tensor) -> Tensor:
    """Return a number for each row (N,), shaped to broadcast against rows of pictures or clips (N, C, …)."""
    return column.reshape(-1, *[1] * (rows.ndim - 1))


def unpatchify(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """Join patches to images: (N, T, C·P·P) → (N, C, rows·P, columns·P); a token is laid out (C, P, P)."""
    n, _, width = tokens.shape
    axes, channels = len(grid), width // math.prod(patch)
    pairs = [number for axis in range(1, axes + 1) for number in (axis, axis + axes + 1)]
    apart = tokens.reshape(n, *grid, channels, *patch).permute(0, axes + 1, *pairs)
    return apart.reshape(n, channels, *(count * side for count, side in zip(grid, patch, strict=True)))
