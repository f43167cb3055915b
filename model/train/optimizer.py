"""The optimiser of a run: AdamW, or Muon beside it, the learning rate, and mixed precision.

Weights, losses and averages are fp32 in every precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditserve.model.nets.experts import ExpertLinear
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation.config import ProgressiveDistillationConfig
from ditserve.model.train.run_config import Precision, RunConfig

HALF_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimisers as one, each with parameters of its own; groups and state are shared with them."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al., https://kellerjordan.github.io/posts/muon), with fp32 products on CPUs.

    torch takes them in bf16, which a processor without such instructions computes 30 times as slowly.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            keep, rate = group["momentum"], group["lr"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - keep)
                update = orthogonalised(matrix.grad.lerp(momentum, keep), group["ns_steps"])
                matrix.mul_(1 - rate * group["weight_decay"])
                # An update of a matrix has the size that AdamW's would have, so that one rate suits both.
                matrix.sub_(update, alpha=0.2 * max(matrix.shape) ** 0.5 * rate)


def orthogonalised(matrix: Tensor, steps: int) -> Tensor:
    """Return about the nearest matrix (m, n) with singular values of 1: all become about 0.7 to 1.2."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    x = x.bfloat16() if matrix.is_cuda else x
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def make_optimizer(
    network: nn.Module, config: RunConfig, *, muon: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Make fused AdamW (Loshchilov & Hutter, arXiv:1711.05101) with two groups of parameters.

    Matrices decay. The rest does not: biases, norms, and embeddings of labels, of positions and of "no text".
    The matrices `muon` are left to Muon, with the same rate and decay.
    """
    own = {id(matrix) for matrix in muon}
    matrices = [
        module.weight
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | ExpertLinear)
    ]
    decaying = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in decaying]
    groups = [
        {
            "params": [matrix for matrix in matrices if id(matrix) not in own],
            "weight_decay": config.weight_decay,
        },
        {"params": rest, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if not muon:
        return adamw
    return CombinedOptimizer([Muon(muon, lr=config.lr, weight_decay=config.weight_decay), adamw])


def muon_matrices(network: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of the linear layers inside blocks, which Muon is meant for."""
    return [
        cast(nn.Parameter, module.weight)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of step 0..steps−1: linear warm-up to `lr`, then as `schedule` says.

    "constant" stays; "cosine" falls to `min_lr` at the end (Loshchilov & Hutter, arXiv:1608.03983); "wsd"
    stays, then falls linearly to `min_lr` over the last `decay` of the steps (warm-up, stable, decay: Hu et
    al., arXiv:2404.06395). With "wsd", 100 steps, `warmup` 10, `decay` 0.2 and `min_lr` 0, the rate is 0.1·lr
    at step 0, lr from step 9 to 80, and 0.5·lr at step 90. Each round of a progressive distillation has this
    course of its own.
    """
    if isinstance(config.distillation, ProgressiveDistillationConfig):
        step, steps = config.distillation.position(step, config.steps)
        config = config.model_copy(update={"steps": steps})
    return scheduled_rate(config, step)


def scheduled_rate(config: RunConfig, step: int) -> float:
    """Return the rate of step 0..steps−1 of a run without rounds, see `learning_rate`."""
    share = min(1.0, SCHEDULES[config.schedule](config, step))
    warm = config.lr * ((step + 1) / max(1, config.warmup))
    return min(warm, config.min_lr + (config.lr - config.min_lr) * share)


def _constant(config: RunConfig, step: int) -> float:
    return 1.0


def _cosine(config: RunConfig, step: int) -> float:
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * max(0.0, progress)))


def _wsd(config: RunConfig, step: int) -> float:
    return (config.steps - step) / max(1.0, config.decay * config.steps)


SCHEDULES: dict[str, Callable[[RunConfig, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "wsd": _wsd,
}


@contextmanager
def autocast(precision: Precision, device: str) -> Iterator[None]:
    """Enter the context of a forward pass: products in the half format, norms and softmax in fp32."""
    half = HALF_DTYPES.get(precision)
    if half is None:
        yield
        return
    # On CPUs the gradient of the fused attention in a half format is slower than its products one by one.
    attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    with attention, torch.autocast(device, dtype=half):
        yield


def loss_scaler(precision: Precision, device: str) -> torch.amp.GradScaler:
    """Make the loss scaler that keeps fp16 gradients from vanishing (Micikevicius et al., arXiv:1710.03740).

    In other precisions it does nothing.
    """
    return torch.amp.GradScaler(device, enabled=precision == "fp16")
