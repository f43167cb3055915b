"""Runners of a graph in ONNX Runtime: rows shared out to CPU threads, or kernels captured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Final, Protocol

import numpy as np
import onnxruntime as ort

from ditserve.service.backends import Floats
from ditserve.service.backends.sessions import Arrays, run_session, translated_errors

# The option of a run that numbers the CUDA graph to capture or replay.
GRAPH_ID = "gpu_graph_id"
# ONNX Runtime captures once its memory no longer grows, which is after two runs.
CAPTURE_RUNS: Final = 3


class RowRunner(Protocol):
    """A graph whose inputs and outputs have rows as their first dimension."""

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[Floats]: ...

    def close(self) -> None: ...


class DataParallelRunner:
    """A graph on CPU threads, each of which computes its own part of the rows of a batch.

    Threads that share the work within every operator wait for one another hundreds of times a pass: 8 rows
    took 1.2 times as long on two cores. A batch of fewer rows than threads is computed that way all the same.

    Args:
        single: the session of one thread's part.
        shared: the session of a batch of fewer rows than threads, whose operators use all threads.
    """

    def __init__(self, single: ort.InferenceSession, shared: ort.InferenceSession, *, threads: int) -> None:
        self._single, self._shared, self._threads = single, shared, threads
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="rows")

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[Floats]:
        rows = len(next(iter(inputs.values())))
        if rows < self._threads or self._threads == 1:
            return run_session(self._shared, outputs, inputs)
        ends = [rows * k // self._threads for k in range(self._threads + 1)]
        parts = [
            {name: value[first:last] for name, value in inputs.items()} for first, last in pairwise(ends)
        ]
        futures = [self._pool.submit(run_session, self._single, outputs, part) for part in parts[1:]]
        try:
            results = [run_session(self._single, outputs, parts[0])]
        finally:
            # Even if this part fails, no thread computes any more when this method returns.
            wait(futures)
        results += [future.result() for future in futures]
        return [np.concatenate(output) for output in zip(*results, strict=True)]

    def close(self) -> None:
        self._pool.shutdown(wait=False)


class PartRunner:
    """A runner of a part of a network, which takes fewer inputs than the whole: it is given those of all."""

    def __init__(self, runner: RowRunner, session: ort.InferenceSession) -> None:
        self._runner, self._inputs = runner, [entry.name for entry in session.get_inputs()]

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[Floats]:
        return self._runner.run(outputs, {name: inputs[name] for name in self._inputs})

    def close(self) -> None:
        self._runner.close()


@dataclass(frozen=True, slots=True)
class _GraphContext:
    """The CUDA graph of one number of rows: its inputs and output on the GPU, and the options of its run."""

    inputs: dict[str, ort.OrtValue]
    output: ort.OrtValue
    binding: ort.IOBinding
    options: ort.RunOptions


class CudaGraphRunner:
    """A graph on a GPU with its kernels captured for each number of rows, then launched as one CUDA graph.

    For a small network, and for few rows of a large one, launching the kernels one by one takes longer than
    computing them. The first batch of a size takes much longer, and each size takes memory for its inputs: a
    backend lets only `GRAPH_SIZES` be run.

    Args:
        session: of a graph for pictures of one size, opened with the provider option `enable_cuda_graph`.
        shape: of a row of its one output.
        capture_lock: held during a capture, which other work on the GPU that takes memory would spoil.
    """

    def __init__(self, session: ort.InferenceSession, shape: tuple[int, ...], capture_lock: Lock) -> None:
        self._session, self._shape, self._capture_lock = session, shape, capture_lock
        self._contexts: dict[int, _GraphContext] = {}

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[Floats]:
        rows = len(next(iter(inputs.values())))
        with translated_errors():
            if rows in self._contexts:
                for name, value in inputs.items():
                    self._contexts[rows].inputs[name].update_inplace(np.ascontiguousarray(value))
                self.replay(rows)
            else:
                self._contexts[rows] = self._capture(rows, outputs[0], inputs)
            return [self._contexts[rows].output.numpy()]

    def replay(self, rows: int) -> None:
        """Compute the last batch of this many rows again, without a copy from or to the host."""
        context = self._contexts[rows]
        self._session.run_with_iobinding(context.binding, context.options)

    def close(self) -> None:
        self._contexts.clear()

    def _capture(self, rows: int, output_name: str, inputs: Arrays) -> _GraphContext:
        """Run a batch until its kernels are captured. The output of the last run is that of the batch."""
        device_inputs = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), "cuda", 0)
            for name, value in inputs.items()
        }
        output = ort.OrtValue.ortvalue_from_shape_and_type((rows, *self._shape), np.float32, "cuda", 0)
        binding = self._session.io_binding()
        for name, value in device_inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(output_name, output)
        options = ort.RunOptions()
        options.add_run_config_entry(GRAPH_ID, str(rows))
        with self._capture_lock:
            for _ in range(CAPTURE_RUNS):
                self._session.run_with_iobinding(binding, options)
        return _GraphContext(device_inputs, output, binding, options)
