"""The attention weights of a network while it runs, computed beside a forward pass that never forms them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ditserve.model.nets.layers import Attention


@contextmanager
def observed_attention(
    network: nn.Module, observe: Callable[[int, Tensor], None], *, rows: int | None = None
) -> Iterator[None]:
    """Call `observe` at each forward pass inside, for every layer whose tokens attend.

    It is given the number of the layer, shallow to deep, and the weights (N, H, T, T) fp32 of the first
    `rows` samples.
    """

    def hook(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            h, *rest = arguments
            observe(number, cast(Attention, module).weights(h[:rows], *rest))

        return look

    layers = [module for module in network.modules() if isinstance(module, Attention) and module.over_tokens]
    hooks = [layer.register_forward_pre_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class AttentionEntropy:
    """The entropy of attention over forward passes, as a share of the largest: that of equal weights.

    1 means that a token attends to all alike, 0 that it attends to a single one. A layer that stays near 0
    has collapsed, which training does not recover from (Zhai et al., arXiv:2303.06296).
    """

    ROWS = 4  # samples of a forward pass that are measured

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._shares: dict[int, list[float]] = defaultdict(list)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure every forward pass of the network inside."""
        with observed_attention(self.network, self._add, rows=self.ROWS):
            yield

    @torch.no_grad()
    def _add(self, layer: int, weights: Tensor) -> None:
        entropy = torch.special.entr(weights).sum(-1).mean()
        self._shares[layer].append(entropy.item() / math.log(max(2, weights.shape[-1])))

    def figures(self) -> dict[str, float]:
        """Return the mean over the layers, and the least of them, by name; empty if nothing was measured."""
        means = [sum(shares) / len(shares) for shares in self._shares.values()]
        if not means:
            return {}
        return {"attention_entropy": sum(means) / len(means), "attention_entropy_least": min(means)}
