"""The cost of a run, estimated before hours are spent on it. Nothing is written.

python -m model.train --config run.json --dry-run
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from ditserve.model.nets.cost import cost
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.sampling.prompt import label_tensor
from ditserve.model.sampling.sheet import sheet_labels, to_pixels
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.sizes import Size, size_name
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.batch import TrainingBatch
from ditserve.model.train.load import SHEET_STEPS, run_defaults
from ditserve.model.train.recompute import RECOMPUTED
from ditserve.model.train.trainer import Trainer

# Operations of a step that is timed, at most: of a large batch, some rows are.
PROBE_FLOPS = {"cpu": 3e11, "cuda": 1e14}
# Cost of a training step in forward passes: a backward pass costs two. Recomputed blocks cost one more.
PASSES = 3


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of a training process, without the data and torch itself.

    `activations` are kept for the backward pass of one micro-batch.
    """

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    averages: int
    activations: int

    @property
    def total(self) -> int:
        return (
            self.weights + self.teacher + self.gradients + self.optimizer + self.averages + self.activations
        )


@dataclass(frozen=True, slots=True)
class StageCost:
    """The cost of a stage: multiply-adds of a forward row, operations of a step, and measured speed."""

    size: Size
    steps: int
    macs: int
    step_flops: int
    images_per_s: float
    seconds: float
    memory: MemoryEstimate


def estimate_stages(trainer: Trainer, probe: int = 3) -> Iterator[StageCost]:
    """Train `probe` steps of every stage, after one to warm up. Yield the cost of each stage.

    Of a batch that costs more than `PROBE_FLOPS` some rows are trained on. The trainer cannot be used
    afterwards.

    Raises:
        ValueError: a configuration that cannot work.
    """
    config, state = trainer.config, trainer.state
    begin = 0
    for end, data in trainer.source.stages:
        macs, objective = cost(trainer.network_config, data.size).macs, trainer.objective
        teacher_macs = 0
        if objective is not None:
            passes = objective.teacher_calls * (2 if objective.teacher.guided else 1)
            teacher_macs = passes * cost(objective.teacher.network.config, data.size).macs
        # No gradient of the weights is taken where they stay as they are.
        passes = PASSES - (trainer.adapted is not None) + trainer.recomputes
        row_flops = 2 * (macs * passes + teacher_macs)
        rows = max(1, min(config.batch, int(PROBE_FLOPS[config.device] // row_flops)))
        trainer.source.rows = range(rows)
        state.step = begin
        trainer.close()
        trainer.step()
        start = time.perf_counter()
        for _ in range(probe):
            trainer.step()
        rate = probe * rows / (time.perf_counter() - start)
        state.step = begin
        trainer.close()
        yield StageCost(
            size=data.size,
            steps=end - begin,
            macs=macs,
            step_flops=config.batch * row_flops,
            images_per_s=rate,
            seconds=(end - begin) * config.batch / rate,
            memory=estimate_memory(trainer),
        )
        begin = end
    trainer.close()


def estimate_memory(trainer: Trainer) -> MemoryEstimate:
    """Return the memory of the current stage; activations are measured on rows of the first micro-batch."""
    state, config = trainer.state, trainer.config
    weights = byte_count(state.model.parameters())
    frozen = byte_count(trainer.adapted.base.parameters()) if trainer.adapted else 0
    whole = -(-config.batch // config.accumulate)
    piece = trainer.next_batch()[:whole].to(config.device)
    return MemoryEstimate(
        weights=weights + frozen,
        teacher=byte_count(trainer.objective.teacher.network.parameters()) if trainer.objective else 0,
        gradients=weights,
        optimizer=byte_count(
            tensor for tensors in state.optimizer.state.values() for tensor in tensors.values()
        ),
        averages=sum(byte_count(average.values()) for average in state.ema.averages.values()),
        activations=_activation_bytes(trainer, piece) * whole // len(piece),
    )


def byte_count(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _activation_bytes(trainer: Trainer, batch: TrainingBatch) -> int:
    """Return the bytes that the backward pass over `batch` needs, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.state.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The loss stays alive while storages are counted, so that no address is used twice.
        total, _ = trainer.losses(batch)
    assert total.requires_grad
    return sum(kept.values())


def rehearse_sampling(trainer: Trainer) -> None:
    """Do the first step of a sample sheet, and of a sample with the bundle's defaults, as export draws one.

    Raises:
        ValueError, ModelError: samples of this run cannot be drawn.
    """
    config, state = trainer.config, trainer.state
    state.step = config.steps
    network, defaults = trainer.averaged_network(), run_defaults(config, trainer.dataset, config.steps)
    rows, _ = sheet_labels(network.config.classes)
    labels = label_tensor(rows[:1], network.config.classes).to(config.device)
    with torch.no_grad():
        conditions = Conditions((network.embed(labels),))
    guidance = Guidance(
        defaults.guidance_scale, defaults.guidance_interval, config.diffusion.guidance_channels
    )
    denoiser = Denoiser(network, trainer.schedule, conditions, guidance)
    for solver, steps in (("ddim", min(SHEET_STEPS, defaults.steps)), (defaults.solver, defaults.steps)):
        levels = noise_levels(defaults.grid, steps, trainer.schedule)
        table = step_table(solver, levels, trainer.schedule)
        clip = config.diffusion_of(trainer.dataset).clip_x0
        x0 = next(denoise(denoiser, table, [config.seed], clip_x0=clip))
        if trainer.decoder is not None:
            to_pixels(trainer.decoder.decode(x0))


def format_estimate(trainer: Trainer, stages: Iterable[StageCost]) -> Iterator[str]:
    """Yield the lines of the estimate for a terminal, each as soon as it is known."""
    config, pictures = trainer.config, len(trainer.source.training)
    parameters = sum(p.numel() for p in trainer.state.model.parameters())
    epochs = config.steps * config.batch / pictures
    yield (
        f"{parameters / 1e6:.2f} M parameters; {config.steps} steps of {config.batch} are {epochs:.1f} "
        f"passes over {pictures} pictures"
    )
    if (adapted := trainer.adapted) is not None:
        yield (
            f"they are an adapter of {adapted.bundle.path}: rank {adapted.spec.rank} beside "
            f"{len(adapted.layers)} layers, a file of {4 * parameters / 1e6:.2f} MB"
        )
    if config.checkpoint_blocks is None and trainer.recomputes:
        yield RECOMPUTED.format(depth=trainer.network_config.depth)
    yield from (f"{config.data.path}: {line}" for line in trainer.dataset.left_out)
    seconds = 0.0
    for stage in stages:
        seconds += stage.seconds
        memory = stage.memory
        parts = ("weights", "teacher", "gradients", "optimizer", "averages", "activations")
        sizes = ", ".join(f"{part} {getattr(memory, part) / 2**20:.0f}" for part in parts)
        yield (
            f"{size_name(stage.size, '×')}: {stage.macs / 1e9:.3f} GMACs a row forward, "
            f"{stage.step_flops / 1e9:.0f} GFLOPs a step; {stage.images_per_s:.1f} img/s; "
            f"{stage.steps} steps take {timedelta(seconds=round(stage.seconds))}"
        )
        yield f"    memory {memory.total / 2**20:.0f} MiB besides the data: {sizes}"
    rehearse_sampling(trainer)
    yield "the bundle, the sample sheet and the golden image can be made of this run"
    yield f"all of it takes {timedelta(seconds=round(seconds))} on {config.device}, measured over a few steps"
