"""Adapters of random numbers for the network of `tiny_bundle`, in the layout of PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ditserve.model.nets.dit import DiT
from tests.service.tiny_bundle import CONFIG

BACKBONE = ("blocks.0.attn.qkv", "blocks.1.mlp.fc1")
CONDITIONER = ("blocks.0.adaLN_modulation.1", "t_embedder.mlp.0")


def write_adapter(
    bundle: Path, name: str, layers: Sequence[str] = BACKBONE, *, rank: int = 2, seed: int = 0
) -> Path:
    """Write an adapter of some layers beside a bundle; return its file."""
    generator, network = torch.Generator().manual_seed(seed), DiT(CONFIG)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        outputs, inputs = network.get_submodule(layer).get_parameter("weight").shape
        key = f"base_model.model.{layer}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    path = bundle / "adapters" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path
