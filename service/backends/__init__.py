"""What runs the network: one protocol, and the table of its implementations.

An implementation is imported only when chosen, so that neither torch nor onnxruntime is loaded by who does not use it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final, Protocol, cast

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.bundle import Bundle, Manifest

Floats = npt.NDArray[np.float32]

BACKENDS: Final[dict[str, str]] = {
    "onnx": "ditserve.service.backends.onnx:OnnxBackend",
    "torch": "ditserve.service.backends.torch:TorchBackend",
    "tensorrt": "ditserve.service.backends.tensorrt:TensorRtBackend",
}
TEXT: Final = "ditserve.service.backends.text"
CONDITIONER_ROWS: Final = 8
CONDITIONER_ROWS_GPU: Final = 32  # a call for few rows is mostly the launching of kernels


class Backend(Protocol):
    """The network of one bundle on one device.

    Every method is row-wise: a row's numbers depend on that row alone (up to rounding when the batch size differs). Inputs are
    C-contiguous and not modified; outputs belong to the caller. Any method may raise `OutOfMemory`.
    `decode` may be called from one thread while another calls the rest.
    """

    name: str
    manifest: Manifest
    buckets: tuple[int, ...] | None  # the batch sizes `denoise` takes; None for any
    conditioner_rows: (
        int  # of every call of `modulate`, so that its answer does not depend on how many are wanted
    )
    precision: str  # what the backbone computes in: fp32, fp16, bf16 or int8
    size_multiple: int | None  # H and W may be any multiples of it; None: only the manifest's own

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        """Class indices (B, F), null = number of classes, and sentence encodings (B, text_size) to condition embeddings (B, E).

        A row of zeros stands for no text, and so does None.
        """
        ...

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        """Timesteps (B,) and embeddings (B, E) to the condition state, (B, *shape) each, in the manifest's order."""
        ...

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        """Latents (B, C, H, W) and their condition state to the network's output (B, C_out, H, W)."""
        ...

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        """Latents (B, C, H, W) to pixels (B, H, W, 3)."""
        ...

    def close(self) -> None: ...


class OutOfMemory(MemoryError):
    """The device has no memory for this many rows; fewer may fit."""


class BackendUnavailable(Exception):
    """The chosen backend cannot run here; the message is one sentence with the remedy."""


def load_backend(name: str, bundle: Bundle, **options: Any) -> Backend:
    """Open `bundle` on the backend `name`; `options` are its own.

    Raises:
        BackendUnavailable: no such backend, a package it needs is not installed, or it cannot run this bundle.
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
            f"backend {name!r} needs the package {package}, which is not installed"
        ) from error
    return cast(Backend, implementation(bundle, **options))


class TextEncoder(Protocol):
    """`size` numbers a sentence, never all zero. Encoders of equal `key` give equal encodings."""

    size: int
    key: str

    def encode(self, sentence: str) -> Floats:
        """(size,)"""
        ...


def load_text_encoder(name: str) -> TextEncoder:
    """The encoder `name`: one that comes as a package, or a folder.

    Raises:
        BackendUnavailable: a package it needs is not installed, or it is no encoder this service can run.
    """
    try:
        return cast(TextEncoder, import_module(TEXT).open_encoder(name))
    except ImportError as error:
        raise BackendUnavailable(
            f"text encoder {name!r} needs the package {error.name}, which is not installed"
        ) from error
