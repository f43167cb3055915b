"""Backends that run the network: one protocol, and the table of its implementations.

An implementation is imported only when it is chosen, so that a process loads torch or onnxruntime
only to use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from typing import Any, Final, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.block_cache import BlockCache
from ditserve.model.spec.bundle import PIPELINE, Bundle
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.pipeline_config import INDEX, missing_package
from ditserve.model.spec.sizes import Size
from ditserve.model.spec.text_encoder import is_encoder_class
from ditserve.service.backends.adapters import BackendAdapters
from ditserve.service.backends.state import StateArray, StateMemory

Floats = npt.NDArray[np.float32]

BACKENDS: Final[dict[str, str]] = {
    "onnx": "ditserve.service.backends.onnx:open_onnx",
    "torch": "ditserve.service.backends.torch:TorchBackend",
    "tensorrt": "ditserve.service.backends.tensorrt:TensorRtBackend",
}
# The extra that brings what a backend imports.
EXTRAS: Final[dict[str, str]] = {"onnx": "cpu", "torch": "torch", "tensorrt": "gpu"}
TEXT: Final = "ditserve.service.backends.text"
OTHER_TEXTS: Final = "ditserve.service.backends.other_texts"
PIPELINE_TEXTS: Final = "ditserve.model.nets.pipelines.texts"
CONDITIONER_ROWS: Final = 8
# A call for few rows would be mostly the launching of kernels.
CONDITIONER_ROWS_GPU: Final = 32


class Backend(Protocol):
    """The network of one bundle on one device.

    Every method works row by row: a row's numbers depend on that row alone (up to rounding if the batch size
    differs). Inputs are C-contiguous and not modified; outputs belong to the caller. Latents and pixels of
    clips and volumes have one axis more, before H. Any method may raise `OutOfMemory`. `decode` and `encode`
    may be called from one thread while another calls the other methods.

    Args:
        buckets: the batch sizes that `denoise` takes; None for any.
        conditioner_rows: the rows of every call of `modulate`. With one fixed size, an answer does not depend
            on how many rows are needed.
        precision: of the backbone: fp32, fp16, bf16, int8 or fp8.
        kernels: what was chosen besides, such as "compiled"; empty where nothing was to be chosen.
        size_multiples: each side may be any multiple of its number; None for the manifest's own size only.
        text_encoder: that of an imported pipeline, which is part of its bundle; None for other models.
        state_memory: the memory that `denoise` reads the condition state from.
        adapters: those that are loaded beside the bundle; None for a backend that takes none.
    """

    name: str
    manifest: Manifest
    buckets: tuple[int, ...] | None
    conditioner_rows: int
    precision: str
    kernels: str
    size_multiples: Size | None
    text_encoder: SentenceEncoder | None
    state_memory: StateMemory
    adapters: BackendAdapters | None

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        """Return condition embeddings (B, E) of class indices (B, F) and sentence encodings (B, text_width).

        The null class of a factor is the number of its classes. A row of zeros stands for no text,
        and so does None.
        """
        ...

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        """Return the condition state of timesteps (B,) and embeddings (B, E).

        It is one tensor (B, *shape) per entry of the manifest, in the manifest's order.
        """
        ...

    def denoise(self, x: Floats, state: tuple[StateArray, ...]) -> Floats:
        """Return the network's output (B, C_out, H, W) for latents (B, C, H, W) and their condition state.

        The state is as `modulate` gives it, or rows of arrays of `state_memory`.
        """
        ...

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        """Return the pixels (B, H, W, 3) of latents (B, C, H, W)."""
        ...

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        """Return the latents (B, C, H, W) of pixels (B, H, W, 3): the mean, not a draw.

        Raises:
            InvalidRequest: the bundle has no encoder.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class BlockCaching(Protocol):
    """A backend whose network may have a block cache."""

    def with_block_cache(self, bundle: Bundle, cache: BlockCache) -> Backend:
        """Return this network with a block cache, a `CachingBackend`, or itself if it cannot have one here.

        The two share what they have in common.

        Raises:
            BackendUnavailable: its graphs cannot be loaded.
            BundleError: the bundle lacks them.
        """
        ...


