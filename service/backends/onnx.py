"""ONNX Runtime: runs a bundle's graphs on the CPU by default, the backbone elsewhere by choice of execution provider.

The runtime releases the interpreter lock while it computes. Inputs are read in place; outputs are arrays of their own. The
conditioner runs where the backbone does, in fp32: of a DiT-XL/2 it has a third of the weights. What it gives is cached by the engine, in
the host's memory.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from threading import Lock
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import structlog

from ditserve.model.spec.bundle import Bundle, Manifest
from ditserve.model.spec.engine_cache import FOLDER, NoGpuError, engine_origin, first_gpu
from ditserve.model.spec.network_config import size_multiple as free_sides
from ditserve.service.backends import CONDITIONER_ROWS, CONDITIONER_ROWS_GPU, BackendUnavailable, Floats
from ditserve.service.backends.rows import SIZES, RecordedRows, Rows, SharedRows, run
from ditserve.service.images import to_pixels

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
BACKBONES: Final = {"fp32": "backbone.onnx", "fp16": "backbone.fp16.onnx", "int8": "backbone.int8.onnx"}
NEEDS: Final = {  # provider → what to install for it
    CUDA: "onnxruntime-gpu[cuda,cudnn] in place of onnxruntime",
    TENSORRT: "onnxruntime-gpu[cuda,cudnn] in place of onnxruntime, and tensorrt-cu13",
}
OUTDATED: Final = "an older export wrote it; write it again with python -m export.half or export.int8"
QUALITY_BUDGET = 0.01  # relative growth of the Fréchet distance that "auto" accepts of INT8
TIMING_S, TIMED = 2.0, 15  # pairs of steps, when a precision is chosen by speed
FASTER = 1.05  # times fp32, below which noise would decide and pictures change from start to start

log = structlog.get_logger()


class Graphs:
    """Embedder, conditioner and decoder of a bundle; each a part of `Backend`.

    `providers` are where conditioner and decoder run; the embedder looks up rows of a table.
    """

    def __init__(
        self, bundle: Bundle, options: ort.SessionOptions, providers: Sequence[str] = (CPU,)
    ) -> None:
        manifest = bundle.manifest
        self._conditions = [factor.name for factor in manifest.factors]
        self._width, self._text_size = manifest.embedding_size, manifest.config.text_size
        conditional = bool(self._conditions or self._text_size)
        self._embedder = open_session(bundle, "embedder.onnx", options) if conditional else None
        self._conditioner = open_session(
            bundle, "conditioner.onnx", options, provider_entries(bundle, "fp32", providers)
        )
        self._decoder = None
        if manifest.decoder != "identity":
            self._decoder = open_session(bundle, "decoder.onnx", options, providers)
        # The decoder runs in another thread, and no work on the GPU may come between what is recorded.
        self._quiet = Lock()
        self._state = [entry.name for entry in manifest.state]

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        """Class indices (B, F) and sentence embeddings (B, text_size), a row of zeros or None standing for no text → (B, E)."""
        if self._embedder is None:
            return np.zeros((len(labels), self._width), np.float32)
        inputs: dict[str, npt.NDArray[Any]] = {
            name: np.ascontiguousarray(labels[:, k]) for k, name in enumerate(self._conditions)
        }
        if self._text_size:
            inputs["text"] = np.zeros((len(labels), self._text_size), np.float32) if text is None else text
        return run(self._embedder, ["embedding"], inputs)[0]

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return tuple(run(self._conditioner, self._state, {"timestep": timesteps, "embedding": embeddings}))

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        if self._decoder is None:
            return to_pixels(latents)
        with self._quiet:
            return to_pixels(run(self._decoder, ["image"], {"latent": latents})[0])


class OnnxBackend(Graphs):
    """A bundle in ONNX Runtime.

    Args:
        threads: compute threads, 0 for one per core. On the CPU they share out the rows of a batch (`SharedRows`).
        precision: "fp32", "fp16" or "int8" where the bundle has it, or "auto": on the CPU INT8 if the bundle's own record says that it
            costs less than `QUALITY_BUDGET` and it is faster here, else fp32; on other providers fp16 if the bundle has it.
        providers: execution providers in order of preference, such as ("CUDAExecutionProvider", "CPUExecutionProvider").
        spin: let idle compute threads wait busily. Worth a try on cores of one's own; beside an API and a queue on two cores
            it cost 72 % more processor time and half as much time again per step of 8 rows.
    """

    name = "onnx"
    buckets: tuple[int, ...] | None = None
    conditioner_rows = CONDITIONER_ROWS

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        precision: str = "auto",
        providers: Sequence[str] = (CPU,),
        spin: bool = False,
    ) -> None:
        known = ("auto", *BACKBONES)
        if precision not in known:
            raise BackendUnavailable(
                f"precision of the onnx backend must be one of {', '.join(known)}, not {precision!r}"
            )
        require(providers)
        self.manifest = bundle.manifest
        threads = threads or len(os.sched_getaffinity(0))
        options = session_options(threads, spin=spin)
        conditioning = [each for each in providers if each != TENSORRT] or [CPU]
        super().__init__(bundle, options, conditioning)
        if conditioning[0] != CPU:
            self.conditioner_rows = CONDITIONER_ROWS_GPU
        self.precision, session = _backbone(bundle, precision, options, providers)
        self.size_multiple = size_multiple(session.get_inputs()[0].shape)
        shared = threads if providers[0] == CPU else 1
        self._backbone: Rows = _shared(bundle, self.precision, session, options, shared)
        self._own_size: Rows = self._backbone
        if providers[0] == CUDA and (graph := recorded(bundle, self.precision, providers, self._quiet)):
            self._own_size, self.buckets = graph, SIZES

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        inputs: dict[str, npt.NDArray[Any]] = {"x": x, **dict(zip(self._state, state, strict=True))}
        rows = self._own_size if x.shape[2:] == self.manifest.config.image_size else self._backbone
        return rows.run(["output"], inputs)[0]

    def close(self) -> None:
        """Free the sessions' memory; the backend cannot be used afterwards."""
        self._backbone.close()
        self._own_size.close()
        del self._embedder, self._conditioner, self._backbone, self._own_size, self._decoder


