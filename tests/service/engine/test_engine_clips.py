"""Clips in the engine: latents of three axes are drawn as a plain loop draws them, in any company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.source import SourceLatent
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.geometry import geometry_of
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.errors import InternalError, InvalidRequest
from ditserve.service.jobs import ConditionTerm
from tests.service.conftest import EMBEDDING, FakeBackend, Floats
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


PICTURE, OTHER = np.random.default_rng(3).standard_normal((2, 3, 4, 6)).astype(np.float32)


class FrameBackend(FakeBackend):
    """A network that is told first frames: the last numbers of an embedding, whose mean moves its output."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        size = EMBEDDING + self.manifest.config.in_channels * 4 * 6
        self.manifest = self.manifest.model_copy(update={"embedding_size": size})

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        return np.pad(super().embed(labels, text), [(0, 0), (0, PICTURE.size)])

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        scale, shift = super().modulate(timesteps, embeddings[:, :EMBEDDING])
        shift[:, 0] += embeddings[:, EMBEDDING:].reshape(-1, 3, 24).mean(2)
        return scale, shift


@pytest.fixture
def clips(make_backend: Make) -> Callable[..., Any]:
    """Give a function that makes the backend of a model of clips."""
    config = replace(CLIP, classes=make_backend().manifest.config.classes)

    def make(device: bool = False, **options: Any) -> Any:
        return DeviceBackend(config=config, **options) if device else make_backend(config=config, **options)

    return make


@pytest.fixture
def telling(make_backend: Make) -> Callable[..., FrameBackend]:
    """Give a function that makes the backend of a model of clips that is told first frames."""
    config = replace(CLIP, classes=make_backend().manifest.config.classes, first_frame=True)
    return lambda **options: FrameBackend(config=config, size_multiple=1, **options)


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


@pytest.mark.parametrize("modulation_bytes", [0, 1 << 20])
def test_told_frames_and_none_share_passes(
    telling: Make, make_engine: Make, make_request: Make, modulation_bytes: int
) -> None:
    """Rows of equal seeds and classes: nothing but their first frame keeps them apart."""
    requests = [
        make_request("one/0", source=SourceLatent(PICTURE)),
        make_request("other/0", source=SourceLatent(OTHER)),
        make_request("none/0"),
        make_request("again/0", source=SourceLatent(PICTURE.copy())),
        make_request("long/0", size=LONG, source=SourceLatent(PICTURE)),
        make_request("unguided/0", guidance_scale=1.0, source=SourceLatent(OTHER)),
    ]
    engine = make_engine(telling(), modulation_bytes=modulation_bytes)
    together = finished(run(engine, requests))
    for request in requests:
        alone = finished(run(make_engine(telling(), modulation_bytes=modulation_bytes), [request]))
        np.testing.assert_array_equal(together[request.id].latent, alone[request.id].latent)
    one, other, none, again = (together[f"{name}/0"].latent for name in ("one", "other", "none", "again"))
    np.testing.assert_array_equal(one, again)
    assert min(np.abs(one - other)[:, 1:].max(), np.abs(one - none)[:, 1:].max()) > 1e-3
    np.testing.assert_array_equal(one[:, 0], PICTURE)


def test_a_frame_of_another_size_or_in_windows_is_put_back_alone(
    telling: Make, clips: Make, make_engine: Make, make_request: Make
) -> None:
    wide = np.concatenate([PICTURE, OTHER], axis=2)
    requests = [
        make_request("wide/0", size=(5, 4, 12), source=SourceLatent(wide)),
        make_request("windows/0", size=LONG, windows=True, source=SourceLatent(PICTURE)),
    ]
    drawn = finished(run(make_engine(telling()), requests))
    expected = finished(run(make_engine(clips(size_multiple=1)), requests))
    for name, sample in expected.items():
        np.testing.assert_array_equal(drawn[name].latent, sample.latent)


def test_a_clip_that_was_told_a_frame_goes_on_elsewhere(
    telling: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    request = make_request("a/0", rung=make_rung(solver="ddpm", steps=6), source=SourceLatent(PICTURE))
    whole = finished(run(make_engine(telling()), [request]))["a/0"].latent
    first = make_engine(telling())
    first.add(request)
    for _ in range(3):
        first.step()
    snapshot = first.export("a/0")
    assert snapshot is not None
    second = make_engine(telling())
    second.add(make_request("b/0", source=SourceLatent(OTHER)))
    second.add(request, Snapshot.from_wire(snapshot.to_wire()))
    np.testing.assert_array_equal(finished(run(second))["a/0"].latent, whole)


@pytest.mark.parametrize("how", ["linear", "compose", "layers"])
def test_a_frame_is_part_of_every_condition_and_of_its_key(telling: Make, how: Any) -> None:
    caches = ConditionCaches(telling())
    terms = [ConditionTerm((0,)), ConditionTerm((1,))] if how == "compose" else [ConditionTerm((0,))]
    plain, told, other = (caches.conditioning(terms, how, first_frame=f) for f in (None, PICTURE, OTHER))
    pairs = zip((*plain.conditions, plain.unconditional), (*told.conditions, told.unconditional), strict=True)
    for before, after in pairs:
        np.testing.assert_array_equal(after.embeddings[:, :EMBEDDING], before.embeddings[:, :EMBEDDING])
        np.testing.assert_array_equal(after.embeddings[0, EMBEDDING:], PICTURE.ravel())
        assert not before.embeddings[:, EMBEDDING:].any()
    keys = {c.key for made in (plain, told, other) for c in (*made.conditions, made.unconditional)}
    assert len(keys) == 3 * (len(terms) + 1)
    assert caches.conditioning(terms, how, first_frame=PICTURE[:, :, :3]).conditions[0].key in keys
    assert not caches.conditioning([ConditionTerm((None,))], first_frame=PICTURE).can_be_guided


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
