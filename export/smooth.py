"""SmoothQuant folded into the weights: the same function, with activations that fit an INT8 scale better.

A product stays the same if an activation channel is divided by s and the weight column multiplied by s (Xiao
et al., arXiv:2211.10438, eq. 3-4). Here the division costs nothing at run time, because it is folded into
other weights:

- The input of `qkv` and `fc1` is `LN(h)·(1 + scale) + shift`, without an affine of LN's own. Shift and
  1 + scale absorb s: their rows of the adaLN linear.
- The input of `proj` is a mix of the values V over tokens. V's rows of `qkv` absorb s.
- The input of `fc2` comes from GELU, which is not linear: it cannot be smoothed. Nor can `qkv` and `fc1` of a
  block without a modulation of its own that acts on all tokens alike, or `proj` where attention mixes
  channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ditserve.export.calibrate import CalibrationRows
from ditserve.export.parity import forward
from ditserve.model.nets.blocks import Block
from ditserve.model.nets.dit import DiT
from ditserve.model.spec.dit_config import MODULATIONS

# The candidates for α; 0 leaves the model as it is.
ALPHAS = (0.0, 0.5, 0.65, 0.8, 0.95)
# The linears of a block that become INT8.
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def int8_linears(dit: DiT) -> dict[str, nn.Linear]:
    """Return the linears that become INT8 by their names, such as "blocks.0.attn.qkv"."""
    modules = dict(dit.named_modules())
    names = [f"blocks.{k}.{layer}" for k in range(dit.config.depth) for layer in LAYERS]
    # The maps of experts lie side by side in one product, which stays as it is.
    return {name: module for name in names if isinstance(module := modules.get(name), nn.Linear)}


@torch.no_grad()
def input_peaks(dit: DiT, rows: CalibrationRows) -> dict[str, Tensor]:
    """Return the largest absolute input of each INT8 linear on `rows`, per channel (D_in,), by name."""
    peaks: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            peak = inputs[0].abs().flatten(0, -2).amax(0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in int8_linears(dit).items()]
    try:
        forward(dit, rows)
    finally:
        for handle in handles:
            handle.remove()
    return peaks


@torch.no_grad()
def smooth(dit: DiT, peaks: dict[str, Tensor], alpha: float) -> DiT:
    """Return a copy that computes the same, activations divided per channel by s = peak^α / |w|max^(1-α)."""
    result = copy.deepcopy(dit)
    if alpha == 0:
        return result
    d = dit.config.heads_width
    for k, module in enumerate(result.blocks):
        block = cast(Block, module)
        qkv, proj = block.attn.qkv, block.attn.proj
        if block.attn.over_tokens:
            factor = _factors(peaks[f"blocks.{k}.attn.proj"], proj.weight, alpha)
            proj.weight *= factor
            qkv.weight[2 * d :] /= factor[:, None]
            qkv.bias[2 * d :] /= factor
        count = MODULATIONS[block.kind]
        if not count or dit.config.shared_modulation or dit.config.condition_gate:
            continue
        _absorb(block, qkv, _factors(peaks[f"blocks.{k}.attn.qkv"], qkv.weight, alpha), 0)
        fc1 = getattr(block.mlp, "fc1", None)
        if isinstance(fc1, nn.Linear) and f"blocks.{k}.mlp.fc1" in peaks:
            _absorb(block, fc1, _factors(peaks[f"blocks.{k}.mlp.fc1"], fc1.weight, alpha), count // 2)
    return result


def _absorb(block: Block, linear: nn.Linear, factor: Tensor, first: int) -> None:
    """Divide the input of `linear` by `factor` (D_in,).

    Its shift is modulation vector `first`, its scale is `first` + 1.
    """
    adaln = cast(nn.Linear, cast(nn.Sequential, block.adaLN_modulation)[1])
    d = len(factor)
    shift, scale = slice(first * d, (first + 1) * d), slice((first + 1) * d, (first + 2) * d)
    linear.weight *= factor
    for rows in (shift, scale):
        adaln.weight[rows] /= factor[:, None]
    adaln.bias[shift] /= factor
    adaln.bias[scale] = (1 + adaln.bias[scale]) / factor - 1


def _factors(peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return s (D_in,), with geometric mean 1 so that the model's numbers keep their size."""
    factor = peak.clamp(min=1e-5) ** alpha / weight.abs().amax(0).clamp(min=1e-5) ** (1 - alpha)
    return factor / factor.log().mean().exp()


@torch.no_grad()
def simulate_int8(dit: DiT, peaks: dict[str, Tensor], rows: CalibrationRows) -> Tensor:
    """Return the output on `rows` with simulated INT8 linears.

    Scales are symmetric: one static scale per tensor of activations, one per channel of weights.
    """
    simulated = copy.deepcopy(dit)
    for name, linear in int8_linears(simulated).items():
        step = linear.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        linear.weight.copy_((linear.weight / step).round() * step)
        scale = float(peaks[name].max()) / 127

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], scale: float = scale) -> tuple[Tensor, ...]:
            return ((inputs[0] / scale).round().clamp(-128, 127) * scale,)

        linear.register_forward_pre_hook(hook)
    return forward(simulated, rows)


def search_alpha(
    dit: DiT, fit: CalibrationRows, held_out: CalibrationRows
) -> tuple[float, dict[float, float]]:
    """Return the best α, and the relative L2 of each α on `held_out`.

    The best is that whose simulated INT8 model, calibrated on `fit`, is nearest to fp32 on `held_out`.
    """
    exact = forward(dit, held_out)
    peaks = input_peaks(dit, fit)
    errors: dict[float, float] = {}
    for alpha in ALPHAS:
        candidate = smooth(dit, peaks, alpha)
        output = simulate_int8(candidate, input_peaks(candidate, fit), held_out)
        errors[alpha] = float((output - exact).norm() / exact.norm())
    return min(errors, key=lambda alpha: errors[alpha]), errors
