"""The estimated cost of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditserve.model.nets.cost import cost
from ditserve.model.train.dry_run import MemoryEstimate, estimate_memory, estimate_stages
from ditserve.model.train.trainer import Trainer
from tests.model.train.training_cases import tiny_config


def memory_of(tmp_path: Path, **changes: object) -> MemoryEstimate:
    trainer = Trainer(tiny_config(tmp_path, **changes))
    trainer.step()
    return estimate_memory(trainer)


def test_memory_is_that_of_the_tensors(tmp_path: Path) -> None:
    memory = memory_of(tmp_path, ema=[0.9, 0.99])
    parameters = sum(p.numel() for p in Trainer(tiny_config(tmp_path)).state.model.parameters())
    assert memory.weights == memory.gradients == 4 * parameters
    assert memory.averages == 2 * memory.weights
    # Two moments and a counter.
    assert 0 <= memory.optimizer - 2 * memory.weights < 1000
    assert memory.total == sum(getattr(memory, part) for part in MemoryEstimate.__slots__)


def test_pieces_and_recomputation_save_activations(tmp_path: Path) -> None:
    whole = memory_of(tmp_path).activations
    assert memory_of(tmp_path, accumulate=4).activations < 0.5 * whole
    assert memory_of(tmp_path, checkpoint_blocks=True).activations < 0.5 * whole


def test_every_stage_is_estimated(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, stages=[{"size": 4, "steps": 5}, {"size": 8}]))
    small, large = estimate_stages(trainer, probe=1)
    assert [(stage.size, stage.steps) for stage in (small, large)] == [((4, 4), 5), ((8, 8), 7)]
    assert large.macs == cost(trainer.network_config).macs > small.macs
    assert large.step_flops == 2 * 3 * 4 * large.macs
    assert large.seconds * large.images_per_s == pytest.approx(7 * 4)
    assert large.memory.activations > small.memory.activations
