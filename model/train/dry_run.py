"""What a run will cost, before hours are spent on it: `python -m model.train --config run.json --dry-run`. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from ditserve.model.nets.cost import cost
from ditserve.model.train.batch import Batch
from ditserve.model.train.trainer import Trainer

PASSES = 3  # a backward pass costs two forward ones; recomputing blocks costs one more


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a training process, besides the data and what torch itself takes."""

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    averages: int
    activations: int  # kept for the backward pass of one piece of a batch

    @property
    def total(self) -> int:
        return (
            self.weights + self.teacher + self.gradients + self.optimizer + self.averages + self.activations
        )


@dataclass(frozen=True, slots=True)
class StageCost:
    """A stage of a run: multiply-adds of a forward row, floating-point operations of a step, measured speed."""

    size: tuple[int, int]
    steps: int
    macs: int
    step_flops: int
    images_per_s: float
    seconds: float
    memory: Memory


def rehearse(trainer: Trainer, probe: int = 3) -> Iterator[StageCost]:
    """Train `probe` steps of every stage, after one to warm up, and tell what each stage costs.

    The trainer is not of use afterwards.

    Raises:
        ValueError: a configuration that cannot work.
    """
    config, state = trainer.config, trainer.state
    begin = 0
    for end, data in trainer.source.stages:
        state.step = begin
        trainer.close()
        trainer.step()
        start = time.perf_counter()
        for _ in range(probe):
            trainer.step()
        rate = probe * config.batch / (time.perf_counter() - start)
        state.step = begin
        trainer.close()
        macs, lesson = cost(trainer.network_config, data.size).macs, trainer.lesson
        teaching = 0
        if lesson is not None:
            passes = lesson.asked * (2 if lesson.teacher.guided else 1)
            teaching = passes * cost(lesson.teacher.network.config, data.size).macs
        yield StageCost(
            size=data.size,
            steps=end - begin,
            macs=macs,
            step_flops=2 * config.batch * (macs * (PASSES + config.checkpoint_blocks) + teaching),
            images_per_s=rate,
            seconds=(end - begin) * config.batch / rate,
            memory=memory(trainer),
        )
        begin = end
    trainer.close()


def memory(trainer: Trainer) -> Memory:
    """What the stage at hand needs; activations are measured on the first piece of a batch."""
    state, config = trainer.state, trainer.config
    weights = size_of(state.model.parameters())
    return Memory(
        weights=weights,
        teacher=size_of(trainer.lesson.teacher.network.parameters()) if trainer.lesson else 0,
        gradients=weights,
        optimizer=size_of(value for kept in state.optimizer.state.values() for value in kept.values()),
        averages=sum(size_of(average.values()) for average in state.ema.averages.values()),
        activations=_kept(trainer, next(trainer.next_batch().split(config.accumulate)).to(config.device)),
    )


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kept(trainer: Trainer, part: Batch) -> int:
    """Bytes that the backward pass over `part` needs, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in trainer.state.model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = trainer.losses(part)  # alive while counting, so that no address is used twice
    assert total.requires_grad
    return sum(seen.values())


def show(trainer: Trainer, stages: Iterable[StageCost]) -> Iterator[str]:
    """Lines for a terminal, each as soon as it is known."""
    config, pictures = trainer.config, len(trainer.source.training)
    parameters = sum(p.numel() for p in trainer.state.model.parameters())
    epochs = config.steps * config.batch / pictures
    yield (
        f"{parameters / 1e6:.2f} M parameters; {config.steps} steps of {config.batch} are {epochs:.1f} passes over {pictures} pictures"
    )
    seconds = 0.0
    for stage in stages:
        seconds += stage.seconds
        need = stage.memory
        parts = ("weights", "teacher", "gradients", "optimizer", "averages", "activations")
        told = ", ".join(f"{part} {getattr(need, part) / 2**20:.0f}" for part in parts)
        yield (
            f"{stage.size[0]}×{stage.size[1]}: {stage.macs / 1e9:.3f} GMACs a row forward, {stage.step_flops / 1e9:.0f} GFLOPs a step; "
            f"{stage.images_per_s:.1f} img/s; {stage.steps} steps take {timedelta(seconds=round(stage.seconds))}"
        )
        yield f"    memory {need.total / 2**20:.0f} MiB besides the data: {told}"
    yield f"all of it takes {timedelta(seconds=round(seconds))} on {config.device}, measured over a few steps"
