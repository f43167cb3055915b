"""What an optimiser step trains on. Every draw is a function of (seed, step, row), whoever makes it and in however many pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import batch_indices
from ditserve.model.nets.conditioner import drop_labels, drop_text
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.loss import logit_normal_timesteps, uniform_timesteps

ANOTHER = 1 << 32  # between the seed of a run and the one it goes on with after a roll-back


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pictures (N, C, H, W) in model space, labels (N, F) and text (N, text_size) after dropout, timesteps (N,), noise as x0."""

    x0: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor
    text: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x0)

    def split(self, pieces: int) -> Iterator[Batch]:
        """At most `pieces` consecutive parts, as even as possible."""
        for index in torch.arange(len(self)).tensor_split(min(pieces, len(self))):
            yield self[int(index[0]) : int(index[-1]) + 1]

    def __getitem__(self, rows: slice) -> Batch:
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        text = None if self.text is None else change(self.text)
        return Batch(change(self.x0), change(self.labels), change(self.t), change(self.noise), text)


class BatchSource:
    """Makes the batch of any step; `rows` are those of the global batch that this process trains on.

    Raises:
        ValueError: dropout rates that do not fit the data.
        DataError: data that cannot be had in the size of a stage.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, network: NetworkConfig, rows: range | None = None
    ) -> None:
        self.config, self.dataset, self.network = config, dataset, network
        self.rows = range(config.batch) if rows is None else rows
        self.stages = [
            (end, dataset if size == dataset.size else dataset.resized(size))
            for end, size in config.sizes(dataset)
        ]
        count = len(dataset.factors)
        self.rates = config.label_dropout * (count if len(config.label_dropout) == 1 else 1)
        if len(self.rates) != count:
            names = ", ".join(factor.name for factor in dataset.factors)
            raise ValueError(
                f"label_dropout has {len(self.rates)} rates, but the data has {count} factors ({names}): give one, or one each"
            )
        self.text = None if dataset.text is None else torch.from_numpy(dataset.text)
        self.training = dataset.training

    def at(self, step: int) -> Dataset:
        """The data in the size that `step` trains on; past the end, the last."""
        return next((data for end, data in self.stages if step < end), self.stages[-1][1])

    def make(self, step: int, rollbacks: int = 0) -> Batch:
        """This process's part of the batch of `step`, a different one after every roll-back."""
        config, rows, data = self.config, slice(self.rows.start, self.rows.stop), self.at(step)
        seed = config.seed + rollbacks * ANOTHER
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = self.training[batch_indices(len(self.training), config.batch, step, seed)]
        labels = drop_labels(torch.from_numpy(data.labels[index]), self.network, self.rates, generator)
        text = None if self.text is None else drop_text(self.text[index], config.text_dropout, generator)
        if config.timesteps == "uniform":
            t = uniform_timesteps(config.batch, config.diffusion.timesteps, generator)
        else:
            law = config.logit_mean, config.logit_std
            t = logit_normal_timesteps(config.batch, config.diffusion.timesteps, generator, *law)
        noise = torch.randn((config.batch, data.channels, *data.size), generator=generator)
        pictures = [
            data.batch(index[row : row + 1], np.random.default_rng([seed, step, row])) for row in self.rows
        ]
        x0 = torch.from_numpy(np.concatenate(pictures))
        return Batch(x0, labels[rows], t[rows], noise[rows], None if text is None else text[rows])
