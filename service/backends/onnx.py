"""ONNX Runtime: runs a bundle's graphs on the CPU by default, the backbone elsewhere by choice of provider.

The runtime releases the interpreter lock while it computes. Inputs are read in place; outputs are arrays of
their own. The conditioner runs on the same device as the backbone, in fp32: of a DiT-XL/2 it has a third of
the weights. The engine caches its results in the host's memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import structlog

from ditserve.model.spec.block_cache import BlockCache
from ditserve.model.spec.bundle import PIPELINE, TAIL, TRUNK, WEIGHTS, Bundle
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import size_multiples
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.sizes import Size
from ditserve.service.backends import (
    CONDITIONER_ROWS,
    CONDITIONER_ROWS_GPU,
    BackendUnavailable,
    Floats,
    SentenceEncoder,
    load_pipeline_texts,
)
from ditserve.service.backends.adapters import BackendAdapters
from ditserve.service.backends.autoencoder import AutoencoderGraphs
from ditserve.service.backends.precision import open_backbone
from ditserve.service.backends.resident import GRAPH_SIZES
from ditserve.service.backends.runners import CudaGraphRunner, DataParallelRunner, PartRunner, RowRunner
from ditserve.service.backends.sessions import (
    BACKBONES,
    CPU,
    CUDA,
    TENSORRT,
    cuda_entry,
    open_session,
    provider_entries,
    require_providers,
    run_session,
    session_options,
)
from ditserve.service.backends.state import HostMemory, StateMemory
from ditserve.service.images import from_pixels, to_pixels

# The bytes of the stored weights above which one copy of the backbone must do. A DiT-L/2 has 916 MB in half
# precision, a DiT-B/2 260.
LARGE_BYTES = 600_000_000

log = structlog.get_logger()


class AuxiliaryGraphs:
    """Embedder, conditioner, decoder and encoder of a bundle; the methods of `Backend` but for `denoise`.

    They run on `providers`, but for the embedder, which looks up rows of a table, on the CPU.
    """

    def __init__(
        self, bundle: Bundle, options: ort.SessionOptions, providers: Sequence[str] = (CPU,)
    ) -> None:
        manifest = bundle.manifest
        self._factors = [factor.name for factor in manifest.factors]
        self._embedding_size, self._text_width = manifest.embedding_size, manifest.config.text_width
        conditional = bool(self._factors or self._text_width)
        self._embedder = open_session(bundle, "embedder.onnx", options) if conditional else None
        self._conditioner = open_session(
            bundle, "conditioner.onnx", options, provider_entries(bundle, "fp32", providers)
        )
        self._channels = manifest.config.in_channels
        latent = manifest.decoder != "identity"
        self._autoencoder = AutoencoderGraphs(bundle, options, providers) if latent else None
        self._state = [tensor.name for tensor in manifest.state]
        # The decoder runs in a thread of its own, and must not use the GPU during a capture.
        self.capture_lock = Lock()

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        """Return embeddings (B, E) of class indices (B, F) and of sentence encodings (B, text_width).

        A row of zeros stands for no text, and so does None.
        """
        if self._embedder is None:
            return np.zeros((len(labels), self._embedding_size), np.float32)
        inputs: dict[str, npt.NDArray[Any]] = {
            name: np.ascontiguousarray(labels[:, k]) for k, name in enumerate(self._factors)
        }
        if self._text_width:
            inputs["text"] = np.zeros((len(labels), self._text_width), np.float32) if text is None else text
        return run_session(self._embedder, ["embedding"], inputs)[0]

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        inputs = {"timestep": timesteps, "embedding": embeddings}
        return tuple(run_session(self._conditioner, self._state, inputs))

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        if self._autoencoder is None:
            return to_pixels(latents)
        with self.capture_lock:
            return self._autoencoder.decode(latents)

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        if self._autoencoder is None:
            return from_pixels(pixels, self._channels)
        with self.capture_lock:
            return self._autoencoder.encode(pixels)

    def close(self) -> None:
        """Free the sessions' memory; the graphs cannot be run afterwards."""
        del self._embedder, self._conditioner, self._autoencoder


