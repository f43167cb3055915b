"""What every backend must do, asked of every one that is installed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import structlog
from onnx import TensorProto, numpy_helper

from ditserve.model.spec.bundle import Bundle, BundleError, write_manifest
from ditserve.model.spec.diffusion import make_schedule
from ditserve.model.spec.engine_cache import Device
from ditserve.service.backends import BACKENDS, Backend, BackendUnavailable, OutOfMemory, load_backend
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner
from tests.service.tiny_bundle import CONFIG, write_bundle

Floats = npt.NDArray[np.float32]
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


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("tiny")
    write_bundle(folder, weights=find_spec("torch") is not None)
    return Bundle.open(folder)


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


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def rows(backend: Backend, rng: np.random.Generator, count: int) -> tuple[Floats, tuple[Floats, ...]]:
    """Latents, and condition states of random timesteps and classes, for so many rows."""
    labels = rng.integers(0, [6, 3], (count, 2))
    timesteps = rng.integers(0, 1000, count).astype(np.float32)
    x = rng.standard_normal((count, 3, 8, 8), np.float32)
    return x, backend.modulate(timesteps, backend.embed(labels))


def test_it_knows_its_name_and_its_bundle(backend: Backend, bundle: Bundle) -> None:
    assert backend.name in BACKENDS
    assert backend.manifest == bundle.manifest
    assert backend.buckets is None or list(backend.buckets) == sorted(backend.buckets)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shapes_and_types_are_those_of_the_manifest(
    backend: Backend, rng: np.random.Generator, count: int
) -> None:
    embeddings = backend.embed(rng.integers(0, [6, 3], (count, 2)))
    x, state = rows(backend, rng, count)
    output = backend.denoise(x, state)
    assert embeddings.shape == (count, backend.manifest.embedding_size)
    assert [each.shape for each in state] == [(count, *entry.shape) for entry in backend.manifest.state]
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
    x, state = rows(backend, rng, 8)
    together = backend.denoise(x, state)
    order = rng.permutation(8)
    moved = backend.denoise(x[order], tuple(each[order] for each in state))
    np.testing.assert_array_equal(moved, together[order])
    for k in range(8):
        alone = backend.denoise(x[k : k + 1], tuple(each[k : k + 1] for each in state))
        np.testing.assert_allclose(alone[0], together[k], atol=1e-5)


def test_a_row_that_is_not_a_number_stays_alone(backend: Backend, rng: np.random.Generator) -> None:
    x, state = rows(backend, rng, 4)
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
    x, state = rows(backend, rng, 3)
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
        x, state = rows(backend, rng, count)
        backend.denoise(x, state)  # the first of a size takes memory
        start = time.perf_counter()
        backend.denoise(x, state)
        seconds = time.perf_counter() - start
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
    assert turns > 3  # with the lock held there is one at most


@pytest.mark.parametrize("strict", [False, True])
def test_images_are_the_same_with_the_cache_on_and_off_and_in_any_company(
    backend: Backend, strict: bool, make_request: Make, make_rung: Make
) -> None:
    def made(requests: list[SampleRequest], modulation_bytes: int) -> dict[str, Floats]:
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
        found: dict[str, Floats] = {}
        while not engine.idle:
            found.update((each.id, each.latent) for each in engine.step().finished)
        return found

    requests = [
        make_request(
            f"{k}/0",
            seed=k,
            condition=(ConditionTerm((k % 5, None)),),
            rung=make_rung(("ddim", "dpmpp-2m", "ddpm")[k % 3], 4 + k),
        )
        for k in range(4)
    ]
    cached, uncached = made(requests, 1 << 20), made(requests, 0)
    for request in requests:
        np.testing.assert_array_equal(cached[request.id], uncached[request.id])
        alone = made([request], 1 << 20)[request.id]
        if strict:
            np.testing.assert_array_equal(cached[request.id], alone)
        np.testing.assert_allclose(cached[request.id], alone, atol=1e-4)


def test_an_unknown_backend_is_refused_by_name(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match="unknown backend 'jax': choose among onnx, torch"):
        load_backend("jax", bundle)


def test_a_backend_whose_package_is_missing_names_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "ditserve.service.backends.onnx", raising=False)
    with pytest.raises(BackendUnavailable, match="backend 'onnx' needs the package onnxruntime"):
        load_backend("onnx", bundle)


def test_a_graph_that_is_none_is_refused_by_its_path(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    for name in bundle.manifest.files:
        (tmp_path / name).write_bytes(bundle.file(name).read_bytes())
    (tmp_path / "backbone.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendUnavailable, match=r"backbone\.onnx cannot be loaded"):
        load_backend("onnx", Bundle(tmp_path, bundle.manifest))


def test_unknown_options_are_refused_in_one_sentence(bundle: Bundle) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with pytest.raises(BackendUnavailable, match="must be one of auto, fp32, fp16, int8, not 'fp4'"):
        load_backend("onnx", bundle, precision="fp4")
    with pytest.raises(BackendUnavailable, match="has no NoSuchProvider: choose among CPUExecutionProvider,"):
        load_backend("onnx", bundle, providers=("NoSuchProvider",))


@pytest.mark.parametrize(
    ("provider", "package"),
    [("CUDAExecutionProvider", "onnxruntime-gpu"), ("TensorrtExecutionProvider", "tensorrt-cu13")],
)
def test_a_provider_that_is_not_installed_names_its_package(
    bundle: Bundle, provider: str, package: str
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if provider in runtime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(BackendUnavailable, match=f"has no {provider}: install .*{package}"):
        load_backend("onnx", bundle, providers=(provider, "CPUExecutionProvider"))


def test_a_provider_that_does_not_start_is_refused_rather_than_left_to_the_cpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself would warn and compute on the CPU."""
    module = pytest.importorskip("ditserve.service.backends.onnx", reason="onnxruntime is not installed")
    real = module.ort.InferenceSession
    monkeypatch.setattr(module, "require", lambda providers: None)
    monkeypatch.setattr(
        module.ort, "InferenceSession", lambda *args, providers: real(*args, providers=[module.CPU])
    )
    with pytest.raises(BackendUnavailable, match="CUDAExecutionProvider does not start"):
        load_backend("onnx", bundle, providers=("CUDAExecutionProvider",))


