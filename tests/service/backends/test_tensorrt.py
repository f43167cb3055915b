"""The TensorRT backend on an imitation of TensorRT and CUDA, and with an imitated engine on a real device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.engine_cache import FOLDER, CachedEngine, Device, engine_origin
from ditserve.service.backends import BackendUnavailable, OutOfMemory
from ditserve.service.backends.cuda import Cuda, CudaError
from ditserve.service.backends.onnx import AuxiliaryGraphs
from ditserve.service.backends.tensorrt import TensorRtBackend, find_engine
from tests.export.fake_cuda import VERSION, Context, Engine, Runtime, module_of
from tests.export.tiny import tiny_source

GPU = Device("NVIDIA L4", "sm89")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    for name in ("weights.safetensors", "backbone.fp16.onnx"):
        (tmp_path / name).write_bytes(name.encode())
    write_manifest(tmp_path, tiny_source().manifest)
    opened = Bundle.open(tmp_path)
    lay_engine(opened, GPU)
    return opened


def lay_engine(bundle: Bundle, device: Device) -> None:
    """Write an engine for `device`, and its record, into the bundle."""
    origin = engine_origin(
        bundle, "fp16", "backbone.fp16.onnx", flavour="tensorrt", version=VERSION, device=device
    )
    cached = CachedEngine.of(bundle.path / FOLDER, origin)
    cached.folder.mkdir(parents=True)
    cached.engine.write_bytes(b"plan")
    record = {"origin": asdict(origin), "options": {}, "sha256": hashlib.sha256(b"plan").hexdigest()}
    cached.record.write_text(json.dumps(record))


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


def opened(bundle: Bundle, runtime: Runtime) -> tuple[TensorRtBackend, Engine]:
    engine = Engine(runtime, bundle.manifest.state[-1].name)
    return backend_of(bundle, runtime, engine), engine


def backend_of(bundle: Bundle, runtime: Runtime, engine: Engine | None, **options: Any) -> TensorRtBackend:
    # The other parts of the bundle are not used here.
    graphs = AuxiliaryGraphs.__new__(AuxiliaryGraphs)
    return TensorRtBackend(bundle, module=module_of(engine), cuda=Cuda(runtime), graphs=graphs, **options)


def engine_of(bundle: Bundle) -> Path:
    return find_engine(bundle, bundle.path / FOLDER, "fp16", VERSION, GPU)


def inputs(bundle: Bundle, rows: int) -> tuple[Any, tuple[Any, ...]]:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 3, 16, 16)).astype(np.float32)
    return x, tuple(rng.standard_normal((rows, *t.shape)).astype(np.float32) for t in bundle.manifest.state)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_rows_go_in_and_out_of_the_smallest_bucket_that_holds_them(
    bundle: Bundle, runtime: Runtime, rows: int
) -> None:
    backend, engine = opened(bundle, runtime)
    assert backend.buckets == (1, 2, 3, 4, 8)
    x, state = inputs(bundle, rows)
    output = backend.denoise(x, state)
    expected = 2 * x + state[-1].reshape(rows, -1).mean(1)[:, None, None, None]
    np.testing.assert_allclose(output, expected, atol=1e-5)
    assert output.dtype == np.float32
    assert engine.contexts[0].shapes["x"][0] == min(size for size in (1, 2, 3, 4, 8) if size >= rows)
    assert engine.contexts[0].profile == (0 if rows <= 2 else 1)


def test_a_batch_size_is_captured_once_and_launched_each_time(bundle: Bundle, runtime: Runtime) -> None:
    backend, engine = opened(bundle, runtime)
    for rows in (2, 2, 8, 7, 2):
        x, state = inputs(bundle, rows)
        backend.denoise(x, state)
    assert len(engine.contexts) == 2
    assert runtime.launches == 5
    backend.close()
    assert not runtime.memory


def test_the_condition_state_is_one_allocation_in_block_order(bundle: Bundle, runtime: Runtime) -> None:
    backend, engine = opened(bundle, runtime)
    backend.denoise(*inputs(bundle, 2))
    addresses = [engine.contexts[0].addresses[tensor.name] for tensor in bundle.manifest.state]
    assert addresses == sorted(addresses)
    assert all(address - addresses[0] in range(1 << 20) for address in addresses)
    assert all((address - addresses[0]) % 256 == 0 for address in addresses)


def test_more_rows_than_the_engine_takes_are_refused(bundle: Bundle, runtime: Runtime) -> None:
    backend, _ = opened(bundle, runtime)
    with pytest.raises(ValueError, match="9 rows are more"):
        backend.denoise(*inputs(bundle, 9))


def test_a_refused_call_is_an_error(bundle: Bundle, runtime: Runtime) -> None:
    backend, engine = opened(bundle, runtime)
    engine.accepts = False
    with pytest.raises(RuntimeError, match=r"refused set_input_shape\(x\)"):
        backend.denoise(*inputs(bundle, 1))


def test_cuda_errors_name_the_call_and_out_of_memory_is_its_own(bundle: Bundle, runtime: Runtime) -> None:
    backend, _ = opened(bundle, runtime)
    runtime.fail["cudaMalloc"] = 2
    with pytest.raises(OutOfMemory, match="cudaMalloc"):
        backend.denoise(*inputs(bundle, 1))
    runtime.fail = {"cudaGraphLaunch": 700}
    with pytest.raises(CudaError, match="cudaGraphLaunch: bad luck"):
        backend.denoise(*inputs(bundle, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "11.5.0"}, "built with another version"),
        ({"capability": "sm90"}, "built with another capability"),
        ({"device": "NVIDIA L40"}, "built with another device"),
        ({"flavour": "tensorrt_rtx"}, "built with another flavour"),
        ({"weights_sha256": "0" * 64}, "built with another weights sha256"),
        ({"graph_sha256": "0" * 64}, "built with another graph sha256"),
    ],
)
def test_a_stale_or_foreign_engine_is_refused_with_the_command(
    bundle: Bundle, change: dict[str, str], words: str
) -> None:
    (file,) = bundle.path.glob("engines/*/backbone.fp16.json")
    record = json.loads(file.read_text())
    record["origin"] |= change
    file.write_text(json.dumps(record))
    with pytest.raises(BackendUnavailable, match=f"{words}: .* python -m export.trt .* --precision fp16"):
        engine_of(bundle)


def test_a_damaged_engine_is_refused(bundle: Bundle) -> None:
    engine = engine_of(bundle)
    assert engine.read_bytes() == b"plan"
    engine.write_bytes(b"plam")
    with pytest.raises(BackendUnavailable, match="is damaged"):
        engine_of(bundle)


def test_engines_may_lie_outside_of_the_bundle(bundle: Bundle, tmp_path: Path, runtime: Runtime) -> None:
    elsewhere = tmp_path.parent / "engines-elsewhere"
    with pytest.raises(BackendUnavailable, match=f"is not built: .* --engines {elsewhere}"):
        backend_of(bundle, runtime, None, engines=elsewhere)


def test_an_engine_that_cannot_be_deserialised_is_refused(bundle: Bundle, runtime: Runtime) -> None:
    with pytest.raises(BackendUnavailable, match="cannot load"):
        backend_of(bundle, runtime, None)
    with pytest.raises(BackendUnavailable, match="precision of the tensorrt backend must be one of auto"):
        backend_of(bundle, runtime, None, precision="int4")


def test_left_to_choose_it_takes_half_precision(bundle: Bundle, runtime: Runtime) -> None:
    backend, _ = opened(bundle, runtime)
    assert backend.precision == "fp16"


def test_an_engine_of_a_graph_that_took_half_precision_is_refused(bundle: Bundle, runtime: Runtime) -> None:
    engine = Engine(runtime, bundle.manifest.state[-1].name)
    engine.dtype = "half"
    with pytest.raises(
        BackendUnavailable, match=r"takes half precision: .* again with python -m export\.half"
    ):
        backend_of(bundle, runtime, engine)


class OnDevice(Engine):
    """An imitated engine that works on the GPU: it copies x to the output, on the stream it is given."""

    def __init__(self, cuda: Cuda, last: str) -> None:
        super().__init__(Runtime(), last)
        self.cuda = cuda

    def create_execution_context(self) -> Context:
        self.contexts.append(CopyOnDevice(self))
        return self.contexts[-1]


class CopyOnDevice(Context):
    engine: OnDevice

    def execute_async_v3(self, stream: int) -> bool:
        runtime, kind = self.engine.cuda._runtime, self.engine.cuda._runtime.cudaMemcpyKind
        size = 4 * int(np.prod(self.shapes["x"]))
        target, source = self.addresses["output"], self.addresses["x"]
        (code,) = runtime.cudaMemcpyAsync(target, source, size, kind.cudaMemcpyDeviceToDevice, stream)
        return int(code) == 0


@pytest.mark.gpu
def test_on_a_real_device_captured_runs_are_replayed(bundle: Bundle) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    cuda = Cuda()
    lay_engine(bundle, Device(*cuda.device()))
    engine = OnDevice(cuda, bundle.manifest.state[-1].name)
    backend = TensorRtBackend(
        bundle, module=module_of(engine), cuda=cuda, graphs=AuxiliaryGraphs.__new__(AuxiliaryGraphs)
    )
    for rows in (2, 8, 7, 2, 1, 8):
        x, state = inputs(bundle, rows)
        np.testing.assert_array_equal(backend.denoise(x, state), x)
    assert len(engine.contexts) == 3
    with pytest.raises(OutOfMemory, match="cudaMalloc"):
        cuda.allocate(1 << 50)
    # The failed allocation broke nothing.
    backend.denoise(*inputs(bundle, 2))
    backend.close()
