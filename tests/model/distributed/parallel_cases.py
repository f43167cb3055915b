"""Networks trained for a few steps by one process or by several: the same program for both.

torchrun --standalone --nproc-per-node 2 -m tests.model.distributed.parallel_cases FOLDER
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

from ditserve.model.distributed.parallel import ParallelNetwork, single_process
from ditserve.model.distributed.processes import ParallelSpec, World, join_processes
from ditserve.model.nets.factory import Network, NetworkConfig, make_network
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.train.ema import Ema
from ditserve.model.train.optimizer import HALF_DTYPES, autocast
from ditserve.model.train.recompute import checkpoint_blocks
from ditserve.model.train.run_config import Precision
from ditserve.model.train.tensor_shards import make_index, read_shards, write_shards
from tests.model.nets.unet_cases import TINY_UNET

BATCH, STEPS, CLIP = 4, 3, 0.5
TINY = DiTConfig(
    image_size=(8, 8), patch_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=2, classes=(3,)
)


@dataclass(frozen=True)
class Case:
    """A run: its network, its division between two processes, and its precision."""

    config: NetworkConfig = TINY
    spec: dict[str, Any] = field(default_factory=dict)
    pieces: int = 1
    precision: Precision = "fp32"
    recompute: bool = False


DDP, FSDP, TENSOR, PIPELINE = {"mode": "ddp"}, {"mode": "fsdp"}, {"tensor": 2}, {"pipeline": 2}
ALL_OPTIONS = replace(TINY, blocks=("adaln", "adaln_zero"), swiglu=True, qk_norm=True, rope=True)
ALL_CONDITIONS = replace(TINY, shared_modulation=True, condition_gate=True)
EXPERTS = replace(TINY, experts=2, shared_expert=True, patch_size=2)
TOKENS = replace(TINY, blocks=("cross_attention", "in_context"))
ROUTED: dict[str, Any] = {"experts": 4, "top_k": 2, "routing": "token_choice"}
# Cases of two processes.
PAIR = {
    "ddp": Case(TOKENS, spec=DDP, pieces=2),
    "fsdp": Case(replace(TINY, in_channels=1), spec=FSDP, pieces=2, recompute=True),
    "fsdp in bf16": Case(ALL_OPTIONS, spec=FSDP, precision="bf16"),
    "fsdp of a u-net": Case(TINY_UNET, spec=FSDP),
    "tensor": Case(ALL_OPTIONS, spec=TENSOR, recompute=True),
    "ddp with gradients in bf16": Case(spec={**DDP, "compress": "bf16"}, pieces=2),
    "ddp of experts": Case(EXPERTS, spec=DDP),
    "fsdp of experts and a shared modulation": Case(
        replace(EXPERTS, **ROUTED, shared_modulation=True, condition_gate=True), spec=FSDP
    ),
    "pipeline": Case(ALL_OPTIONS, spec=PIPELINE, pieces=2, recompute=True),
    "pipeline of three blocks with condition tokens": Case(
        replace(TINY, depth=3, blocks=("cross_attention", "in_context", "adaln")), spec=PIPELINE, pieces=4
    ),
    "pipeline with a shared modulation": Case(ALL_CONDITIONS, spec=PIPELINE, pieces=2),
    "tensor with condition tokens": Case(TOKENS, spec=TENSOR, pieces=2),
}
FOUR = {
    "tensor with norms by the mean square": Case(replace(ALL_OPTIONS, rms_norm=True), spec={**DDP, **TENSOR}),
    "ddp over pipelines": Case(ALL_OPTIONS, spec={**DDP, **PIPELINE}, pieces=2),
    "ddp over tensor": Case(ALL_OPTIONS, spec={**DDP, **TENSOR}),
    "fsdp over tensor": Case(ALL_OPTIONS, spec={**FSDP, **TENSOR}, pieces=2),
}


def random_network(config: NetworkConfig) -> Network:
    """Make a network without zeros, so that no path is hidden."""
    network, generator = make_network(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network


def make_batch(config: NetworkConfig, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pictures, timesteps, labels and targets of the whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    size = (config.in_channels, *config.image_size)
    x = torch.randn((BATCH, *size), generator=generator)
    t = torch.randint(1000, (BATCH,), generator=generator)
    labels = torch.stack([torch.randint(n, (BATCH,), generator=generator) for n in config.classes], dim=1)
    target = torch.randn((BATCH, config.out_channels, *config.image_size), generator=generator)
    return x, t, labels, target


def distribute(case: Case, world: World) -> ParallelNetwork:
    network = random_network(case.config)
    if case.recompute:
        checkpoint_blocks(network)
    return ParallelNetwork(network, world, ParallelSpec(**case.spec), HALF_DTYPES.get(case.precision))


def make_optimizer(parallel: ParallelNetwork) -> torch.optim.AdamW:
    """Make AdamW with a large epsilon: a gradient of zero up to rounding must not make a full step."""
    return torch.optim.AdamW(parallel.network.parameters(), lr=1e-2, eps=1e-3, fused=True)


def train(case: Case, parallel: ParallelNetwork) -> dict[str, Tensor]:
    """Train, and return the losses and gradient norms of every step.

    The full weights, last gradients, averages and moments are returned too, by "<what> <parameter>".
    """
    network, optimizer = parallel.network, make_optimizer(parallel)
    ema = Ema(network, (0.9,))
    rows = ParallelSpec(**case.spec).rows(parallel.world, BATCH) if parallel.world.size > 1 else range(BATCH)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        batch = [part[rows.start : rows.stop] for part in make_batch(case.config, step)]
        loss = pipelined(case, parallel, batch) if parallel.pipeline else in_pieces(case, parallel, batch)
        norms.append(parallel.clip_gradients(CLIP))
        losses.append(parallel.all_reduce_mean({"loss": loss})["loss"])
        optimizer.step()
        ema.update(network.parameters())
    results = {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}
    for name, parameter in network.named_parameters():
        # A process of a pipeline holds nothing of the blocks of others.
        gradient = parameter.grad if parameter.numel() else parameter.detach()
        assert gradient is not None, name
        moments = optimizer.state.get(parameter, {"exp_avg": parameter.detach()})
        kept = {"weight": parameter.detach(), "gradient": gradient, "average": ema.first[name]}
        kept |= {"moment": moments["exp_avg"]}
        results |= {f"{what} {name}": parallel.full_tensor(name, tensor) for what, tensor in kept.items()}
    return {name: tensor.clone().contiguous() for name, tensor in results.items()}


def in_pieces(case: Case, parallel: ParallelNetwork, batch: list[Tensor]) -> float:
    """Add the gradient of a batch in micro-batches, and return its loss."""
    loss = 0.0
    pieces = list(zip(*(part.tensor_split(case.pieces) for part in batch), strict=True))
    for index, piece in enumerate(pieces):
        with parallel.gradient_sync(last=index == len(pieces) - 1):
            error = squared_error(parallel, case.precision, *piece) / len(pieces)
            error.backward()
        loss += error.item()
    return loss


def pipelined(case: Case, parallel: ParallelNetwork, batch: list[Tensor]) -> float:
    """Do the same in a pipeline."""
    x, t, labels, target = batch
    losses = []

    def error(output: Tensor, rows: Tensor) -> Tensor:
        losses.append((output - target[rows]).square().mean() / case.pieces)
        return losses[-1]

    pipeline = parallel.pipeline
    assert pipeline is not None
    pipeline.run((x, t, labels, None), case.pieces, error, lambda: autocast(case.precision, "cpu"))
    parallel.average_pipelines()
    return pipeline.of_last({"loss": sum(loss.item() for loss in losses)})["loss"]


def squared_error(
    parallel: ParallelNetwork, precision: Precision, x: Tensor, t: Tensor, labels: Tensor, target: Tensor
) -> Tensor:
    with autocast(precision, "cpu"):
        output: Tensor = parallel.forward(x, t, labels)
    return (output.float() - target).square().mean()


def sections_of(parallel: ParallelNetwork) -> dict[str, dict[str, Tensor]]:
    """Return the weights, and twice the weights, named by number as an optimiser names its moments."""
    weights = dict(parallel.network.state_dict())
    doubled = {f"{number}.exp_avg": 2 * p.detach() for number, p in enumerate(parallel.network.parameters())}
    return {"model": weights, "optimizer": {**doubled, "0.step": torch.tensor(7.0)}}


def rewrite_shards(folder: Path, cases: list[Case], world: World) -> None:
    """Write a network as one process, then read and write it in the shards of each case in turn."""
    index, held = None, sections_of(single_process(random_network(cases[0].config)))
    if world.is_first:
        folder.mkdir()
        write_shards(folder, single_process(random_network(cases[0].config)), held)
    world.all_agree(True)
    for number, case in enumerate(cases):
        parallel = distribute(case, world)
        with torch.no_grad():
            for parameter in parallel.network.parameters():
                parameter.zero_()
        held = {part: read_shards(folder, parallel, part, index) for part in held}
        folder, index = folder.with_name(f"{folder.name}-{number}"), make_index(parallel, held)
        if world.is_first:
            folder.mkdir()
            (folder / "index.json").write_text(json.dumps(index))
        world.all_agree(True)
        write_shards(folder, parallel, held)
        world.all_agree(True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join_processes("cpu") as world:
        cases = PAIR if world.size == 2 else FOUR
        for name, case in cases.items():
            results = train(case, distribute(case, world))
            if world.is_first:
                save_file(results, folder / f"{name}.safetensors")
        rewrite_shards(folder / "parts", REWRITTEN[world.size], world)


REWRITTEN = {
    2: [
        Case(ALL_OPTIONS, FSDP),
        Case(ALL_OPTIONS, TENSOR),
        Case(ALL_OPTIONS, DDP),
        Case(ALL_OPTIONS, PIPELINE),
        Case(ALL_OPTIONS, FSDP),
    ],
    4: [Case(ALL_OPTIONS, FSDP), Case(ALL_OPTIONS, {**FSDP, **TENSOR}), Case(ALL_OPTIONS, {**DDP, **TENSOR})],
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
