"""The TensorRT backend's own logic, on an imitation of TensorRT and CUDA: it has not run on a GPU yet."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model.bundle import Bundle, write_manifest
from service.backends import BackendUnavailable, OutOfMemory
from service.backends import tensorrt as backend_module
from service.backends.cuda import Cuda, CudaError
from service.backends.tensorrt import TensorRtBackend, find_engine
from tests.export.tiny import tiny_source

GPU = ("NVIDIA L4", "sm89")
VERSION = "11.4.0"
DTYPES = SimpleNamespace(FLOAT="float", HALF="half", BF16="bf16")


class Runtime:
    """`cuda.bindings.runtime` over host memory: a device address is the address of a numpy array."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0
        self.fail: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: (self.fail.get(name, 0), *self._do(name, arguments))

    def _do(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in ("cudaMalloc", "cudaMallocHost"):
            array = np.zeros(arguments[0], np.uint8)
            self.memory[array.ctypes.data] = array
            return (array.ctypes.data,)
        if name in ("cudaFree", "cudaFreeHost"):
            del self.memory[arguments[0]]
            return ()
        if name == "cudaMemcpyAsync":
            target, source, size = (int(value) for value in arguments[:3])
            self.enqueue(lambda: _move(target, source, size))
            return ()
        if name == "cudaStreamBeginCapture":
            self.recording = []
            return ()
        if name == "cudaStreamEndCapture":
            recorded, self.recording = self.recording, None
            return (recorded,)
        if name == "cudaGraphLaunch":
            self.launches += 1
            for work in arguments[0]:
                work()
            return ()
        answers = {
            "cudaGetDeviceCount": (1,),
            "cudaStreamCreateWithFlags": (7,),
            "cudaGraphInstantiate": arguments[:1],
            "cudaGetErrorString": (b"bad luck",),
            "cudaGetDeviceProperties": (SimpleNamespace(name=b"NVIDIA L4\0", major=8, minor=9),),
        }
        return answers.get(name, ())

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)


def _move(target: int, source: int, size: int) -> None:
    ctypes.memmove(target, source, size)


