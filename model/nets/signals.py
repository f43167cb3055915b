"""The signals of a network that trains badly: entropy of attention, activations, and load of experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ditserve.model.nets.attention_weights import AttentionEntropy
from ditserve.model.nets.experts import observed_routers, router_figures
from ditserve.model.nets.factory import Network
from ditserve.model.spec.dit_config import DiTConfig

# A layer whose attention has less entropy than this has collapsed.
COLLAPSED = 0.02


class NetworkSignals:
    """The figures of forward passes: entropy of attention, size of activations, and load of experts.

    "activation_rms" is the root mean square of the output of the block where it is largest, "activation_peak"
    the largest absolute number of any block.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.entropy = network, AttentionEntropy(network)
        self._squares: dict[int, list[float]] = {}
        self._peak = 0.0
        self._scores: list[Tensor] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure every forward pass of the network inside."""
        with ExitStack() as stack:
            stack.enter_context(self.entropy.measured())
            self._scores = stack.enter_context(observed_routers(self.network))
            for number, block in enumerate(self.network.blocks):
                stack.callback(block.register_forward_hook(self._hook(number)).remove)
            yield

    def _hook(self, number: int) -> Any:
        @torch.no_grad()
        def record(module: nn.Module, inputs: Any, h: Tensor) -> None:
            self._squares.setdefault(number, []).append(h.float().square().mean().item())
            self._peak = max(self._peak, h.abs().max().item())

        return record

    def figures(self) -> dict[str, float]:
        """Return the figures by name; empty if nothing was measured."""
        figures = self.entropy.figures()
        if self._squares:
            largest = max(sum(squares) / len(squares) for squares in self._squares.values())
            figures |= {"activation_rms": largest**0.5, "activation_peak": self._peak}
        config = self.network.config
        if isinstance(config, DiTConfig) and config.experts:
            figures |= router_figures(self._scores, config.depth, top_k=config.top_k, routing=config.routing)
        return figures
