"""The ladder of an imported pipeline: its pictures are the service's, and the service degrades along it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.bench import report
from ditserve.bench.ladder import __main__ as command
from ditserve.bench.ladder.prompts import prompt_inputs
from ditserve.model import convert
from ditserve.model.evaluation.front import OperatingPoint
from ditserve.model.evaluation.ladder import draw_pictures
from ditserve.model.evaluation.ladder_plan import LadderPlan, candidates, pipeline_plan
from ditserve.model.sampling.prompt import read_prompts
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import Manifest
from ditserve.model.train.imported_pipeline import open_pipeline
from ditserve.service.backends import load_backend
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import Finished, SampleRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.costs import CostModel
from ditserve.service.rung import Consent, Rung
from ditserve.service.settings import Settings
from ditserve.service.worker.parts import build_engine
from tests.tiny_pipelines import save_pipeline, tokens

# ChromaTransformer2DModel has it from where it was.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


def imported(family: str, folder: Path) -> Bundle:
    save_pipeline(family, folder / "pipeline")
    options = [f"--tokens={tokens(family)}", "--size", "8", "8", "--licence=x"]
    assert convert.main(["import", str(folder / "pipeline"), str(folder / "bundle"), *options]) == 0
    return Bundle.open(folder / "bundle")


def own_rung(manifest: Manifest, steps: int) -> Rung:
    defaults = manifest.defaults
    return Rung(f"{defaults.solver}-{steps}", defaults.solver, steps, defaults.grid, (0.0, 1.0), 0.0)


def asked(manifest: Manifest, prompt: str, seed: int, rung: Rung, **fields: Any) -> SampleRequest:
    """Return a request of a prompt as the service makes it of one that leaves all else out."""
    return SampleRequest(
        id=f"{seed}/0",
        condition=(ConditionTerm((), text=prompt),),
        mix="linear",
        seed=seed,
        rung=rung,
        requested=rung,
        guidance_scale=manifest.defaults.guidance_scale + 1.0 - manifest.diffusion.unguided_scale,
        guidance_embedded=manifest.guidance_embedded,
        previews=0,
        **{"deadline_at": None, "allow_degraded": True, "consent": Consent(), **fields},
    )


def drawn(engine: Engine, requests: list[SampleRequest]) -> list[Finished]:
    for request in requests:
        engine.add(request)
    made: list[Finished] = []
    while not engine.idle:
        made += engine.step().finished
    return sorted(made, key=lambda sample: sample.id)


# Guided and padded; told its guidance; with words of its own and a norm; guided from 0.
@pytest.mark.parametrize("family", ["sd3", "flux", "lumina2", "z_image"])
def test_the_pictures_of_a_ladder_are_those_of_the_service(family: str, tmp_path: Path) -> None:
    bundle = imported(family, tmp_path)
    manifest = bundle.manifest
    # Prompts of the pipeline's own vocabulary.
    prompts = ("a red fox", "the moon")
    model, inputs = open_pipeline(bundle), prompt_inputs(bundle, prompts, "cpu")
    rung = own_rung(manifest, 3)
    point = OperatingPoint(rung.solver, rung.steps, rung.grid, rung.guidance_interval)
    pictures = draw_pictures(model, inputs, point).numpy()
    backend = load_backend("torch", bundle, threads=1)
    requests = [asked(manifest, prompt, seed, rung) for seed, prompt in enumerate(prompts * 2)]
    for picture, sample in zip(
        pictures, drawn(build_engine({"": backend}, Settings.load([])), requests), strict=True
    ):
        np.testing.assert_allclose(picture, sample.latent, atol=1e-4 * np.abs(picture).max())


def test_a_pipeline_gets_a_ladder_along_which_the_service_degrades(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = imported("sd3", tmp_path)
    solver, grid = bundle.manifest.defaults.solver, bundle.manifest.defaults.grid
    plan = LadderPlan("small", 20, {solver: ((grid,), (10, 4)), "dpmpp-2m": ((grid,), (6,))}, 0)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "pipeline_plan", lambda manifest: plan)
    (tmp_path / "prompts.txt").write_text("a red fox\n\nthe moon\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--write"]
    assert command.main([str(bundle.path), *options]) == 0
    opened = Bundle.open(bundle.path)
    ladder = opened.manifest.ladder
    assert {rung.own for rung in ladder} > {0.0}  # its own long run, and others
    assert opened.manifest.provenance["ladder"]["pictures"] == 4
    assert opened.manifest.defaults == bundle.manifest.defaults

    engine = build_engine({"": load_backend("torch", opened, threads=1)}, Settings.load([]))
    # A pass takes a second, on a clock that stands still.
    engine.costs = CostModel(fixed_s=1.0, per_row_s=1e-6)
    engine.clock = lambda: 0.0
    (sample,) = drawn(
        engine, [asked(opened.manifest, "a red fox", 1, own_rung(opened.manifest, 20), deadline_at=12.0)]
    )
    assert sample.degraded
    assert sample.steps_used < 20
    assert np.isfinite(sample.latent).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data", "pictures.npz"], "--data is not for imported pipelines: name prompts with --prompts"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read"),
        ([], "the text that begins 'a red bicycle leaning against a brick wa' has"),
    ],
)
def test_options_that_do_not_fit_a_pipeline_are_refused(
    tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = imported("sd3", tmp_path)
    assert command.main([str(bundle.path), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert bundle.manifest == Bundle.open(bundle.path).manifest


def test_an_imported_dit_is_measured_before_it_has_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pipeline("dit", tmp_path / "pipeline")
    options = ["--function=diffusers", "--predicts-noise", "--licence=x"]
    assert convert.main(["import", str(tmp_path / "pipeline"), str(tmp_path / "bundle"), *options]) == 0
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "THOROUGH", LadderPlan("small", 8, {"ddim": (("trailing",), (4,))}, 2))
    assert command.main([str(tmp_path / "bundle"), "--write"]) == 0
    assert [rung.steps for rung in Bundle.open(tmp_path / "bundle").manifest.ladder] == [8, 4]


def test_a_pipeline_of_few_steps_is_measured_only_in_fewer(tmp_path: Path) -> None:
    bundle = imported("sd3", tmp_path)
    points = candidates(bundle.manifest, pipeline_plan(bundle.manifest))
    assert {point.solver for point in points} == {bundle.manifest.defaults.solver, "dpmpp-2m", "unipc-2"}
    few = bundle.manifest.defaults.model_copy(update={"steps": 4, "guidance_scale": 1.0})
    distilled = bundle.manifest.model_copy(update={"defaults": few, "guidance": "none"})
    assert [point.steps for point in candidates(distilled, pipeline_plan(distilled))] == [2, 1]
    stated = distilled.diffusion.model_copy(update={"step_counts": (1, 4)})
    refusing = distilled.model_copy(update={"diffusion": stated})
    assert [point.steps for point in candidates(refusing, pipeline_plan(refusing))] == [1]


def test_prompts_are_the_lines_of_a_file_or_ordinary_ones(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    with pytest.raises(ModelError, match=r"--prompts .*prompts\.txt cannot be read"):
        read_prompts(file)
    file.write_text("\n \n")
    with pytest.raises(ModelError, match="has no prompt: write one a line"):
        read_prompts(file)
    file.write_text(" a fox \n\na cat\n")
    assert read_prompts(file) == ("a fox", "a cat")