class Context:
    """Answers output = 2·x + mean of the last condition tensor, from the addresses it was given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.engine.accepts

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.runtime.enqueue(self._compute)
        return True

    def _compute(self) -> None:
        x = self._view("x")
        last = self._view(self.engine.last)
        mean = last.reshape(len(last), -1).astype(np.float32).mean(1)
        output = (2 * x.astype(np.float32) + mean[:, None, None, None]).astype(x.dtype)
        _move(self.addresses["output"], output.ctypes.data, output.nbytes)

    def _view(self, name: str) -> Any:
        dtype = np.dtype({"float": "f4", "half": "f2"}[self.engine.dtype])
        size = int(np.prod(self.shapes[name])) * dtype.itemsize
        raw = memoryview((ctypes.c_byte * size).from_address(self.addresses[name])).cast("B")
        return np.frombuffer(raw, dtype).reshape(self.shapes[name])


class Engine:
    def __init__(self, runtime: Runtime, last: str, dtype: str) -> None:
        self.runtime, self.last, self.dtype, self.accepts = runtime, last, dtype, True
        self.profiles = [(1, 2, 2), (3, 8, 8)]
        self.num_optimization_profiles = len(self.profiles)
        self.contexts: list[Context] = []

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, 3, 16, 16) for size in self.profiles[profile]]

    def get_tensor_dtype(self, name: str) -> str:
        return self.dtype

    def create_execution_context(self) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]


def module_of(engine: Engine | None) -> Any:
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    runtime = type(
        "Runtime",
        (),
        {"__init__": lambda self, log: None, "deserialize_cuda_engine": lambda self, plan: engine},
    )
    return SimpleNamespace(__version__=VERSION, Logger=logger, Runtime=runtime, DataType=DTYPES)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    for name in ("weights.safetensors", "backbone.fp16.onnx"):
        (tmp_path / name).write_bytes(name.encode())
    write_manifest(tmp_path, tiny_source().manifest)
    opened = Bundle.open(tmp_path)
    files = opened.manifest.files
    recipe = {
        "graph": "backbone.fp16.onnx",
        "graph_sha256": files["backbone.fp16.onnx"].sha256,
        "weights_sha256": files["weights.safetensors"].sha256,
        "flavour": "tensorrt",
        "version": VERSION,
        "device": GPU[0],
        "capability": GPU[1],
    }
    folder = tmp_path / "engines" / "l4"
    folder.mkdir(parents=True)
    (folder / "backbone.fp16.engine").write_bytes(b"plan")
    record = {"recipe": recipe, "sha256": hashlib.sha256(b"plan").hexdigest()}
    (folder / "backbone.fp16.json").write_text(json.dumps(record))
    return opened


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    monkeypatch.setattr(backend_module, "_session", lambda *_: None)
    return Runtime()


def opened(bundle: Bundle, runtime: Runtime, dtype: str = "half") -> tuple[TensorRtBackend, Engine]:
    engine = Engine(runtime, bundle.manifest.state[-1].name, dtype)
    return TensorRtBackend(bundle, module=module_of(engine), cuda=Cuda(runtime)), engine


def inputs(bundle: Bundle, rows: int) -> tuple[Any, tuple[Any, ...]]:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 3, 16, 16)).astype(np.float32)
    return x, tuple(rng.standard_normal((rows, *t.shape)).astype(np.float32) for t in bundle.manifest.state)


@pytest.mark.parametrize("dtype", ["half", "float"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_rows_go_in_and_out_of_the_smallest_bucket_that_holds_them(
    bundle: Bundle, runtime: Runtime, rows: int, dtype: str
) -> None:
    backend, engine = opened(bundle, runtime, dtype)
    assert backend.buckets == (1, 2, 3, 4, 8)
    x, state = inputs(bundle, rows)
    output = backend.denoise(x, state)
    expected = 2 * x + state[-1].reshape(rows, -1).mean(1)[:, None, None, None]
    np.testing.assert_allclose(output, expected, atol=2e-2 if dtype == "half" else 1e-5)
    assert output.dtype == np.float32
    assert engine.contexts[0].shapes["x"][0] == min(size for size in (1, 2, 3, 4, 8) if size >= rows)
    assert engine.contexts[0].profile == (0 if rows <= 2 else 1)


def test_a_lane_is_captured_once_and_launched_each_time(bundle: Bundle, runtime: Runtime) -> None:
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
        ({"version": "11.5.0"}, "there is no engine"),
        ({"capability": "sm90"}, "there is no engine"),
        ({"device": "NVIDIA L40"}, "there is no engine"),
        ({"flavour": "tensorrt_rtx"}, "there is no engine"),
        ({"weights_sha256": "0" * 64}, "was built from other files"),
        ({"graph_sha256": "0" * 64}, "was built from other files"),
    ],
)
def test_a_stale_or_foreign_engine_is_refused_with_the_command(
    bundle: Bundle, change: dict[str, str], words: str
) -> None:
    file = bundle.path / "engines" / "l4" / "backbone.fp16.json"
    record = json.loads(file.read_text())
    record["recipe"] |= change
    file.write_text(json.dumps(record))
    with pytest.raises(BackendUnavailable, match=f"{words}.* python -m export.trt .* --precision fp16"):
        find_engine(bundle, "fp16", VERSION, *GPU)


def test_a_damaged_engine_is_refused(bundle: Bundle) -> None:
    assert find_engine(bundle, "fp16", VERSION, *GPU).read_bytes() == b"plan"
    (bundle.path / "engines" / "l4" / "backbone.fp16.engine").write_bytes(b"plam")
    with pytest.raises(BackendUnavailable, match="is damaged"):
        find_engine(bundle, "fp16", VERSION, *GPU)


def test_an_engine_that_cannot_be_deserialised_is_refused(bundle: Bundle, runtime: Runtime) -> None:
    with pytest.raises(BackendUnavailable, match="cannot load"):
        TensorRtBackend(bundle, module=module_of(None), cuda=Cuda(runtime))
    with pytest.raises(BackendUnavailable, match="precision must be one of"):
        TensorRtBackend(bundle, precision="int4", module=module_of(None), cuda=Cuda(runtime))


def test_bf16_survives_the_way_in_and_out() -> None:
    values = np.array([[0.0, 1.0, -2.5, 3.1415927, 1e30, -1e-20]], np.float32)
    held = np.zeros((2, 6), np.uint16)
    backend_module._fill(held, values)
    np.testing.assert_allclose(backend_module._read(held, 1), values, rtol=2**-8)