class OnnxBackend:
    """A bundle in ONNX Runtime, made of its parts by `open_onnx`.

    Args:
        graphs: all but the backbone.
        precision: of the backbone.
        backbone: the backbone for pictures of any size that its graph takes.
        cuda_graph: the backbone for the bundle's own size if its kernels are captured, else None.
        size_multiples: see `Backend`.
        conditioner_rows: see `Backend`.
        text_encoder: see `Backend`.
        open_part: opens a graph that has a part of the backbone.
    """

    name = "onnx"
    kernels = ""
    state_memory: StateMemory = HostMemory()
    adapters: BackendAdapters | None = None

    def __init__(
        self,
        manifest: Manifest,
        graphs: AuxiliaryGraphs,
        *,
        precision: str,
        backbone: RowRunner,
        cuda_graph: CudaGraphRunner | None,
        size_multiples: Size | None,
        conditioner_rows: int,
        text_encoder: SentenceEncoder | None = None,
        open_part: Callable[[Bundle, str], RowRunner],
    ) -> None:
        self.manifest, self.precision = manifest, precision
        self.text_encoder = text_encoder
        self.size_multiples, self.conditioner_rows = size_multiples, conditioner_rows
        self.buckets: tuple[int, ...] | None = GRAPH_SIZES if cuda_graph else None
        self._graphs, self._backbone, self._open_part = graphs, backbone, open_part
        self._own_size: RowRunner = cuda_graph or backbone
        self._state = [tensor.name for tensor in manifest.state]

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        return self._graphs.embed(labels, text)

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return self._graphs.modulate(timesteps, embeddings)

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        own_size = x.shape[2:] == self.manifest.config.image_size
        runner = self._own_size if own_size else self._backbone
        return runner.run(["output"], self._inputs(x, state))[0]

    def with_block_cache(self, bundle: Bundle, cache: BlockCache) -> OnnxBackend:
        trunk, tail = (self._open_part(bundle, name) for name in (TRUNK, TAIL))
        return OnnxCachingBackend(self, cache, trunk, tail)

    def _inputs(self, x: Floats, state: tuple[Floats, ...]) -> dict[str, npt.NDArray[Any]]:
        return {"x": x, **dict(zip(self._state, state, strict=True))}

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        return self._graphs.decode(latents)

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        return self._graphs.encode(pixels)

    def close(self) -> None:
        """Free the sessions' memory; the backend cannot be used afterwards."""
        self._backbone.close()
        self._own_size.close()
        self._graphs.close()
        del self._backbone, self._own_size