def test_tensorrt_keeps_its_engines_by_gpu_version_and_content(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = pytest.importorskip("ditserve.service.backends.onnx", reason="onnxruntime is not installed")
    write_bundle(tmp_path, weights=False)
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path, bundle.manifest)
    monkeypatch.setattr(module, "first_gpu", lambda: Device("NVIDIA L4", "sm89"))
    monkeypatch.setattr(module.metadata, "version", lambda package: "11.4.0")
    ((name, first),) = module.provider_entries(Bundle.open(tmp_path), "fp32", (module.TENSORRT,))
    assert name == module.TENSORRT
    folder = f"l4-sm89-onnxruntime-{module.ort.__version__}-11.4.0"
    assert first["trt_engine_cache_path"] == str(tmp_path / "engines" / folder)
    (tmp_path / "weights.safetensors").write_bytes(b"other weights")
    write_manifest(tmp_path, bundle.manifest)
    ((_, other),) = module.provider_entries(Bundle.open(tmp_path), "fp32", (module.TENSORRT,))
    assert other["trt_engine_cache_path"] == first["trt_engine_cache_path"]
    assert other["trt_engine_cache_prefix"] != first["trt_engine_cache_prefix"]


@pytest.fixture
def with_int8(bundle: Bundle, tmp_path: Path) -> Callable[..., Bundle]:
    """The bundle with an INT8 backbone (its fp32 one under that name) and what its record says of it."""

    def make(**metrics: float) -> Bundle:
        for name in bundle.manifest.files:
            (tmp_path / name).write_bytes(bundle.file(name).read_bytes())
        (tmp_path / "backbone.int8.onnx").write_bytes(bundle.file("backbone.onnx").read_bytes())
        write_manifest(tmp_path, bundle.manifest.model_copy(update={"metrics": metrics}))
        return Bundle.open(tmp_path)

    return make


