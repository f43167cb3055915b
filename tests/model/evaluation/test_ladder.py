"""The measurement of a ladder, on a small network of random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ditserve.model.data.dataset import DataConfig
from ditserve.model.evaluation.ladder import (
    ENOUGH_PICTURES,
    NARROW,
    LadderInputs,
    LadderMeasurement,
    draw_inputs,
    draw_pictures,
)
from ditserve.model.evaluation.ladder_plan import (
    COARSE,
    QUICK,
    THOROUGH,
    LadderPlan,
    affordable_plan,
    candidates,
    reference_point,
)
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.manifest import Manifest
from tests.export.tiny import CONFIG, tiny_source

SMALL = LadderPlan("small", 24, {"ddim": (("trailing",), (4,)), "dpmpp-2m": (("trailing",), (6,))}, 4)


def with_timesteps(manifest: Manifest, timesteps: int) -> Manifest:
    return manifest.model_copy(
        update={"diffusion": manifest.diffusion.model_copy(update={"timesteps": timesteps})}
    )


def test_without_real_pictures_a_ladder_is_ordered_by_the_distance_to_its_own_long_run() -> None:
    source = tiny_source()
    measurement = LadderMeasurement(
        source.manifest, SMALL, draw_inputs(source, 2, None), settled=False, data="none"
    )
    done = 0.0

    def count(rows: float) -> None:
        nonlocal done
        done += rows

    result = measurement.run(source.network, count)
    assert done == measurement.rows == 4 * 2 * (24 + 4 + 6)
    assert (result.order, result.defaults) == ("own", source.manifest.defaults)
    assert result.ladder[0].name == "ddim-24"
    assert [rung.own for rung in result.ladder] == sorted(rung.quality for rung in result.ladder)
    assert result.ladder[0].own == 0.0
    assert all(rung.real is None for rung in result.measured)
    manifest = result.added_to(source.manifest)
    assert (manifest.ladder, manifest.ladder_order) == (result.ladder, "own")
    assert manifest.provenance["ladder"] == {"plan": "small", "pictures": 4, "reference": "ddim-24"}


def test_with_real_pictures_the_nearest_to_them_is_best_though_it_is_less_alike_to_the_long_run() -> None:
    source = tiny_source()
    labels = torch.zeros(2 * ENOUGH_PICTURES, 2, dtype=torch.int64)
    inputs = LadderInputs(labels, None)
    four = next(p for p in candidates(source.manifest, SMALL) if p.name == "ddim-4")
    # The reality of this world is what the model draws in four steps.
    real = draw_pictures(source, inputs, four).chunk(2)[0]
    measurement = LadderMeasurement(
        source.manifest, SMALL, LadderInputs(labels, None, real), settled=True, data="four"
    )
    result = measurement.run(source.network)
    best, worst = result.ladder[0], result.ladder[-1]
    assert (result.order, best.name, worst.name) == ("real", "ddim-4", "ddim-24")
    assert best.own is not None
    assert best.own > (worst.own or 0.0)
    assert best.quality == best.real
    assert result.defaults == source.manifest.defaults
    assert result.record["data"] == "four"
    free = LadderMeasurement(source.manifest, SMALL, LadderInputs(labels, None, real), settled=False)
    assert free.run(source.network).defaults.steps == 4


def test_a_narrower_guidance_interval_is_taken_if_it_draws_nearer_to_real_pictures() -> None:
    source = tiny_source()
    labels = torch.zeros(2 * ENOUGH_PICTURES, 2, dtype=torch.int64)
    point = candidates(source.manifest, LadderPlan("one", 24, {"dpmpp-2m": (("trailing",), (20,))}, 1))[0]
    drawn = {
        interval: draw_pictures(
            source,
            LadderInputs(labels, None),
            type(point)(point.solver, point.steps, point.grid, interval),
        ).chunk(2)[0]
        for interval in (NARROW, (0.0, 1.0))
    }
    for interval, real in drawn.items():
        measurement = LadderMeasurement(
            source.manifest, SMALL, LadderInputs(labels, None, real), settled=False
        )
        assert measurement.run(source.network).defaults.guidance_interval == interval


def test_pictures_are_those_of_the_seeds_whatever_else_is_drawn() -> None:
    source = tiny_source()
    inputs = draw_inputs(source, 5, None)
    point = reference_point(source.manifest, SMALL)
    few = LadderInputs(inputs.labels[:3], None)
    torch.testing.assert_close(
        draw_pictures(source, inputs, point)[:3], draw_pictures(source, few, point), atol=1e-5, rtol=0
    )


def test_real_pictures_stand_at_the_labels_that_are_drawn(tmp_path: Path) -> None:
    file = tmp_path / "pictures.npz"
    x = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    names, styles = np.array(["circle", "square", "triangle", "star"]), np.array(["flat", "shaded"])
    np.savez(file, x=x, y=np.arange(8) // 2, s=np.arange(8) % 2, names=names, styles=styles)
    inputs = draw_inputs(tiny_source(), 6, DataConfig(path=file, hold_out=0.0).open())
    assert inputs.real is not None
    assert (len(inputs), len(inputs.real)) == (12, 6)
    assert torch.equal(inputs.labels[:6], inputs.labels[6:])
    for row, picture in zip(inputs.labels, inputs.real, strict=False):
        expected = x[2 * int(row[0]) + int(row[1])].transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(picture.numpy(), expected, atol=1e-5)


def test_a_model_of_texts_or_labels_is_measured_on_both(tmp_path: Path) -> None:
    file = tmp_path / "pictures.npz"
    x, names = np.zeros((8, 16, 16, 3), np.uint8), np.array(["circle", "square", "triangle", "star"])
    captions = np.array([name * 2 for name in names.repeat(2)])
    y, s, styles = np.arange(8) // 2, np.arange(8) % 2, np.array(["flat", "shaded"])
    np.savez(file, x=x, y=y, s=s, names=names, styles=styles, captions=captions)
    source = tiny_source(replace(CONFIG, text_size=1))
    dataset = DataConfig(path=file, hold_out=0.0, text="tests.model.data.test_texts:Lengths").open()
    together = draw_inputs(source, 6, dataset)
    assert together.text is not None
    assert together.text.all()
    manifest = source.manifest.model_copy(update={"provenance": {"training": {"text_instead": 0.5}}})
    apart = draw_inputs(replace(source, manifest=manifest), 6, dataset)
    assert apart.text is not None
    told, null = apart.text.any(1), apart.labels[:, 0] == CONFIG.classes[0]
    assert told.tolist() == null.tolist() == [False, True] * 6
    assert torch.equal(apart.labels[:, 1], together.labels[:, 1])


@pytest.mark.parametrize("timesteps", [1, 2, 10, 1000])
@pytest.mark.parametrize("plan", [QUICK, THOROUGH, COARSE])
def test_candidates_are_legal_and_all_different(timesteps: int, plan: LadderPlan) -> None:
    manifest = with_timesteps(tiny_source().manifest, timesteps)
    points = [reference_point(manifest, plan), *candidates(manifest, plan)]
    assert len(set(points)) == len(points)
    assert all(timesteps >= point.steps and point.rows(manifest) >= point.steps for point in points)


def test_a_model_of_one_timestep_has_a_ladder_of_one_rung() -> None:
    source = tiny_source()
    manifest = with_timesteps(source.manifest, 1)
    measurement = LadderMeasurement(manifest, QUICK, draw_inputs(source, 1, None), settled=False)
    assert [rung.name for rung in measurement.run(source.network).ladder] == ["ddim-1"]


def test_a_few_step_model_is_compared_with_the_steps_it_was_trained_to_draw_in() -> None:
    manifest = tiny_source().manifest
    defaults = manifest.defaults.model_copy(update={"steps": 4, "solver": "ddpm"})
    student = manifest.model_copy(
        update={"defaults": defaults, "provenance": {"training": {"distillation": {"teacher": "x"}}}}
    )
    assert reference_point(student, THOROUGH).name == "ddpm-4"
    assert [point.name for point in candidates(student, THOROUGH)] == ["ddpm-2", "ddpm-1"]


def test_a_model_that_states_its_step_counts_is_measured_at_these() -> None:
    source = tiny_source()
    stated = source.manifest.diffusion.model_copy(update={"step_counts": (1, 3, 8, 20)})
    defaults = source.manifest.defaults.model_copy(update={"steps": 3})
    manifest = source.manifest.model_copy(update={"diffusion": stated, "defaults": defaults})
    points = [reference_point(manifest, THOROUGH), *candidates(manifest, THOROUGH)]
    assert [point.steps for point in points] == [20, 8, 3, 1]


@pytest.mark.parametrize("counts", [(), (2, 4)])
def test_a_guided_flow_is_measured_on_its_own_grids(counts: tuple[int, ...]) -> None:
    """An export with pictures tries a narrower guidance interval too, on a grid that a flow has."""
    source = tiny_source()
    diffusion = DiffusionSpec(schedule="flow", prediction="flow", step_counts=counts)
    defaults = source.manifest.defaults.model_copy(update={"grid": "karras", "steps": 4})
    manifest = source.manifest.model_copy(update={"diffusion": diffusion, "defaults": defaults})
    assert defaults.guidance_scale != 1.0
    labels = torch.zeros(2 * ENOUGH_PICTURES, 2, dtype=torch.int64)
    real = torch.zeros(ENOUGH_PICTURES, 3, 16, 16)
    plan = LadderPlan("small", 24, {"ddim": (("trailing",), (4,)), "unipc-2": (("trailing",), (6,))}, 4)
    measurement = LadderMeasurement(manifest, plan, LadderInputs(labels, None, real), settled=False)
    result = measurement.run(source.network)
    grids = {(rung.solver, rung.steps, rung.grid) for rung in result.measured}
    if counts:
        assert grids == {("ddim", 4, "karras"), ("ddim", 2, "karras")}
    else:
        even = {("ddim", 24, "uniform"), ("ddim", 4, "uniform"), ("unipc-2", 6, "uniform")}
        assert grids == {*even, ("ddim", 4, "karras")}
    assert all(rung.own is not None and np.isfinite(rung.own) for rung in result.measured)


def test_the_plan_is_what_the_rows_afford() -> None:
    manifest = tiny_source().manifest
    assert affordable_plan(manifest, 1e9) == (QUICK, QUICK.conditions)
    plan, conditions = affordable_plan(manifest, 10_000)
    rows = sum(p.rows(manifest) for p in (reference_point(manifest, plan), *candidates(manifest, plan)))
    assert (plan, 2 * conditions * rows <= 10_000) == (QUICK, True)
    assert affordable_plan(manifest, 300) == (COARSE, 1)
    assert affordable_plan(manifest, 0) == (COARSE, 1)
