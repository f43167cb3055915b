"""The contract of a backend, tested on every implementation that is installed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.diffusion import make_schedule
from ditserve.service.backends import BACKENDS, Backend, BackendUnavailable, Floats, load_backend
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner
from tests.service.backends.random_rows import random_rows
from tests.service.tiny_bundle import CONFIG

Make = Callable[..., Any]

PACKAGES = {"onnx": "onnxruntime", "torch": "torch"}
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx on 1": ("onnx", {"threads": 1}),
    "onnx on 3": ("onnx", {"threads": 3}),
    "torch on 1": ("torch", {"threads": 1}),
    "onnx on a GPU": ("onnx", {"threads": 1, "providers": PROVIDERS}),
    "torch on a GPU": ("torch", {"threads": 1, "device": "cuda"}),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[pytest.mark.gpu] if "GPU" in kind else []) for kind in KINDS],
)
def backend(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Backend]:
    name, options = KINDS[request.param]
    package = PACKAGES[name]
    runtime = pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[dev]'")
    if "providers" in options and PROVIDERS[0] not in runtime.get_available_providers():
        pytest.skip("this ONNX Runtime cannot use a GPU: install onnxruntime-gpu in its place")
    loaded = load_backend(name, bundle, **options)
    yield loaded
    loaded.close()


def test_it_knows_its_name_and_its_bundle(backend: Backend, bundle: Bundle) -> None:
    assert backend.name in BACKENDS
    assert backend.manifest == bundle.manifest
    assert backend.buckets is None or list(backend.buckets) == sorted(backend.buckets)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shapes_and_types_are_those_of_the_manifest(
    backend: Backend, rng: np.random.Generator, count: int
) -> None:
    embeddings = backend.embed(rng.integers(0, [6, 3], (count, 2)))
    x, state = random_rows(backend, rng, count)
    output = backend.denoise(x, state)
    assert embeddings.shape == (count, backend.manifest.embedding_size)
    assert [tensor.shape for tensor in state] == [(count, *entry.shape) for entry in backend.manifest.state]
    assert output.shape == (count, CONFIG.out_channels, 8, 8)
    assert {array.dtype for array in (embeddings, *state, output)} == {np.dtype(np.float32)}
    assert all(np.isfinite(array).all() for array in (embeddings, *state, output))


def test_every_class_and_the_null_class_are_told_apart(backend: Backend) -> None:
    labels = np.array([[label, style] for label in range(6) for style in range(3)])
    embeddings = backend.embed(labels)
    assert len(np.unique(embeddings.round(5), axis=0)) == len(labels)


def test_condition_timestep_and_latent_each_matter(backend: Backend, rng: np.random.Generator) -> None:
    embeddings = backend.embed(np.array([[0, 0], [1, 0], [0, 0], [0, 0]]))
    state = backend.modulate(np.array([500, 500, 100, 500], np.float32), embeddings)
    x = np.repeat(rng.standard_normal((1, 3, 8, 8), np.float32), 4, axis=0)
    x[3] += 0.5
    output = backend.denoise(x, state)
    for k in (1, 2, 3):
        assert np.abs(output[k] - output[0]).max() > 1e-4


def test_a_row_does_not_depend_on_the_others(backend: Backend, rng: np.random.Generator) -> None:
    x, state = random_rows(backend, rng, 8)
    together = backend.denoise(x, state)
    order = rng.permutation(8)
    moved = backend.denoise(x[order], tuple(tensor[order] for tensor in state))
    np.testing.assert_array_equal(moved, together[order])
    for k in range(8):
        alone = backend.denoise(x[k : k + 1], tuple(tensor[k : k + 1] for tensor in state))
        np.testing.assert_allclose(alone[0], together[k], atol=1e-5)


def test_a_row_that_is_not_a_number_stays_alone(backend: Backend, rng: np.random.Generator) -> None:
    x, state = random_rows(backend, rng, 4)
    clean = backend.denoise(x, state)
    x[2] = np.nan
    output = backend.denoise(x, state)
    assert not np.isfinite(output[2]).any()
    np.testing.assert_array_equal(output[[0, 1, 3]], clean[[0, 1, 3]])


def test_the_conditioner_at_its_fixed_size_does_not_depend_on_company_or_place(
    backend: Backend, rng: np.random.Generator
) -> None:
    rows = backend.conditioner_rows
    embeddings = backend.embed(rng.integers(0, [6, 3], (rows, 2)))
    timesteps = rng.integers(0, 1000, rows).astype(np.float32)
    state = backend.modulate(timesteps, embeddings)
    order = rng.permutation(rows)
    for one, other in zip(state, backend.modulate(timesteps[order], embeddings[order]), strict=True):
        np.testing.assert_array_equal(other, one[order])
    same = backend.modulate(timesteps[:1].repeat(rows), embeddings[:1].repeat(rows, axis=0))
    for one, other in zip(state, same, strict=True):
        np.testing.assert_array_equal(other, one[:1].repeat(rows, axis=0))


def test_inputs_stay_as_they_are_and_outputs_are_the_callers(
    backend: Backend, rng: np.random.Generator
) -> None:
    x, state = random_rows(backend, rng, 3)
    kept = [array.copy() for array in (x, *state)]
    first = backend.denoise(x, state)
    held = first.copy()
    for array, before in zip((x, *state), kept, strict=True):
        np.testing.assert_array_equal(array, before)
    backend.denoise(x + 1.0, state)
    np.testing.assert_array_equal(first, held)
    first[:] = 0.0  # may be written to


def test_decoding_gives_rgb_bytes(backend: Backend) -> None:
    latents = np.linspace(-1.5, 1.5, 2 * 3 * 8 * 8, dtype=np.float32).reshape(2, 3, 8, 8)
    pixels = backend.decode(latents)
    assert pixels.shape == (2, 8, 8, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, 0, 0] == 0
    assert pixels[1, 7, 7, 2] == 255


def test_the_interpreter_runs_on_while_it_computes(backend: Backend, rng: np.random.Generator) -> None:
    count, seconds = 64, 0.0
    while seconds < 0.05:
        count *= 2
        x, state = random_rows(backend, rng, count)
        backend.denoise(x, state)  # the first of a size takes memory
        # A busy machine adds to the time that passes, not to that of the processor.
        start = time.process_time()
        backend.denoise(x, state)
        seconds = time.process_time() - start

    def turns() -> int:
        began, done = threading.Event(), threading.Event()

        def compute() -> None:
            began.set()
            backend.denoise(x, state)
            done.set()

        worker = threading.Thread(target=compute)
        worker.start()
        began.wait()
        turns = 0
        while not done.wait(0.001):
            turns += 1
        worker.join()
        return turns

    # If the backend held the interpreter lock there would be one turn at most. Beside others there may be
    # none once, and not each time.
    assert any(turns() > 3 for _ in range(10))


@pytest.mark.parametrize("strict", [False, True])
def test_images_are_the_same_with_the_cache_on_and_off_and_in_any_company(
    backend: Backend, strict: bool, make_request: Make, make_rung: Make
) -> None:
    def images(requests: list[SampleRequest], modulation_bytes: int) -> dict[str, Floats]:
        engine = Engine(
            backend=backend,
            conditions=ConditionCaches(backend, modulation_bytes=modulation_bytes),
            scheduler=Scheduler(max_rows=6, strict=strict),
            planner=Planner(Ladder(())),
            ladder=Ladder(()),
            costs=CostModel(fixed_s=10.0, per_row_s=0.001),
            schedule=make_schedule("cosine", prediction="v"),
            clock=lambda: 0.0,
        )
        for request in requests:
            engine.add(request)
        latents: dict[str, Floats] = {}
        while not engine.idle:
            latents.update((sample.id, sample.latent) for sample in engine.step().finished)
        return latents

    requests = [
        make_request(
            f"{k}/0",
            seed=k,
            condition=(ConditionTerm((k % 5, None)),),
            rung=make_rung(("ddim", "dpmpp-2m", "ddpm")[k % 3], 4 + k),
        )
        for k in range(4)
    ]
    cached, uncached = images(requests, 1 << 20), images(requests, 0)
    for request in requests:
        np.testing.assert_array_equal(cached[request.id], uncached[request.id])
        alone = images([request], 1 << 20)[request.id]
        if strict:
            np.testing.assert_array_equal(cached[request.id], alone)
        np.testing.assert_allclose(cached[request.id], alone, atol=1e-4)


def test_an_unknown_backend_is_refused_by_name(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match="unknown backend 'jax': choose among onnx, torch"):
        load_backend("jax", bundle)


def test_a_backend_whose_package_is_missing_names_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "ditserve.service.backends.onnx", raising=False)
    with pytest.raises(
        BackendUnavailable, match=r"needs the package onnxruntime.*: pip install 'ditserve\[cpu\]'"
    ):
        load_backend("onnx", bundle)
