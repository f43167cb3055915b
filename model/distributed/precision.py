"""In which arithmetic a network trains: fp32, or mixed with bf16 or fp16. Weights, losses and averages are fp32 in all of them."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
HALVES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: str) -> torch.autocast:
    """The context of a forward pass: matrix products in the half format; normalisation and softmax stay in fp32."""
    half = HALVES.get(precision, torch.bfloat16)
    return torch.autocast(device, dtype=half, enabled=precision in HALVES)


def loss_scaler(precision: Precision, device: str) -> torch.amp.GradScaler:
    """Scales the loss so that fp16 gradients do not vanish (Micikevicius et al., arXiv:1710.03740); else does nothing."""
    return torch.amp.GradScaler(device, enabled=precision == "fp16")
