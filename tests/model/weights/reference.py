"""The functions of the official DiT and of SiT, written down from their papers without our layers.

DiT: Peebles & Xie, arXiv:2212.09748; SiT: Ma et al., arXiv:2401.08740, the same network told t in 0..1. A
state dict is in the published layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def official_dit(state: State, x: Tensor, t: Tensor, y: Tensor, *, heads: int) -> Tensor:
    """Return the output (N, C_out, H, W) of the published network for x (N, C, H, W), t (N,), y (N,)."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["x_embedder.proj.weight"]
    patch, (n, _, height, width) = kernel.shape[-1], x.shape
    h = F.conv2d(x, kernel, state["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    h = h + state["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    c = c + state["y_embedder.embedding_table.weight"][y]

    def norm(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for k in range(depth):
        modulation = linear(f"blocks.{k}.adaLN_modulation.1", F.silu(c))[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        q, key, v = (
            part.reshape(n, -1, heads, part.shape[-1] // heads).transpose(1, 2)
            for part in linear(f"blocks.{k}.attn.qkv", norm(h, shift_a, scale_a)).chunk(3, dim=-1)
        )
        weights = (q @ key.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        h = h + gate_a * linear(f"blocks.{k}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{k}.mlp.fc1", norm(h, shift_m, scale_m)), approximate="tanh")
        h = h + gate_m * linear(f"blocks.{k}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", norm(h, shift, scale))  # (N, T, P·P·C_out)
    rows, columns = height // patch, width // patch
    out = out.reshape(n, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(n, -1, height, width)


def sit_velocity(state: State, x: Tensor, time: Tensor, y: Tensor, *, heads: int) -> Tensor:
    """Return SiT's velocity for a time in 0..1: the first half of the channels of a network that has both."""
    return official_dit(state, x, time, y, heads=heads).chunk(2, dim=1)[0]