def session_options(threads: int, *, spin: bool = False) -> ort.SessionOptions:
    """Of every session: so many threads, and no log of its own below errors."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    return options


def require(providers: Sequence[str]) -> None:
    """Raises BackendUnavailable, naming the package to install, unless this ONNX Runtime has all `providers`."""
    for name in providers:
        if name not in ort.get_available_providers():
            known = ", ".join((CPU, *NEEDS))
            remedy = f"install {NEEDS[name]}" if name in NEEDS else f"choose among {known}"
            raise BackendUnavailable(f"this ONNX Runtime has no {name}: {remedy}")


def open_session(
    bundle: Bundle,
    name: str,
    options: ort.SessionOptions,
    providers: Sequence[str | tuple[str, dict[str, str]]] = (CPU,),
) -> ort.InferenceSession:
    """A session of the graph `name` that really runs on the first of `providers`.

    Raises:
        BackendUnavailable: it cannot be loaded, or would quietly run elsewhere.
        BundleError: the bundle lacks it.
    """
    path = bundle.file(name)
    if providers[0] != CPU:
        ort.preload_dlls()  # CUDA's libraries may be packages, which the system's loader does not know
    try:
        session = ort.InferenceSession(path, options, providers=list(providers))
    except Exception as error:  # the runtime's exceptions share no base class of their own
        raise BackendUnavailable(
            f"{path} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}"
        ) from error
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if first not in session.get_providers():
        raise BackendUnavailable(
            f"{first} does not start and ONNX Runtime would compute on the CPU instead: install {NEEDS.get(first, first)}"
        )
    return session


def provider_entries(
    bundle: Bundle, precision: str, providers: Sequence[str]
) -> list[str | tuple[str, dict[str, str]]]:
    """`providers` as a session takes them. CUDA computes fp32 in fp32 (its default is TF32: errors of 1e-3, which change with the
    batch); TensorRT keeps its engines in the bundle, by the same keys as `export.trt`'s.

    Raises:
        BackendUnavailable: TensorRT is asked for and there is no GPU.
    """
    return [
        _cached(bundle, precision)
        if name == TENSORRT
        else (name, {"use_tf32": "0"})
        if name == CUDA
        else name
        for name in providers
    ]


def _cached(bundle: Bundle, precision: str) -> tuple[str, dict[str, str]]:
    try:
        device = first_gpu()
        version = f"{ort.__version__}-{metadata.version('tensorrt-cu13')}"
    except NoGpuError as error:
        raise BackendUnavailable(f"{TENSORRT} needs a GPU, and {error}") from None
    except metadata.PackageNotFoundError:
        raise BackendUnavailable(
            f"{TENSORRT} needs the package tensorrt-cu13, which is not installed"
        ) from None
    origin = engine_origin(
        bundle, precision, BACKBONES[precision], flavour="onnxruntime", version=version, device=device
    )
    folder = bundle.path / FOLDER / origin.folder
    return TENSORRT, {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": origin.key({})[:16],
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def _backbone(
    bundle: Bundle, wanted: str, options: ort.SessionOptions, providers: Sequence[str]
) -> tuple[str, ort.InferenceSession]:
    """The precision and the session that `wanted` comes to."""

    def opened(precision: str) -> ort.InferenceSession:
        entries = provider_entries(bundle, precision, providers)
        session = open_session(bundle, BACKBONES[precision], options, entries)
        if session.get_inputs()[0].type != "tensor(float)":
            raise BackendUnavailable(f"{bundle.file(BACKBONES[precision])} takes half precision: {OUTDATED}")
        return session

    if wanted != "auto":
        if wanted == "int8":
            options.add_session_config_entry("session.x64quantprecision", _exact_products(bundle.manifest))
        return wanted, opened(wanted)
    if providers[0] != CPU:
        chosen = "fp16" if BACKBONES["fp16"] in bundle.manifest.files else "fp32"
        return chosen, opened(chosen)
    exact = opened("fp32")
    against = _against_int8(bundle)
    if against is None:
        options.add_session_config_entry("session.x64quantprecision", _exact_products(bundle.manifest))
        int8 = opened("int8")
        speedup = _speedup(exact, int8, bundle.manifest)
        if speedup >= FASTER:
            log.info("precision chosen", precision="int8", speedup=round(speedup, 2))
            return "int8", int8
        against = f"it is no faster here ({speedup:.2f} times)"
    log.info("precision chosen", precision="fp32", against_int8=against)
    return "fp32", exact


def _shared(
    bundle: Bundle, precision: str, session: ort.InferenceSession, options: ort.SessionOptions, threads: int
) -> SharedRows:
    """The backbone on so many threads; on several its weights are in memory twice."""
    if threads == 1:
        return SharedRows(session, session, threads=1)
    options.intra_op_num_threads = 1
    alone = open_session(bundle, BACKBONES[precision], options)
    return SharedRows(alone, session, threads=threads)


def recorded(bundle: Bundle, precision: str, providers: Sequence[str], quiet: Lock) -> RecordedRows | None:
    """The backbone for pictures of the bundle's own size, its kernels recorded; None, said in the log, if the runtime cannot."""
    config, options = bundle.manifest.config, session_options(1)
    multiple = free_sides(config)
    for name, side in zip(("rows", "columns"), config.image_size, strict=True):
        if multiple:  # a free side is named after its factor: what depends on it alone is then computed when the graph is loaded
            options.add_free_dimension_override_by_name(f"{multiple}*{name}" if multiple > 1 else name, side)
    entries = [
        (name, {"use_tf32": "0", "enable_cuda_graph": "1"}) if name == CUDA else name for name in providers
    ]
    try:
        session = open_session(bundle, BACKBONES[precision], options, entries)
        return RecordedRows(session, (config.out_channels, *config.image_size), quiet)
    except BackendUnavailable as error:
        log.info("kernels are launched one by one", because=str(error))
        return None


