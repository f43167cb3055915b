"""The trainer: exact resume (also after SIGKILL), learning, and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model import train
from model.checkpoint import save
from model.recipe import TrainConfig
from model.train import Trainer, learning_rate


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A run small enough for a test: 8×8 pictures of two factors, a two-block model."""
    rng = np.random.default_rng(0)
    pairs = [(y, s) for y in range(3) for s in range(2)]
    np.savez(
        tmp_path / "set.npz",
        x=rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8),
        y=np.array([y for y, _ in pairs]),
        s=np.array([s for _, s in pairs]),
        names=np.array(["a", "b", "c"]),
        styles=np.array(["flat", "shaded"]),
    )
    return {
        "data": {"path": str(tmp_path / "set.npz"), "hold_out": 0},
        "output": str(tmp_path / "run"),
        "model": {
            "patch_size": 4,
            "in_channels": 3,
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 2,
            "learn_sigma": False,
        },
        "diffusion": {"schedule": "cosine", "prediction": "x0"},
        "steps": 12,
        "batch": 4,
        "warmup": 2,
        "checkpoint_every": 4,
        "sheet_every": 1000,
        "log_every": 1,
        "loss_cap": 5,
        "threads": 1,
    }


def config_file(raw: dict[str, Any], tmp_path: Path) -> str:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(raw))
    return str(file)


def final_state(output: Path) -> dict[str, torch.Tensor]:
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    return {
        f"{part}.{k}": v.clone()
        for part in ("model", "ema", "optimizer")
        for k, v in load_file(newest / f"{part}.safetensors").items()
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(raw: dict[str, Any], tmp_path: Path) -> None:
    straight = TrainConfig.model_validate({**raw, "output": str(tmp_path / "straight")})
    train.run(straight)
    resumed = TrainConfig.model_validate(raw)
    trainer = Trainer(resumed)
    for _ in range(5):
        trainer.step()
    save(resumed.output / "checkpoints", trainer.state, trainer.identity)
    train.run(resumed)
    assert_same(final_state(straight.output), final_state(resumed.output))


def test_sigkill_loses_nothing_but_the_steps_since_the_last_checkpoint(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw |= {"steps": 60}
    straight = TrainConfig.model_validate({**raw, "output": str(tmp_path / "straight")})
    train.run(straight)
    command = [sys.executable, "-m", "model.train", "--config", config_file(raw, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoints = Path(raw["output"]) / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train.run(TrainConfig.model_validate(raw))
    assert_same(final_state(straight.output), final_state(Path(raw["output"])))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(raw: dict[str, Any]) -> None:
    config = TrainConfig.model_validate(raw)
    train.run(config)
    whole = final_state(config.output)
    newest = sorted((config.output / "checkpoints").glob("step-*"))[-1]
    (newest / "model.safetensors").write_bytes(b"cut short")
    train.run(config)
    assert_same(whole, final_state(config.output))


def test_the_loss_falls(raw: dict[str, Any]) -> None:
    trainer = Trainer(TrainConfig.model_validate({**raw, "steps": 150, "batch": 12, "decay": 0.1}))
    losses = [trainer.step()["loss"] for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])


def test_the_average_is_what_a_sheet_shows(raw: dict[str, Any]) -> None:
    trainer = Trainer(TrainConfig.model_validate(raw))
    for _ in range(3):
        trainer.step()
    averaged = dict(trainer.averaged().named_parameters())
    assert all(torch.equal(averaged[k], v) for k, v in trainer.state.ema.shadow.items())
    assert any(not torch.equal(averaged[k], v) for k, v in trainer.state.model.named_parameters())


def test_the_learning_rate_warms_up_stays_and_falls(raw: dict[str, Any]) -> None:
    config = TrainConfig.model_validate({**raw, "steps": 100, "warmup": 10, "decay": 0.2, "lr": 1.0})
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:80] == [1.0] * 70
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"path": "nowhere.npz"}}, "nowhere.npz does not exist"),
        ({"stepz": 3}, "stepz: Extra inputs are not permitted"),
        (
            {"model": {"patch_size": 3, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2}},
            "not divisible by patch_size",
        ),
        ({"lr": 1e30}, "loss is .* at step"),
    ],
)
def test_a_mistake_is_one_sentence(
    raw: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    assert train.main(["--config", config_file({**raw, **change, "clip": 1e30, "warmup": 1}, tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_another_model_in_the_same_folder_is_refused(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--config", config_file(raw, tmp_path)]) == 0
    raw["model"]["depth"] = 1
    assert train.main(["--config", config_file(raw, tmp_path)]) == 2
    assert "another model" in capsys.readouterr().err
