"""The memory of this host's GPUs, from NVIDIA's management library (NVML), for every backend.

Where the library, its package or a GPU is missing, nothing is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

# The module of the distribution nvidia-ml-py.
PACKAGE = "pynvml"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its number on this host. `used` (by any process) and `total` are bytes of memory.

    `uuid` is the name by which CUDA knows it whatever the order of its own numbers.
    """

    index: int
    used: int
    total: int
    uuid: str


def gpus() -> Iterator[Gpu]:
    """Yield every GPU that this process sees and that answers."""
    nvml = _open_nvml()
    if nvml is None:
        return
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory, uuid = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetUUID(handle)
            name = uuid.decode() if isinstance(uuid, bytes) else str(uuid)
            yield Gpu(index, int(memory.used), int(memory.total), name)
    except nvml.NVMLError:
        # A GPU that fell off the bus no longer answers.
        return


@cache
def _open_nvml() -> Any:
    """Return the initialized library, None where there is none."""
    try:
        nvml = import_module(PACKAGE)
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
