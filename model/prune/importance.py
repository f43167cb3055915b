"""The importance of heads and MLP channels: how much the loss would change without one, to first order.

A gate of value 1 multiplies the output of a head or a channel. The importance for a picture is the squared
derivative of its loss by the gate (Taylor importance: Molchanov et al., arXiv:1906.10771, eq. 8 and §3.1);
the importance of the group is the mean over pictures. One backward pass gives all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ditserve.model.data.dataset import Dataset
from ditserve.model.nets.dit import DiT
from ditserve.model.train.batch import TrainingBatch
from ditserve.model.train.loaded_model import LoadedModel
from ditserve.model.train.loss import TrainingNoise, squared_error, training_noise

# Pictures of one backward pass.
BATCH = 16

Importance = dict[str, Tensor]
"""Linear map → importance of each group of its inputs.

The groups are heads for `blocks.<k>.attn.proj` and `cross.proj`, channels for `mlp.fc2`."""


def group_counts(dit: DiT) -> dict[str, int]:
    """Return the number of groups (heads or channels) that enter each linear map, by its name."""
    heads, channels = dit.config.num_heads, cast(nn.Linear, dit.get_submodule("blocks.0.mlp.fc2")).in_features
    kinds = {"attn.proj": heads, "cross.proj": heads, "mlp.fc2": channels}
    names = {name for name, _ in dit.named_modules()}
    possible = {f"blocks.{k}.{kind}": count for k in range(dit.config.depth) for kind, count in kinds.items()}
    return {name: count for name, count in possible.items() if name in names}


def importance(dit: DiT, noise: TrainingNoise, batches: Iterable[TrainingBatch]) -> Importance:
    """Return the importance (groups,) fp32 of every group, by the training loss on `batches`.

    Raises:
        ValueError: there is no picture.
    """
    sums = {name: torch.zeros(count) for name, count in group_counts(dit).items()}
    pictures = 0
    for batch in batches:
        pictures += len(batch)
        gates = {
            name: torch.ones(len(batch), 1, len(total), requires_grad=True) for name, total in sums.items()
        }
        hooks = [
            dit.get_submodule(name).register_forward_pre_hook(_gate_inputs(gate))
            for name, gate in gates.items()
        ]
        try:
            row = noise.at(batch.t)
            output = dit(row.noisy(batch.x0, batch.noise), row.told, batch.labels, batch.text)
        finally:
            for hook in hooks:
                hook.remove()
        # Rows do not mix, so the derivative of the sum by a row's gate is that of the row's own loss.
        loss = squared_error(row, output, batch.x0, batch.noise).sum()
        for name, slope in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            sums[name] += slope.square().sum((0, 1))
    if not pictures:
        raise ValueError("importance is measured on pictures: give at least one")
    return {name: total / pictures for name, total in sums.items()}


def _gate_inputs(gate: Tensor) -> Callable[..., Any]:
    """Make a hook that multiplies inputs (N, T, groups · size) by gates (N, 1, groups)."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        size = inputs[0].shape[-1] // gate.shape[-1]
        return (inputs[0] * gate.repeat_interleave(size, dim=-1),)

    return hook


def training_batches(model: LoadedModel, dataset: Dataset, count: int, seed: int) -> Iterator[TrainingBatch]:
    """Yield `count` training pictures with their conditions, at noise levels spread evenly."""
    generator = torch.Generator().manual_seed(seed)
    order = np.random.default_rng(seed).permutation(dataset.training)[:count]
    shares = (torch.randperm(len(order), generator=generator) + 0.5) / max(1, len(order))
    levels = torch.from_numpy(model.schedule.process.trained_levels(shares.numpy()))
    for start in range(0, len(order), BATCH):
        index = order[start : start + BATCH]
        x0 = torch.from_numpy(dataset.batch(index, np.random.default_rng([seed, start])))
        text = None if dataset.texts is None else torch.from_numpy(dataset.texts.draw(index))
        noise = torch.randn(x0.shape, generator=generator)
        labels = torch.from_numpy(dataset.labels[index])
        yield TrainingBatch(x0, labels, levels[start : start + BATCH], noise, text)


def noise_of(model: LoadedModel) -> TrainingNoise:
    """Return the noise, with its loss, that the model was trained by, as far as its provenance tells."""
    training = model.manifest.provenance.get("training", {})
    return training_noise(model.schedule, space=training.get("loss_space"), cap=training.get("loss_cap"))
