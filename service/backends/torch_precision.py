"""The numbers and kernels that torch computes a DiT of ours with: as wanted, or as measured at the start.

On a GPU two ways are timed in turns, with their kernels captured, as they run in service. What is chosen is
logged.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import structlog
import torch
from torch import Tensor, nn

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.layers import Attention, padded_attention
from ditserve.model.nets.low_precision import (
    FP8_OUTPUT,
    HALVES,
    Backbone,
    fp8_objection,
    lower_precision,
)
from ditserve.model.spec.attention_kinds import FULL
from ditserve.model.spec.manifest import Manifest
from ditserve.service.backends import BackendUnavailable
from ditserve.service.backends.measured_choice import FASTER, FASTER_FP8, quality_objection, speedup
from ditserve.service.backends.torch_stream import CudaStream, TorchStream, computing

ROWS: Final = 8  # of the timed passes
# Kernels of attention are made for heads whose width is a multiple of it.
HEAD_MULTIPLE: Final = 16

Run = Callable[[], object]

log = structlog.get_logger()


def own_precision(network: DiT, manifest: Manifest, wanted: str, *, adapted: bool) -> tuple[str, Backbone]:
    """Put a DiT into the precision `wanted`; return its name and the backbone.

    "auto" is fp32, and on a GPU the fastest that the bundle's record allows. With adapters (`adapted`) it is
    not FP8, whose layers take none.

    Raises:
        BackendUnavailable: FP8 cannot be computed here, or with adapters.
    """
    device = next(network.parameters()).device
    if wanted == "fp8" and (objection := fp8_objection(device)):
        raise BackendUnavailable(f"--precision fp8 cannot be computed here: {objection}; leave it out")
    if wanted == "fp8" and adapted:
        raise BackendUnavailable("--precision fp8 takes no adapters: choose bf16, or leave --adapters out")
    if wanted == "auto":
        wanted = "fp32" if _on_cpu(network) else fastest_precision(network, manifest, adapted=adapted)
    if wanted == "fp32":
        return "fp32", network.backbone
    backbone = lower_precision(network, wanted)
    if not _on_cpu(network):
        widen_heads(network, HALVES.get(wanted, FP8_OUTPUT))
    return wanted, backbone


def fastest_precision(network: DiT, manifest: Manifest, *, adapted: bool) -> str:
    """Return fp32, the half precision of the bundle's graphs, or FP8: the fastest of those on record."""
    half = next((name for name in HALVES if f"backbone.{name}.onnx" in manifest.files), None)
    if half is None:
        log.info("precision chosen", precision="fp32", against_half="the bundle has no graph in it")
        return "fp32"
    runs = {name: _pass(network, name) for name in ("fp32", half)}
    ratio = speedup(runs["fp32"], runs[half], time.perf_counter)
    if ratio < FASTER:
        log.info(
            "precision chosen", precision="fp32", against_half=f"it is no faster here ({ratio:.2f} times)"
        )
        return "fp32"
    device = next(network.parameters()).device
    against = quality_objection(manifest, "fp8") or fp8_objection(device)
    against = against or ("it takes no adapters" if adapted else None)
    if against is None:
        beyond = speedup(runs[half], _pass(network, "fp8"), time.perf_counter)
        if beyond >= FASTER_FP8:
            log.info("precision chosen", precision="fp8", speedup=round(ratio * beyond, 2))
            return "fp8"
        against = f"it is {beyond:.2f} times as fast as {half} here, {FASTER_FP8} is asked for"
    log.info("precision chosen", precision=half, speedup=round(ratio, 2), against_fp8=against)
    return half


def widen_heads(network: DiT, dtype: torch.dtype) -> None:
    """Compute heads with zeros behind them, to a width that kernels are made for, if that is faster here."""
    config, device = network.config, next(network.parameters()).device
    width = -(-config.head_size // HEAD_MULTIPLE) * HEAD_MULTIPLE
    if width == config.head_size:
        return
    shape = (ROWS, config.num_heads, config.tokens, config.head_size)
    q, k, v = torch.randn(3, *shape, device=device, dtype=dtype)
    widths = (config.head_size, width)
    own, wide = (_replayed(partial(padded_attention, q, k, v, each), device) for each in widths)
    ratio = speedup(own, wide, time.perf_counter)
    chosen = width if ratio >= FASTER else config.head_size
    for module in network.modules():
        if isinstance(module, Attention) and module.kind == FULL:
            module.computed_width = chosen
    log.info("attention chosen", head=config.head_size, computed=chosen, speedup=round(ratio, 2))


def compile_if_faster(network: DiT, backbone: Backbone) -> bool:
    """Compile the blocks of a DiT, on a GPU only if that is faster; return True if they are compiled."""
    eager = None if _on_cpu(network) else _run(network, backbone)
    network.compile_blocks()
    if eager is None:
        return True
    ratio = speedup(eager, _run(network, backbone), time.perf_counter)
    if ratio < FASTER:
        network.uncompile_blocks()
    log.info("kernels chosen", compiled=ratio >= FASTER, speedup=round(ratio, 2))
    return ratio >= FASTER


def chosen_kernels(network: nn.Module, *, compiled: bool) -> str:
    """Return what was chosen of the kernels, such as "heads of 80, compiled"."""
    layers = [module for module in network.modules() if isinstance(module, Attention)]
    widths = {layer.computed_width for layer in layers if layer.computed_width != layer.head_size}
    return ", ".join([*(f"heads of {width}" for width in widths), *(["compiled"] if compiled else [])])


def _on_cpu(network: DiT) -> bool:
    return next(network.parameters()).device.type == "cpu"


def _pass(network: DiT, precision: str) -> Run:
    """Return a pass in a precision, of a copy of the network where it is not fp32."""
    if precision == "fp32":
        return _run(network, network.backbone)
    lowered = copy.deepcopy(network)
    return _run(lowered, lower_precision(lowered, precision))


def _run(network: DiT, backbone: Backbone) -> Run:
    """Return a pass of a few random rows, which is over when it returns."""
    config, device = network.config, next(network.parameters()).device

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(ROWS, *shape, device=device)

    x = normal((config.in_channels, *config.image_size))
    return _replayed(partial(backbone, x, [normal(shape) for _, shape in config.state()]), device)


def _replayed(run: Run, device: torch.device) -> Run:
    """Return `run` as it is computed in service, over when it returns: on CUDA its kernels are captured."""
    stream = CudaStream(device) if device.type == "cuda" else TorchStream(device)

    def work() -> None:
        run()

    with computing():
        captured = stream.capture(work)

    def launch() -> None:
        with computing():
            stream.launch(captured)
            stream.wait(stream.mark())

    return launch
