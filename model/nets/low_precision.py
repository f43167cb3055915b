"""The backbone of a DiT in half precision, and its blocks' linear layers in FP8.

The conditioner stays in fp32, as in the exported graphs (`export.half`): a server computes its results once.
FP8 numbers are e4m3, of 3 bits of mantissa, up to 448. Each row of a product's inputs and each output of its
weights has a scale of its own, so that a row depends on itself alone (Micikevicius et al., arXiv:2209.05433).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ditserve.model.nets.dit import DiT

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# A product in FP8 gives bf16: no other output is there for rows with scales on every GPU.
FP8_OUTPUT = torch.bfloat16
# Both sides of a matrix in FP8 are multiples of it.
FP8_MULTIPLE = 16
# The first GPUs with products in FP8 are those of compute capability 8.9.
FP8_CAPABILITY = (8, 9)

Backbone = Callable[[Tensor, Sequence[Tensor]], Tensor]


class Fp8Linear(nn.Module):
    """A linear layer in FP8, (…, in) bf16 → (…, out) bf16."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        values, scale = quantized_rows(weight)
        self.register_buffer("weight", values)  # (out, in)
        self.register_buffer("scale", scale.T.contiguous())  # (1, out)
        self.bias = None if layer.bias is None else layer.bias.detach().to(FP8_OUTPUT)

    def forward(self, h: Tensor) -> Tensor:
        values, scale = quantized_rows(h.reshape(-1, h.shape[-1]))
        weight, weight_scale = cast(Tensor, self.weight), cast(Tensor, self.scale)
        out = torch._scaled_mm(
            values, weight.t(), scale_a=scale, scale_b=weight_scale, out_dtype=FP8_OUTPUT, use_fast_accum=True
        )
        out = out if self.bias is None else out + self.bias
        return out.reshape(*h.shape[:-1], -1)


def quantized_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (n, k) in FP8, and the scale (n, 1) fp32 by which each is to be multiplied."""
    # A row that is not a number gives a scale that is none, and stays alone.
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (rows.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def lower_precision(network: DiT, precision: str) -> Backbone:
    """Put the backbone of a network into `precision` in place: "fp16", "bf16" or "fp8"; return its calls.

    Their inputs and outputs are fp32. In FP8 are the linear layers of blocks whose sides allow it; the rest
    of the backbone is in bf16 then.
    """
    dtype = HALVES.get(precision, FP8_OUTPUT)
    for name, module in network.named_modules():
        if not _of_conditioner(name):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    if precision == "fp8":
        for parent, name, layer in list(_fp8_layers(network)):
            setattr(parent, name, Fp8Linear(layer))

    def backbone(x: Tensor, state: Sequence[Tensor]) -> Tensor:
        return type(network).backbone(network, x.to(dtype), [tensor.to(dtype) for tensor in state]).float()

    # Whoever calls the network's own backbone is given this one.
    vars(network)["backbone"] = backbone
    return backbone


def _of_conditioner(name: str) -> bool:
    """Return True for the modules that `modulate` and `embed` call."""
    first = name.partition(".")[0]
    conditioner = (
        "t_embedder",
        "y_embedder",
        "layout",
        "conditional_mean",
        "frame_embedder",
        "shared_modulation",
    )
    return first in conditioner or "adaLN_modulation" in name


def _fp8_layers(network: DiT) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield the linear layers of the blocks that can be in FP8, with the module and the name they have."""
    for path, parent in network.blocks.named_modules():
        for name, layer in parent.named_children():
            whole = isinstance(layer, nn.Linear) and not (
                layer.in_features % FP8_MULTIPLE or layer.out_features % FP8_MULTIPLE
            )
            if whole and not _of_conditioner(f"blocks.{path}.{name}"):
                yield parent, name, cast(nn.Linear, layer)


def fp8_objection(device: torch.device) -> str | None:
    """Return why a device cannot compute in FP8, None if it can."""
    if device.type != "cuda":
        return None if device.type == "cpu" else f"torch has no products in FP8 on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= FP8_CAPABILITY:
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    return f"{name} has compute capability {major}.{minor}, and products in FP8 need 8.9"
