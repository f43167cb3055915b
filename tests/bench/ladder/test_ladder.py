"""The command that measures a ladder: its table, figure and record, and the bundle that gets its rungs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ditserve.bench import report
from ditserve.bench.ladder import __main__ as command
from ditserve.bench.ladder.tables import stretch_table
from ditserve.bench.ladder.training_pictures import GraphDecoder, PictureFigures, TrainingPictures
from ditserve.model.evaluation.ladder import MeasuredLadder
from ditserve.model.evaluation.ladder_plan import LadderPlan
from ditserve.model.evaluation.picture_sets import round_to_8_bits
from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.manifest import Defaults, RungSpec, StretchSpec
from ditserve.model.spec.sigma_grids import SigmaGrid
from ditserve.service.backends import load_backend
from ditserve.service.planning.ladder import Ladder
from tests.service.tiny_bundle import MANIFEST, write_bundle

SMALL = LadderPlan("small", 250, {"ddim": (("trailing",), (20, 5)), "dpmpp-2m": (("uniform-t",), (8,))}, 2)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "THOROUGH", SMALL)
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_bundle(folder, weights=True)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    file = tmp_path / "pictures.npz"
    x = np.random.default_rng(0).integers(0, 255, (10, 8, 8, 3), np.uint8)
    names, styles = np.array(list("abcde")), np.array(["flat", "round"])
    np.savez(file, x=x, y=np.arange(10) // 2, s=np.arange(10) % 2, names=names, styles=styles)
    return file


def test_the_command_writes_a_ladder_the_service_can_use(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(bundle), "--samples", "1"]) == 0
    assert "ddim-20" in capsys.readouterr().out
    assert Bundle.open(bundle).manifest.ladder == ()

    assert command.main([str(bundle), "--samples", "1", "--write"]) == 0
    opened = Bundle.open(bundle).manifest
    served = Ladder.from_manifest(opened)
    assert len(served.rungs) >= 2
    assert [rung.quality for rung in served.rungs] == sorted(rung.quality for rung in served.rungs)
    results = bundle.parent / "results"
    assert (results / "ladder-tiny.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((results / "ladder-tiny.json").read_text())
    assert saved["ladder"] == [rung.name for rung in opened.ladder]
    assert (saved["order"], len(saved["measured"])) == ("own", 5)  # DDIM has the bundle's own grid too


def test_the_ladder_of_a_flow_is_on_the_grid_of_a_flow(
    bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = DiffusionSpec(schedule="flow", prediction="flow", sigma_grid=SigmaGrid(shift=3.0))
    defaults = MANIFEST.defaults.model_copy(update={"grid": "uniform"})
    opened = Bundle.open(bundle).manifest
    write_manifest(bundle, opened.model_copy(update={"diffusion": flow, "defaults": defaults}))
    assert command.main([str(bundle), "--samples", "6", "--data", str(pictures), "--write"]) == 0
    assert "dpmpp-2m-8" in capsys.readouterr().out
    ladder = Ladder.from_manifest(Bundle.open(bundle).manifest)
    assert {rung.grid for rung in ladder.rungs} == {"uniform"}


def test_training_pictures_order_the_ladder_and_the_defaults_follow(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        TrainingPictures, "__init__", lambda self, *args, **options: setattr(self, "inputs", ())
    )
    monkeypatch.setattr(
        TrainingPictures,
        "figures",
        lambda self, rungs, on_rows: {rung.name: PictureFigures(1.5, 0.25) for rung in rungs},
    )
    before = Bundle.open(bundle).manifest.defaults
    options = ["--samples", "8", "--data", str(pictures), "--classifier", "any", "--write"]
    assert command.main([str(bundle), *options]) == 0
    manifest = Bundle.open(bundle).manifest
    assert manifest.ladder_order == "real"
    assert all(rung.real == rung.quality for rung in manifest.ladder)
    assert manifest.defaults != before
    assert manifest.provenance["ladder"]["data"] == "pictures.npz"
    saved = json.loads((bundle.parent / "results" / "ladder-tiny.json").read_text())
    # The other rungs are there to judge the ladder's by.
    assert {rung.name for rung in manifest.ladder} | {"ddim-20"} == saved["frechet"].keys()
    assert set(saved["grain"].values()) == {0.25}
    assert Defaults.model_validate(saved["defaults"]) == manifest.defaults
    assert manifest.defaults.steps in {rung["steps"] for rung in saved["measured"]}
    assert "1.500" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--data", "nowhere.npz"], ["--classifier", "model/zoo/emoji-classifier"]]
)
def test_data_that_is_not_there_is_refused_in_a_sentence(
    bundle: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(bundle), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.ladder: ")
    assert error.count("\n") == 1
    assert command.main([str(bundle / "nothing")]) == 2


@pytest.mark.parametrize("option", [["--prompts", "prompts.txt"], ["--device", "cpu"]])
def test_options_of_pipelines_are_refused_for_other_models(
    bundle: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(bundle), *option]) == 2
    assert f"{option[0]} is for imported pipelines: leave it out" in capsys.readouterr().err


def test_pictures_over_latents_are_compared_as_their_decoder_makes_them(
    prompted_bundle: Path,
) -> None:
    bundle = Bundle.open(prompted_bundle)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = GraphDecoder(bundle).decode(latents)
    expected = load_backend("onnx", bundle, threads=1).decode(latents.numpy())
    assert decoded.shape == (2, 3, 16, 16)
    levels = (round_to_8_bits(decoded) * 127.5 + 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(levels - expected).max() <= 1


def test_every_stretch_is_told_beside_the_own_network_alone() -> None:
    def rung(steps: int, rows: float, own: float, *stretches: tuple[float, str]) -> RungSpec:
        parts = tuple(StretchSpec(above=above, backbone=name) for above, name in stretches)
        return RungSpec(
            name=f"{steps}",
            solver="ddim",
            steps=steps,
            grid="trailing",
            rows=rows,
            quality=own,
            own=own,
            stretches=parts,
        )

    measured = (
        rung(20, 40, 0.1),
        rung(10, 20, 0.2),
        rung(20, 30, 0.12, (0.5, "light")),
        rung(10, 15, 0.24, (0.5, "light")),
        rung(10, 10, 0.3, (0.7, ""), (0.0, "light")),
        rung(4, 2, 0.5, (0.0, "student")),
    )
    ladder = MeasuredLadder(measured, measured, "own", MANIFEST.defaults, {})
    table = stretch_table(ladder)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("light above 0.5, own", "2", "0.75", "+0.0300", ""),
        ("own above 0.7, light", "1", "0.50", "+0.1000", ""),
    ]
