"""The command `model.evaluate`: from a bundle and its data to the report, and its refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ditserve.model.evaluate import COLUMNS, main, usual_conditions
from ditserve.model.evaluation.classifier_network import Classifier, ClassifierCard, save_classifier
from ditserve.model.evaluation.measures import REAL
from ditserve.model.evaluation.picture_sets import GENERATED, REAL_UNSEEN, TRAINING, UNSEEN, Given, Wordings
from ditserve.model.spec.bundle import Bundle, write_manifest
from tests.export.tiny import tiny_source

NAMES, STYLES = ("cat", "dog", "fox", "owl", "bee"), ("flat", "shaded", "line")


@pytest.fixture
def command(bundle: Path, tmp_path: Path) -> list[str]:
    """The arguments that evaluate a bundle whose training left out some of the fifteen combinations."""
    labels = np.array([[y, s] for y in range(5) for s in range(3) for _ in range(4)])
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    data = tmp_path / "drawn.npz"
    np.savez(data, x=x, y=labels[:, 0], s=labels[:, 1], names=np.array(NAMES), styles=np.array(STYLES))
    manifest = Bundle.open(bundle).manifest
    provenance = {"training": {"data": {"path": "x.npz", "names": NAMES, "hold_out": 0.3}}}
    write_manifest(bundle, manifest.model_copy(update={"provenance": provenance, "metrics": {"old": 1.0}}))
    card = ClassifierCard(
        image_size=(8, 8), widths=(4, 6), factors=manifest.factors, accuracy={"label_top1_unseen": 0.5}
    )
    save_classifier(Classifier(card), tmp_path / "judge", card)
    out = str(tmp_path / "out")
    return [str(bundle), "--data", str(data), "--classifier", str(tmp_path / "judge"), "--out", out]


def record(folder: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return written


def opened(file: Path) -> npt.NDArray[np.float64]:
    with Image.open(file) as picture:
        return np.asarray(picture, np.float64)


def test_the_report_holds_all_figures_and_the_pictures(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--limit", "40", "--steps", "2", "--seed", "3"]) == 0
    out = tmp_path / "out"
    written = record(out)
    assert set(written["figures"]) == {GENERATED, UNSEEN, REAL, REAL_UNSEEN}
    for figure in (
        "frechet_distance",
        "kernel_distance",
        "precision",
        "nearest_pixel_p50",
        "label_top1",
        "style_top1",
    ):
        assert figure in written["figures"][GENERATED]
    assert {"label_top1", "style_top1", "nearest_feature_p50"} <= set(written["figures"][UNSEEN])
    assert (written["pictures"][GENERATED], written["pictures"][TRAINING]) == (
        40,
        60 - 4 * written["pictures"][UNSEEN],
    )
    assert written["sampling"]["steps"] == 2
    assert written["classifier_accuracy"] == {"label_top1_unseen": 0.5}
    text = (out / "evaluation.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert written["deviations"][GENERATED]["frechet_distance"] > 0
    assert re.search(r"Fréchet distance ↓ \| [\d.]+ ± [\d.]+ \|", text)
    assert "not comparable with published FID" in text
    assert "40 pictures are few for 6 features" in text
    assert opened(out / "closest.png").shape == (3 * 2 * 8, COLUMNS * 8, 3)
    assert opened(out / "held-out.png").shape == (2 * 8, COLUMNS * 8, 3)


@pytest.mark.parametrize(
    ("instead", "wordings", "given"),
    [(None, "first", "all"), (0.5, "first", "labels"), (0.5, "unseen", "text"), (None, "unseen", "all")],
)
def test_a_model_is_told_together_what_it_learned_together(
    instead: float | None, wordings: Wordings, given: Given
) -> None:
    manifest = tiny_source().manifest
    told = manifest.model_copy(update={"provenance": {"training": {"text_instead": instead}}})
    assert usual_conditions(told, wordings) == given


def test_the_same_seed_gives_the_same_figures(command: list[str], tmp_path: Path) -> None:
    figures = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--limit", "6", "--steps", "1", "--seed", seed]) == 0
        figures.append(record(tmp_path / "out")["figures"])
    assert figures[0] == figures[1] != figures[2]


def test_closest_pictures_stand_above_their_training_picture(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--limit", "8", "--steps", "1"]) == 0
    pixels = opened(tmp_path / "out" / "closest.png").reshape(2, 8, COLUMNS, 8, 3)
    above, below = pixels.transpose(0, 2, 1, 3, 4)  # (N, H, W, 3) each
    apart = np.sqrt(((above - below) ** 2).mean((1, 2, 3)))[:8]
    assert (np.diff(apart) >= -1e-9).all()
    with np.load(tmp_path / "drawn.npz") as arrays:
        drawn = {picture.tobytes() for picture in arrays["x"]}
    assert {picture.astype(np.uint8).tobytes() for picture in below[:8]} <= drawn
    assert (above[8:] == 255).all()


def test_figures_are_written_to_the_manifest_on_request_only(
    command: list[str], bundle: Path, tmp_path: Path
) -> None:
    assert main([*command, "--limit", "8", "--steps", "1"]) == 0
    assert Bundle.open(bundle).manifest.metrics == {"old": 1.0}
    assert main([*command, "--limit", "8", "--steps", "1", "--write"]) == 0
    metrics, figures = Bundle.open(bundle).manifest.metrics, record(tmp_path / "out")["figures"]
    assert metrics["old"] == 1
    assert metrics["frechet_distance_classifier"] == pytest.approx(
        figures[GENERATED]["frechet_distance"], abs=1e-5
    )
    assert metrics["label_top1"] == pytest.approx(figures[GENERATED]["label_top1"], abs=1e-5)
    assert metrics["held_out_style_top1"] == pytest.approx(figures[UNSEEN]["style_top1"], abs=1e-5)


def test_what_too_few_pictures_cannot_tell_is_said_and_left_out(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--limit", "2", "--steps", "1"]) == 0
    assert "model.evaluate: no Fréchet distance, which needs 7 pictures" in capsys.readouterr().err
    written = record(tmp_path / "out")
    assert not {"frechet_distance", "precision"} & set(written["figures"][GENERATED])
    assert sum("no precision and recall" in note for note in written["notes"]) == 1


def test_impossible_evaluations_are_refused_in_one_sentence(
    command: list[str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Bundle.open(bundle).manifest
    stranger = ClassifierCard(
        image_size=(8, 8), widths=(4, 6), factors=(manifest.factors[0].model_copy(update={"name": "x"}),)
    )
    save_classifier(Classifier(stranger), tmp_path / "stranger", stranger)
    larger = ClassifierCard(image_size=(16, 16), widths=(4, 6), factors=manifest.factors)
    save_classifier(Classifier(larger), tmp_path / "larger", larger)
    cases = {
        ("--classifier", str(tmp_path / "stranger")): "knows none of the model's",
        ("--classifier", str(tmp_path / "larger")): "reads pictures of 16×16, not 8×8",
        ("--classifier", str(tmp_path)): "holds no classifier",
        ("--data", str(tmp_path / "none.npz")): "none.npz",
        ("--features", "inception"): "--weights",
        ("--features", "inception", "--weights", str(tmp_path / "drawn.npz")): "its sha256 differs",
        ("--solver", "magic"): "magic",
        ("--steps", "5000"): "5000",
    }
    for extra, expected in cases.items():
        assert main([*command, "--steps", "1", *extra]) == 2, extra
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("model.evaluate: ")
        assert expected in message
    assert main([str(tmp_path), *command[1:]]) == 2
    assert "neither a bundle" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
