"""AdamW over a network's parameters, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation_config import ProgressiveDistillation


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter, arXiv:1711.05101) in two groups: matrices, which decay, and the rest, which does not.

    The rest are biases, norms, and embeddings of labels, of positions and of "no text".
    """
    matrices = [
        module.weight for module in network.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    decaying = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in decaying]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0..steps−1: linear warm-up to `lr`, then as `schedule` says.

    "constant" stays; "cosine" falls to zero at the end (Loshchilov & Hutter, arXiv:1608.03983); "wsd" stays, then falls linearly
    to zero over the last `decay` of the steps (warm-up, stable, decay: Hu et al., arXiv:2404.06395). Each round of a progressive
    distillation is a run of its own.
    """
    if isinstance(config.distillation, ProgressiveDistillation):
        step, steps = config.distillation.length(step, config.steps)
        config = config.model_copy(update={"steps": steps})
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup), SCHEDULES[config.schedule](config, step))


def _constant(config: TrainConfig, step: int) -> float:
    return 1.0


def _cosine(config: TrainConfig, step: int) -> float:
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * max(0.0, progress)))


def _wsd(config: TrainConfig, step: int) -> float:
    return (config.steps - step) / max(1.0, config.decay * config.steps)


SCHEDULES: dict[str, Callable[[TrainConfig, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "wsd": _wsd,
}