@pytest.mark.parametrize(
    ("metrics", "int8_seconds", "chosen", "why"),
    [
        ({"int8_quality_loss": 0.004, "int8_weight_bits": 7}, 0.5, "int8", "2.0"),
        ({"int8_quality_loss": -0.1, "int8_weight_bits": 8}, 0.5, "int8", "2.0"),
        ({"int8_quality_loss": 0.004}, 2.0, "fp32", "no faster here (0.50 times)"),
        ({"int8_quality_loss": 0.004}, 0.98, "fp32", "no faster here (1.02 times)"),  # as good as equal
        ({"int8_quality_loss": 0.02}, 0.5, "fp32", "costs 2.0% of quality"),
        ({}, 0.5, "fp32", "not on record"),
    ],
)
def test_int8_is_chosen_where_it_is_within_budget_and_faster(
    with_int8: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
    metrics: dict[str, float],
    int8_seconds: float,
    chosen: str,
    why: str,
) -> None:
    module = pytest.importorskip("ditserve.service.backends.onnx", reason="onnxruntime is not installed")
    monkeypatch.setattr(module, "_speedup", lambda one, other, manifest: 1.0 / int8_seconds)
    with structlog.testing.capture_logs() as logs:
        backend = load_backend("onnx", with_int8(**metrics), threads=1)
    assert backend.precision == chosen
    (told,) = [entry for entry in logs if entry["event"] == "precision chosen"]
    assert told["precision"] == chosen
    assert why in str(told.get("against_int8", told.get("speedup")))
    backend.close()


