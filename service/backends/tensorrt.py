"""TensorRT: runs engines that `python -m export.trt` has built for this GPU. Everything here but TensorRT has run on one.

Each batch size has a lane of its own: execution context, fixed device buffers, and a CUDA graph of copy in, execute, copy out. The
condition state lies in one allocation per lane, block after block, as the engine's one input per block wants it.
An engine is loaded only if its record names this GPU, this TensorRT and the bundle's graph and weights as they are now.
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

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.engine_cache import FOLDER, GRAPHS, CachedEngine, Device, engine_origin
from ditserve.service.backends import CONDITIONER_ROWS, CONDITIONER_ROWS_GPU, BackendUnavailable, Floats
from ditserve.service.backends.cuda import Cuda
from ditserve.service.backends.onnx import CPU, CUDA, OUTDATED, Graphs, session_options

PRECISIONS = ("fp16", "bf16", "fp32", "int8")


@dataclass(frozen=True, slots=True)
class _Lane:
    """What one batch size runs on: host and device side of every tensor, and the captured work."""

    host: Mapping[str, Floats]
    graph: Any
    context: Any  # kept alive for the graph


class TensorRtBackend:
    """A bundle in TensorRT; embedder and conditioner run in ONNX Runtime on the CPU, their results are cached anyway.

    The decoder of a model on latents runs in ONNX Runtime too, on the GPU where the installed build can.

    Args:
        precision: which engine: "fp16", "bf16", "int8", "fp32", or "auto" for the first of fp16, bf16 and fp32 that the bundle has a
            graph for.
        threads: compute threads of ONNX Runtime, 0 for one per core.
        engines: folder of the engines, the bundle's own unless given.
        module: the TensorRT module, `tensorrt` unless given.
        cuda: the device, the first one unless given.
        graphs: what runs the other parts of the bundle, unless as above.
    """

    name = "tensorrt"
    size_multiple: int | None = None  # an engine is built for one size

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: str = "auto",
        threads: int = 0,
        engines: Path | None = None,
        module: Any = None,
        cuda: Cuda | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        if precision not in ("auto", *PRECISIONS):
            known = ", ".join(("auto", *PRECISIONS))
            raise BackendUnavailable(
                f"precision of the tensorrt backend must be one of {known}, not {precision!r}"
            )
        self.manifest = bundle.manifest
        self.precision = _half(bundle) if precision == "auto" else precision
        self._trt = module if module is not None else import_module("tensorrt")
        self._cuda = cuda if cuda is not None else Cuda()
        on_gpu = (CUDA, CPU) if CUDA in ort.get_available_providers() else (CPU,)
        self._graphs = graphs or Graphs(bundle, session_options(threads), on_gpu)
        self.conditioner_rows = CONDITIONER_ROWS if on_gpu[0] == CPU else CONDITIONER_ROWS_GPU
        self._state = [entry.name for entry in bundle.manifest.state]
        device = Device(*self._cuda.device())
        file = find_engine(
            bundle, engines or bundle.path / FOLDER, self.precision, self._trt.__version__, device
        )
        self._engine = self._deserialise(file)
        self._profiles = self._batch_ranges()
        self.buckets: tuple[int, ...] | None = _buckets(self._profiles)
        self._lanes: dict[int, _Lane] = {}

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        return self._graphs.embed(labels, text)

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return self._graphs.modulate(timesteps, embeddings)

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        return self._graphs.decode(latents)

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        rows = len(x)
        bucket = next((size for size in self.buckets or () if size >= rows), None)
        if bucket is None:
            raise ValueError(f"{rows} rows are more than the engine takes ({max(self.buckets or (0,))})")
        lane = self._lanes.get(bucket) or self._open_lane(bucket)
        for name, value in zip(("x", *self._state), (x, *state), strict=True):
            lane.host[name][:rows] = value  # rows beyond keep what they had, nobody reads theirs
        self._cuda.launch(lane.graph)
        self._cuda.synchronise()
        return lane.host["output"][:rows].copy()

    def close(self) -> None:
        """Free the device; the backend cannot be used afterwards."""
        self._lanes.clear()
        self._cuda.close()

    def _deserialise(self, file: Path) -> Any:
        logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise BackendUnavailable(
                f"TensorRT cannot load {file}: build it again with python -m export.trt --force"
            )
        if engine.get_tensor_dtype("x") != self._trt.DataType.FLOAT:
            raise BackendUnavailable(f"{file} takes half precision: {OUTDATED}")
        return engine

    def _batch_ranges(self) -> list[tuple[int, int, int]]:
        """Smallest, tuned and largest batch of each optimisation profile."""
        count = self._engine.num_optimization_profiles
        shapes = [self._engine.get_tensor_profile_shape("x", k) for k in range(count)]
        return [cast(tuple[int, int, int], tuple(int(shape[0]) for shape in triple)) for triple in shapes]

    def _open_lane(self, bucket: int) -> _Lane:
        """Buffers, context and graph for batches of `bucket` rows; one uncaptured run first, which capture requires."""
        context = self._engine.create_execution_context()
        if context is None:
            raise BackendUnavailable(f"TensorRT has no memory for another context (batch {bucket})")
        profile = next(k for k, (low, _, high) in enumerate(self._profiles) if low <= bucket <= high)
        _require(
            context.set_optimization_profile_async(profile, self._cuda.stream),
            "set_optimization_profile_async",
        )
        shapes = self._shapes(bucket)
        host = {name: self._cuda.pinned(shape) for name, shape in shapes.items()}
        base = self._cuda.allocate(sum(_aligned(host[name].nbytes) for name in self._state))
        device = {}
        for name in self._state:
            device[name], base = base, base + _aligned(host[name].nbytes)
        device |= {name: self._cuda.allocate(host[name].nbytes) for name in ("x", "output")}
        for name, shape in shapes.items():
            if name != "output":
                host[name][...] = 0
                _require(context.set_input_shape(name, shape), f"set_input_shape({name})")
            _require(context.set_tensor_address(name, device[name]), f"set_tensor_address({name})")
        if context.infer_shapes():
            raise RuntimeError(f"TensorRT lacks the shapes of {', '.join(context.infer_shapes())}")

        def work() -> None:
            for name in ("x", *self._state):
                self._cuda.upload(device[name], host[name])
            _require(context.execute_async_v3(self._cuda.stream), "execute_async_v3")
            self._cuda.download(host["output"], device["output"])

        work()
        self._cuda.synchronise()
        lane = self._lanes[bucket] = _Lane(host, self._cuda.capture(work), context)
        return lane

    def _shapes(self, bucket: int) -> dict[str, tuple[int, ...]]:
        model = self.manifest.config
        shapes: dict[str, tuple[int, ...]] = {"x": (bucket, model.in_channels, *model.image_size)}
        shapes |= {entry.name: (bucket, *entry.shape) for entry in self.manifest.state}
        return {**shapes, "output": (bucket, model.out_channels, *model.image_size)}


def find_engine(bundle: Bundle, engines: Path, precision: str, version: str, device: Device) -> Path:
    """The engine of this precision whose record fits the bundle, TensorRT and the GPU, its content checked.

    Raises:
        BackendUnavailable: there is none, or it is stale, foreign or damaged; the message holds the command that builds it.
        BundleError: the bundle has no graph of this precision.
    """
    origin = engine_origin(
        bundle, precision, GRAPHS[precision][0], flavour="tensorrt", version=version, device=device
    )
    slot = CachedEngine.of(engines, origin)
    problem = slot.problem(origin)
    if problem is not None:
        where = "" if engines == bundle.path / FOLDER else f" --engines {engines}"
        raise BackendUnavailable(
            f"the {precision} engine for {device.name} ({device.capability}) and TensorRT {version} is {problem}: "
            f"build it with python -m export.trt {bundle.path} --precision {precision}{where}"
        )
    return slot.engine


def _half(bundle: Bundle) -> str:
    """The first precision with a graph; INT8 only by choice, since its pictures differ."""
    return next((name for name in ("fp16", "bf16") if GRAPHS[name][0] in bundle.manifest.files), "fp32")


def _buckets(profiles: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
    """Batch sizes worth a lane: the powers of two inside the profiles, and each profile's ends and tuned size."""
    sizes = {size for profile in profiles for size in profile}
    sizes |= {1 << k for low, _, high in profiles for k in range(high.bit_length()) if low <= 1 << k <= high}
    return tuple(sorted(sizes))


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def _require(done: bool, what: str) -> None:
    if not done:
        raise RuntimeError(f"TensorRT refused {what}")
