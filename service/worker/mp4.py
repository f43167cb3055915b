"""Clips as MP4 files with H.264 video, which every browser plays. Needs PyAV, the extra `video`."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from typing import Final

import av
import numpy as np
import numpy.typing as npt

# Visually lossless, and in the layout of colours that players in hardware know.
_OPTIONS: Final = {"crf": "16", "preset": "medium"}
_LAYOUT: Final = "yuv420p"
_LARGEST_DENOMINATOR: Final = 1000


def encode(frames: npt.NDArray[np.uint8], *, fps: float, comment: str) -> bytes:
    """Return frames (F, H, W, 3) as a file; an odd side is made even by repeating its last pixels."""
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    out = BytesIO()
    with av.open(out, "w", format="mp4") as container:
        container.metadata["comment"] = comment
        rate = Fraction(fps).limit_denominator(_LARGEST_DENOMINATOR)
        stream = container.add_stream("libx264", rate=rate, options=dict(_OPTIONS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = _LAYOUT
        # With one thread equal frames give equal files.
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()
