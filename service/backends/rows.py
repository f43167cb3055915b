"""How a graph in ONNX Runtime takes the rows of a batch: shared out to CPU threads, or recorded once and replayed on a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any, Final, Protocol, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ditserve.service.backends import Floats, OutOfMemory

GRAPH_ID = "gpu_graph_id"  # of a run: which recording it makes or replays
SIZES: Final = tuple(
    sorted({1, *(1 << k for k in range(1, 11)), *(3 << k for k in range(9))})
)  # 1, 2, 3, 4, 6, 8, 12 … 1024
RUNS: Final = 3  # the runtime records once its memory no longer grows: after two runs

_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|failed to allocate|out of memory|CUDNN_STATUS_ALLOC_FAILED", re.IGNORECASE
)
Arrays = Mapping[str, npt.NDArray[Any]]


class Rows(Protocol):
    """Rows are the first dimension of whatever goes in and comes out."""

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[Floats]: ...

    def close(self) -> None: ...


def run(session: ort.InferenceSession, outputs: Sequence[str], inputs: Arrays) -> list[Floats]:
    with _running():
        return cast(list[Floats], session.run(outputs, inputs))


@contextmanager
def _running() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the runtime tells out of memory only by its message
        if _OUT_OF_MEMORY.search(str(error)):
            raise OutOfMemory(str(error)) from error
        raise


class SharedRows:
    """A graph on CPU threads that share out the rows of a batch, each computing its part by itself.

    Threads that share the work within every operator wait for one another hundreds of times a pass: 8 rows took 1.2 times as long on
    two cores. A batch of fewer rows than threads runs like that all the same.

    Args:
        alone: the session of a thread's part.
        together: the session of fewer rows than threads.
    """

    def __init__(self, alone: ort.InferenceSession, together: ort.InferenceSession, *, threads: int) -> None:
        self._alone, self._together, self._threads = alone, together, threads
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="rows")

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[Floats]:
        rows = len(next(iter(inputs.values())))
        if rows < self._threads or self._threads == 1:
            return run(self._together, outputs, inputs)
        ends = [rows * k // self._threads for k in range(self._threads + 1)]
        parts = [
            {name: value[first:last] for name, value in inputs.items()} for first, last in pairwise(ends)
        ]
        others = [self._pool.submit(run, self._alone, outputs, part) for part in parts[1:]]
        try:
            found = [run(self._alone, outputs, parts[0])]
        finally:
            wait(others)  # whatever happens, nobody computes when this returns
        found += [each.result() for each in others]
        return [np.concatenate(each) for each in zip(*found, strict=True)]

    def close(self) -> None:
        self._pool.shutdown(wait=False)


@dataclass(frozen=True, slots=True)
class _Lane:
    """What so many rows run in: where their inputs and output lie on the GPU, and under which number they are recorded."""

    inputs: Mapping[str, ort.OrtValue]
    output: ort.OrtValue
    binding: ort.IOBinding
    options: ort.RunOptions


class RecordedRows:
    """A graph on a GPU whose kernels are recorded for every number of rows, and from then on launched as one (CUDA graphs).

    Launching them one by one takes longer than computing them, for a small network and for few rows of a large one. The first batch
    of a size takes much longer, and each takes memory for its inputs: a backend lets `SIZES` be run alone.

    Args:
        session: of a graph that takes rows of one size, opened with the option `enable_cuda_graph`.
        shape: of a row of its one output.
        quiet: held while kernels are recorded: other work on the GPU that takes memory would spoil it.
    """

    def __init__(self, session: ort.InferenceSession, shape: tuple[int, ...], quiet: Lock) -> None:
        self._session, self._shape, self._quiet = session, shape, quiet
        self._lanes: dict[int, _Lane] = {}

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[Floats]:
        rows = len(next(iter(inputs.values())))
        with _running():
            if rows not in self._lanes:
                self._record(rows, outputs[0], inputs)
            else:
                for name, value in inputs.items():
                    self._lanes[rows].inputs[name].update_inplace(np.ascontiguousarray(value))
                self.replay(rows)
            return [self._lanes[rows].output.numpy()]

    def replay(self, rows: int) -> None:
        """Compute once more what was last asked of so many rows, without a word to or from the host."""
        lane = self._lanes[rows]
        self._session.run_with_iobinding(lane.binding, lane.options)

    def close(self) -> None:
        self._lanes.clear()

    def _record(self, rows: int, output_name: str, inputs: Arrays) -> None:
        held = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), "cuda", 0)
            for name, value in inputs.items()
        }
        output = ort.OrtValue.ortvalue_from_shape_and_type((rows, *self._shape), np.float32, "cuda", 0)
        binding = self._session.io_binding()
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(output_name, output)
        options = _numbered(rows)
        with self._quiet:
            for _ in range(RUNS):
                self._session.run_with_iobinding(binding, options)
        self._lanes[rows] = _Lane(held, output, binding, options)


def _numbered(recording: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(recording))
    return options
