"""The autoencoder of a bundle of latents, in ONNX Runtime, whichever backend runs the network."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ditserve.model.spec.bundle import DECODER, ENCODER, Bundle
from ditserve.model.spec.sizes import frame_by_frame
from ditserve.service.backends import NO_ENCODER, Floats
from ditserve.service.backends.sessions import CPU, CUDA, open_session, run_session, session_options
from ditserve.service.errors import InvalidRequest
from ditserve.service.images import from_pixels, to_pixels


class AutoencoderGraphs:
    """The decoder of a bundle of latents, and the encoder if it has one."""

    def __init__(
        self, bundle: Bundle, options: ort.SessionOptions, providers: Sequence[str] = (CPU,)
    ) -> None:
        self._decoder = open_session(bundle, DECODER, options, providers)
        has_encoder = ENCODER in bundle.manifest.files
        self._encoder = open_session(bundle, ENCODER, options, providers) if has_encoder else None

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        return to_pixels(frame_by_frame(self._images, latents))

    def _images(self, latents: Floats) -> Floats:
        return run_session(self._decoder, ["image"], {"latent": latents})[0]

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        if self._encoder is None:
            raise InvalidRequest(NO_ENCODER)
        return run_session(self._encoder, ["latent"], {"image": from_pixels(pixels)})[0]


def open_autoencoder(bundle: Bundle, *, threads: int, cuda: bool) -> AutoencoderGraphs:
    """Open the autoencoder of a bundle whose network is run by another library.

    It is on the GPU if `cuda` and this build of ONNX Runtime computes there, else on the CPU, with as many
    threads, 0 for one per core.
    """
    on_gpu = cuda and CUDA in ort.get_available_providers()
    options = session_options(threads or len(os.sched_getaffinity(0)))
    return AutoencoderGraphs(bundle, options, [CUDA, CPU] if on_gpu else [CPU])
