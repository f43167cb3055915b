"""Networks trained for a few steps alone or by several processes: the same program for both.

torchrun --standalone --nproc-per-node 2 -m tests.model.parallel_cases FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ditserve.model.distributed.parallel import Share, alone
from ditserve.model.distributed.precision import Precision, autocast
from ditserve.model.distributed.processes import ParallelSpec, World, joined
from ditserve.model.nets.factory import Network, NetworkConfig, make_network
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.train.activation_checkpointing import checkpoint_blocks
from ditserve.model.train.ema import Ema
from ditserve.model.train.sharded import make_index, read, write
from tests.model.nets.unet_cases import TINY_UNET

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


DDP, FSDP, TENSOR = {"mode": "ddp"}, {"mode": "fsdp"}, {"tensor": 2}
ALL_OPTIONS = replace(TINY, blocks=("adaln", "adaln_zero"), swiglu=True, qk_norm=True, rope=True)
TOKENS = replace(TINY, blocks=("cross_attention", "in_context"))
PAIR = {  # of two processes
    "ddp": Case(TOKENS, spec=DDP, pieces=2),
    "fsdp": Case(
        replace(TINY, in_channels=1), spec=FSDP, pieces=2, recompute=True
    ),  # of rows that do not divide
    "fsdp in bf16": Case(ALL_OPTIONS, spec=FSDP, precision="bf16"),
    "fsdp of a u-net": Case(TINY_UNET, spec=FSDP),
    "tensor": Case(ALL_OPTIONS, spec=TENSOR, recompute=True),
    "tensor with condition tokens": Case(TOKENS, spec=TENSOR, pieces=2),
}
FOUR = {
    "ddp over tensor": Case(ALL_OPTIONS, spec={**DDP, **TENSOR}),
    "fsdp over tensor": Case(ALL_OPTIONS, spec={**FSDP, **TENSOR}, pieces=2),
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


def make_share(case: Case, world: World) -> Share:
    network = random_network(case.config)
    if case.recompute:
        checkpoint_blocks(network)
    return Share(network, world, ParallelSpec(**case.spec), case.precision)


def make_optimizer(share: Share) -> torch.optim.AdamW:
    """Its epsilon is large, so that a gradient of zero up to rounding makes no step of full length."""
    return torch.optim.AdamW(share.network.parameters(), lr=1e-2, eps=1e-3, fused=True)


def train(case: Case, share: Share) -> dict[str, Tensor]:
    """Losses and gradient norms of every step, and what came of it, whole: weights, last gradients, averages, moments."""
    network, optimizer = share.network, make_optimizer(share)
    ema = Ema(network, (0.9,))
    rows = ParallelSpec(tensor=share.tensor_size).rows(share.world, BATCH)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        batch = [part[rows.start : rows.stop] for part in make_batch(case.config, step)]
        loss = 0.0
        pieces = list(zip(*(part.tensor_split(case.pieces) for part in batch), strict=True))
        for index, piece in enumerate(pieces):
            with share.piece(last=index == len(pieces) - 1):
                error = squared_error(share, case.precision, *piece) / len(pieces)
                error.backward()
            loss += error.item()
        norms.append(share.clip(CLIP))
        losses.append(share.mean({"loss": loss})["loss"])
        optimizer.step()
        ema.update(network.parameters())
    results = {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        kept = {"weight": parameter.detach(), "gradient": parameter.grad, "average": ema.first[name]}
        kept |= {"moment": optimizer.state[parameter]["exp_avg"]}
        results |= {f"{what} {name}": share.whole(name, tensor) for what, tensor in kept.items()}
    return {name: tensor.clone().contiguous() for name, tensor in results.items()}


def squared_error(
    share: Share, precision: Precision, x: Tensor, t: Tensor, labels: Tensor, target: Tensor
) -> Tensor:
    with autocast(precision, "cpu"):
        output: Tensor = share.forward(x, t, labels)
    return (output.float() - target).square().mean()


def parts(share: Share) -> dict[str, dict[str, Tensor]]:
    """The weights, and twice them by number as an optimiser keeps its moments."""
    weights = dict(share.network.state_dict())
    doubled = {f"{number}.exp_avg": 2 * p.detach() for number, p in enumerate(share.network.parameters())}
    return {"model": weights, "optimizer": {**doubled, "0.step": torch.tensor(7.0)}}


def hand_over(folder: Path, cases: list[Case], world: World) -> None:
    """Write a network's parts as the first case shares it out, read and write them as the next does, and so on."""
    index, held = None, parts(alone(random_network(cases[0].config)))
    if world.first:
        folder.mkdir()
        write(folder, alone(random_network(cases[0].config)), held)
    world.agree(True)
    for number, case in enumerate(cases):
        share = make_share(case, world)
        with torch.no_grad():
            for parameter in share.network.parameters():
                parameter.zero_()
        held = {part: read(folder, share, part, index) for part in held}
        folder, index = folder.with_name(f"{folder.name}-{number}"), make_index(share, held)
        if world.first:
            folder.mkdir()
            (folder / "index.json").write_text(json.dumps(index))
        world.agree(True)
        write(folder, share, held)
        world.agree(True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        cases = PAIR if world.size == 2 else FOUR
        for name, case in cases.items():
            results = train(case, make_share(case, world))
            if world.first:
                save_file(results, folder / f"{name}.safetensors")
        hand_over(folder / "parts", HANDED[world.size], world)


HANDED = {
    2: [Case(ALL_OPTIONS, FSDP), Case(ALL_OPTIONS, TENSOR), Case(ALL_OPTIONS, DDP), Case(ALL_OPTIONS, FSDP)],
    4: [Case(ALL_OPTIONS, FSDP), Case(ALL_OPTIONS, {**FSDP, **TENSOR}), Case(ALL_OPTIONS, {**DDP, **TENSOR})],
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
