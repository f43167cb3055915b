"""TensorRT: runs engines that `python -m export.trt` built for this GPU.

Each batch size has an execution context, fixed device buffers, and a CUDA graph of copy in, execute, copy
out. The condition state lies in one allocation per batch size, tensor after tensor in the order of the
manifest. An engine is loaded only if its record names this GPU, this TensorRT, and the bundle's graph and
weights. On a real GPU all of this module has run except TensorRT itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ditserve.commands import command_line
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.engine_cache import FOLDER, GRAPHS, CachedEngine, Device, engine_origin
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.sizes import Size
from ditserve.service.backends import (
    CONDITIONER_ROWS,
    CONDITIONER_ROWS_GPU,
    BackendUnavailable,
    Floats,
    SentenceEncoder,
)
from ditserve.service.backends.adapters import BackendAdapters
from ditserve.service.backends.cuda import Cuda
from ditserve.service.backends.onnx import AuxiliaryGraphs
from ditserve.service.backends.precision import OUTDATED
from ditserve.service.backends.sessions import CPU, CUDA, session_options
from ditserve.service.backends.state import HostMemory, StateMemory

PRECISIONS = ("fp16", "bf16", "fp32", "int8")


@dataclass(frozen=True, slots=True)
class _EngineContext:
    """One batch size: the host arrays of every tensor, the captured CUDA graph, and the execution context.

    The graph needs the execution context to stay alive.
    """

    host: Mapping[str, Floats]
    graph: Any
    execution: Any


class TensorRtBackend:
    """A bundle in TensorRT. Embedder, conditioner and decoder run in ONNX Runtime.

    Conditioner and decoder run on the GPU if the installed build of ONNX Runtime can; the engine caches
    what the conditioner gives.

    Args:
        precision: of the engine: "fp16", "bf16", "int8", "fp32", or "auto" for the first of fp16, bf16 and
            fp32 that the bundle has a graph for.
        threads: compute threads of ONNX Runtime, 0 for one per core.
        engines: folder of the engines; the bundle's own unless given.
        module: the TensorRT module; `tensorrt` unless given.
        cuda: the device; the first one unless given.
        graphs: the other parts of the bundle; opened in ONNX Runtime unless given.
    """

    name = "tensorrt"
    kernels = ""
    text_encoder: SentenceEncoder | None = None
    state_memory: StateMemory = HostMemory()
    adapters: BackendAdapters | None = None
    size_multiples: Size | None = None  # an engine has one size

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: str = "auto",
        threads: int = 0,
        engines: Path | None = None,
        module: Any = None,
        cuda: Cuda | None = None,
        graphs: AuxiliaryGraphs | None = None,
    ) -> None:
        if precision not in ("auto", *PRECISIONS):
            known = ", ".join(("auto", *PRECISIONS))
            raise BackendUnavailable(
                f"precision of the tensorrt backend must be one of {known}, not {precision!r}"
            )
        if isinstance(bundle.manifest.config, PipelineConfig):
            raise BackendUnavailable(
                f"{bundle.manifest.name} is an imported pipeline, of which no engines are built: "
                "choose the torch or the onnx backend"
            )
        self.manifest = bundle.manifest
        self.precision = _half(bundle) if precision == "auto" else precision
        self._trt = module if module is not None else import_module("tensorrt")
        self._cuda = cuda if cuda is not None else Cuda()
        on_gpu = (CUDA, CPU) if CUDA in ort.get_available_providers() else (CPU,)
        self._graphs = graphs or AuxiliaryGraphs(bundle, session_options(threads), on_gpu)
        self.conditioner_rows = CONDITIONER_ROWS if on_gpu[0] == CPU else CONDITIONER_ROWS_GPU
        self._state = [tensor.name for tensor in bundle.manifest.state]
        device = Device(*self._cuda.device())
        file = find_engine(
            bundle, engines or bundle.path / FOLDER, self.precision, self._trt.__version__, device
        )
        self._engine = self._deserialise(file)
        self._profiles = self._batch_ranges()
        self.buckets: tuple[int, ...] | None = _buckets(self._profiles)
        self._contexts: dict[int, _EngineContext] = {}

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        return self._graphs.embed(labels, text)

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return self._graphs.modulate(timesteps, embeddings)

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        return self._graphs.decode(latents)

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        return self._graphs.encode(pixels)

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        rows = len(x)
        bucket = next((size for size in self.buckets or () if size >= rows), None)
        if bucket is None:
            raise ValueError(f"{rows} rows are more than the engine takes ({max(self.buckets or (0,))})")
        if bucket not in self._contexts:
            self._contexts[bucket] = self._open_context(bucket)
        context = self._contexts[bucket]
        for name, value in zip(("x", *self._state), (x, *state), strict=True):
            # Rows of the bucket beyond these keep old values; their output is not returned.
            context.host[name][:rows] = value
        self._cuda.launch(context.graph)
        self._cuda.synchronise()
        return context.host["output"][:rows].copy()

    def close(self) -> None:
        """Free the device; the backend cannot be used afterwards."""
        self._contexts.clear()
        self._cuda.close()

    def _deserialise(self, file: Path) -> Any:
        logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise BackendUnavailable(
                f"TensorRT cannot load {file}: build it again with {command_line('export.trt')} --force"
            )
        if engine.get_tensor_dtype("x") != self._trt.DataType.FLOAT:
            raise BackendUnavailable(f"{file} takes half precision: {OUTDATED}")
        return engine

    def _batch_ranges(self) -> list[tuple[int, int, int]]:
        """Return the smallest, tuned and largest batch of each optimisation profile."""
        count = self._engine.num_optimization_profiles
        shapes = [self._engine.get_tensor_profile_shape("x", k) for k in range(count)]
        return [cast(tuple[int, int, int], tuple(int(shape[0]) for shape in triple)) for triple in shapes]

    def _open_context(self, bucket: int) -> _EngineContext:
        """Allocate buffers for batches of `bucket` rows, run once, as capture requires, and capture a run."""
        execution = self._engine.create_execution_context()
        if execution is None:
            raise BackendUnavailable(f"TensorRT has no memory for another context (batch {bucket})")
        profile = next(k for k, (low, _, high) in enumerate(self._profiles) if low <= bucket <= high)
        _require(
            execution.set_optimization_profile_async(profile, self._cuda.stream),
            "set_optimization_profile_async",
        )
        shapes = self._shapes(bucket)
        host = {name: self._cuda.pinned(shape) for name, shape in shapes.items()}
        device = self._device_buffers(host)
        for name, shape in shapes.items():
            if name != "output":
                host[name][...] = 0
                _require(execution.set_input_shape(name, shape), f"set_input_shape({name})")
            _require(execution.set_tensor_address(name, device[name]), f"set_tensor_address({name})")
        if execution.infer_shapes():
            raise RuntimeError(f"TensorRT lacks the shapes of {', '.join(execution.infer_shapes())}")

        def run() -> None:
            for name in ("x", *self._state):
                self._cuda.upload(device[name], host[name])
            _require(execution.execute_async_v3(self._cuda.stream), "execute_async_v3")
            self._cuda.download(host["output"], device["output"])

        run()
        self._cuda.synchronise()
        return _EngineContext(host, self._cuda.capture(run), execution)

    def _device_buffers(self, host: Mapping[str, Floats]) -> dict[str, int]:
        """Allocate device memory for every host array; return the addresses. The state is one allocation."""
        address = self._cuda.allocate(sum(_aligned(host[name].nbytes) for name in self._state))
        device = {}
        for name in self._state:
            device[name] = address
            address += _aligned(host[name].nbytes)
        return device | {name: self._cuda.allocate(host[name].nbytes) for name in ("x", "output")}

    def _shapes(self, bucket: int) -> dict[str, tuple[int, ...]]:
        model = self.manifest.config
        shapes: dict[str, tuple[int, ...]] = {"x": (bucket, model.in_channels, *model.image_size)}
        shapes |= {tensor.name: (bucket, *tensor.shape) for tensor in self.manifest.state}
        return {**shapes, "output": (bucket, model.out_channels, *model.image_size)}


def find_engine(bundle: Bundle, engines: Path, precision: str, version: str, device: Device) -> Path:
    """Return the engine of a precision, if its record fits bundle, TensorRT and GPU, and it is undamaged.

    Raises:
        BackendUnavailable: there is none, or it is stale, foreign or damaged; the message has the command to
            build it.
        BundleError: the bundle has no graph of this precision.
    """
    origin = engine_origin(
        bundle, precision, GRAPHS[precision][0], flavour="tensorrt", version=version, device=device
    )
    cached = CachedEngine.of(engines, origin)
    problem = cached.problem(origin)
    if problem is not None:
        where = "" if engines == bundle.path / FOLDER else f" --engines {engines}"
        raise BackendUnavailable(
            f"the {precision} engine for {device.name} ({device.capability}) and TensorRT {version} "
            f"is {problem}: build it with "
            f"{command_line('export.trt')} {bundle.path} --precision {precision}{where}"
        )
    return cached.engine


def _half(bundle: Bundle) -> str:
    """Return the first of fp16, bf16 and fp32 with a graph. INT8 is not one, since its pictures differ."""
    return next((name for name in ("fp16", "bf16") if GRAPHS[name][0] in bundle.manifest.files), "fp32")


def _buckets(profiles: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
    """Return the batch sizes to capture: each profile's ends and tuned size, and powers of two inside."""
    sizes = {size for profile in profiles for size in profile}
    sizes |= {1 << k for low, _, high in profiles for k in range(high.bit_length()) if low <= 1 << k <= high}
    return tuple(sorted(sizes))


def _aligned(size: int) -> int:
    """Return `size` bytes rounded up to the alignment of tensors."""
    return -(-size // 256) * 256


def _require(accepted: bool, call: str) -> None:
    if not accepted:
        raise RuntimeError(f"TensorRT refused {call}")
