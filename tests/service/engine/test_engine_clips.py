"""Clips in the engine: latents of three axes are drawn as a plain loop draws them, in any company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.source import SourceLatent
from ditserve.service.engine.geometry import geometry_of
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.errors import InternalError, InvalidRequest
from tests.service.engine.imitated_device import DeviceBackend
from tests.service.engine.stepping import failed, finished, previews, recorded_shapes, reference, run

Make = Callable[..., Any]
# More frames than channels, of which guidance takes the first two.
CLIP = DiTConfig(
    image_size=(5, 4, 6),
    patch_size=2,
    in_channels=3,
    hidden_size=16,
    depth=1,
    num_heads=2,
    classes=(5,),
    learn_sigma=False,
)
OWN, STILL, LONG = CLIP.image_size, (1, 4, 6), (10, 4, 6)


PICTURE = np.random.default_rng(3).standard_normal((3, 4, 6)).astype(np.float32)


@pytest.fixture
def clips(make_backend: Make) -> Callable[..., Any]:
    """Give a function that makes the backend of a model of clips."""
    config = replace(CLIP, classes=make_backend().manifest.config.classes)

    def make(device: bool = False, **options: Any) -> Any:
        return DeviceBackend(config=config, **options) if device else make_backend(config=config, **options)

    return make


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "ddpm"])
def test_a_clip_is_what_a_plain_loop_draws(
    clips: Make, make_engine: Make, make_request: Make, make_rung: Make, solver: str
) -> None:
    backend = clips(guidance_channels=2)
    request = make_request("a/0", rung=make_rung(solver=solver, steps=6), previews=2)
    latent, estimates = reference(backend, request)
    reports = run(make_engine(clips(guidance_channels=2)), [request])
    drawn = finished(reports)["a/0"].latent
    assert drawn.shape == (3, *OWN)
    np.testing.assert_allclose(drawn, latent, atol=1e-5)
    shown = previews(reports)
    assert [preview.step for preview in shown] == [2, 4]
    np.testing.assert_allclose(shown[0].latent, estimates[1], atol=1e-5)


def test_clips_of_several_lengths_are_the_same_alone_and_together(
    clips: Make, make_engine: Make, make_request: Make
) -> None:
    requests = [
        make_request("own/0", seed=1),
        make_request("still/0", size=STILL, seed=2),
        make_request("long/0", size=LONG, seed=3),
        make_request("windows/0", size=LONG, windows=True, seed=4),
    ]
    together = finished(run(make_engine(clips(size_multiple=1)), requests))
    for request in requests:
        alone = finished(run(make_engine(clips(size_multiple=1)), [request]))[request.id]
        np.testing.assert_array_equal(together[request.id].latent, alone.latent)
    assert together["long/0"].latent.shape == together["windows/0"].latent.shape == (3, *LONG)


def test_rows_count_by_their_frames(clips: Make, make_engine: Make, make_request: Make) -> None:
    backend = clips(size_multiple=1)
    shapes = recorded_shapes(backend)
    engine = make_engine(backend, max_rows=8)
    for k in range(8):
        engine.add(make_request(f"long-{k}/0", size=LONG, seed=k))
        engine.add(make_request(f"own-{k}/0", seed=k))
    run(engine)
    assert max(shape[0] for shape in shapes if shape[2:] == OWN) == 8
    assert max(shape[0] for shape in shapes if shape[2:] == LONG) == 4


def test_a_clip_goes_on_where_another_engine_left_it(
    clips: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    request = make_request("a/0", rung=make_rung(solver="ddpm", steps=6))
    whole = finished(run(make_engine(clips()), [request]))["a/0"].latent
    first = make_engine(clips())
    first.add(request)
    for _ in range(3):
        first.step()
    snapshot = first.export("a/0")
    assert snapshot is not None
    second = make_engine(clips())
    second.add(request, Snapshot.from_wire(snapshot.to_wire()))
    np.testing.assert_array_equal(finished(run(second))["a/0"].latent, whole)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "ddpm"])
def test_a_clip_begins_with_the_picture_that_is_given(
    clips: Make, make_engine: Make, make_request: Make, make_rung: Make, solver: str
) -> None:
    source = SourceLatent(PICTURE)
    rungs = {strength: make_rung(solver, 8, strength=strength) for strength in (0.25, 1.0)}
    requests = [
        make_request(f"{strength}-{seed}/0", rung=rung, source=source, seed=seed)
        for strength, rung in rungs.items()
        for seed in (1, 2)
    ]
    drawn = {name: sample.latent for name, sample in finished(run(make_engine(clips()), requests)).items()}
    for latent in drawn.values():
        np.testing.assert_array_equal(latent[:, 0], PICTURE)
        assert np.abs(latent[:, 1:] - PICTURE[:, None]).mean() > 0.05
    assert (drawn["1.0-1/0"] != drawn["1.0-2/0"])[:, 1:].all()
    # A little strength moves little.
    still, moving = (np.abs(drawn[f"{k}-1/0"] - PICTURE[:, None]).mean() for k in rungs)
    assert still < moving


def test_clips_on_a_device_are_those_of_the_host(clips: Make, make_engine: Make, make_request: Make) -> None:
    requests = [
        make_request("plain/0", seed=1, previews=3),
        make_request("given/0", seed=2, source=SourceLatent(PICTURE)),
        make_request("other/0", seed=3, guidance_scale=1.0),
    ]
    there = finished(run(make_engine(clips(device=True)), requests))
    here = finished(run(make_engine(clips()), requests))
    for name, sample in here.items():
        np.testing.assert_array_equal(there[name].latent, sample.latent)


def test_a_clip_without_memory_hurts_no_still(clips: Make, make_engine: Make, make_request: Make) -> None:
    backend = clips(size_multiple=1)
    inner = backend.denoise

    def denoise(x: Any, state: Any) -> Any:
        if x.shape[2] == LONG[0]:
            raise MemoryError
        return inner(x, state)

    backend.denoise = denoise
    requests = [make_request("long/0", size=LONG), make_request("still/0", size=STILL)]
    reports = run(make_engine(backend), requests)
    error = failed(reports)["long/0"].error
    assert isinstance(error, InternalError)
    assert error.detail == "An image of 10x4x6 latent pixels does not fit in this worker's memory."
    assert set(finished(reports)) == {"still/0"}


def test_a_size_of_other_axes_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="makes nothing of 4x6: its own size is 5x4x6"):
        geometry_of((4, 6), own=OWN, windows=False, multiples=(1, 2, 2))
    with pytest.raises(InvalidRequest, match="makes no images of 5x4x7 latent pixels"):
        geometry_of((5, 4, 7), own=OWN, windows=False, multiples=(1, 2, 2))
    with pytest.raises(InvalidRequest, match="larger than 5x4x6 latent pixels"):
        geometry_of((4, 8, 12), own=OWN, windows=True, multiples=None)
