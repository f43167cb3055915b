"""A run's configuration: file and flags, mistakes by name, and the fields that a resumed run must keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ditserve.model.train.config import TrainConfig, first_mistake, load_config
from ditserve.model.train.identity import run_identity
from tests.model.train.training_cases import tiny_config, tiny_run

ROOT = Path(__file__).resolve().parents[3]


def test_the_shipped_configuration_is_read() -> None:
    config = load_config(ROOT / "model" / "zoo" / "tiny" / "train.json")
    assert (config.ema, config.space, config.loss_cap, config.schedule) == ((0.999,), "v", 5.0, "wsd")
    assert (config.precision, config.accumulate, config.timesteps) == ("fp32", 1, "uniform")


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, ema=[0.9, 0.99], stages=[{"size": 4, "steps": 5}, {"size": [8, 8]}])
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(tiny_run(tmp_path)))
    config = load_config(file, ["lr=0.5", "data.hold_out=0.5", "output=elsewhere", "model.depth=1"])
    assert (config.lr, config.data.hold_out, config.output) == (0.5, 0.5, Path("elsewhere"))
    assert config.model["depth"] == 1
    for override in ("lr", "=1", "data.=1", "data..size=1"):
        with pytest.raises(ValueError, match="write KEY=VALUE"):
            load_config(file, [override])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stepz": 3}, "there is no field stepz: did you mean steps?"),
        ({"data": {"path": "x.npz", "grops": []}}, "there is no field data.grops: did you mean data.groups?"),
        ({"xyzzy": 3}, "there is no field xyzzy"),
        ({"batch": 0}, "field batch: Input should be greater than or equal to 1"),
        ({"schedule": "linear"}, "field schedule: Input should be 'constant', 'cosine' or 'wsd'"),
        ({"accumulate": 5}, "accumulate 5 cuts a batch of 4 into more pieces than pictures"),
        ({"stages": [{"size": 4}, {"size": 8}]}, "stages: only the last one may leave out steps"),
        (
            {"stages": [{"size": 4, "steps": 3}, {"size": 8, "steps": 3}]},
            "stages add up to 6 steps, and steps is 12: "
            "leave steps out of the last stage to let it run to the end",
        ),
        (
            {"model": {"learn_sigma": True}},
            "learn_sigma differs between model and diffusion: make them agree",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as error:
        tiny_config(tmp_path, **change)
    assert first_mistake(error.value) == sentence


def test_steps_are_the_sum_of_the_stages(tmp_path: Path) -> None:
    raw = tiny_run(tmp_path)
    del raw["steps"]
    config = TrainConfig.model_validate({**raw, "stages": [{"size": 4, "steps": 3}, {"size": 8, "steps": 5}]})
    assert config.steps == 8
    assert config.stage_sizes(config.open_dataset()) == [(3, (4, 4)), (8, (8, 8))]
    with pytest.raises(ValidationError, match="steps\n  Field required"):
        TrainConfig.model_validate({**raw, "stages": [{"size": 4, "steps": 3}, {"size": 8}]})


def test_the_loss_is_in_the_space_of_the_prediction_unless_said(tmp_path: Path) -> None:
    for prediction, space in (("epsilon", "epsilon"), ("v", "v"), ("x0", "v")):
        diffusion = {"schedule": "cosine", "prediction": prediction}
        assert tiny_config(tmp_path, diffusion=diffusion).space == space
        assert tiny_config(tmp_path, diffusion=diffusion, loss_space="x0").space == "x0"


def test_the_network_takes_its_size_channels_and_classes_from_the_data(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    network = config.network_config(config.open_dataset())
    assert (network.image_size, network.in_channels, network.classes) == ((8, 8), 3, (3, 2))
    assert network.learn_sigma is False
    with pytest.raises(ValueError, match=r"model\.in_channels is 4, but 3 by the data"):
        tiny_config(tmp_path, model={**config.model, "in_channels": 4}).network_config(config.open_dataset())


def test_stages_interpolate_the_positions_of_the_first(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, stages=[{"size": 4, "steps": 3}, {"size": 8}])
    network = config.network_config(config.open_dataset())
    assert network.image_size == (8, 8)
    assert getattr(network, "base_size", None) == (4, 4)
    with pytest.raises(ValueError, match="layout_rank fixes the picture size"):
        tiny_config(tmp_path, stages=config.stages, model={**config.model, "layout_rank": 2}).network_config(
            config.open_dataset()
        )


def test_other_pictures_make_another_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    own = run_identity(config, config.open_dataset())["pictures"]
    assert own["count"] == 6
    with np.load(config.data.path) as file:
        arrays = dict(file)
    np.savez(config.data.path, **arrays | {"y": arrays["y"][::-1]})
    relabelled = run_identity(config, config.open_dataset())["pictures"]
    assert relabelled["count"] == own["count"]
    assert relabelled["labels"] != own["labels"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lr": 0.5, "steps": 99, "warmup": 7, "device": "cpu", "accumulate": 2, "keep": 5}, None),
        ({"seed": 1}, "seed"),
        ({"batch": 5}, "batch"),
        ({"ema": 0.9}, "ema"),
        ({"precision": "bf16"}, "precision"),
        ({"label_dropout": 0.3}, "label_dropout joint_dropout"),
        ({"joint_dropout": 0.3}, "joint_dropout"),
        ({"stages": [{"size": 4, "steps": 3}, {"size": 8}]}, "stages"),
    ],
)
def test_what_makes_a_run_another_one(tmp_path: Path, change: dict[str, Any], field: str | None) -> None:
    config = tiny_config(tmp_path)
    own, other = (run_identity(run, run.open_dataset()) for run in (config, tiny_config(tmp_path, **change)))
    assert [key for key in own if own[key] != other[key]] == (field or "").split()
    assert json.loads(json.dumps(own)) == own
