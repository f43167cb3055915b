"""A comparison of models from one command: the cost of each, and the quality of its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditserve.model.evaluate import main
from ditserve.model.evaluation.classifier_network import Classifier, ClassifierCard, save_classifier
from ditserve.model.evaluation.comparison import rows_per_image
from ditserve.model.nets.cost import cost
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.diffusion import make_schedule
from ditserve.model.train.load import load_model
from tests.model.train.distillation.distillation_cases import write_teacher
from tests.model.train.training_cases import write_pictures


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The arguments that evaluate a bundle and a smaller one, over five names in two styles."""
    data: dict[str, Any] = {"path": str(write_pictures(tmp_path / "more.npz", tuple("abcde"))), "hold_out": 0}
    small = {"patch_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 2}
    write_teacher(tmp_path, "large", data=data)
    write_teacher(tmp_path, "small", data=data, model=small)
    card = ClassifierCard(
        image_size=(8, 8), widths=(4, 6), factors=Bundle.open(tmp_path / "large").manifest.factors
    )
    save_classifier(Classifier(card), tmp_path / "judge", card)
    models = [str(tmp_path / "large"), str(tmp_path / "small")]
    return [*models, "--data", data["path"], "--classifier", str(tmp_path / "judge"), "--limit", "8"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_models_are_set_side_by_side(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both"
    assert main([*command, "--out", str(out), "--steps", "3"]) == 0
    text = (out / "comparison.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    head, _, *lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines] == ["large", "small"]
    table: dict[str, dict[str, str]] = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    for name, row in table.items():
        record: dict[str, Any] = json.loads((out / name / "evaluation.json").read_text())
        network = cost(load_model(tmp_path / name).network.config)
        assert row["parameters"] == f"{network.parameters / 1e6:.2f} M"
        assert row["GFLOPs a row"] == f"{network.flops / 1e9:.3f}"
        assert row["rows an image"] == "6"
        assert row["sampling"] == "ddim, 3 steps, guidance 2"
        figures = record["figures"]["generated"]
        assert row["Fréchet distance ↓"] == f"{figures['frechet_distance']:.4g}"
        assert row["label top-1 ↑"] == f"{figures['label_top1']:.4g}"
        assert float(row["ms a row"]) > 0


def test_rows_count_where_guidance_acts() -> None:
    schedule = make_schedule("linear")
    sampling = {"steps": 10, "grid": "trailing", "guidance_scale": 2.0, "guidance_interval": [0, 1]}
    assert rows_per_image({"sampling": sampling}, schedule) == 20
    assert rows_per_image({"sampling": {**sampling, "guidance_scale": 1.0}}, schedule) == 10
    assert rows_per_image({"sampling": {**sampling, "guidance_interval": [0.35, 0.65]}}, schedule) == 13


def test_a_comparison_needs_an_output_folder_and_different_names(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    assert "several models are compared in --out FOLDER" in capsys.readouterr().err
    assert main([command[0], *command, "--out", str(tmp_path / "both")]) == 2
    assert "models of different names" in capsys.readouterr().err
