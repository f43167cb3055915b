"""The memory of this host's GPUs, as NVIDIA's management library (NVML) tells it, whatever runs the network.

Where the library, its package or a GPU is missing there is nothing to tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

PACKAGE = "pynvml"  # of the distribution nvidia-ml-py


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its number on this host; memory in bytes, used by anybody."""

    index: int
    used: int
    total: int


def gpus() -> Iterator[Gpu]:
    """Every GPU that this process sees and that answers."""
    nvml = _opened()
    if nvml is None:
        return
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index))
            yield Gpu(index, int(memory.used), int(memory.total))
    except nvml.NVMLError:  # one that fell off the bus; what it held is lost with it
        return


@cache
def _opened() -> Any:
    """The library, ready to be asked; None where there is none."""
    try:
        nvml = import_module(PACKAGE)
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
