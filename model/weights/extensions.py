"""The extensions that LightningDiT and REPA make to the official layout, folded into the options of ours.

The names of a state dict tell the extensions. The result computes the same as the network that it was trained
in, in the tensors that our DiT has:

- The weight of an RMSNorm multiplies the scale of the modulation that follows it.
- A modulation without shifts gets shifts of zero.
- A SwiGLU whose width is no multiple of 8 gets channels of zero.
- Rotary pairs that are neighbours, (2k, 2k + 1), are brought to (k, k + half a head).
- Queries and keys before a LayerNorm are scaled so that our smaller epsilon acts as the larger one there.

Sources: Yao et al., arXiv:2501.01423 (LightningDiT); Yu et al., arXiv:2410.06940 (REPA).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditserve.model.nets.layers import rotary_tables
from ditserve.model.spec.dit_config import SWIGLU_MULTIPLE
from ditserve.model.weights.official import Weights, WeightsError

# The norms before a modulation, and which of its vectors is the scale.
_BLOCK_NORMS = {"norm1": 1, "norm2": 4}
_COS, _SIN = "feat_rope.freqs_cos", "feat_rope.freqs_sin"
# The epsilon of their LayerNorm of queries and keys, torch's default, and of ours.
_THEIR_EPS, _OUR_EPS = 1e-5, 1e-6


def fold_extensions(state: Mapping[str, Tensor]) -> tuple[Weights, dict[str, Any]]:
    """Return a state dict in official names, and the fields of `DiTConfig` that its extensions tell.

    A state dict without extensions is returned as it is, and tells nothing.

    Raises:
        WeightsError: extensions in some blocks only, of unlike shapes, or other rotary positions than ours.
    """
    folding = _Folding(state)
    try:
        return folding.state, folding.run()
    except KeyError as error:
        raise WeightsError(f"{error.args[0]} is missing") from None
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"the shapes of the weights do not fit together: {reason}") from None


class _Folding:
    """The state dict under work; every method does one of the folds, in every block."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)
        found = {match[0] for name in state if (match := re.match(r"blocks\.\d+(?=\.)", name))}
        self.blocks = sorted(found)

    def run(self) -> dict[str, Any]:
        """Fold what is there, in an order in which no fold undoes another, and return the options."""
        options: dict[str, Any] = {}
        if not self.blocks:
            return options
        head_size = 0
        for block in self.blocks:
            self._add_shifts(block)
        if self._everywhere("mlp.w12.weight"):
            options["swiglu"] = True
            for block in self.blocks:
                self._rename_swiglu(block)
        if self._everywhere("norm1.weight"):
            options["rms_norm"] = True
            self._fold_norms()
        if self._everywhere("attn.q_norm.weight"):
            options["qk_norm"] = True
            head_size = len(self.state[f"{self.blocks[0]}.attn.q_norm.weight"])
            self._check_head_norms(rms=options.get("rms_norm", False))
        if _COS in self.state:
            options["rope"] = True
            head_size = self._check_tables()
            for block in self.blocks:
                self._sort_pairs(block, head_size)
        if head_size:
            options["num_heads"] = len(self.state[f"{self.blocks[0]}.attn.qkv.weight"]) // (3 * head_size)
        return options

    def _everywhere(self, name: str) -> bool:
        """Return whether every block has a tensor of that name. Raise WeightsError if only some have."""
        lacking = [block for block in self.blocks if f"{block}.{name}" not in self.state]
        if lacking and len(lacking) < len(self.blocks):
            raise WeightsError(f"{lacking[0]} has no {name}, and other blocks have one")
        return not lacking

    def _modulation(self, owner: str) -> tuple[Tensor, Tensor]:
        name = f"{owner}.adaLN_modulation.1"
        return self.state[f"{name}.weight"].float(), self.state[f"{name}.bias"].float()

    def _set_modulation(self, owner: str, weight: Tensor, bias: Tensor) -> None:
        self.state[f"{owner}.adaLN_modulation.1.weight"] = weight
        self.state[f"{owner}.adaLN_modulation.1.bias"] = bias

    def _add_shifts(self, block: str) -> None:
        """Make (shift, scale, gate) twice of (scale, gate) twice, with shifts of zero."""
        if f"{block}.adaLN_modulation.1.weight" not in self.state:
            return
        weight, bias = self._modulation(block)
        size = weight.shape[1]
        if len(weight) != 4 * size or len(bias) != 4 * size:
            return
        parts = []
        for tensor in (weight, bias):
            attention, mlp = tensor.chunk(2)
            shift = torch.zeros_like(tensor[:size])
            parts.append(torch.cat([shift, attention, shift, mlp]))
        self._set_modulation(block, *parts)

    def _rename_swiglu(self, block: str) -> None:
        """Name the maps of a SwiGLU as ours, and add channels of zero up to a multiple of 8."""
        takes = [self.state.pop(f"{block}.mlp.w12.{part}") for part in ("weight", "bias")]
        gives = self.state.pop(f"{block}.mlp.w3.weight")
        channels = gives.shape[1]
        added = -channels % SWIGLU_MULTIPLE
        for part, tensor in zip(("weight", "bias"), takes, strict=True):
            halves = tensor.unflatten(0, (2, channels))
            zeros = halves.new_zeros((2, added, *halves.shape[2:]))
            self.state[f"{block}.mlp.fc1.{part}"] = torch.cat([halves, zeros], dim=1).flatten(0, 1)
        self.state[f"{block}.mlp.fc2.weight"] = torch.cat(
            [gives, gives.new_zeros((len(gives), added))], dim=1
        )
        self.state[f"{block}.mlp.fc2.bias"] = self.state.pop(f"{block}.mlp.w3.bias")

    def _fold_norms(self) -> None:
        """Multiply the scales by the weights of the norms: w · (1 + scale) = 1 + (w · scale + w − 1)."""
        places = [(block, name, 6, vector) for block in self.blocks for name, vector in _BLOCK_NORMS.items()]
        for owner, name, vectors, vector in (*places, ("final_layer", "norm_final", 2, 1)):
            norm = f"{owner}.{name}.weight"
            if norm not in self.state:
                raise WeightsError(f"{norm} is missing, and other norms have a weight")
            factor = self.state.pop(norm).float()
            weight, bias = (tensor.clone() for tensor in self._modulation(owner))
            if len(bias) != vectors * len(factor):
                raise WeightsError(
                    f"{norm} has {len(factor)} numbers, which do not fit a modulation of {len(bias)}"
                )
            rows = slice(vector * len(factor), (vector + 1) * len(factor))
            weight[rows] *= factor[:, None]
            bias[rows] = factor * bias[rows] + factor - 1
            self._set_modulation(owner, weight, bias)

    def _check_head_norms(self, *, rms: bool) -> None:
        """Refuse norms of queries and keys of another kind than those of the blocks, and match epsilon."""
        if self._everywhere("attn.q_norm.bias") == rms:
            kinds = ("RMSNorm", "LayerNorm") if rms else ("LayerNorm", "RMSNorm")
            raise WeightsError(
                f"the blocks have {kinds[0]}, and their queries {kinds[1]}: such a network cannot be imported"
            )
        if rms:
            return
        for block in self.blocks:
            for part in ("weight", "bias"):
                q, k, v = self.state[f"{block}.attn.qkv.{part}"].float().chunk(3)
                scale = math.sqrt(_OUR_EPS / _THEIR_EPS)
                self.state[f"{block}.attn.qkv.{part}"] = torch.cat([q * scale, k * scale, v])

    def _check_tables(self) -> int:
        """Return the size of a head from the rotary tables, which must be ours but for the order."""
        cos, sin = self.state.pop(_COS), self.state.pop(_SIN)
        tokens, head_size = cos.shape
        side = math.isqrt(tokens)
        if side * side != tokens or head_size % 4:
            raise WeightsError(f"{_COS} is {tokens} × {head_size}: it must be of a square of tokens")
        rounding = max(1e-4, torch.finfo(cos.dtype).eps)
        tables = rotary_tables(head_size, (side, side))
        for name, theirs, ours in zip((_COS, _SIN), (cos, sin), tables, strict=True):
            doubled = ours.repeat_interleave(2, dim=1)
            if theirs.shape != cos.shape or not torch.allclose(theirs.float(), doubled, atol=rounding):
                raise WeightsError(f"{name} turns by other angles than LightningDiT's: it cannot be imported")
        return head_size

    def _sort_pairs(self, block: str, head_size: int) -> None:
        """Bring the two numbers of every rotary pair half a head apart, as `apply_rotary` takes them."""
        order = torch.cat([torch.arange(0, head_size, 2), torch.arange(1, head_size, 2)])
        for part in ("weight", "bias"):
            q, k, v = self.state[f"{block}.attn.qkv.{part}"].chunk(3)
            turned = [tensor.unflatten(0, (-1, head_size))[:, order].flatten(0, 1) for tensor in (q, k)]
            self.state[f"{block}.attn.qkv.{part}"] = torch.cat([*turned, v])
        for name in (f"{block}.attn.{letter}_norm.{part}" for letter in "qk" for part in ("weight", "bias")):
            if name in self.state:
                self.state[name] = self.state[name][order]
