"""Samples of a flow, whose noise levels are real numbers: the same engine, told sigma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest

from ditserve.model.spec.sigma_grids import DynamicShift, SigmaGrid
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.planning.planner import LOAD
from tests.service.engine.stepping import finished, previews, reference, run

Make = Callable[..., Any]

# Networks as they are: SD3 is told 1000 · sigma; SiT is told 1 - sigma, and its output points to the image.
SD3 = {"schedule": "flow", "prediction": "flow"}
SIT = {**SD3, "noise_input": "1-sigma", "noise_scale": 1.0, "output_sign": -1}
IMAGE = {"schedule": "flow", "prediction": "x0", "clip_x0": True}


@pytest.mark.parametrize("diffusion", [SD3, SIT, IMAGE])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp-2m", "unipc-1", "unipc-2"])
def test_a_sample_is_what_a_plain_loop_makes(
    solver: str,
    diffusion: dict[str, Any],
    make_backend: Make,
    make_engine: Make,
    make_request: Make,
    make_rung: Make,
) -> None:
    backend = make_backend(**diffusion)
    request = make_request(rung=make_rung(solver, 12, "uniform", (0.2, 0.7)), guidance_scale=2.5, previews=4)
    company = [make_request(f"{k}/0", seed=k, rung=make_rung("ddim", 5 + k, "uniform")) for k in range(3)]
    reports = run(make_engine(backend), [request, *company])
    expected, estimates = reference(backend, request)
    np.testing.assert_allclose(finished(reports)["a/0"].latent, expected, atol=1e-4)
    shown = {preview.step: preview.latent for preview in previews(reports) if preview.id == "a/0"}
    assert sorted(shown) == [4, 8]
    for step, latent in shown.items():
        np.testing.assert_allclose(latent, estimates[step - 1], atol=1e-4)


def test_guidance_acts_at_the_sigmas_of_its_interval(
    make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    engine = make_engine(make_backend(**SD3))
    reports = run(engine, [make_request(rung=make_rung("ddim", 10, "uniform", (0.25, 0.75)))])
    # Sigmas 1, 0.9, … 0.1, of which 0.7 … 0.3 are guided.
    assert [report.rows for report in reports] == [1, 1, 1, 2, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "unipc-2"])
def test_a_trajectory_changed_under_way_goes_on_from_the_sigma_where_the_sample_stands(
    solver: str,
    make_backend: Make,
    make_engine: Make,
    make_request: Make,
    make_rung: Make,
    make_planner: Make,
) -> None:
    backend, after = make_backend(**SIT), make_rung(solver, 5, "1,0.9,0.6,0.5,0.1")
    request = make_request(rung=make_rung("dpmpp-2m", 10, "1,0.95,0.9,0.8,0.6,0.5,0.4,0.3,0.2,0.1"))
    planner = make_planner([("a/0", 800, after, LOAD)])
    made = finished(run(make_engine(backend, planner=planner), [request]))["a/0"]
    # 7 of 10 steps are left at sigma 0.8, so 4 of 5. The new grid is a curve that is sampled from 0.8 on.
    index = np.interp([-0.8], [-1, -0.9, -0.6, -0.5, -0.1, 0], range(6))[0]
    rest = np.interp(np.linspace(index, 5, 5)[:-1], range(6), [1, 0.9, 0.6, 0.5, 0.1, 0])
    pieces = [(request.rung, (1.0, 0.95, 0.9)), (after, (0.8, *rest[1:].tolist()))]
    np.testing.assert_allclose(made.latent, reference(backend, request, pieces)[0], atol=1e-4)
    assert (made.steps_used, made.reason) == (7, LOAD)


def test_a_snapshot_of_a_flow_goes_on_to_the_same_image(
    make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    request = make_request(rung=make_rung("dpmpp-2m", 7, "uniform"))
    whole = finished(run(make_engine(make_backend(**SIT)), [request]))["a/0"]
    first, second = make_engine(make_backend(**SIT)), make_engine(make_backend(**SIT))
    first.add(request)
    for _ in range(3):
        first.step()
    wire = msgpack.unpackb(msgpack.packb(first.export("a/0").to_wire()))
    second.add(request, Snapshot.from_wire(wire))
    np.testing.assert_array_equal(finished(run(second))["a/0"].latent, whole.latent)


@pytest.mark.parametrize("kind", ["uniform", "karras", "1,0.8,0.5,0.2"])
def test_a_sample_walks_the_grid_that_the_model_states(
    kind: str, make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    backend = make_backend(**SD3, sigma_grid={"shift": 3.0})
    request = make_request(rung=make_rung("dpmpp-2m", 4, kind))
    made = finished(run(make_engine(backend), [request]))["a/0"]
    np.testing.assert_allclose(made.latent, reference(backend, request)[0], atol=1e-4)


def test_a_larger_image_is_shifted_more_where_the_shift_is_dynamic(
    make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    """A row of another size walks the grid of its tokens, a row that is a window that of the model's own."""
    dynamic = SigmaGrid(dynamic=DynamicShift(), tokens=256)
    engine = make_engine(make_backend(**SD3, sigma_grid=dynamic, size_multiple=2))
    rung = make_rung("ddim", 4, "uniform")
    engine.add(make_request("own/0", rung=rung))
    engine.add(make_request("large/0", rung=rung, size=(8, 12)))
    engine.add(make_request("windows/0", rung=rung, size=(8, 12), windows=True))
    levels = {name: sample.trajectory.levels for name, sample in engine._samples.items()}
    assert levels["own/0"] == levels["windows/0"] == dynamic.sigmas(4)
    assert levels["large/0"] == SigmaGrid(dynamic=DynamicShift(), tokens=1024).sigmas(4)
