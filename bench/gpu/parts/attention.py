"""Attention by torch's kernels, with heads 72 wide as they are and padded to 80, as in DiT-XL/2.

Needs torch alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditserve.bench.gpu.measuring import Measuring, main
from ditserve.bench.gpu.timing import timed
from ditserve.model.nets.layers import padded_attention
from ditserve.model.nets.low_precision import HALVES

KERNELS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Rows, heads, tokens, width of a head.
SHAPES = {"DiT-XL/2": (16, 16, 256, 72), "SD3-medium's": (4, 24, 4096, 64)}
TOY_SHAPES = {"DiT-XL/2": (2, 2, 16, 72)}
PADDED = 80


def measure(part: Measuring) -> None:
    for shape_name, shape in (TOY_SHAPES if part.toy else SHAPES).items():
        for precision in ("fp32",) if part.toy else HALVES:
            for kernel in KERNELS:
                name = f"{shape_name} {precision} {kernel}"
                part.point(name, partial(_attention, part, shape, precision, kernel))


def _attention(part: Measuring, shape: tuple[int, ...], precision: str, kernel: str) -> dict[str, Any]:
    """Return the milliseconds of attention in a kernel: heads as they are, and padded where that is tried."""
    dtype = HALVES.get(precision, torch.float32)
    q, k, v = torch.randn(3, *shape, device=part.device, dtype=dtype)
    chosen = KERNELS[kernel]
    passes = 2 if part.toy else 30
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for width in (shape[-1], PADDED) if shape[-1] < PADDED and shape[-1] % 16 else (shape[-1],):
            run = partial(padded_attention, q, k, v, width)
            if chosen is None:
                found[f"ms {width}"] = timed(run, part.device, passes).device_ms
                continue
            try:
                with sdpa_kernel(chosen):
                    found[f"ms {width}"] = timed(run, part.device, passes).device_ms
            except RuntimeError as error:
                found[f"ms {width}"] = f"not here: {str(error).splitlines()[0]}"
        if len(found) > 1:
            exact = F.scaled_dot_product_attention(q, k, v)
            difference = (padded_attention(q, k, v, PADDED) - exact).abs().max()
            found["difference"] = float(difference)
    return found


if __name__ == "__main__":
    main("attention", measure)
