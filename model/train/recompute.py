"""Blocks that keep their inputs alone in training, and compute the rest again for the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ditserve.model.nets.factory import Network

RECOMPUTED = (
    "{depth} blocks keep their inputs alone and compute the rest again for the gradient, to save memory: "
    "checkpoint_blocks=false keeps all"
)


def checkpoint_blocks(network: Network) -> None:
    """Make every block keep only its inputs in training, and recompute its activations for the gradient.

    This saves memory and costs one more forward pass (Chen et al., arXiv:1604.06174). Names and results stay
    the same.
    """
    for block in network.blocks:
        block.forward = _checkpointed(block, block.forward)


def _checkpointed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
        return forward(*inputs)

    return run
