"""A run's log: whole lines, no step twice, null for a number that is not finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ditserve.model.train import training_log
from ditserve.model.train.trainer import Trainer
from ditserve.model.train.training_log import TrainingLog, read_log
from tests.model.train.training_cases import tiny_config

METRICS = {"loss": 0.5, "grad_norm": 2.0, "lr": 1e-3}


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(tiny_config(tmp_path, log_every=2))
    trainer.config.output.mkdir()
    yield trainer
    trainer.close()


def record(trainer: Trainer, steps: int, **metrics: float) -> None:
    with TrainingLog(trainer.config, trainer.state) as log:
        for _ in range(steps):
            trainer.state.step += 1
            log.record(trainer.state, {**METRICS, **metrics})


def test_every_few_steps_a_line_tells_how_it_goes(trainer: Trainer) -> None:
    record(trainer, 5, variational=0.25)
    lines = read_log(trainer.config.output)
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0].keys() == {
        *("step", "loss", "grad_norm", "lr", "variational", "smooth_loss", "images_per_s", "skipped"),
        *("rollbacks", "scale", "peak_memory_mib"),
    }
    assert lines[1]["smooth_loss"] == 0.5
    assert lines[1]["peak_memory_mib"] > 10


def test_a_number_that_is_none_is_null(trainer: Trainer) -> None:
    record(trainer, 2, loss=float("nan"), grad_norm=float("inf"))
    text = (trainer.config.output / "log.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (line["loss"], line["grad_norm"], line["smooth_loss"]) == (None, None, None)


def test_what_was_logged_past_the_checkpoint_is_dropped_and_the_average_goes_on(trainer: Trainer) -> None:
    record(trainer, 6)
    with (trainer.config.output / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')  # cut short by a kill
    trainer.state.step = 4
    record(trainer, 2, loss=1.5)
    lines = read_log(trainer.config.output)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["smooth_loss"] == pytest.approx(1.5 - 0.98**2)


def test_tensorboard_that_is_not_installed_is_named(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_log, "SummaryWriter", None)
    config = trainer.config.model_copy(update={"tensorboard": True})
    with pytest.raises(ValueError, match="tensorboard is not installed: pip install tensorboard"):
        TrainingLog(config, trainer.state)


def test_tensorboard_is_told_what_the_log_is(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Board:
        def __init__(self, folder: str) -> None:
            calls.append(Path(folder).name)

        def add_scalar(self, key: str, value: float, step: int) -> None:
            calls.append((key, value, step))

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setattr(training_log, "SummaryWriter", Board)
    trainer.config = trainer.config.model_copy(update={"tensorboard": True})
    record(trainer, 2)
    assert calls[0] == "tensorboard"
    assert ("loss", 0.5, 2) in calls
    assert calls[-1] == "closed"
