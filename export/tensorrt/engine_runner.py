"""A runner of an engine that was just built, to check and to time it: one context, plain copies.

Serving is another matter, see `service.backends.tensorrt`. Not yet run on a GPU: tests drive it with
imitations only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ditserve.export.errors import ExportError
from ditserve.export.tensorrt.module import TensorRt, import_cuda, listening

Arrays = Mapping[str, npt.NDArray[Any]]
# Runs before timing, and runs that a time is the median of.
WARM, TIMED = 3, 20


class EngineRunner:
    """An engine on the first GPU; `close` frees its memory and stream.

    Raises:
        ExportError: the engine cannot be loaded, a call fails, or cuda-bindings is not installed.
    """

    def __init__(self, trt: TensorRt, plan: bytes, cuda: Any = None) -> None:
        self._cuda = cuda if cuda is not None else import_cuda()
        with listening(trt) as (logger, log):
            self._runtime = trt.module.Runtime(logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise ExportError(f"TensorRT cannot load the engine it built: {'; '.join(log.errors())}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ExportError("TensorRT has no memory to run the engine it built")
        self._stream = int(self._call("cudaStreamCreate"))
        self._buffers: dict[str, tuple[int, int]] = {}  # name → address and bytes

    def __call__(self, inputs: Arrays, output_shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return the output in fp32 for `inputs` by name, all of one batch size."""
        self._bind(inputs, output_shape)
        self._execute()
        output = np.empty(output_shape, np.float32)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpy", output.ctypes.data, self._buffers["output"][0], output.nbytes, kind)
        return output

    def seconds(self, inputs: Arrays, output_shape: tuple[int, ...]) -> float:
        """Return the median time in seconds of one execution, without copies."""
        self._bind(inputs, output_shape)
        times = []
        for _ in range(WARM + TIMED):
            started = time.perf_counter()
            self._execute()
            times.append(time.perf_counter() - started)
        return statistics.median(times[WARM:])

    def close(self) -> None:
        """Free memory and stream; the engine cannot be run afterwards."""
        for address, _ in self._buffers.values():
            self._call("cudaFree", address)
        self._buffers.clear()
        self._call("cudaStreamDestroy", self._stream)

    def _bind(self, inputs: Arrays, output_shape: tuple[int, ...]) -> None:
        """Choose the profile, copy the inputs to the GPU, and set the address of every tensor."""
        rows = output_shape[0]
        profile = next(
            (k for k in range(self._engine.num_optimization_profiles) if self._takes(k, rows)), None
        )
        if profile is None:
            raise ExportError(f"no profile of the engine takes {rows} rows")
        self._require("set_optimization_profile_async", profile, self._stream)
        for name, value in inputs.items():
            array = np.ascontiguousarray(value, np.float32)
            self._require("set_input_shape", name, array.shape)
            self._require("set_tensor_address", name, self._buffer(name, array.nbytes))
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            self._call("cudaMemcpy", self._buffers[name][0], array.ctypes.data, array.nbytes, kind)
        self._require("set_tensor_address", "output", self._buffer("output", 4 * int(np.prod(output_shape))))

    def _takes(self, profile: int, rows: int) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape("x", profile)
        return int(low[0]) <= rows <= int(high[0])

    def _execute(self) -> None:
        self._require("execute_async_v3", self._stream)
        self._call("cudaStreamSynchronize", self._stream)

    def _buffer(self, name: str, size: int) -> int:
        """Return the address of at least `size` bytes of device memory for a tensor."""
        address, capacity = self._buffers.get(name, (0, 0))
        if capacity < size:
            if address:
                self._call("cudaFree", address)
            address = int(self._call("cudaMalloc", size))
            self._buffers[name] = address, size
        return address

    def _require(self, name: str, *arguments: Any) -> None:
        if not getattr(self._context, name)(*arguments):
            raise ExportError(f"TensorRT refuses {name} of the engine it built")

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._cuda, name)(*arguments)
        if int(code):
            raise ExportError(f"{name} fails with CUDA error {int(code)} while the engine is checked")
        return values[0] if values else None
