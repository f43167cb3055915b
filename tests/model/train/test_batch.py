"""The batch of a step: a function of seed and step, in any number of pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditserve.model.train.batch import BatchSource, TrainingBatch
from tests.model.train.training_cases import tiny_config


def source(folder: Path, rows: range | None = None, **changes: Any) -> BatchSource:
    config = tiny_config(folder, **changes)
    dataset = config.open_dataset()
    return BatchSource(config, dataset, config.network_config(dataset), rows)


def equal(a: TrainingBatch, b: TrainingBatch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("x0", "labels", "t", "noise"))


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    made = [source(tmp_path).make(step) for step in (3, 0, 3)]
    assert equal(made[0], made[2])
    assert not equal(made[0], made[1])
    assert not equal(made[0], source(tmp_path, seed=1).make(3))


def test_processes_share_one_batch(tmp_path: Path) -> None:
    flipped: dict[str, Any] = {"data": {"path": str(tmp_path / "set.npz"), "hold_out": 0, "flip": True}}
    whole = source(tmp_path, **flipped).make(5)
    shares = [source(tmp_path, rows, **flipped).make(5) for rows in (range(3), range(3, 4))]
    for name in ("x0", "labels", "t", "noise"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))


def test_rows_with_the_mean_of_others_are_drawn_last(tmp_path: Path) -> None:
    """A run without such rows draws for a step what it drew before there were any."""
    model = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "mean_rank": 2, "mean_maps": 2}
    changes: dict[str, Any] = {"batch": 400, "condition_start": "data", "model": model}
    plain = source(tmp_path, **changes).make(0)
    apart = source(tmp_path, **changes, mean_of_others=0.25).make(0)
    assert plain.hidden is None
    assert equal(plain, apart)
    assert apart.hidden is not None
    assert float(apart.hidden.float().mean()) == pytest.approx(0.25, abs=0.08)
    half = next(apart.split(2)).hidden
    assert half is not None
    assert torch.equal(half, apart.hidden[:200])
    with pytest.raises(ValueError, match="mean_of_others needs maps"):
        source(tmp_path, mean_of_others=0.25)


def test_rows_that_are_told_their_first_frame_are_drawn_last(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    clips = np.random.default_rng(0).integers(0, 256, (6, 4, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "clips.npz", x=clips, y=np.arange(6) % 2, names=np.array(["a", "b"]))
    (tmp_path / "clips.json").write_text('{"licence": "CC0-1.0", "first_axis": "frames", "fps": 4}')
    model = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    changes: dict[str, Any] = {"data": {"path": str(tmp_path / "clips.npz"), "hold_out": 0}, "batch": 200}
    plain = source(tmp_path, **changes, model=model).make(0)
    told = source(tmp_path, **changes, model={**model, "first_frame": True}, first_frame_given=0.25).make(0)
    assert plain.first_frame is None
    assert len(plain.conditions) == 2
    assert equal(plain, told)
    assert told.first_frame is not None
    given = told.first_frame.flatten(1).any(dim=1)
    assert float(given.float().mean()) == pytest.approx(0.25, abs=0.1)
    assert torch.equal(told.first_frame[given], told.x0[given][:, :, 0])
    half = next(told.split(2))
    assert half.conditions[2] is not None
    assert torch.equal(half.conditions[2], told.first_frame[:100])


def test_after_a_roll_back_the_same_step_trains_on_something_else(tmp_path: Path) -> None:
    made = source(tmp_path)
    assert not equal(made.make(3, 0), made.make(3, 1))
    assert equal(made.make(3, 1), made.make(3, 1))


def test_pieces_are_the_batch_in_order(tmp_path: Path) -> None:
    whole = source(tmp_path, batch=7).make(0)
    for pieces in (1, 3, 7):
        parts = list(whole.split(pieces))
        assert len(parts) == pieces
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert torch.equal(torch.cat([part.x0 for part in parts]), whole.x0)


def test_stages_have_their_size(tmp_path: Path) -> None:
    made = source(tmp_path, stages=[{"size": 4, "steps": 3}, {"size": 8}])
    assert [tuple(made.make(step).x0.shape) for step in (2, 3, 12)] == [
        (4, 3, 4, 4),
        (4, 3, 8, 8),
        (4, 3, 8, 8),
    ]
    assert made.make(2).noise.shape == (4, 3, 4, 4)


def test_labels_are_dropped_at_their_rates(tmp_path: Path) -> None:
    labels = source(tmp_path, batch=400, label_dropout=[0.0, 1.0]).make(0).labels
    assert (labels[:, 0] < 3).all()
    assert (labels[:, 1] == 2).all()
    with pytest.raises(
        ValueError, match=r"label_dropout has 3 rates, but the data has 2 factors \(label, style\)"
    ):
        source(tmp_path, label_dropout=[0.1, 0.1, 0.1])


def test_timesteps_follow_the_chosen_law(tmp_path: Path) -> None:
    t = source(tmp_path, batch=200, timesteps="logit-normal", logit_mean=4.0, logit_std=0.1).make(0).t
    assert t.min() > 900
