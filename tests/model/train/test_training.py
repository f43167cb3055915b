"""Runs of `python -m model.train`: divergence, bad input, fine-tuning, and the files of a run."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditserve.model import sample
from ditserve.model.sampling.sheet import STRIP
from ditserve.model.train import training
from ditserve.model.train.__main__ import main
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.curve import draw_curve
from ditserve.model.train.load import load_model
from ditserve.model.train.trainer import Trainer
from tests.model.train.training_cases import (
    assert_same,
    config_file,
    newest_state,
    tiny_config,
    tiny_run,
    write_pictures,
)


def test_what_a_run_leaves_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "draw_curve", draw_curve)
    config = tiny_config(tmp_path, steps=4, sheet_every=2, ema=[0.9, 0.99])
    training.train(config)
    assert sorted(path.name for path in config.output.iterdir()) == [
        "checkpoints",
        "config.json",
        "curve.png",
        "log.jsonl",
        "sheet-0000002.png",
        "sheet-0000004.png",
    ]
    assert TrainConfig.model_validate_json((config.output / "config.json").read_text()) == config
    with Image.open(config.output / "sheet-0000004.png") as sheet:
        assert sheet.height == 2 * (8 + STRIP)
    trained = load_model(config.output)
    assert trained.manifest.version == "0.4"
    ours = newest_state(config.output)
    assert all(
        torch.equal(ours[f"ema.{key}"], tensor) for key, tensor in trained.network.state_dict().items()
    )


def test_a_run_that_loses_its_way_goes_back_and_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = Trainer.losses

    def losses(self: Trainer, batch: Any) -> Any:
        total, parts = spoilt(self, batch)
        bad = self.state.step >= 6 and not self.state.rollbacks
        return (
            (total * float("nan"), {name: part * float("nan") for name, part in parts.items()})
            if bad
            else (total, parts)
        )

    monkeypatch.setattr(Trainer, "losses", losses)
    config = tiny_config(tmp_path, skip_limit=3)
    training.train(config)
    lines = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert (lines[-1]["skipped"], lines[-1]["rollbacks"]) == (3, 1)
    assert 0 < lines[-1]["attention_entropy_least"] <= lines[-1]["attention_entropy"] <= 1
    assert all(line["loss"] is not None for line in lines)
    assert all(torch.isfinite(tensor).all() for tensor in newest_state(config.output).values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Trainer.update

    def broken(self: Trainer, rate: float) -> None:
        update(self, rate)
        if self.state.step == 7 and not self.state.rollbacks:
            with torch.no_grad():
                next(iter(self.state.ema.averages[0.999].values())).fill_(float("inf"))

    monkeypatch.setattr(Trainer, "update", broken)
    config = tiny_config(tmp_path)
    training.train(config)
    states = [json.loads(path.read_text()) for path in (config.output / "checkpoints").glob("*/state.json")]
    assert sorted((state["step"], state["rollbacks"]) for state in states) == [(8, 1), (12, 1)]


def flat(size: int) -> dict[str, Any]:
    """Return the arrays of a valid picture file."""
    return {
        "x": np.zeros((4, size, size, 3), np.uint8),
        "y": np.array([0, 0, 1, 1]),
        "names": np.array(["a", "b"]),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"path": "nowhere.npz"}}, "nowhere.npz"),
        ({"data": {"path": "empty"}}, "empty"),
        ({"stepz": 3}, "there is no field stepz: did you mean steps?"),
        (
            {"model": {"patch_size": 3, "hidden_size": 32, "depth": 1, "num_heads": 2}},
            "not divisible by patch_size",
        ),
        ({"model": {"dept": 3}}, "no field 'dept'"),
        ({"label_dropout": [0.1, 0.1, 0.1]}, "label_dropout has 3 rates, but the data has 2 factors"),
        ({"lr": 1e30, "clip": None, "skip_limit": 2}, "not finite at step .* did not help: lower lr"),
        ({"output": "set.npz/run"}, "set.npz/run lies in the input"),
        ({"init": "nowhere"}, "nowhere is neither a bundle"),
    ],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    raw = {**tiny_run(tmp_path), **change}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["--config", config_file(raw, tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_bad_labels_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tiny_run(tmp_path)
    arrays: dict[str, Any] = {**flat(8), "y": np.array([0, 0, 1, 9])}
    np.savez(tmp_path / "set.npz", **arrays)
    assert main(["--config", config_file(raw, tmp_path)]) == 2
    assert "picture 3 has name 9, but there are only 2 names" in capsys.readouterr().err
    assert not Path(raw["output"]).exists()


def test_another_model_in_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file(tiny_run(tmp_path), tmp_path)
    assert main(["--config", file, "--steps", "1"]) == 0
    before = newest_state(tmp_path / "run")
    saved = (tmp_path / "run" / "config.json").read_text()
    assert main(["--config", file, "--set", "model.depth=1"]) == 2
    assert "was trained with another model.depth (2, not 1)" in capsys.readouterr().err
    assert main(["--config", file, "--seed", "9"]) == 2
    assert "another seed (0, not 9)" in capsys.readouterr().err
    assert_same(before, newest_state(tmp_path / "run"))
    assert (tmp_path / "run" / "config.json").read_text() == saved


def test_other_pictures_are_refused_before_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file(tiny_run(tmp_path), tmp_path)
    assert main(["--config", file, "--steps", "1"]) == 0
    before = newest_state(tmp_path / "run")
    with np.load(tmp_path / "set.npz") as arrays:
        more = {key: np.concatenate([arrays[key], arrays[key][:2]]) for key in "xys"}
        np.savez(tmp_path / "set.npz", **{**arrays, **more})
    assert main(["--config", file]) == 2
    assert "another training_pictures.label.a (2, not 4): take that one back" in capsys.readouterr().err
    assert_same(before, newest_state(tmp_path / "run"))


def test_a_disk_that_fills_up_stops_the_run_with_its_last_state_intact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny_run(tmp_path) | {"steps": 8}
    step, before = Trainer.step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def until_full(self: Trainer) -> dict[str, float]:
        if self.state.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", until_full)
        try:
            assert main(["--config", config_file(raw, tmp_path)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "step-0000008 cannot be written" in error
    assert "earlier checkpoints are intact" in error
    assert main(["--config", config_file(raw, tmp_path)]) == 0
    straight = TrainConfig.model_validate({**raw, "output": str(tmp_path / "straight")})
    training.train(straight)
    assert_same(newest_state(straight.output), newest_state(Path(raw["output"])))


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tiny_run(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert main(["--config", config_file(raw, tmp_path), "--dry-run", "--batch", "6"]) == 0
    text = capsys.readouterr().out
    assert "12 steps of 6 are 12.0 passes over 6 pictures" in text
    assert re.search(r"8×8: [\d.]+ GMACs a row forward, .* img/s; 12 steps take 0:", text)
    assert "memory" in text
    assert {path.name for path in tmp_path.iterdir()} == before | {"run.json"}


@pytest.mark.parametrize("timesteps", [1, 2, 10])
def test_a_model_of_few_timesteps_trains_and_is_sampled(tmp_path: Path, timesteps: int) -> None:
    raw = tiny_run(tmp_path) | {"steps": 2, "sheet_every": 1}
    raw["diffusion"] |= {"timesteps": timesteps}
    assert main(["--config", config_file(raw, tmp_path), "--dry-run"]) == 0
    assert main(["--config", config_file(raw, tmp_path)]) == 0
    loaded = load_model(Path(raw["output"]))
    assert loaded.manifest.defaults.steps == timesteps
    assert sample.main([raw["output"], "-o", str(tmp_path / "sheet.png")]) == 0


def test_pictures_without_classes_train_and_are_sampled_unguided(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for k in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * k, np.uint8)).save(folder / f"{k}.png")
    raw = tiny_run(tmp_path) | {"steps": 2}
    raw["data"] |= {"path": str(folder)}
    assert main(["--config", config_file(raw, tmp_path)]) == 0
    manifest = load_model(Path(raw["output"])).manifest
    assert (manifest.factors, manifest.defaults.guidance_scale) == ((), 1.0)
    assert sample.main([raw["output"], "-o", str(tmp_path / "sheet.png")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "runs/mein lauf"], "name 'mein lauf' is to be the model's"),
        (["--output", "runs/grün"], "name 'grün' is to be"),
        (["--output", ""], "field output: .*it is empty"),
        (["--batch", "1000000000"], "batch 1000000000 takes .* GiB"),
        (["--set", "batch.x=1"], "--set batch.x=1: batch is a value"),
        (["--set", "lr.x=1"], "field lr: "),
        (["--set", "seed=1e30"], "field seed"),
        (["--set", "threads=-1"], "field threads"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_mistake_is_refused_before_anything_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
    dry: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config", config_file(tiny_run(tmp_path), tmp_path), *arguments, *dry]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "set.npz"}


def test_fine_tuning_knows_classes_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.train(tiny_config(tmp_path, steps=2))
    write_pictures(tmp_path / "other.npz", names=("c", "new", "a", "b"))
    changes = {"data": {"path": str(tmp_path / "other.npz"), "hold_out": 0}, "init": tmp_path / "run"}
    config = tiny_config(tmp_path, steps=1, lr=1e-9, output=tmp_path / "tuned", **changes)
    training.train(config)
    assert "5 of 6 classes known" in capsys.readouterr().out
    old, new = newest_state(tmp_path / "run"), newest_state(config.output)
    rows = old["ema.y_embedder.tables.0.weight"][[2, 3, 0, 1, 3]]  # c, null, a, b, null
    torch.testing.assert_close(new["ema.y_embedder.tables.0.weight"], rows, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        new["model.blocks.0.mlp.fc1.weight"], old["ema.blocks.0.mlp.fc1.weight"], rtol=0, atol=1e-6
    )
