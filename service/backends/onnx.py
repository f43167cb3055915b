"""ONNX Runtime: runs a bundle's graphs on the CPU by default, elsewhere by choice of execution provider.

The runtime releases the interpreter lock while it computes. Inputs are read in place; outputs are arrays of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from model.bundle import Bundle
from service.backends import BackendUnavailable, Floats, OutOfMemory
from service.images import to_pixels

BACKBONES: Final = {"fp32": "backbone.onnx", "int8": "backbone.int8.onnx"}
_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|failed to allocate|out of memory|CUDNN_STATUS_ALLOC_FAILED", re.IGNORECASE
)


class OnnxBackend:
    """A bundle in ONNX Runtime.

    Args:
        threads: compute threads, 0 for one per core.
        precision: "fp32", or "int8" where the bundle has it.
        providers: execution providers in order of preference, such as ("CUDAExecutionProvider", "CPUExecutionProvider").
        spin: let idle compute threads wait busily. Worth a try on cores of one's own; beside an API and a queue on two cores
            it cost 72 % more processor time and half as much time again per step of 8 rows.
    """

    name = "onnx"
    buckets: tuple[int, ...] | None = None

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        precision: str = "fp32",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        spin: bool = False,
    ) -> None:
        if precision not in BACKBONES:
            raise BackendUnavailable(f"precision must be one of {', '.join(BACKBONES)}, not {precision!r}")
        missing = [provider for provider in providers if provider not in ort.get_available_providers()]
        if missing:
            raise BackendUnavailable(f"this ONNX Runtime has no {missing[0]}: install the build that has it")
        self.manifest = bundle.manifest
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        self._options.log_severity_level = 3
        self._providers = list(providers)
        self._embedder = self._open(bundle, "embedder.onnx")
        self._conditioner = self._open(bundle, "conditioner.onnx")
        self._backbone = self._open(bundle, BACKBONES[precision])
        self._decoder = None if bundle.manifest.decoder == "identity" else self._open(bundle, "decoder.onnx")
        self._factors = [factor.name for factor in bundle.manifest.factors]
        self._state = [entry.name for entry in bundle.manifest.state]

    def embed(self, labels: npt.NDArray[np.int64]) -> Floats:
        inputs = {name: np.ascontiguousarray(labels[:, k]) for k, name in enumerate(self._factors)}
        return run(self._embedder, ["embedding"], inputs)[0]

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return tuple(run(self._conditioner, self._state, {"timestep": timesteps, "embedding": embeddings}))

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        return run(self._backbone, ["output"], {"x": x, **dict(zip(self._state, state, strict=True))})[0]

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        images = latents if self._decoder is None else run(self._decoder, ["image"], {"latent": latents})[0]
        return to_pixels(images)

    def close(self) -> None:
        """Free the sessions' memory; the backend cannot be used afterwards."""
        del self._embedder, self._conditioner, self._backbone, self._decoder

    def _open(self, bundle: Bundle, name: str) -> ort.InferenceSession:
        path = bundle.file(name)
        try:
            return ort.InferenceSession(path, self._options, providers=self._providers)
        except Exception as error:  # the runtime's exceptions share no base class of their own
            raise BackendUnavailable(
                f"{path} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}"
            ) from error


def run(
    session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, npt.NDArray[Any]]
) -> list[Floats]:
    try:
        return cast(list[Floats], session.run(outputs, inputs))
    except Exception as error:  # the runtime tells out of memory only by its message
        if _OUT_OF_MEMORY.search(str(error)):
            raise OutOfMemory(str(error)) from error
        raise
