"""A device that is imitated on the CPU: it counts what crosses the bus, what is launched, and what waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ditserve.service.backends import OutOfMemory
from ditserve.service.backends.resident import Slab
from ditserve.service.backends.torch_rows import TorchRows
from ditserve.service.backends.torch_stream import TorchStream
from tests.service.conftest import FakeBackend, Floats


@dataclass
class Counts:
    """The calls of a device: copies to it and from it, launches, captures, waits, and new memory."""

    uploads: int = 0
    uploaded_bytes: int = 0
    downloads: int = 0
    downloaded_bytes: int = 0
    launches: int = 0
    captures: int = 0
    waits: int = 0
    allocations: int = 0


class CountingStream(TorchStream):
    """The stream of an imitated device. A mark can be waited for once all before it is done."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.counts, self.launching = Counts(), False

    def zeros(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        self.counts.allocations += 1
        return super().zeros(shape, dtype)

    def upload(self, target: Tensor, source: Tensor) -> None:
        self.counts.uploads += 1
        self.counts.uploaded_bytes += source.nbytes
        super().upload(target, source)

    def download(self, target: Tensor, source: Tensor) -> None:
        self.counts.downloads += 1
        self.counts.downloaded_bytes += source.nbytes
        super().download(target, source)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.counts.captures += 1
        return super().capture(work)

    def launch(self, work: Callable[[], None]) -> None:
        self.counts.launches += 1
        self.launching = True
        super().launch(work)
        self.launching = False

    def wait(self, mark: Any) -> None:
        self.counts.waits += 1


class OperationsOutsideLaunches(TorchDispatchMode):
    """The names of torch's operations, but for views, that the host calls outside of launches."""

    def __init__(self, stream: CountingStream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._stream.launching and not func.is_view:
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class DeviceBackend(FakeBackend):
    """The made-up network on an imitated device, with the same numbers to the last bit.

    A batch of more than `memory_rows` rows has no room there.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.stream = CountingStream()

    def keep_rows(self, slabs: Sequence[Slab], *, slots: int, rows: int) -> TorchRows:
        tensors = [Slab(torch.from_numpy(slab.array), slab.line) for slab in slabs]
        return TorchRows(
            self._network,
            self.manifest,
            tensors,
            self.stream,
            slots=slots,
            rows=rows,
        )

    def modulate_there(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return self.modulate(timesteps, embeddings)

    def _network(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        if len(x) > self.memory_rows:
            raise OutOfMemory(f"{len(x)} rows")
        self.batches.append(len(x))
        scale, shift, slope = (
            numbers.view(*numbers.shape, *(1,) * (x.ndim - 2))
            for numbers in (state[0], state[1][:, 0], state[1][:, 1])
        )
        bent = x / (1.0 + x * x)
        output = bent * scale + shift + x * slope
        if not self.manifest.config.learn_sigma:
            return output
        variance = np.sin(7.0 * output.numpy())
        return torch.cat([output, torch.from_numpy(variance.astype(np.float32))], dim=1)
