"""Samples that start from a picture: as diffusers' loops walk, and what must hold of any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch

from ditserve.model.spec.source import SourceLatent
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.planning.planner import LOAD
from tests.service.engine.stepping import finished, previews, run
from tests.service.engine.test_snapshots import moved

Make = Callable[..., Any]
Floats = npt.NDArray[np.float32]

RANDOM = np.random.default_rng(0)
PICTURE: Floats = RANDOM.uniform(-1.0, 1.0, (3, 4, 6)).astype(np.float32)
MASK = np.zeros((1, 4, 6), np.float32)
MASK[:, 1:3, 2:] = 1.0
WHOLE, MASKED = SourceLatent(PICTURE), SourceLatent(PICTURE, MASK)
KEPT = np.broadcast_to(MASK == 0.0, PICTURE.shape)


@pytest.fixture
def edit(make_request: Make, make_rung: Make) -> Make:
    def make(solver: str = "ddim", steps: int = 10, *, strength: float = 0.5, **fields: Any) -> SampleRequest:
        rung = make_rung(solver, steps, fields.pop("grid", "trailing"), strength=strength)
        return make_request(**{"source": WHOLE, **fields, "rung": rung})  # type: ignore[no-any-return]

    return make


def walked_by_diffusers(backend: Any, request: SampleRequest, scheduler: Any, *, flow: bool) -> Floats:
    """Return the picture of a request by the loop of diffusers' pipelines, on a scheduler of theirs."""
    source, rung = request.source, request.rung
    assert source is not None
    generator = np.random.Generator(np.random.Philox(request.seed))
    noise = torch.from_numpy(generator.standard_normal((1, *PICTURE.shape), np.float32))
    known = torch.from_numpy(source.latent)[None]

    def noised(level: Any) -> Any:
        if flow:
            return scheduler.scale_noise(known, level, noise)
        return scheduler.add_noise(known, noise, level)

    scheduler.set_timesteps(rung.steps)
    start = int(rung.steps - min(rung.steps * rung.strength, rung.steps))
    timesteps = scheduler.timesteps[start:]
    if flow:
        scheduler.set_begin_index(start)
    x = noised(timesteps[:1])
    classes = len(backend.manifest.factors[0].classes)
    embeddings = backend.embed(np.array([[request.condition[0].labels[0]], [classes]]))
    for i, t in enumerate(timesteps):
        told = backend.manifest.diffusion.noise_schedule().told(float(t) / (1000.0 if flow else 1.0))
        rows = np.repeat(x.numpy().astype(np.float32), 2, axis=0)
        output = backend.denoise(rows, backend.modulate(np.full(2, told, np.float32), embeddings))
        guided = output[1:] + request.guidance_scale * (output[:1] - output[1:])
        x = scheduler.step(torch.from_numpy(guided), t, x).prev_sample
        if source.mask is not None:
            mask, level = torch.from_numpy(source.mask), timesteps[i + 1 : i + 2]
            x = (1 - mask) * (noised(level) if len(level) else known) + mask * x
    result: Floats = x[0].numpy()
    return result


