"""The ladder that an export measures: when it does, its price, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ditserve.export import ladder
from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.errors import ExportError
from ditserve.export.ladder import LadderOptions, PlanName, plan_ladder
from ditserve.export.onnx import main
from ditserve.export.plan import forward_rows
from ditserve.export.source import training_pictures
from ditserve.model.evaluation import ladder_plan
from ditserve.model.evaluation.ladder import ENOUGH_PICTURES, LadderMeasurement
from ditserve.model.spec.bundle import Bundle
from ditserve.model.train.load import DEFAULTS
from ditserve.model.train.loaded_model import LoadedModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Consent
from tests.export.test_onnx import training_run
from tests.export.tiny import graphs_of, tiny_source

CHEAPLY = ["--half", "none", "--golden", "none", "--samples", "1", "--steps", "2"]


def planned(
    model: LoadedModel, options: LadderOptions, seconds_per_row: float = 1e-3
) -> LadderMeasurement | None:
    return plan_ladder(model, options, seconds_per_row=seconds_per_row, other_rows=1680)


def without_ladder() -> LoadedModel:
    source = tiny_source()
    return LoadedModel(source.network, source.manifest.model_copy(update={"ladder": ()}))


def test_a_run_is_exported_with_a_ladder_and_the_defaults_that_follow_from_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ladder, "SECONDS", 1e6)
    monkeypatch.setattr(ladder_plan, "QUICK", replace(ladder_plan.QUICK, conditions=ENOUGH_PICTURES))
    (tmp_path / "run").mkdir()
    run, out = training_run(tmp_path / "run"), tmp_path / "bundle"
    assert main([str(run), "--out", str(out), *CHEAPLY]) == 0
    told = capsys.readouterr().err
    assert "forward rows" in told
    assert "to measure the ladder (quick:" in told
    manifest = Bundle.open(out).manifest
    assert manifest.ladder_order == "real"
    assert manifest.provenance["ladder"]["data"] == "pictures.npz"
    assert all(rung.own is not None and rung.real == rung.quality for rung in manifest.ladder)
    assert Ladder.from_manifest(manifest).descent(Consent())
    defaults = manifest.defaults
    assert defaults.guidance_interval == manifest.ladder[0].guidance_interval
    assert str(tmp_path) not in manifest.model_dump_json()

    card = tmp_path / "card.json"
    card.write_text(json.dumps({"defaults": DEFAULTS.model_dump()}))
    options = ["--card", str(card), "--ladder", "quick", "--data", str(run / "pictures.npz")]
    monkeypatch.setattr("ditserve.export.onnx.write_graphs", graphs_of(out))
    assert main([str(out), "--out", str(tmp_path / "again"), *CHEAPLY, *options]) == 0
    assert Bundle.open(tmp_path / "again").manifest.defaults == DEFAULTS


@pytest.mark.parametrize(
    ("has_ladder", "plan", "measured"),
    [
        (False, "auto", True),
        (True, "auto", False),
        (True, "quick", True),
        (False, "none", False),
        (True, "thorough", True),
    ],
)
def test_a_ladder_is_measured_if_there_is_none_or_if_it_is_asked_for(
    has_ladder: bool, plan: PlanName, measured: bool
) -> None:
    model = tiny_source() if has_ladder else without_ladder()
    assert (planned(model, LadderOptions(plan)) is not None) == measured


def test_the_quick_ladder_takes_a_small_part_of_the_export() -> None:
    model = without_ladder()
    for seconds_per_row in (1e-4, 1e-2, 0.1):
        measurement = planned(model, LadderOptions(), seconds_per_row)
        assert measurement is not None
        assert measurement.rows * seconds_per_row <= max(ladder.SECONDS, 0.2 * 1680 * seconds_per_row)
    large = planned(model, LadderOptions(), 3.0)
    assert large is not None
    assert large.rows <= 320


def test_the_rows_of_an_export_are_those_of_its_passes() -> None:
    assert forward_rows(tiny_source(), TrajectorySettings(), half=True) == 7 * 240
    assert forward_rows(tiny_source(), TrajectorySettings(), half=False) == 5 * 240


def test_pictures_that_cannot_be_compared_with_are_refused_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    with pytest.raises(ExportError, match=r"nowhere.*--ladder none"):
        planned(without_ladder(), LadderOptions(pictures=tmp_path / "nowhere"))


def test_a_run_knows_its_pictures_and_a_bundle_does_not(tmp_path: Path, tiny_bundle: Path) -> None:
    assert training_pictures(training_run(tmp_path)) == tmp_path / "pictures.npz"
    assert training_pictures(tiny_bundle) is None


def test_a_bundle_is_not_written_among_the_pictures_of_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = training_run(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    fields = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**fields, "data": {**fields["data"], "path": str(folder)}}))
    assert main([str(run), "--out", str(folder / "bundle"), *CHEAPLY]) == 2
    assert f"lies in the input {folder}" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    (run / "config.json").write_text("{")
    assert main([str(run), "--out", str(tmp_path / "bundle"), *CHEAPLY]) == 2
    assert "config.json is not the configuration of a training run" in capsys.readouterr().err