def test_threads_share_rows_and_only_of_fewer_rows_than_threads_the_work_within(
    bundle: Bundle, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("ditserve.service.backends.rows", reason="onnxruntime is not installed")
    threads: list[int] = []
    real = module.run

    def run(session: Any, outputs: Any, inputs: Any) -> Any:
        threads.append(session.get_session_options().intra_op_num_threads)
        return real(session, outputs, inputs)

    backend = load_backend("onnx", bundle, threads=2)
    inputs = {count: rows(backend, rng, count) for count in (1, 5)}
    monkeypatch.setattr(module, "run", run)
    backend.denoise(*inputs[1])
    backend.denoise(*inputs[5])
    assert threads == [2, 1, 1]
    backend.close()


def test_when_a_part_fails_nobody_computes_any_more() -> None:
    module = pytest.importorskip("ditserve.service.backends.rows", reason="onnxruntime is not installed")
    ended = threading.Event()

    class Session:
        def run(self, outputs: list[str], inputs: dict[str, Floats]) -> list[Floats]:
            if inputs["x"][0] == 0:
                raise RuntimeError("bad_alloc")
            time.sleep(0.05)
            ended.set()
            return [inputs["x"]]

    shared = module.SharedRows(Session(), Session(), threads=2)
    with pytest.raises(MemoryError, match="bad_alloc"):
        shared.run(["output"], {"x": np.arange(2.0, dtype=np.float32)})
    assert ended.is_set()
    (same,) = shared.run(["output"], {"x": np.arange(1.0, 6.0, dtype=np.float32)})
    np.testing.assert_array_equal(same, [1, 2, 3, 4, 5])
    shared.close()


def test_speed_is_measured_in_pairs_of_steps_of_one_row(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("ditserve.service.backends.onnx", reason="onnxruntime is not installed")
    now, batches = 0.0, list[int]()

    class Session:
        def __init__(self, seconds: Iterator[float]) -> None:
            self.seconds = seconds

        def run(self, outputs: Any, inputs: Any) -> None:
            nonlocal now
            now += next(self.seconds)
            batches.append(len(inputs["x"]))

    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    slow_at_first = chain([9.0], repeat(3e-3))
    interrupted = chain(repeat(2e-3, 5), [1.0], repeat(2e-3))
    assert module._speedup(Session(slow_at_first), Session(interrupted), bundle.manifest) == pytest.approx(
        1.5
    )
    assert set(batches) == {1}
    batches.clear()
    module._speedup(Session(repeat(30.0)), Session(repeat(20.0)), bundle.manifest)
    assert len(batches) == 4  # a pair that does not count, and one that does


def test_a_precision_the_bundle_lacks_is_refused_by_its_file(bundle: Bundle) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with pytest.raises(BundleError, match=r"backbone\.int8\.onnx is not part of this bundle"):
        load_backend("onnx", bundle, precision="int8")


def test_a_graph_that_takes_half_precision_is_refused_with_the_remedy(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    for name in bundle.manifest.files:
        (tmp_path / name).write_bytes(bundle.file(name).read_bytes())
    proto = onnx.load(tmp_path / "backbone.onnx")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            narrow = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    onnx.save(proto, tmp_path / "backbone.fp16.onnx")
    write_manifest(tmp_path, bundle.manifest)
    with pytest.raises(
        BackendUnavailable, match=r"takes half precision: .* again with python -m export\.half"
    ):
        load_backend("onnx", Bundle.open(tmp_path), precision="fp16", threads=1)


class Recording:
    """ONNX Runtime on a GPU in miniature: what is bound is doubled, and every run's recording is kept."""

    def __init__(self) -> None:
        self.runs: list[str] = []

    def io_binding(self) -> Any:
        bound: dict[str, Any] = {}
        keep = bound.__setitem__
        return SimpleNamespace(bound=bound, bind_ortvalue_input=keep, bind_ortvalue_output=keep)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.runs.append(options.get_run_config_entry("gpu_graph_id"))
        binding.bound["output"].update_inplace(2.0 * binding.bound["x"].numpy())


def test_every_number_of_rows_is_recorded_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("ditserve.service.backends.rows", reason="onnxruntime is not installed")
    value = module.ort.OrtValue
    on_host = SimpleNamespace(
        ortvalue_from_numpy=lambda array, *place: value.ortvalue_from_numpy(array.copy()),
        ortvalue_from_shape_and_type=lambda shape, kind, *place: value.ortvalue_from_shape_and_type(
            shape, kind
        ),
    )
    monkeypatch.setattr(module.ort, "OrtValue", on_host)
    session = Recording()
    recorded = module.RecordedRows(session, (2,), threading.Lock())
    for rows in (1, 3, 1, 3):
        x = np.random.default_rng(rows).standard_normal((rows, 2), np.float32)
        (output,) = recorded.run(["output"], {"x": x})
        np.testing.assert_array_equal(output, 2.0 * x)
    assert session.runs == ["1"] * module.RUNS + ["3"] * module.RUNS + ["1", "3"]


@pytest.mark.parametrize(
    ("shape", "multiple"),
    [
        (["batch", 3, 8, 8], None),
        (["batch", 3, "4*rows", "4*columns"], 4),
        (["batch", 3, "rows", "columns"], 1),
        (["batch", 3, "4*rows", 8], None),
    ],
)
def test_sizes_are_free_where_the_graph_says_so(shape: list[Any], multiple: int | None) -> None:
    backend = pytest.importorskip("ditserve.service.backends.onnx", reason="onnxruntime is not installed")
    assert backend.size_multiple(shape) == multiple


def test_a_model_without_conditions_has_the_embedding_zero(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    for name in bundle.manifest.files:
        if name != "embedder.onnx":
            (tmp_path / name).write_bytes(bundle.file(name).read_bytes())
    alone = {"factors": (), "config": replace(CONFIG, classes=())}
    write_manifest(tmp_path, bundle.manifest.model_copy(update=alone))
    backend = load_backend("onnx", Bundle.open(tmp_path), threads=1)
    embeddings = backend.embed(np.zeros((3, 0), np.int64))
    np.testing.assert_array_equal(embeddings, np.zeros((3, bundle.manifest.embedding_size), np.float32))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Failed to allocate memory for requested buffer of size 64", OutOfMemory),
        ("some other fault", RuntimeError),
    ],
)
def test_onnx_runtime_out_of_memory_is_told_from_other_faults(
    message: str, expected: type[Exception]
) -> None:
    module = pytest.importorskip("ditserve.service.backends.onnx", reason="onnxruntime is not installed")

    class Session:
        def run(self, *_: Any) -> None:
            raise RuntimeError(message)

    with pytest.raises(expected, match=message):
        module.run(Session(), ["output"], {})


def test_the_onnx_backend_leaves_torch_unimported() -> None:
    code = "import sys, service.backends.onnx, service.engine.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
