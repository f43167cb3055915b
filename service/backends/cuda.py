"""The calls of the CUDA runtime that a backend needs, over `cuda-bindings` and without torch.

Every return code is checked. Memory is of one device; copies and launches are ordered on one stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from ditserve.service.backends import BackendUnavailable, Floats, OutOfMemory

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class CudaError(RuntimeError):
    """A CUDA call that failed; the message names the call and the reason."""


class Cuda:
    """One device and one non-blocking stream; `close` frees everything allocated here."""

    def __init__(self, runtime: Any = None) -> None:
        self._runtime = runtime if runtime is not None else _load()
        count = self._call("cudaGetDeviceCount")
        if not count:
            raise BackendUnavailable("there is no CUDA device: choose the onnx backend")
        self.stream = int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))
        self._device: list[int] = []
        self._host: list[int] = []
        self._graphs: list[Any] = []

    def device(self) -> tuple[str, str]:
        """Return name and compute capability of the device, such as ("NVIDIA L4", "sm89")."""
        properties = self._call("cudaGetDeviceProperties", 0)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return name.rstrip("\0"), f"sm{properties.major}{properties.minor}"

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes of device memory; return the address."""
        address = int(self._call("cudaMalloc", size))
        self._device.append(address)
        return address

    def pinned(self, shape: tuple[int, ...]) -> Floats:
        """Allocate a page-locked host array of fp32, from and to which copies are asynchronous."""
        size = 4 * int(np.prod(shape))
        address = int(self._call("cudaMallocHost", size))
        self._host.append(address)
        view = memoryview((ctypes.c_byte * size).from_address(address)).cast("B")
        return np.frombuffer(view, np.float32).reshape(shape)

    def upload(self, target: int, source: Floats) -> None:
        """Copy a page-locked array to the device, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, self.stream)

    def download(self, target: Floats, source: int) -> None:
        """Copy to a page-locked array from the device, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, self.stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Capture the calls that `work` enqueues on the stream as a graph that can be launched repeatedly."""
        self._call(
            "cudaStreamBeginCapture",
            self.stream,
            self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
        )
        try:
            work()
        finally:
            # A stream that is left capturing could not be used again.
            graph = self._call("cudaStreamEndCapture", self.stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def synchronise(self) -> None:
        """Wait for all work on the stream; errors of earlier work surface here."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free graphs, memory and stream; arrays from `pinned` must not be touched afterwards."""
        for call, resources in (
            ("cudaGraphExecDestroy", self._graphs),
            ("cudaFree", self._device),
            ("cudaFreeHost", self._host),
        ):
            while resources:
                self._call(call, resources.pop())
        if self.stream:
            self._call("cudaStreamDestroy", self.stream)
            self.stream = 0

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._runtime, name)(*arguments)
        if int(code) == _OUT_OF_MEMORY:
            raise OutOfMemory(f"{name}: the device is out of memory")
        if int(code):
            _, reason = self._runtime.cudaGetErrorString(code)
            raise CudaError(f"{name}: {reason.decode() if isinstance(reason, bytes) else reason}")
        return values[0] if values else None


def _load() -> Any:
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendUnavailable(
            "the tensorrt backend needs the package cuda-bindings, which is not installed"
        ) from error
