"""Pictures larger than the model's own, denoised in windows: rows among all others, blended at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ditserve.service.engine.samples import Finished, SampleRequest
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.errors import InvalidRequest, NumericalError
from ditserve.service.planning.planner import LOAD
from tests.service.engine.stepping import failed, finished, previews, run

Make = Callable[..., Any]

OWN, WIDE, TALL, GRID = (4, 6), (4, 12), (7, 6), (6, 15)
ROWS = {WIDE: 3, TALL: 3, GRID: 2 * 4}


@pytest.fixture(scope="module")
def make_local(make_backend: Make) -> Make:
    """A network whose rows see their mean and position: a window's prediction is not that of the whole."""

    def make(**options: Any) -> Any:
        backend = make_backend(**options)
        inner = backend.denoise

        def denoise(x: Any, state: Any) -> Any:
            assert x.shape[2:] == OWN
            ramp = np.linspace(0.0, 0.3, x.shape[3], dtype=np.float32)
            return inner(x, state) + ramp * x.mean(axis=(2, 3), keepdims=True)

        backend.denoise = denoise
        return backend

    return make


@pytest.mark.parametrize("size", [WIDE, TALL, GRID])
def test_windows_make_the_image_of_the_whole_where_pixels_are_independent(
    size: tuple[int, int], make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    request = make_request(size=size, windows=True, rung=make_rung("dpmpp-2m", 8, interval=(0.1, 0.8)))
    made = finished(run(make_engine(), [request]))["a/0"]
    whole = replace(request, windows=False)
    expected = finished(run(make_engine(make_backend(size_multiple=1)), [whole]))["a/0"]
    assert made.latent.shape == (3, *size)
    np.testing.assert_allclose(made.latent, expected.latent, atol=1e-4)


@pytest.mark.parametrize("size", [WIDE, TALL, GRID])
def test_every_window_is_a_row_and_a_second_one_where_guidance_acts(
    size: tuple[int, int], make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    rung = make_rung("ddim", 10, "trailing", (0.3, 0.7))  # timesteps 999, 899, … 99
    engine = make_engine(max_rows=32)
    engine.add(make_request(size=size, windows=True, rung=rung))
    assert engine.backlog_rows == 14 * ROWS[size]
    steps = [rows * ROWS[size] for rows in [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]]
    assert [report.rows for report in run(engine)] == steps


def test_windows_share_a_pass_with_the_rows_of_other_samples(
    make_local: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_local()
    engine = make_engine(backend, max_rows=32)
    requests = [make_request("a/0"), make_request("b/0", size=WIDE, windows=True), make_request("c/0")]
    reports = run(engine, requests)
    assert {report.rows for report in reports} == {2 + 2 * ROWS[WIDE] + 2}
    assert set(backend.batches) == {10}
    for request in requests:
        alone = finished(run(make_engine(make_local()), [request]))[request.id]
        np.testing.assert_array_equal(finished(reports)[request.id].latent, alone.latent)


@pytest.mark.parametrize("options", [{"max_rows": 1}, {"max_rows": 5}, {"max_rows": 3, "strict": True}])
def test_more_windows_than_a_pass_has_rows_take_several(
    options: dict[str, Any], make_local: Make, make_engine: Make, make_request: Make
) -> None:
    request = make_request(size=GRID, windows=True)
    backend = make_local()
    made = finished(run(make_engine(backend, **options), [request]))["a/0"]
    assert max(backend.batches) == options["max_rows"]
    expected = finished(run(make_engine(make_local(), max_rows=64), [request]))["a/0"]
    np.testing.assert_array_equal(made.latent, expected.latent)


def test_windows_fit_a_backend_of_few_batch_sizes(
    make_local: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_local(buckets=(4, 8))
    request = make_request(size=GRID, windows=True)
    made = finished(run(make_engine(backend), [request]))["a/0"]
    assert set(backend.batches) <= {4, 8}
    expected = finished(run(make_engine(make_local()), [request]))["a/0"]
    np.testing.assert_array_equal(made.latent, expected.latent)


def test_a_device_without_memory_for_all_windows_runs_them_in_parts(
    make_local: Make, make_engine: Make, make_request: Make
) -> None:
    request = make_request(size=GRID, windows=True)
    made = finished(run(make_engine(make_local(memory_rows=3), max_rows=16), [request]))["a/0"]
    expected = finished(run(make_engine(make_local()), [request]))["a/0"]
    np.testing.assert_array_equal(made.latent, expected.latent)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "dpmpp-2m", "unipc-2"])
def test_a_sample_in_windows_that_changes_engines_ends_in_the_same_picture(
    solver: str, make_local: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    request: SampleRequest = make_request(size=WIDE, windows=True, rung=make_rung(solver))
    whole = finished(run(make_engine(make_local()), [request]))["a/0"]
    first = make_engine(make_local())
    first.add(request)
    for _ in range(3):
        first.step()
    snapshot = Snapshot.from_wire(first.export("a/0").to_wire())
    second = make_engine(make_local())
    second.add(request, snapshot)
    made = finished(run(second))["a/0"]
    np.testing.assert_array_equal(made.latent, whole.latent)


def test_previews_are_of_the_whole_picture_and_a_cut_keeps_it_whole(
    make_engine: Make, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    planner = make_planner([("a/0", 699, make_rung("dpmpp-2m", 4), LOAD)])
    reports = run(make_engine(planner=planner), [make_request(size=WIDE, windows=True, previews=2)])
    assert {preview.latent.shape for preview in previews(reports)} == {(3, *WIDE)}
    made: Finished = finished(reports)["a/0"]
    assert made.degraded
    assert made.steps_used < 8
    assert made.latent.shape == (3, *WIDE)
    assert planner.seen[0][0].row_cost == ROWS[WIDE]


def test_what_is_not_finite_fails_alone_and_everything_is_given_back(
    make_engine: Make, make_request: Make
) -> None:
    engine = make_engine()
    reports = run(engine, [make_request("broken/0", colour=3, size=WIDE, windows=True), make_request("a/0")])
    assert isinstance(failed(reports)["broken/0"].error, NumericalError)
    alone = finished(run(make_engine(), [make_request("a/0")]))["a/0"]
    np.testing.assert_array_equal(finished(reports)["a/0"].latent, alone.latent)
    assert engine.free_samples == 16


@pytest.mark.parametrize("size", [None, OWN, (3, 12), (8, 5)])
def test_only_what_is_larger_has_windows(
    size: tuple[int, int] | None, make_engine: Make, make_request: Make
) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match="larger than 4x6"):
        engine.add(make_request(size=size, windows=True))
    assert engine.idle