class OnnxCachingBackend(OnnxBackend):
    """An `OnnxBackend` in two parts, a `CachingBackend`, in fp32. It shares all the rest with `own`."""

    def __init__(self, own: OnnxBackend, cache: BlockCache, trunk: RowRunner, tail: RowRunner) -> None:
        self.__dict__.update(own.__dict__)
        self.precision, self.block_cache = "fp32", cache
        self._trunk, self._tail = trunk, tail

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        return self.tail(x, state, self.trunk(x, state))

    def trunk(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        return self._trunk.run(["change"], self._inputs(x, state))[0]

    def tail(self, x: Floats, state: tuple[Floats, ...], change: Floats) -> Floats:
        return self._tail.run(["output"], {**self._inputs(x, state), "change": change})[0]

    def close(self) -> None:
        """Free the sessions of the parts."""
        self._trunk.close()
        self._tail.close()
        del self._trunk, self._tail


def open_onnx(
    bundle: Bundle,
    *,
    threads: int = 0,
    precision: str = "auto",
    providers: Sequence[str] = (CPU,),
    spin: bool = False,
) -> OnnxBackend:
    """Open a bundle in ONNX Runtime.

    Args:
        threads: compute threads, 0 for one per core. On the CPU they share out the rows of a batch
            (`DataParallelRunner`).
        precision: "fp32", "fp16" or "int8" if the bundle has it, or "auto": see `open_backbone`.
        providers: execution providers by preference, such as
            ("CUDAExecutionProvider", "CPUExecutionProvider").
        spin: let idle compute threads wait busily. It may help on cores of one's own. Beside an API and a
            queue on two cores it cost 72 % more processor time, and a step of 8 rows took half as long again.

    Raises:
        BackendUnavailable: a precision or provider that is not there, or a graph that cannot be loaded.
        BundleError: the bundle lacks a graph.
    """
    known = ("auto", *BACKBONES)
    if precision not in known:
        raise BackendUnavailable(
            f"precision of the onnx backend must be one of {', '.join(known)}, not {precision!r}"
        )
    require_providers(providers)
    pipeline = isinstance(bundle.manifest.config, PipelineConfig)
    if pipeline and precision not in ("auto", "fp32"):
        raise BackendUnavailable(
            f"{bundle.manifest.name} is an imported pipeline, whose graphs are in fp32: "
            "--backend torch computes it in half precision"
        )
    threads = threads or len(os.sched_getaffinity(0))
    options = session_options(threads, spin=spin)
    # Conditioner and decoder do not run on TensorRT, but on the next provider.
    auxiliary_providers = [name for name in providers if name != TENSORRT] or [CPU]
    graphs = AuxiliaryGraphs(bundle, options, auxiliary_providers)
    chosen, session = open_backbone(bundle, precision, options, providers)
    cuda_graph = None
    if providers[0] == CUDA:
        cuda_graph = open_cuda_graph(bundle, chosen, providers, graphs.capture_lock)
    parallel = threads if providers[0] == CPU else 1

    def open_part(bundle: Bundle, name: str) -> RowRunner:
        entries, options = provider_entries(bundle, "fp32", providers), session_options(threads, spin=spin)
        session = open_session(bundle, name, options, entries)
        return PartRunner(_data_parallel(bundle, name, session, options, parallel), session)

    return OnnxBackend(
        bundle.manifest,
        graphs,
        precision=chosen,
        backbone=_data_parallel(bundle, BACKBONES[chosen], session, options, parallel),
        cuda_graph=cuda_graph,
        size_multiples=graph_size_multiples(session.get_inputs()[0].shape),
        conditioner_rows=CONDITIONER_ROWS if auxiliary_providers[0] == CPU else CONDITIONER_ROWS_GPU,
        text_encoder=load_pipeline_texts(bundle) if pipeline else None,
        open_part=open_part,
    )


def open_cuda_graph(
    bundle: Bundle, precision: str, providers: Sequence[str], capture_lock: Lock
) -> CudaGraphRunner | None:
    """Open the backbone for pictures of the bundle's own size, with its kernels captured.

    Return None, and log why, if the runtime cannot capture them.
    """
    config, options = bundle.manifest.config, session_options(1)
    multiples = size_multiples(config)
    if multiples:
        # A free side is named after its factor ("4*rows"). With the factors fixed, all that depends on the
        # size alone is computed when the graph is loaded.
        names = ("frames", "rows", "columns")[-len(multiples) :]
        for name, multiple, side in zip(names, multiples, config.image_size, strict=True):
            dimension = f"{multiple}*{name}" if multiple > 1 else name
            options.add_free_dimension_override_by_name(dimension, side)
    entries = [cuda_entry(enable_cuda_graph="1") if name == CUDA else name for name in providers]
    try:
        session = open_session(bundle, BACKBONES[precision], options, entries)
        return CudaGraphRunner(session, (config.out_channels, *config.image_size), capture_lock)
    except BackendUnavailable as error:
        log.info("kernels are launched one by one", because=str(error))
        return None


def _data_parallel(
    bundle: Bundle, name: str, session: ort.InferenceSession, options: ort.SessionOptions, threads: int
) -> DataParallelRunner:
    """Return the backbone in the graph `name`, or a part of it, on this many threads.

    On several its weights are in memory twice, except for a large model. The operators of that are so large
    that threads which share them hardly wait: 8 rows of a DiT-B/2 took 1.05 times as long on two cores.
    """
    if threads == 1 or weights_bytes(bundle.manifest) > LARGE_BYTES:
        return DataParallelRunner(session, session, threads=1)
    options.intra_op_num_threads = 1
    single = open_session(bundle, name, options)
    return DataParallelRunner(single, session, threads=threads)


def weights_bytes(manifest: Manifest) -> int:
    """Return the bytes of the stored weights of the network, which are a pipeline's where it was imported."""
    stored = (WEIGHTS, f"{PIPELINE}/transformer/")
    return sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(stored))


def graph_size_multiples(shape: Sequence[int | str]) -> Size | None:
    """Return what each side must be a multiple of, or None if they are fixed.

    `shape` is that of the graph's input: ("batch", 3, "4*rows", "4*columns") gives (4, 4), ("batch", 3, 8, 8)
    None.
    """
    sides = shape[2:]
    if not all(isinstance(side, str) for side in sides):
        return None
    return tuple(int(str(side).rpartition("*")[0] or "1") for side in sides)
