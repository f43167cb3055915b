"""The cost of one row at many tokens: time and memory, of each network in a process of its own.

Times are those of the processor, which other processes of the machine hardly change.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditserve.bench.variants.scan import ScanMixer
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network, make_network
from ditserve.model.spec.network_config import network_config

# Two blocks of the width of the shipped model, in the middle of a network that is deeper.
SHAPE: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 192,
    "depth": 2,
    "num_heads": 6,
    "classes": [10],
    "learn_sigma": False,
}
SCAN = "state-space scan"
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "window": {"attention": ["window:8", "window:8+4"]},
    "neighbourhood": {"attention": ["neighbourhood:4"]},
    "axial": {"attention": ["axial"]},
    "axial, channel": {"attention": ["axial", "channel"]},
    "linear, convolutional MLP": {"attention": ["linear"], "conv_mlp": True},
    "low rank": {"attention": ["low_rank:16"]},
    "levels": {"levels": [0, 1], "attention": ["window:8", "full"]},
    "half of the tokens merged": {"merge_tokens": 0.5},
    SCAN: {},
}
# A U-Net with about the multiply-adds of the two blocks at 1,024 tokens.
UNET: Mapping[str, Any] = {
    "network": "unet",
    "in_channels": 3,
    "base_channels": 32,
    "multipliers": [1, 2, 4],
    "res_blocks": 1,
    "attention": [2],
    "head_size": 32,
    "classes": [10],
    "learn_sigma": False,
}
# A loop over the tokens is timed no further.
MOST_SCANNED = 1024
# A row is also trained on, and timed several times, up to so many tokens.
MOST_TRAINED = 1024
TURNS = 3


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """The cost of a row: the fastest of its passes, and the growth of resident memory during one."""

    network: str
    tokens: int
    forward_ms: float
    forward_bytes: int
    training_ms: float | None


def forward_costs(sides: Sequence[int], threads: int) -> Iterator[ForwardCost]:
    """Yield the cost of each network at grids of side×side tokens."""
    spawn = multiprocessing.get_context("spawn")
    for name in (*NETWORKS, "U-Net"):
        for side in sides:
            if name == SCAN and side * side > MOST_SCANNED:
                continue
            # Memory that was freed stays with a process, so that each measurement has its own.
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                yield pool.submit(measure_forward, name, side, threads).result()


def measure_forward(name: str, side: int, threads: int) -> ForwardCost:
    """Measure one network at one size, in this process."""
    torch.set_num_threads(threads)
    network = build(name, side)
    size = 2 * side
    x, labels = torch.randn(1, 3, size, size), torch.zeros(1, 1, dtype=torch.int64)
    state = network.modulate(torch.full((1,), 500.0), network.embed(labels))
    with torch.no_grad():
        # A small pass first: what torch allocates once is not the row's.
        network.backbone(torch.randn(1, 3, 32, 32), state)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        seconds = [_seconds(network, x, state)]
        grown = _resident("VmHWM") - before
        is_small = side * side <= MOST_TRAINED
        seconds += [_seconds(network, x, state) for _ in range((TURNS - 1) * is_small)]
    training = None
    if is_small:
        training = min(_seconds(network, x, state, backward=True) for _ in range(TURNS))
    return ForwardCost(
        network=name,
        tokens=side * side,
        forward_ms=round(1e3 * min(seconds), 3),
        forward_bytes=grown,
        training_ms=None if training is None else round(1e3 * training, 3),
    )


def build(name: str, side: int) -> Network:
    """Return a network of `NETWORKS`, or the U-Net, for pictures of side×side tokens."""
    size = {"image_size": [2 * side, 2 * side]}
    torch.manual_seed(0)
    if name == "U-Net":
        return make_network(network_config({**UNET, **size}))
    network = make_network(network_config({**SHAPE, **NETWORKS[name], **size}))
    if name == SCAN and isinstance(network, DiT):
        for block in network.blocks:
            block.attn = ScanMixer(network.config.hidden_size)
    return network


def _seconds(network: Network, x: Tensor, state: tuple[Tensor, ...], *, backward: bool = False) -> float:
    began = time.process_time()
    output = network.backbone(x, [tensor.detach() for tensor in state])
    if backward:
        output.square().mean().backward()
    return time.process_time() - began


def _resident(field: str) -> int:
    """Return a size of this process in bytes; VmHWM is its peak since it was last cleared."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
