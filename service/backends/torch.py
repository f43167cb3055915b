"""PyTorch: runs a bundle's weights in the model's own code, on any device of torch, eager or compiled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import structlog
import torch
from safetensors import SafetensorError

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network, make_network
from ditserve.model.nets.lora import AdapterBank, Layers, adaptable_layers
from ditserve.model.nets.pipelines import PRECISIONS
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.adapters import AdapterFile
from ditserve.model.spec.block_cache import BlockCache
from ditserve.model.spec.bundle import PIPELINE, WEIGHTS, Bundle
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import NetworkConfig, size_multiples
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_folder import VAE
from ditserve.model.weights.lora import AdapterError, adapter_base, read_adapter
from ditserve.model.weights.stored import load_weights
from ditserve.service.backends import (
    CONDITIONER_ROWS,
    CONDITIONER_ROWS_GPU,
    BackendUnavailable,
    Floats,
    OutOfMemory,
    SentenceEncoder,
    load_pipeline_texts,
    opening_pipeline,
)
from ditserve.service.backends.adapters import BackendAdapters, RowUses, adapted
from ditserve.service.backends.overflow import refuse_overflow
from ditserve.service.backends.resident import GRAPH_SIZES, Slab
from ditserve.service.backends.state import StateArray, StateMemory
from ditserve.service.backends.torch_precision import chosen_kernels, compile_if_faster, own_precision
from ditserve.service.backends.torch_rows import TorchRows
from ditserve.service.backends.torch_stream import CudaStream, TorchStream, computing
from ditserve.service.fleet import LoadedAdapter
from ditserve.service.images import from_pixels, to_pixels

# Imported: it loads ONNX Runtime.
AUTOENCODER = "ditserve.service.backends.autoencoder"
# Imported: they load diffusers and transformers.
PIPELINES = "ditserve.model.nets.pipelines"

log = structlog.get_logger()


class TorchBackend:
    """A bundle in PyTorch.

    Args:
        threads: compute threads on the CPU, 0 for torch's own choice. Applies to the whole process.
        device: of torch, such as "cpu" or "cuda".
        compile: compile the backbone before the backend is open, on a GPU where that makes it faster.
        precision: fp32, bf16 or fp16; fp8 for a DiT of ours, with the linear layers of its blocks in FP8.
            "auto" is fp32, and for a DiT of ours on a GPU what the bundle's record allows and is measured to
            be the fastest.
        adapters: the files of the low-rank adapters that rows may be drawn with.

    Raises:
        BackendUnavailable: the bundle cannot be run so, its network overflows in this precision, or an
            adapter does not fit it.
    """

    name = "torch"
    buckets: tuple[int, ...] | None = None
    conditioner_rows = CONDITIONER_ROWS

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        device: str = "cpu",
        compile: bool = False,
        precision: str = "auto",
        adapters: Sequence[AdapterFile] = (),
    ) -> None:
        _refuse(precision, device)
        self.precision = "fp32" if precision == "auto" else precision
        if threads:
            torch.set_num_threads(threads)
        # By default torch computes fp32 convolutions in TF32.
        torch.backends.cudnn.allow_tf32 = False
        self.manifest = bundle.manifest
        config = bundle.manifest.config
        self.size_multiples = size_multiples(config)
        self._device = torch.device(device)
        self.state_memory: StateMemory = TorchMemory(self._device)
        self.stream: TorchStream | None = None
        self._side: Any = None
        if self._device.type != "cpu":
            self.conditioner_rows = CONDITIONER_ROWS_GPU
        if self._device.type == "cuda":
            self.buckets = GRAPH_SIZES
            self.stream, self._side = CudaStream(self._device), torch.cuda.Stream(self._device)
        self.text_encoder: SentenceEncoder | None = None
        self._decoder = self._graphs = None
        if (folder := bundle.path / PIPELINE / VAE).is_dir():
            self._decoder = self._open_decoder(folder, bundle.manifest)
        elif bundle.manifest.decoder != "identity":
            self._graphs = self._open_autoencoder(bundle, threads)
        if isinstance(config, PipelineConfig):
            self._model: Any = self._open_pipeline(bundle, config)
        else:
            self._model = self._own_network(bundle, config)
        self._backbone = self._model.backbone
        if isinstance(self._model, DiT):
            self.precision, self._backbone = own_precision(
                self._model, bundle.manifest, precision, adapted=bool(adapters)
            )
        self.adapters: BackendAdapters | None
        self.adapters = TorchAdapters(self._model, bundle, adapters, compiled=compile)
        if compile and isinstance(self._model, DiT):
            compile = compile_if_faster(self._model, self._backbone)
        elif compile and isinstance(self._model, UNet):
            self._backbone = torch.compile(self._backbone, dynamic=True)
        elif compile:
            self._model.compile_blocks()
        if self.precision != "fp32" and self.text_encoder is not None:
            refuse_overflow(self)
        self.kernels = chosen_kernels(self._model, compiled=compile)
        if compile:
            self._compile_now()

    def _compile_now(self) -> None:
        """Compile what a pass needs, where nobody waits for it: one row has code of its own."""
        config, began = self.manifest.config, time.perf_counter()
        for rows in (1, 2):
            state = tuple(np.zeros((rows, *entry.shape), np.float32) for entry in self.manifest.state)
            self.denoise(np.zeros((rows, config.in_channels, *config.image_size), np.float32), state)
        log.info("network compiled", seconds=round(time.perf_counter() - began, 1))

    def _own_network(self, bundle: Bundle, config: NetworkConfig) -> Network:
        lowered = self.precision != "fp32"
        if lowered and not isinstance(config, DiTConfig):
            raise BackendUnavailable(
                f"--precision {self.precision} of the torch backend is not for a U-Net: leave it out"
            )
        network, weights = make_network(config), bundle.file(WEIGHTS)
        try:
            network.load_state_dict(load_weights(bundle))
        except SafetensorError as error:
            raise BackendUnavailable(f"{weights} cannot be read: {error}") from None
        return network.eval().to(self._device)

    def _open_pipeline(self, bundle: Bundle, config: PipelineConfig) -> Any:
        """Open the transformer and the text encoders of an imported pipeline."""
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise BackendUnavailable(
                f"--precision {self.precision} is not for imported pipelines: choose among {known}"
            )
        folder = bundle.path / PIPELINE
        dtype = PRECISIONS[self.precision]
        self.text_encoder = load_pipeline_texts(bundle, self.precision)
        with opening_pipeline(bundle.manifest):
            network = import_module(f"{PIPELINES}.network")
            return network.open_network(folder, config, dtype=dtype, device=self._device)

    def _open_decoder(self, folder: Path, manifest: Manifest) -> Any:
        """Open the autoencoder of an imported pipeline."""
        with opening_pipeline(manifest):
            decoder = import_module(f"{PIPELINES}.decoder")
            return decoder.PipelineDecoder(folder, manifest.latents, device=self._device)

    def _open_autoencoder(self, bundle: Bundle, threads: int) -> Any:
        """Open the graphs of the bundle's autoencoder."""
        try:
            graphs = import_module(AUTOENCODER)
        except ModuleNotFoundError:
            raise BackendUnavailable(
                f"the autoencoder of {bundle.manifest.name} runs in ONNX Runtime, which is not installed: "
                "pip install 'ditserve[cpu]'"
            ) from None
        return graphs.open_autoencoder(bundle, threads=threads, cuda=self._device.type == "cuda")

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        with computing():
            sentences = None if text is None else self._tensor(text)
            return _array(self._model.embed(torch.from_numpy(labels).to(self._device), sentences))

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return tuple(_array(tensor) for tensor in self.modulate_there(timesteps, embeddings))

    def modulate_there(self, timesteps: Floats, embeddings: Floats) -> tuple[StateArray, ...]:
        with computing():
            return tuple(self._model.modulate(self._tensor(timesteps), self._tensor(embeddings)))

    def denoise(self, x: Floats, state: tuple[StateArray, ...]) -> Floats:
        with computing():
            return _array(self._backbone(self._tensor(x), self._tensors(state)))

    def with_block_cache(self, bundle: Bundle, cache: BlockCache) -> TorchBackend:
        own = isinstance(self._model, DiT) and self.precision == "fp32"
        return TorchCachingBackend(self, cache) if own else self

    def keep_rows(self, slabs: Sequence[Slab], *, slots: int, rows: int) -> TorchRows | None:
        if self.stream is None:
            return None

        def network(x: torch.Tensor, state: Sequence[torch.Tensor]) -> Any:
            return self._backbone(x, state)

        return TorchRows(
            network,
            self.manifest,
            slabs,
            self.stream,
            slots=slots,
            rows=rows,
            adapted=partial(adapted, self),
        )

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        if self._graphs is not None:
            return cast(npt.NDArray[np.uint8], self._graphs.decode(latents))
        if self._decoder is None:
            return to_pixels(latents)
        with computing(), self._beside():
            return to_pixels(_array(self._decoder.decode(torch.from_numpy(latents))))

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        if self._graphs is not None:
            return cast(Floats, self._graphs.encode(pixels))
        if self._decoder is None:
            return from_pixels(pixels, self.manifest.config.in_channels)
        with computing(), self._beside():
            return _array(self._decoder.encode(torch.from_numpy(from_pixels(pixels))))

    def close(self) -> None:
        """Free the weights; the backend cannot be used afterwards."""
        del self._model, self._backbone, self._graphs

    def _beside(self) -> Any:
        """Return the context of work that another thread does while the network runs: a stream of its own."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _tensor(self, array: Floats) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _tensors(self, state: tuple[StateArray, ...]) -> list[torch.Tensor]:
        return [torch.as_tensor(tensor, device=self._device) for tensor in state]


class TorchCachingBackend(TorchBackend):
    """A `TorchBackend` in two parts, a `CachingBackend`. It shares the network with `own`, which is fp32."""

    def __init__(self, own: TorchBackend, cache: BlockCache) -> None:
        self.__dict__.update(own.__dict__)
        self.block_cache = cache

    def trunk(self, x: Floats, state: tuple[StateArray, ...]) -> Floats:
        with computing():
            return _array(self._model.trunk(self._tensor(x), self._tensors(state), self.block_cache.blocks))

    def tail(self, x: Floats, state: tuple[StateArray, ...], change: Floats) -> Floats:
        with computing():
            arguments = self._tensor(x), self._tensors(state), self._tensor(change)
            return _array(self._model.tail(*arguments, self.block_cache.blocks))

    def close(self) -> None:
        """Leave the network to the backend that it is shared with."""


def _refuse(precision: str, device: str) -> None:
    """Raise `BackendUnavailable` for a precision that torch has not, or a device that is not there."""
    known = ("auto", *PRECISIONS, "fp8")
    if precision not in known:
        raise BackendUnavailable(
            f"precision of the torch backend must be one of {', '.join(known)}, not {precision!r}"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailable(f"device {device!r} is not there: torch sees no CUDA device")


class TorchAdapters:
    """The low-rank adapters of a network of torch.

    A pass with adapters runs eager where the network is to be `compiled`: it would be compiled again for
    every set of layers that are changed.
    """

    def __init__(
        self, network: Any, bundle: Bundle, files: Sequence[AdapterFile], *, compiled: bool = False
    ) -> None:
        self._bank, self._conditioner = AdapterBank({}, {}), frozenset[str]()
        self._compiled = compiled
        self.loaded: tuple[LoadedAdapter, ...] = ()
        if not files:
            return
        try:
            with computing():
                self._load(network, bundle, files)
        except AdapterError as error:
            raise BackendUnavailable(str(error)) from None
        except OutOfMemory as error:
            raise BackendUnavailable(f"too little memory for the adapters ({error}): remove some") from None

    def _load(self, network: Any, bundle: Bundle, files: Sequence[AdapterFile]) -> None:
        conditioner, backbone = adaptable_layers(network, bundle.manifest.config)
        self._conditioner = frozenset(_inner(conditioner))
        layers = _inner(conditioner) | _inner(backbone)
        base, translate = adapter_base(bundle), _translation(bundle.manifest)
        read = {file.name: read_adapter(file, layers, base=base, translate=translate) for file in files}
        self._bank = AdapterBank(layers, {name: adapter.terms for name, adapter in read.items()})
        self.loaded = tuple(LoadedAdapter(file.name, file.version, read[file.name].rank) for file in files)

    def of_conditioner(self, uses: RowUses) -> RowUses:
        return tuple(use for use in uses if self._bank.reached(use.name) & self._conditioner)

    @contextmanager
    def applied(self, rows: Sequence[RowUses]) -> Iterator[None]:
        named = [[(use.name, use.scale) for use in uses] for uses in rows]
        eager = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        with eager, self._bank.applied(named):
            yield


def _inner(layers: Layers) -> dict[str, torch.nn.Linear]:
    """Return layers by their names in the module of diffusers, for that of an imported pipeline."""
    return {name.removeprefix("transformer."): layer for name, layer in layers.items()}


def _translation(manifest: Manifest) -> Any:
    """Return what renames the layers of other projects, for a family that diffusers has names of."""
    if not isinstance(manifest.config, PipelineConfig):
        return None
    return import_module(f"{PIPELINES}.lora").translation(manifest.config.family)


class TorchMemory:
    """A `StateMemory` of tensors on a device of torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def zeros(self, rows: int, shape: tuple[int, ...]) -> torch.Tensor:
        with computing():
            # Unlike those of torch, numpy's zeros take no memory of the host before they are written to.
            return torch.from_numpy(np.zeros((rows, *shape), np.float32)).to(self._device)

    def write(self, array: torch.Tensor, places: Sequence[int] | slice, values: StateArray) -> None:
        with computing():
            array[places] = torch.as_tensor(values, device=self._device)

    def take(self, array: torch.Tensor, places: Sequence[int], out: torch.Tensor) -> None:
        with computing():
            rows = torch.tensor(places, device=self._device)
            torch.index_select(array, 0, rows, out=out[: len(places)])


def _array(tensor: torch.Tensor) -> Floats:
    return cast(Floats, tensor.cpu().numpy())
