"""Attention beside a forward pass: its entropy is 1 where all are attended alike, and 0 where one is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ditserve.model.nets.attention_weights import AttentionEntropy
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.layers import Attention
from ditserve.model.spec.dit_config import DiTConfig

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]


def entropy(dit: DiT, passes: int = 1) -> dict[str, float]:
    measured = AttentionEntropy(dit)
    labels = torch.zeros((6, len(dit.config.classes)), dtype=torch.int64)
    x = torch.randn(6, dit.config.in_channels, *dit.config.image_size)
    with torch.no_grad(), measured.measured():
        for _ in range(passes):
            dit(x, torch.full((6,), 5.0), labels)
    return measured.figures()


def test_the_entropy_of_layers_that_attend_to_all_or_to_one(tiny: Tiny, network: Make) -> None:
    dit = network(tiny(depth=2))
    first, second = (layer for layer in dit.modules() if isinstance(layer, Attention))
    with torch.no_grad():
        # Without keys every token is worth the same.
        for layer in (first, second):
            layer.qkv.weight.zero_()
            layer.qkv.bias.zero_()
    assert entropy(dit) == pytest.approx({"attention_entropy": 1.0, "attention_entropy_least": 1.0})
    with torch.no_grad():
        width = second.qkv.weight.shape[1]
        second.qkv.weight[: 2 * width].normal_(0, 100)
    collapsed = entropy(dit, passes=2)
    assert collapsed["attention_entropy_least"] < 0.2
    assert collapsed["attention_entropy"] == pytest.approx((1 + collapsed["attention_entropy_least"]) / 2)


def test_nothing_is_measured_outside_the_context(tiny: Tiny, network: Make) -> None:
    dit = network(tiny())
    assert AttentionEntropy(dit).figures() == {}
    assert not any(module._forward_pre_hooks for module in dit.modules())
    entropy(dit)
    assert not any(module._forward_pre_hooks for module in dit.modules())