def _against_int8(bundle: Bundle) -> str | None:
    """Why the bundle's own record does not allow INT8, or None."""
    if BACKBONES["int8"] not in bundle.manifest.files:
        return "the bundle has none"
    loss = bundle.manifest.metrics.get("int8_quality_loss")
    if loss is None:
        return "its cost in quality is not on record"
    return None if loss <= QUALITY_BUDGET else f"it costs {loss:.1%} of quality"


def _exact_products(manifest: Manifest) -> str:
    """Whether a CPU without VNNI must take its exact kernels: the fast ones saturate on 8-bit weights, but not on 7-bit ones."""
    return "0" if manifest.metrics.get("int8_weight_bits") == 7 else "1"


def _speedup(one: ort.InferenceSession, other: ort.InferenceSession, manifest: Manifest) -> float:
    """How many times as fast as `one` the `other` takes a step of one row: the median of pairs, which a busy machine slows alike.

    The first pair does not count; slow steps are paired once.
    """
    config, drawn = manifest.config, np.random.default_rng(0)
    shapes = {"x": (config.in_channels, *config.image_size)} | {
        each.name: each.shape for each in manifest.state
    }
    inputs = {name: drawn.standard_normal((1, *shape), np.float32) for name, shape in shapes.items()}

    def seconds(session: ort.InferenceSession) -> float:
        before = time.perf_counter()
        run(session, ["output"], inputs)
        return time.perf_counter() - before

    started = time.perf_counter()
    ratios = [seconds(one) / seconds(other)]
    while len(ratios) <= TIMED and (len(ratios) == 1 or time.perf_counter() - started < TIMING_S):
        ratios.append(seconds(one) / seconds(other))
    return statistics.median(ratios[1:])


def size_multiple(shape: Sequence[int | str]) -> int | None:
    """What height and width must be multiples of, from the input's shape such as ("batch", 3, "4*rows", "4*columns")."""
    factors = {side.rpartition("*")[0] or "1" for side in shape[2:] if isinstance(side, str)}
    return (
        int(factors.pop()) if len(factors) == 1 and all(isinstance(side, str) for side in shape[2:]) else None
    )
