"""LightningDiT written down from its paper and its public description, without our layers.

Yao et al., arXiv:2501.01423. A network is a state dict in the names of its checkpoints. Which extensions it
has follows from the names, but for the rotary angles, which are computed here as complex numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
# The shape of a small one: latents of 6 × 6 in 5 channels, a token for each.
SIDE, CHANNELS, WIDTH, HEADS, DEPTH, CLASSES = 6, 5, 32, 2, 2, 5
HEAD = WIDTH // HEADS


def lightning_config(**sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configuration of a training as its checkpoints keep it, with changes by section."""
    config: dict[str, dict[str, Any]] = {
        "ckpt_path": {},
        "data": {"image_size": 96, "num_classes": CLASSES, "latent_norm": True, "latent_multiplier": 1.0},
        "vae": {"model_name": "vavae_f16d32", "downsample_ratio": 16},
        "model": {
            "model_type": "LightningDiT-tiny/1",
            "use_qknorm": False,
            "use_swiglu": True,
            "use_rope": True,
            "use_rmsnorm": True,
            "wo_shift": False,
            "in_chans": CHANNELS,
        },
        "transport": {"path_type": "Linear", "prediction": "velocity", "loss_weight": None},
        "sample": {
            "mode": "ODE",
            "sampling_method": "euler",
            "num_sampling_steps": 9,
            "cfg_scale": 2.5,
            "cfg_interval_start": 0.125,
            "timestep_shift": 0.3,
        },
    }
    return {name: {**config.get(name, {}), **sections.get(name, {})} for name in {**config, **sections}}


