"""How much the loss would change if a head or an MLP channel were taken away: first-order Taylor importance.

A gate that is 1 multiplies what a head, or a channel, hands on; a picture's importance is the squared derivative of its loss by the gate
(Molchanov et al., arXiv:1906.10771, eq. 8 and §3.1), and the mean over pictures is the group's. One backward pass gives all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ditserve.model.nets.dit import DiT
from ditserve.model.spec.diffusion import add_noise
from ditserve.model.train.batch import Batch
from ditserve.model.train.loss import NoiseTables, rows, squared_error

Importance = dict[str, Tensor]
"""Of the groups that enter a linear map, by its name: heads for `blocks.<k>.attn.proj` (and `cross.proj`), channels for `mlp.fc2`."""


def gated(dit: DiT) -> dict[str, int]:
    """The linear maps whose inputs come in groups, and how many groups each has."""
    heads, channels = dit.config.num_heads, cast(nn.Linear, dit.get_submodule("blocks.0.mlp.fc2")).in_features
    kinds = {"attn.proj": heads, "cross.proj": heads, "mlp.fc2": channels}
    names = {name for name, _ in dit.named_modules()}
    every = {f"blocks.{k}.{kind}": count for k in range(dit.config.depth) for kind, count in kinds.items()}
    return {name: count for name, count in every.items() if name in names}


def importance(dit: DiT, tables: NoiseTables, batches: Iterable[Batch]) -> Importance:
    """Importance (groups,) fp32 of every group of `gated`, by the training loss on `batches`.

    Raises:
        ValueError: there is no picture.
    """
    sums = {name: torch.zeros(count) for name, count in gated(dit).items()}
    pictures = 0
    for batch in batches:
        pictures += len(batch)
        gates = {
            name: torch.ones(len(batch), 1, len(each), requires_grad=True) for name, each in sums.items()
        }
        hooks = [dit.get_submodule(name).register_forward_pre_hook(_gate(z)) for name, z in gates.items()]
        try:
            x_t = add_noise(rows(tables.alpha, batch.t), rows(tables.sigma, batch.t), batch.x0, batch.noise)
            output = dit(x_t, batch.t, batch.labels, batch.text)
        finally:
            for hook in hooks:
                hook.remove()
        loss = squared_error(tables, output, batch.x0, batch.noise, batch.t).sum()  # rows do not mix
        for name, slope in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            sums[name] += slope.square().sum((0, 1))
    if not pictures:
        raise ValueError("importance is measured on pictures: give at least one")
    return {name: total / pictures for name, total in sums.items()}


def _gate(z: Tensor) -> Callable[..., Any]:
    """(N, T, groups · size) times gates (N, 1, groups)."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        size = inputs[0].shape[-1] // z.shape[-1]
        return (inputs[0] * z.repeat_interleave(size, dim=-1),)

    return hook
