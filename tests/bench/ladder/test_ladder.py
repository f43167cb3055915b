"""The ladder: which candidates are kept, what the distance means, and that a bundle gets its rungs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.bench import report
from ditserve.bench.ladder import __main__ as command
from ditserve.bench.ladder import measure as ladder
from ditserve.model.spec.bundle import Bundle, RungSpec
from ditserve.model.spec.diffusion import make_schedule
from ditserve.service.backends import Backend, load_backend
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung
from tests.service.tiny_bundle import write_bundle

WHOLE = (0.0, 1.0)


def spec(rows: float, quality: float, name: str = "r") -> RungSpec:
    return RungSpec(name=name, solver="ddim", steps=10, grid="trailing", rows=rows, quality=quality)


specs = st.lists(st.builds(spec, st.integers(1, 200), st.floats(0.0, 1.0)), max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle")
    write_bundle(path, weights=False)
    return path


@pytest.fixture(scope="module")
def backend(folder: Path) -> Backend:
    return load_backend("onnx", Bundle.open(folder), threads=1)


def test_the_front_keeps_what_nothing_cheaper_matches() -> None:
    best, good, bad, dear = spec(100, 0.1), spec(40, 0.2), spec(50, 0.3), spec(200, 0.1)
    assert ladder.best_rungs([good, dear, bad, best]) == (best, good)


def test_a_rung_must_save_something_worthwhile() -> None:
    assert [rung.rows for rung in ladder.best_rungs([spec(100, 0.1), spec(95, 0.2), spec(80, 0.3)])] == [
        100,
        80,
    ]


@given(specs)
@settings(max_examples=40, deadline=None)
def test_every_candidate_is_matched_by_the_front_for_little_more(measured: list[RungSpec]) -> None:
    kept = ladder.best_rungs(measured)
    assert [rung.rows for rung in kept] == sorted({rung.rows for rung in kept}, reverse=True)
    assert [rung.quality for rung in kept] == sorted({rung.quality for rung in kept})
    for candidate in measured:
        assert any(
            rung.quality <= candidate.quality and rung.rows * ladder.WORTHWHILE < candidate.rows + 1e-9
            for rung in kept
        )


def test_candidates_are_legal_rungs_and_all_different() -> None:
    rungs = list(ladder.candidates([WHOLE, (0.1, 0.8)], "leading", make_schedule("linear")))
    assert len(set(rungs)) == len(rungs)
    assert all(Ladder(()).row_steps(rung, 2.0) >= rung.steps for rung in rungs)
    assert {rung.grid for rung in rungs} == {"leading", "trailing", "uniform-t"}


def test_no_candidate_has_more_steps_than_there_are_timesteps() -> None:
    assert (
        max(rung.steps for rung in ladder.candidates([WHOLE], "trailing", make_schedule("linear", 20))) == 20
    )


def test_the_reference_is_at_no_distance_from_itself_and_fewer_steps_are_farther(backend: Backend) -> None:
    inputs = ladder.image_inputs(backend, 3, seed=0)
    rungs = [Rung(f"ddim-{n}", "ddim", n, "trailing", WHOLE, 0.0) for n in (ladder.REFERENCE_STEPS, 50, 5)]
    same, near, far = ladder.measure(backend, inputs, rungs, rows=2)
    assert same.quality == 0.0
    assert 0.0 < near.quality < far.quality
    assert [rung.rows for rung in (same, near, far)] == [500, 100, 10]


def test_images_do_not_depend_on_how_many_are_made_at_a_time(backend: Backend) -> None:
    inputs = ladder.image_inputs(backend, 3, seed=0)
    rung = Rung("dpmpp", "dpmpp-2m", 6, "uniform-t", (0.1, 0.8), 0.0)
    one, all_at_once = (ladder.generate(backend, inputs, rung, rows=rows) for rows in (1, 3))
    assert one.shape == inputs.noise.shape
    np.testing.assert_allclose(one, all_at_once, atol=1e-5)


def test_the_narrower_interval_is_a_part_of_the_bundles_own(backend: Backend) -> None:
    manifest = backend.manifest
    assert ladder.intervals(manifest, (0.1, 0.8)) == (WHOLE, (0.1, 0.8))
    assert ladder.intervals(manifest, WHOLE) == (WHOLE,)
    assert ladder.intervals(manifest, None) == (WHOLE,)
    unguided = manifest.defaults.model_copy(update={"guidance_scale": 1.0})
    assert ladder.intervals(manifest.model_copy(update={"defaults": unguided}), (0.1, 0.8)) == (WHOLE,)


def test_the_command_writes_a_ladder_the_service_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ladder, "REFERENCE_STEPS", 40)
    monkeypatch.setattr(
        ladder, "CANDIDATES", {"ddim": (("trailing",), (20, 5)), "dpmpp-2m": (("uniform-t",), (8,))}
    )
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_bundle(bundle, weights=False)

    command.main([str(bundle), "--samples", "2", "--threads", "1"])
    assert "ddim-20" in capsys.readouterr().out
    assert Bundle.open(bundle).manifest.ladder == ()

    command.main([str(bundle), "--samples", "2", "--threads", "1", "--write"])
    opened = Bundle.open(bundle)
    served = Ladder.from_manifest(opened.manifest)
    assert len(served.rungs) >= 2
    assert [rung.quality for rung in served.rungs] == sorted(rung.quality for rung in served.rungs)
    assert (tmp_path / "results" / "ladder-tiny.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "results" / "ladder-tiny.json").read_text())
    assert saved["ladder"] == [rung.name for rung in opened.manifest.ladder]
    assert len(saved["measured"]) == 5


def test_rungs_are_judged_by_real_pictures_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mean:
        """Distance of the mean brightness to that of a grey picture."""

        def __init__(self, bundle: Path, data: Path, classifier: Path, *, pictures: int) -> None:
            self.labels = np.zeros((pictures, 2), np.int64)

        def distance(self, pixels: npt.NDArray[np.uint8]) -> float:
            assert pixels.shape == (3, 8, 8, 3)
            return abs(float(pixels.mean()) - 127.5)

    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ladder, "REFERENCE_STEPS", 40)
    monkeypatch.setattr(ladder, "CANDIDATES", {"ddim": (("trailing",), (20, 5))})
    monkeypatch.setattr(command, "TrainingPictures", Mean)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_bundle(bundle, weights=False)
    assert command.main([str(bundle), "--samples", "2", "--data", "some.npz", "--pictures", "3"]) == 0
    saved = json.loads((tmp_path / "results" / "ladder-tiny.json").read_text())
    assert saved["frechet"].keys() == set(saved["ladder"])
    assert "Fréchet" in capsys.readouterr().out


def test_data_that_is_not_there_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path, weights=True)
    assert command.main([str(tmp_path), "--data", "nowhere.npz"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.ladder: ")
    assert "Traceback" not in error
    assert command.main([str(tmp_path / "nothing")]) == 2
