"""Networks trained for a few steps alone or by several processes: the same program for both.

torchrun --standalone --nproc-per-node 2 -m tests.model.parallel_cases FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import DiTConfig
from model.network import Network, NetworkConfig, make_network
from model.parallel import Share
from model.precision import Precision, autocast
from model.recomputation import checkpoint_blocks
from model.world import ParallelSpec, World, joined
from tests.model.unet_cases import TINY_UNET

BATCH, STEPS, CLIP = 4, 3, 0.5
TINY = DiTConfig(
    image_size=(8, 8), patch_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=2, classes=(3,)
)


@dataclass(frozen=True)
class Case:
    """A run: its network, how two processes share it, and the arithmetic."""

    config: NetworkConfig = TINY
    spec: dict[str, Any] = field(default_factory=dict)
    pieces: int = 1
    precision: Precision = "fp32"
    recompute: bool = False


FSDP, TENSOR = {"mode": "fsdp"}, {"tensor": 2}
SWIGLU = replace(TINY, swiglu=True, qk_norm=True, rope=True, mlp_ratio=3.0)
CASES = {
    "ddp": Case(spec={"mode": "ddp"}),
    "ddp in pieces": Case(spec={"mode": "ddp"}, pieces=2, recompute=True),
    "ddp of a u-net": Case(TINY_UNET, spec={"mode": "ddp"}),
    "fsdp": Case(spec=FSDP),
    "fsdp in pieces": Case(spec=FSDP, pieces=2, recompute=True),
    "fsdp in bf16": Case(spec=FSDP, precision="bf16"),
    "fsdp of a u-net": Case(TINY_UNET, spec=FSDP),
    "fsdp of uneven rows": Case(replace(TINY, hidden_size=20, blocks=("adaln",)), spec=FSDP),
    "tensor": Case(spec=TENSOR),
    "tensor with swiglu, qk_norm and rope": Case(SWIGLU, spec=TENSOR, recompute=True),
    "tensor with cross-attention": Case(replace(TINY, blocks=("cross_attention",)), spec=TENSOR, pieces=2),
    "tensor with a hybrid plan": Case(
        replace(TINY, blocks=("in_context", "adaln"), layout_rank=0), spec=TENSOR
    ),
}


def random_network(config: NetworkConfig) -> Network:
    """Nothing is zero, so nothing is hidden."""
    network, generator = make_network(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network


def make_batch(config: NetworkConfig, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures, timesteps, labels and targets of the whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    size = (config.in_channels, *config.image_size)
    x = torch.randn((BATCH, *size), generator=generator)
    t = torch.randint(1000, (BATCH,), generator=generator)
    labels = torch.stack([torch.randint(n, (BATCH,), generator=generator) for n in config.classes], dim=1)
    target = torch.randn((BATCH, config.out_channels, *config.image_size), generator=generator)
    return x, t, labels, target


def train(case: Case, world: World, steps: int = STEPS) -> dict[str, Tensor]:
    """Losses and gradient norms of every step, and what came of it, whole: weights, last gradients, optimiser moments."""
    network = random_network(case.config)
    if case.recompute:
        checkpoint_blocks(network)
    spec = ParallelSpec(**case.spec) if world.size > 1 else ParallelSpec()
    share = Share(network, world, spec, case.precision)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    rows = spec.rows(world, BATCH)
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        batch = [part[rows.start : rows.stop] for part in make_batch(case.config, step)]
        told = {"loss": 0.0}
        pieces = list(zip(*(part.chunk(case.pieces) for part in batch), strict=True))
        for index, (x, t, labels, target) in enumerate(pieces):
            with share.piece(last=index == len(pieces) - 1):
                with autocast(case.precision, "cpu"):
                    output = share.forward(x, t, labels)
                loss = (output.float() - target).square().mean() / len(pieces)
                loss.backward()
            told["loss"] += loss.item()
        norms.append(share.clip(CLIP))
        losses.append(share.mean(told)["loss"])
        optimizer.step()
    results = {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}
    for name, parameter in network.named_parameters():
        results[f"weight {name}"] = share.whole(name, parameter.detach())
        assert parameter.grad is not None, name
        results[f"gradient {name}"] = share.whole(name, parameter.grad)
        results[f"moment {name}"] = share.whole(name, optimizer.state[parameter]["exp_avg"])
    return {name: tensor.clone().contiguous() for name, tensor in results.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        for name, case in CASES.items():
            print(name, flush=True)
            results = train(case, world)
            if world.first:
                save_file(results, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
