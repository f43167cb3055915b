"""PyTorch: runs a bundle's weights in the model's own code, on any device of torch, eager or compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ditserve.model.nets.factory import make_network
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.network_config import size_multiple
from ditserve.service.backends import (
    CONDITIONER_ROWS,
    CONDITIONER_ROWS_GPU,
    BackendUnavailable,
    Floats,
    OutOfMemory,
)
from ditserve.service.images import to_pixels


class TorchBackend:
    """A bundle in PyTorch.

    Args:
        threads: compute threads on the CPU, 0 for torch's own choice. Applies to the whole process.
        device: of torch, such as "cpu" or "cuda".
        compile: compile the backbone; the first batch of each size then takes much longer.
    """

    name = "torch"
    precision = "fp32"
    buckets: tuple[int, ...] | None = None
    conditioner_rows = CONDITIONER_ROWS

    def __init__(
        self, bundle: Bundle, *, threads: int = 0, device: str = "cpu", compile: bool = False
    ) -> None:
        if bundle.manifest.decoder != "identity":
            decoder = bundle.manifest.decoder
            raise BackendUnavailable(f"the torch backend has no decoder {decoder!r}: choose the onnx backend")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BackendUnavailable(f"device {device!r} is not there: torch sees no CUDA device")
        if threads:
            torch.set_num_threads(threads)
        # By default torch computes fp32 convolutions in TF32.
        torch.backends.cudnn.allow_tf32 = False
        self.manifest = bundle.manifest
        config = bundle.manifest.config
        self.size_multiple = size_multiple(config)
        self._device = torch.device(device)
        if self._device.type != "cpu":
            self.conditioner_rows = CONDITIONER_ROWS_GPU
        self._model = make_network(config)
        weights = bundle.file("weights.safetensors")
        try:
            self._model.load_state_dict(load_file(weights))
        except SafetensorError as error:
            raise BackendUnavailable(f"{weights} cannot be read: {error}") from None
        self._model.eval().to(self._device)
        self._backbone = (
            torch.compile(self._model.backbone, dynamic=True) if compile else self._model.backbone
        )

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        with _computing():
            sentences = None if text is None else self._tensor(text)
            return _array(self._model.embed(torch.from_numpy(labels).to(self._device), sentences))

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        with _computing():
            state = self._model.modulate(self._tensor(timesteps), self._tensor(embeddings))
            return tuple(_array(tensor) for tensor in state)

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        with _computing():
            return _array(self._backbone(self._tensor(x), [self._tensor(tensor) for tensor in state]))

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        return to_pixels(latents)

    def close(self) -> None:
        """Free the weights; the backend cannot be used afterwards."""
        del self._model, self._backbone

    def _tensor(self, array: Floats) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _array(tensor: torch.Tensor) -> Floats:
    return cast(Floats, tensor.cpu().numpy())


@contextmanager
def _computing() -> Iterator[None]:
    """Compute without gradients, and raise `OutOfMemory` for torch's errors of memory."""
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error)) from error
    # The CPU allocator has no exception of its own.
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise OutOfMemory(str(error)) from error
        raise
