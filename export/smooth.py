"""SmoothQuant folded into the model: the same function, with activations that an INT8 scale fits better.

An activation channel divided by s and the weight column multiplied by s leave a product as it was (Xiao et al., arXiv:2211.10438,
eq. 3–4). Here the division costs nothing at run time. Before `qkv` and `fc1` stands `LN(h)·(1 + scale) + shift` without an affine of its own,
so shift and 1 + scale absorb it: their rows of the adaLN linear. Before `proj` stands a mix of the values V, so V's rows of `qkv` absorb it.
Nothing linear stands before `fc2` (GELU), and nothing to fold into where a block has no modulation.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ditserve.export.calibrate import Rows
from ditserve.export.parity import forward
from ditserve.model.nets.dit import Block, DiT
from ditserve.model.spec.dit_config import MODULATIONS

ALPHAS = (0.0, 0.5, 0.65, 0.8, 0.95)  # 0: leave the model as it is
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # the linears of a block that become INT8


def int8_linears(dit: DiT) -> dict[str, nn.Linear]:
    """The linears that become INT8, by name such as "blocks.0.attn.qkv"; all others stay as they are."""
    modules = dict(dit.named_modules())
    names = [f"blocks.{k}.{layer}" for k in range(dit.config.depth) for layer in LAYERS]
    return {name: cast(nn.Linear, modules[name]) for name in names if name in modules}


@torch.no_grad()
def amax(dit: DiT, rows: Rows) -> dict[str, Tensor]:
    """Largest absolute input of each INT8 linear, per channel (D_in,), along `rows`."""
    found: dict[str, Tensor] = {}

    def watcher(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            peak = inputs[0].abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found[name], peak) if name in found else peak

        return hook

    handles = [module.register_forward_pre_hook(watcher(name)) for name, module in int8_linears(dit).items()]
    try:
        forward(dit, rows)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def smoothed(dit: DiT, peaks: dict[str, Tensor], alpha: float) -> DiT:
    """A copy that computes the same, its activations divided per channel by s = peak^α / |w|max^(1−α)."""
    result = copy.deepcopy(dit)
    if alpha == 0:
        return result
    d = dit.config.heads_width
    for k, module in enumerate(result.blocks):
        block = cast(Block, module)
        qkv, proj = block.attn.qkv, block.attn.proj
        factor = _factors(peaks[f"blocks.{k}.attn.proj"], proj.weight, alpha)
        proj.weight *= factor
        qkv.weight[2 * d :] /= factor[:, None]
        qkv.bias[2 * d :] /= factor
        count = MODULATIONS[block.kind]
        if not count:
            continue
        _absorb(block, qkv, _factors(peaks[f"blocks.{k}.attn.qkv"], qkv.weight, alpha), 0)
        fc1 = getattr(block.mlp, "fc1", None)
        if isinstance(fc1, nn.Linear) and f"blocks.{k}.mlp.fc1" in peaks:
            _absorb(block, fc1, _factors(peaks[f"blocks.{k}.mlp.fc1"], fc1.weight, alpha), count // 2)
    return result


def _absorb(block: Block, linear: nn.Linear, factor: Tensor, first: int) -> None:
    """Divide what enters `linear` by `factor` in modulation vectors `first` (shift) and `first` + 1 (scale)."""
    adaln = cast(nn.Linear, block.adaLN_modulation[1])
    d = len(factor)
    shift, scale = slice(first * d, (first + 1) * d), slice((first + 1) * d, (first + 2) * d)
    linear.weight *= factor
    for rows in (shift, scale):
        adaln.weight[rows] /= factor[:, None]
    adaln.bias[shift] /= factor
    adaln.bias[scale] = (1 + adaln.bias[scale]) / factor - 1


def _factors(peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s (D_in,), around 1 in geometric mean so that the model's numbers keep their size."""
    factor = peak.clamp(min=1e-5) ** alpha / weight.abs().amax(0).clamp(min=1e-5) ** (1 - alpha)
    return factor / factor.log().mean().exp()


@torch.no_grad()
def int8_output(dit: DiT, peaks: dict[str, Tensor], rows: Rows) -> Tensor:
    """Output of the backbone with INT8 linears simulated: static symmetric activations per tensor, weights per channel."""
    simulated = copy.deepcopy(dit)
    for name, linear in int8_linears(simulated).items():
        step = linear.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        linear.weight.copy_((linear.weight / step).round() * step)
        scale = float(peaks[name].max()) / 127

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], scale: float = scale) -> tuple[Tensor, ...]:
            return ((inputs[0] / scale).round().clamp(-128, 127) * scale,)

        linear.register_forward_pre_hook(hook)
    return forward(simulated, rows)


def search(dit: DiT, fit: Rows, judge: Rows) -> tuple[float, dict[float, float]]:
    """The α whose simulated INT8 model is nearest to fp32 on `judge`, calibrated on `fit`; and the relative L2 of each α."""
    exact = forward(dit, judge)
    peaks = amax(dit, fit)
    errors: dict[float, float] = {}
    for alpha in ALPHAS:
        candidate = smoothed(dit, peaks, alpha)
        output = int8_output(candidate, amax(candidate, fit), judge)
        errors[alpha] = float((output - exact).norm() / exact.norm())
    return min(errors, key=lambda alpha: errors[alpha]), errors
