"""The batch of an optimiser step.

Every random draw is a function of (seed, step, row), whichever process makes it and in however many
micro-batches.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import batch_indices
from ditserve.model.nets.layers import along_rows
from ditserve.model.spec.heap import memory_bytes
from ditserve.model.spec.network_config import NetworkConfig, frame_shape
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.dropout import condition_dropout
from ditserve.model.train.loss import draw_levels

T = TypeVar("T")

# Added to the seed of a run at each roll-back.
ROLLBACK_SEED_STRIDE = 1 << 32


@dataclass(frozen=True, slots=True, eq=False)
class TrainingBatch:
    """The rows of a batch: pictures x0 (N, C, H, W) in model space, noise levels t (N,), and noise like x0.

    Levels are float64. The conditions are labels (N, F) and text (N, text_width), after dropout. The
    conditional mean of rows `hidden` (N,) bool is that of other maps than their own. `first_frame` (N, C, H,
    W) is the clean first frame of the rows that are told it, and zeros in the others.
    """

    x0: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor
    text: Tensor | None = None
    hidden: Tensor | None = None
    first_frame: Tensor | None = None

    @property
    def conditions(self) -> tuple[Tensor | None, ...]:
        """The arguments of a network after picture and level: labels, text, and frames if any are told."""
        frames = () if self.first_frame is None else (self.first_frame,)
        return (self.labels, self.text, *frames)

    def __len__(self) -> int:
        return len(self.x0)

    def split(self, pieces: int) -> Iterator[TrainingBatch]:
        """Yield at most `pieces` consecutive micro-batches, as even as possible."""
        for index in torch.arange(len(self)).tensor_split(min(pieces, len(self))):
            yield self[int(index[0]) : int(index[-1]) + 1]

    def __getitem__(self, rows: slice) -> TrainingBatch:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: str) -> TrainingBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> TrainingBatch:
        fields = ((name, getattr(self, name)) for name in self.__slots__)
        return replace(self, **{name: change(part) for name, part in fields if part is not None})


class BatchSource:
    """The source of the batch of any step; `rows` are those of the global batch that this process trains on.

    Raises:
        ValueError: dropout rates that do not fit the data, or a batch that does not fit in memory.
        DataError: the data cannot be had in the size of a stage.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, network: NetworkConfig, rows: range | None = None
    ) -> None:
        self.config, self.dataset, self.network = config, dataset, network
        self.rows = range(config.batch) if rows is None else rows
        self.stages = [
            (end, dataset if size == dataset.size else dataset.resized(size))
            for end, size in config.stage_sizes(dataset)
        ]
        self.schedule = config.diffusion.noise_schedule()
        self.dropout = condition_dropout(config, dataset)
        self._check_memory()
        self.training = dataset.training

    def _check_memory(self) -> None:
        """Refuse a batch whose pictures and noise, as float32, exceed the memory of this machine."""
        largest = max(math.prod(data.size) for _, data in self.stages)
        needed = 2 * 4 * self.config.batch * self.dataset.channels * largest
        memory = memory_bytes()
        if needed > memory:
            raise ValueError(
                f"batch {self.config.batch} takes {needed / 2**30:,.0f} GiB for pictures and noise alone, "
                f"and this machine has {memory / 2**30:,.0f}: lower it"
            )

    def dataset_at(self, step: int) -> Dataset:
        """Return the data in the size that `step` trains on; past the end, in that of the last stage."""
        return next((data for end, data in self.stages if step < end), self.stages[-1][1])

    def make(self, step: int, rollbacks: int = 0) -> TrainingBatch:
        """Make this process's part of the batch of `step`; it is another one after every roll-back."""
        config, rows, data = self.config, slice(self.rows.start, self.rows.stop), self.dataset_at(step)
        seed = config.seed + rollbacks * ROLLBACK_SEED_STRIDE
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = self.training[batch_indices(len(self.training), config.batch, step, seed)]
        # A number stands for each text, so that those that are dropped need not be encoded.
        told = None if data.texts is None else torch.ones(len(index), 1)
        labels, told = self.dropout.apply(torch.from_numpy(data.labels[index]), told, self.network, generator)
        text = None
        if data.texts is not None and told is not None:
            text, kept = torch.zeros(len(index), self.network.text_width), told[:, 0].bool()
            if kept.any():
                drawn = data.texts.draw(index[kept.numpy()], np.random.default_rng([seed, step]))
                text[kept] = torch.from_numpy(drawn)
        law = None if config.timesteps == "uniform" else (config.logit_mean, config.logit_std)
        t = draw_levels(config.batch, self.schedule, generator, law=law, shift=config.noise_shift)
        noise = torch.randn((config.batch, data.channels, *data.size), generator=generator)
        pictures = [
            data.batch(index[row : row + 1], np.random.default_rng([seed, step, row])) for row in self.rows
        ]
        x0 = torch.from_numpy(np.concatenate(pictures))
        hidden = None
        if config.mean_of_others:
            hidden = (torch.rand(config.batch, generator=generator) < config.mean_of_others)[rows]
        first_frame = None
        if any(frame_shape(self.network)):
            rate = 0.5 if config.first_frame_given is None else config.first_frame_given
            given = torch.rand(config.batch, generator=generator) < rate  # (B,)
            first_frame = along_rows(given[rows], x0[:, :, 0]) * x0[:, :, 0]  # (N, C, H, W)
        text = None if text is None else text[rows]
        return TrainingBatch(x0, labels[rows], t[rows], noise[rows], text, hidden, first_frame)

    def make_at_all_levels(self, step: int) -> TrainingBatch:
        """Make the same, at noise levels that are uniform over the trained range."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        batch = self.make(step)
        return replace(batch, t=draw_levels(len(batch), self.schedule, generator))


class Prefetch(Generic[T]):
    """An iterator over make(first), make(first + 1), …, up to `ahead` of them made early.

    Each is made in its own thread. `make` must depend on its number alone; then neither threads nor stopping
    and resuming change the results. An error in `make` is raised when its result is asked for. With `ahead` 0
    nothing is made early.
    """

    def __init__(self, make: Callable[[int], T], *, first: int = 0, ahead: int = 2) -> None:
        self.make, self.next_number, self.ahead = make, first, ahead
        self.pending: deque[Future[T]] = deque()
        self.threads = ThreadPoolExecutor(max(1, ahead), thread_name_prefix="prefetch")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while len(self.pending) <= self.ahead:
            self.pending.append(self.threads.submit(self.make, self.next_number))
            self.next_number += 1
        return self.pending.popleft().result()

    def close(self) -> None:
        """Drop the results that were made early."""
        self.threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