def random_lightningdit(
    *, qk_norm: bool = False, swiglu: bool = True, rope: bool = True, rms: bool = True, shift: bool = True
) -> dict[str, Tensor]:
    """Return a checkpoint of random weights with the names and shapes of those options."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        state[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.1

    def norm(name: str, size: int, *, bias: bool) -> None:
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(size, generator=generator)
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(size, generator=generator)

    linear("x_embedder.proj", WIDTH, CHANNELS)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"][..., None, None]
    state["pos_embed"] = positions()[None]
    linear("t_embedder.mlp.0", WIDTH, 256)
    linear("t_embedder.mlp.2", WIDTH, WIDTH)
    state["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, WIDTH, generator=generator)
    if rope:
        turns = angles().repeat_interleave(2, dim=1)
        state["feat_rope.freqs_cos"], state["feat_rope.freqs_sin"] = turns.cos(), turns.sin()
    for k in range(DEPTH):
        block = f"blocks.{k}"
        if rms:
            norm(f"{block}.norm1", WIDTH, bias=False)
            norm(f"{block}.norm2", WIDTH, bias=False)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        if qk_norm:
            # Small enough that the epsilon of the norm matters.
            for part in ("weight", "bias"):
                state[f"{block}.attn.qkv.{part}"][: 2 * WIDTH] *= 0.01
            norm(f"{block}.attn.q_norm", HEAD, bias=not rms)
            norm(f"{block}.attn.k_norm", HEAD, bias=not rms)
        if swiglu:
            # Two thirds of 4 · 32, which is no multiple of eight.
            linear(f"{block}.mlp.w12", 2 * 85, WIDTH)
            linear(f"{block}.mlp.w3", WIDTH, 85)
        else:
            linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
            linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
        linear(f"{block}.adaLN_modulation.1", (6 if shift else 4) * WIDTH, WIDTH)
    if rms:
        norm("final_layer.norm_final", WIDTH, bias=False)
    linear("final_layer.linear", CHANNELS, WIDTH)
    linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return state


def positions() -> Tensor:
    """Return the sine-cosine table (T, D): sine and cosine of the column, then of the row."""
    i, j = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    omega = 10000.0 ** (-torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    parts = [wave(place.flatten()[:, None] * omega) for place in (j, i) for wave in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()


def angles() -> Tensor:
    """Return the rotary angle of every pair (T, head / 2): those of the row, then those of the column."""
    i, j = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    theta = 1.0 / 10000.0 ** (torch.arange(0, HEAD // 2, 2).float() / (HEAD // 2))
    return torch.cat([i.flatten()[:, None] * theta, j.flatten()[:, None] * theta], dim=1)


def lightningdit(state: State, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Return the velocity (N, C, H, W) for x (N, C, H, W), the time t (N,) in 0..1 and classes y (N,)."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, value: Tensor, *, eps: float = 1e-6) -> Tensor:
        weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
        if weight is not None and bias is None:
            return value / (value.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        centred = value - value.mean(-1, keepdim=True)
        value = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return value if weight is None or bias is None else value * weight + bias

    def turned(value: Tensor) -> Tensor:
        """Turn neighbours, as a complex number, by their angle."""
        if "feat_rope.freqs_cos" not in state:
            return value
        pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones(()), angles())).flatten(-2)

    n = len(x)
    h = x.flatten(2).transpose(1, 2) @ state["x_embedder.proj.weight"].flatten(1).T
    h = h + state["x_embedder.proj.bias"] + state["pos_embed"]
    phases = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    features = torch.cat([phases.cos(), phases.sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][y])
    for k in range(DEPTH):
        block = f"blocks.{k}"
        vectors = linear(f"{block}.adaLN_modulation.1", c)[:, None]
        parts = list(vectors.chunk(vectors.shape[-1] // WIDTH, dim=-1))
        if len(parts) == 4:
            parts = [torch.zeros(()), *parts[:2], torch.zeros(()), *parts[2:]]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        attended = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", h) * (1 + scale_a) + shift_a)
        q, key, v = (part.reshape(n, -1, HEADS, HEAD).transpose(1, 2) for part in attended.chunk(3, dim=-1))
        if f"{block}.attn.q_norm.weight" in state:
            # Their LayerNorm of queries and keys has torch's default epsilon.
            q, key = norm(f"{block}.attn.q_norm", q, eps=1e-5), norm(f"{block}.attn.k_norm", key, eps=1e-5)
        weights = (turned(q) @ turned(key).transpose(-1, -2) / math.sqrt(HEAD)).softmax(-1)
        h = h + gate_a * linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        inner = norm(f"{block}.norm2", h) * (1 + scale_m) + shift_m
        if f"{block}.mlp.w12.weight" in state:
            gate, value = linear(f"{block}.mlp.w12", inner).chunk(2, dim=-1)
            inner = linear(f"{block}.mlp.w3", gate * torch.sigmoid(gate) * value)
        else:
            inner = F.gelu(linear(f"{block}.mlp.fc1", inner), approximate="tanh")
            inner = linear(f"{block}.mlp.fc2", inner)
        h = h + gate_m * inner
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", norm("final_layer.norm_final", h) * (1 + scale) + shift)
    return out.transpose(1, 2).reshape(n, CHANNELS, SIDE, SIDE)


def lightning_run(state: State, noise: Tensor, label: int, sample: Mapping[str, Any]) -> Tensor:
    """Return the image of noise (1, C, H, W): Euler's method over times 0 … 1, both ends included.

    The times are shifted; guidance acts from a time on, and on the first three channels alone.
    """
    t = torch.linspace(0, 1, sample["num_sampling_steps"], dtype=torch.float64)
    a = sample["timestep_shift"] or 1.0
    t = a * t / (1 + (a - 1) * t)
    x = noise
    for now, after in zip(t[:-1].tolist(), t[1:].tolist(), strict=True):
        both = lightningdit(state, torch.cat([x, x]), torch.full((2,), now), torch.tensor([label, CLASSES]))
        velocity, null = both.chunk(2)
        if now >= sample["cfg_interval_start"] and sample["cfg_scale"] > 1:
            guided = null + sample["cfg_scale"] * (velocity - null)
            velocity = torch.cat([guided[:, :3], velocity[:, 3:]], dim=1)
        x = x + (after - now) * velocity
    return x
