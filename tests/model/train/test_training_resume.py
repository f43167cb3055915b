"""Runs that stop and go on: bit for bit, also after SIGKILL and past a damaged checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.model.train import training
from ditserve.model.train.checkpoint import CheckpointError
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.trainer import Trainer
from tests.model.train.training_cases import assert_same, config_file, newest_state, tiny_config, tiny_run

# Everything a checkpoint can hold: two averages, a loss scale, a learned variance, two sizes, micro-batches.
RICH: dict[str, Any] = {
    "ema": [0.9, 0.999],
    "precision": "fp16",
    "diffusion": {"schedule": "linear", "prediction": "epsilon", "learn_sigma": True},
    "stages": [{"size": 4, "steps": 6}, {"size": 8}],
    "accumulate": 2,
    "steps": 8,
}


def interrupted(config: TrainConfig, step: int) -> None:
    """Train and stop after the checkpoint of `step`."""
    config.output.mkdir()
    trainer = Trainer(config)
    training.start(trainer)
    for _ in range(step):
        trainer.step()
    trainer.save()


MUON: dict[str, Any] = {"optimizer": "muon", "condition_start": "data", "precision": "bf16"}


@pytest.mark.parametrize(
    "changes", [{}, RICH, {**RICH, "data_prefetch": 2}, MUON], ids=["plain", "rich", "ahead", "muon"]
)
@pytest.mark.parametrize("step", [3, 6])  # within a stage, and on the border
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, changes: dict[str, Any], step: int
) -> None:
    raw = {**tiny_run(tmp_path), "steps": 8, **changes}
    raw["data"] |= {"prefetch": raw.pop("data_prefetch", 0)}
    straight = TrainConfig.model_validate({**raw, "output": str(tmp_path / "straight")})
    training.train(straight)
    resumed = TrainConfig.model_validate(raw)
    interrupted(resumed, step)
    training.train(resumed)
    assert_same(newest_state(straight.output), newest_state(resumed.output))


def test_sigkill_loses_nothing_but_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    raw = tiny_run(tmp_path) | {"steps": 60, "checkpoint_every": 2}
    straight = TrainConfig.model_validate({**raw, "output": str(tmp_path / "straight")})
    training.train(straight)
    command = [sys.executable, "-m", "model.train", "--config", config_file(raw, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoints = Path(raw["output"]) / "checkpoints"
    while not list(checkpoints.glob("step-*[1-9]")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = int(sorted(checkpoints.glob("step-*"))[-1].name.removeprefix("step-"))
    assert 0 < killed_at < 60
    training.train(TrainConfig.model_validate(raw))
    assert_same(newest_state(straight.output), newest_state(Path(raw["output"])))
    steps = [
        json.loads(line)["step"] for line in (Path(raw["output"]) / "log.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 61))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_its_state_first(tmp_path: Path, number: signal.Signals) -> None:
    raw = tiny_run(tmp_path) | {"steps": 100_000, "checkpoint_every": 50_000, "schedule": "constant"}
    command = [sys.executable, "-m", "model.train", "--config", config_file(raw, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    log = Path(raw["output"]) / "log.jsonl"
    while not (log.is_file() and log.read_text().count("\n") > 3) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 130
    assert b"stopping after this step" in error
    assert b"model.train: stopped; the same command goes on" in error
    stopped = sorted((Path(raw["output"]) / "checkpoints").glob("step-*"))[-1]
    step = int(stopped.name.removeprefix("step-"))
    assert 3 < step < 50_000
    straight = TrainConfig.model_validate({**raw, "steps": step, "output": str(tmp_path / "straight")})
    training.train(straight)
    assert_same(newest_state(straight.output), newest_state(Path(raw["output"])))


def test_pictures_replaced_under_the_same_labels_are_noticed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    training.train(config)
    with np.load(config.data.path) as file:
        arrays = dict(file)
    arrays["x"][5] += 1
    np.savez(config.data.path, **arrays)
    with pytest.raises(CheckpointError, match="other pictures: those numbered 5–5 in the data were replaced"):
        training.train(config.model_copy(update={"steps": 4}))


def test_a_run_begun_without_joint_dropout_goes_on_without(tmp_path: Path) -> None:
    raw = {**tiny_run(tmp_path), "steps": 6, "schedule": "constant"}
    straight = TrainConfig.model_validate({**raw, "output": str(tmp_path / "straight"), "joint_dropout": 0})
    training.train(straight)
    old = TrainConfig.model_validate({**raw, "joint_dropout": 0})
    interrupted(old, 3)
    for state in (old.output / "checkpoints").glob("*/state.json"):
        fields = json.loads(state.read_text())
        for field in ("joint_dropout", "training_pictures", "content"):
            del fields[field]
        state.write_text(json.dumps(fields))
    for steps in (4, 6):
        training.train(TrainConfig.model_validate({**raw, "steps": steps}))
    assert_same(newest_state(straight.output), newest_state(old.output))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path)
    training.train(config)
    whole = newest_state(config.output)
    newest = sorted((config.output / "checkpoints").glob("step-*"))[-1]
    (newest / "model.safetensors").write_bytes(b"cut short")
    training.train(config)
    assert f"{newest} is passed over, it is damaged" in capsys.readouterr().out
    assert_same(whole, newest_state(config.output))


def test_a_longer_run_goes_on_with_its_own_learning_rate(tmp_path: Path) -> None:
    training.train(tiny_config(tmp_path, steps=4))
    config = tiny_config(tmp_path, steps=6)
    training.train(config)
    lines = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [lines[3]["lr"], lines[5]["lr"]] == pytest.approx([config.lr / 1.2, config.lr / 1.8])


def test_a_finished_run_says_so_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, steps=2)
    training.train(config)
    before = newest_state(config.output)
    training.train(config)
    assert "is at step 2 already: raise steps" in capsys.readouterr().out
    assert_same(before, newest_state(config.output))
