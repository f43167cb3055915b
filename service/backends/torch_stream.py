"""Work on a device of torch, in order: copies, launches and marks, as one thread sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import structlog
import torch
from torch import Tensor

from ditserve.service.backends import OutOfMemory

Work = Callable[[], None]
# Before a step is captured it runs so often, because libraries choose their kernels in the first runs.
RUNS_BEFORE_CAPTURE: Final = 3

log = structlog.get_logger()


@contextmanager
def computing() -> Iterator[None]:
    """Compute without gradients, and raise `OutOfMemory` for torch's errors of memory."""
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error)) from error
    # The CPU allocator has no exception of its own.
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise OutOfMemory(str(error)) from error
        raise


class TorchStream:
    """Copies and launches on a device of torch, in order. This one is the CPU, where all is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def zeros(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return new memory of the device."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return new memory of the host, from and to which copies do not wait."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def download(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def capture(self, work: Work) -> Work:
        """Return what launches `work` again and again, over tensors that stay where they are."""
        work()
        return work

    def launch(self, work: Work) -> None:
        work()

    def mark(self) -> Any:
        """Return a mark of this point of the stream."""
        return time.perf_counter()

    def wait(self, mark: Any) -> None:
        """Wait until the device has come to a mark. Errors of the work before it are raised here."""

    def seconds(self, began: Any, ended: Any) -> float:
        """Return the seconds between two marks that the device has come to."""
        return float(ended - began)


class CudaStream(TorchStream):
    """Copies and launches on the current CUDA stream of the thread that steps."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # Nothing in the memory of one graph outlives its launch, so all of them share it.
        self._pool = torch.cuda.graph_pool_handle()

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def upload(self, target: Tensor, source: Tensor) -> None:
        pinned = source if source.is_pinned() else source.pin_memory()
        target.copy_(pinned, non_blocking=True)

    def download(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def capture(self, work: Work) -> Work:
        """Capture `work` as one CUDA graph; where that cannot be, its kernels are launched one by one."""
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(RUNS_BEFORE_CAPTURE):
                work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may decode meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.info("kernels are launched one by one", because=str(error).splitlines()[0])
            return work
        replay: Work = graph.replay
        return replay

    def mark(self) -> Any:
        # Waiting for it leaves the processor to others.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def seconds(self, began: Any, ended: Any) -> float:
        return 1e-3 * float(began.elapsed_time(ended))