@pytest.mark.parametrize("source", [WHOLE, MASKED], ids=["whole", "masked"])
@pytest.mark.parametrize("strength", [0.3, 0.55, 0.8])
def test_a_diffusion_walks_as_in_diffusers(
    source: SourceLatent[Any], strength: float, make_engine: Make, make_backend: Make, edit: Make
) -> None:
    backend = make_backend(schedule="linear", prediction="x0")
    request = edit(grid="leading", strength=strength, source=source)
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=2e-2, prediction_type="sample", clip_sample=False
    )
    expected = walked_by_diffusers(backend, request, scheduler, flow=False)
    made = finished(run(make_engine(backend), [request]))["a/0"]
    assert made.steps_used == {0.3: 3, 0.55: 6, 0.8: 8}[strength]
    np.testing.assert_allclose(made.latent, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", [WHOLE, MASKED], ids=["whole", "masked"])
@pytest.mark.parametrize("strength", [0.3, 0.55, 0.8, 1.0])
def test_a_flow_walks_as_in_diffusers(
    source: SourceLatent[Any], strength: float, make_engine: Make, make_backend: Make, edit: Make
) -> None:
    backend = make_backend(schedule="flow", prediction="flow", noise_scale=1000.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    levels = ",".join(str(float(sigma)) for sigma in scheduler.sigmas[:-1])
    request = edit("euler", grid=levels, strength=strength, source=source)
    expected = walked_by_diffusers(backend, request, scheduler, flow=True)
    made = finished(run(make_engine(backend), [request]))["a/0"]
    np.testing.assert_allclose(made.latent, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp-2m", "unipc-2"])
def test_what_the_mask_keeps_is_the_picture_to_the_last_bit(
    solver: str, make_engine: Make, edit: Make
) -> None:
    request = edit(solver, strength=0.9, source=MASKED, previews=1)
    reports = run(make_engine(), [request])
    made = finished(reports)["a/0"].latent
    np.testing.assert_array_equal(made[KEPT], PICTURE[KEPT])
    assert np.abs(made - PICTURE)[~KEPT].min() > 1e-4
    for preview in previews(reports):
        np.testing.assert_array_equal(preview.latent[KEPT], PICTURE[KEPT])


def test_at_full_strength_it_starts_from_noise_alone(make_engine: Make, edit: Make) -> None:
    drawn, without = edit(strength=1.0), edit(strength=1.0, source=None)
    made, expected = (finished(run(make_engine(), [request]))["a/0"] for request in (drawn, without))
    np.testing.assert_array_equal(made.latent, expected.latent)


@pytest.mark.parametrize("after", [1, 4])
def test_it_goes_on_in_another_engine_to_the_same_picture(after: int, make_engine: Make, edit: Make) -> None:
    request = edit("ddpm", strength=0.6, source=MASKED)
    whole = finished(run(make_engine(), [request]))["a/0"]
    made = moved(make_engine(), make_engine(), request, after)
    np.testing.assert_array_equal(made.latent, whole.latent)
    assert made.steps_used == whole.steps_used == 6


def test_one_that_is_cut_before_its_first_step_starts_at_the_new_level(
    make_engine: Make, make_planner: Make, make_rung: Make, edit: Make
) -> None:
    few = make_rung("dpmpp-2m", 4, strength=0.5)
    planner = make_planner([("a/0", 1000, few, LOAD)])
    made = finished(run(make_engine(planner=planner), [edit(strength=0.5, source=MASKED)]))["a/0"]
    asked = finished(run(make_engine(), [edit("dpmpp-2m", 4, strength=0.5, source=MASKED)]))["a/0"]
    np.testing.assert_array_equal(made.latent, asked.latent)
    assert (made.steps_used, made.degraded) == (2, True)


def test_one_that_is_cut_under_way_walks_the_share_that_is_left(
    make_engine: Make, make_planner: Make, make_rung: Make, edit: Make
) -> None:
    few = make_rung("dpmpp-2m", 10, strength=0.5)
    planner = make_planner([("a/0", 300, few, LOAD)])
    engine = make_engine(planner=planner)
    made = finished(run(engine, [edit(steps=50, strength=0.5, source=MASKED)]))["a/0"]
    # 25 steps from level 499; below 300 after 10 of them, and a fifth of the 15 left.
    assert (made.steps_used, made.rung, made.degraded) == (10 + 3, few, True)
    np.testing.assert_array_equal(made.latent[KEPT], PICTURE[KEPT])
    seen = [sample.remaining_steps for samples in planner.seen for sample in samples]
    assert (seen[0], max(seen)) == (25, 25)


def test_the_windows_of_a_larger_picture_share_one_known_part(make_engine: Make, edit: Make) -> None:
    picture = RANDOM.uniform(-1.0, 1.0, (3, 8, 13)).astype(np.float32)
    mask = np.zeros((1, 8, 13), np.float32)
    mask[:, 2:6, 3:9] = 1.0
    request = edit(strength=0.6, source=SourceLatent(picture, mask), size=(8, 13), windows=True)
    made = finished(run(make_engine(), [request]))["a/0"]
    kept = np.broadcast_to(mask == 0.0, picture.shape)
    np.testing.assert_array_equal(made.latent[kept], picture[kept])
    assert made.steps_used == 6


def test_a_picture_of_another_size_is_refused(make_engine: Make, edit: Make) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match="another size"):
        engine.add(edit(source=SourceLatent(PICTURE[:, :2])))
    assert engine.free_samples == 16