@runtime_checkable
class CachingBackend(Protocol):
    """A backend whose first blocks may run without the rest of its network, and the rest without them."""

    block_cache: BlockCache

    def trunk(self, x: Floats, state: tuple[StateArray, ...]) -> Floats:
        """Return what the first blocks change of the tokens (B, h, w, D); arguments as for `denoise`."""
        ...

    def tail(self, x: Floats, state: tuple[StateArray, ...], change: Floats) -> Floats:
        """Return the output (B, C_out, H, W) where the first blocks make this change."""
        ...


NO_ENCODER: Final = "This worker has no encoder of pictures: export the model again, with its autoencoder."


class OutOfMemory(MemoryError):
    """A call for which the device has no memory; fewer rows may fit."""


class BackendUnavailable(ModelError):
    """A backend that cannot run here; the message is one sentence with the remedy."""


def load_backend(name: str, bundle: Bundle, **options: Any) -> Backend:
    """Open `bundle` on the backend `name`; `options` are those of the backend.

    Raises:
        BackendUnavailable: there is no such backend, a package it needs is not installed, or it cannot run
            this bundle.
        BundleError: the bundle lacks a file it needs.
    """
    if name not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {name!r}: choose among {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    try:
        implementation = getattr(import_module(module), attribute)
    except ImportError as error:
        package = error.name or str(error)
        raise BackendUnavailable(
            f"backend {name!r} needs the package {package}, which is not installed: "
            f"pip install 'ditserve[{EXTRAS[name]}]'"
        ) from error
    return cast(Backend, implementation(bundle, **options))


class SentenceEncoder(Protocol):
    """An encoder of sentences to `size` numbers, never all zero. Equal `key`s give equal encodings."""

    size: int
    key: str

    def encode(self, sentence: str) -> Floats:
        """Return the encoding (size,) of a sentence."""
        ...


def text_parts_key(manifest: Manifest) -> str:
    """Return a key that is equal for equal text encoders and tokenizers of an imported pipeline."""
    parts = (f"{PIPELINE}/text_encoder", f"{PIPELINE}/tokenizer", f"{PIPELINE}/{INDEX}")
    hashes = [entry.sha256 for name, entry in sorted(manifest.files.items()) if name.startswith(parts)]
    return sha256("".join([*hashes, str(manifest.config.text_width)]).encode()).hexdigest()


def load_pipeline_texts(bundle: Bundle, precision: str = "fp32") -> SentenceEncoder:
    """Open the text encoders of an imported pipeline, which run in torch, in fp32, bf16 or fp16.

    Raises:
        BackendUnavailable: a package they need is not installed, or one of them cannot be read.
    """
    manifest = bundle.manifest
    with opening_pipeline(manifest):
        texts = import_module(PIPELINE_TEXTS)
        folder, key = bundle.path / PIPELINE, f"{text_parts_key(manifest)}{precision}"
        encoder = texts.PipelineTexts(folder, manifest.config, key, precision)
    return cast(SentenceEncoder, encoder)


@contextmanager
def opening_pipeline(manifest: Manifest) -> Iterator[None]:
    """Raise `BackendUnavailable` for a part of an imported pipeline that cannot be opened here."""
    try:
        yield
    except ImportError as error:
        raise BackendUnavailable(missing_package(manifest.name, error)) from error
    except ModelError as error:
        raise BackendUnavailable(str(error)) from error


class NoBert(BackendUnavailable):
    """A folder with a text model of another kind than BERT."""


def load_text_encoder(name: str, tokens: int = 0) -> SentenceEncoder:
    """Open the encoder `name`; it gives so many token states.

    It is one that comes as a package, the folder of a BERT, which runs without PyTorch, that of another text
    model (CLIP, T5 …), which needs torch and transformers, or `package.module:Class`.

    Raises:
        BackendUnavailable: a package it needs is not installed, or the encoder cannot be run.
    """
    try:
        if is_encoder_class(name):
            return cast(SentenceEncoder, import_module(OTHER_TEXTS).open_class(name, tokens))
        try:
            return cast(SentenceEncoder, import_module(TEXT).open_encoder(name, tokens))
        except NoBert:
            folder = name.removeprefix("transformers:")
            return cast(SentenceEncoder, import_module(OTHER_TEXTS).open_folder(folder, tokens))
    except ImportError as error:
        raise BackendUnavailable(
            f"text encoder {name!r} needs the package {error.name}, which is not installed"
        ) from error
