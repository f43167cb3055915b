"""The signals of a network while it runs: attention, activations and routers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.signals import NetworkSignals
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.dit_config import DiTConfig
from tests.model.nets.unet_cases import TINY_UNET

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]


def test_activations_are_those_of_the_block_where_they_are_largest(tiny: Tiny, network: Make) -> None:
    dit = network(tiny(experts=4))
    outputs: list[torch.Tensor] = []
    for block in dit.blocks:
        block.register_forward_hook(lambda module, inputs, h: outputs.append(h))
    signals = NetworkSignals(dit)
    with torch.no_grad(), signals.measured():
        dit(torch.randn(2, 3, 8, 8), torch.full((2,), 5.0), torch.zeros(2, 2, dtype=torch.int64))
    figures = signals.figures()
    largest = max(float(h.square().mean()) for h in outputs)
    assert figures["activation_rms"] == pytest.approx(largest**0.5)
    assert figures["activation_peak"] == pytest.approx(max(float(h.abs().max()) for h in outputs))
    assert 0 < figures["attention_entropy"] <= 1
    assert 1 <= figures["router_busiest"] <= 4
    assert 0 <= figures["router_left_out"] < 1


def test_a_network_without_experts_has_no_routers_and_nothing_stays_behind(network: Make) -> None:
    for model in (network(), UNet(TINY_UNET)):
        signals = NetworkSignals(model)
        assert signals.figures() == {}
        count = sum(len(module._forward_hooks) for module in model.modules())
        x = torch.randn(1, model.config.in_channels, *model.config.image_size)
        with torch.no_grad(), signals.measured():
            model(x, torch.ones(1), torch.zeros(1, len(model.config.classes), dtype=torch.int64))
        assert {"activation_rms", "activation_peak"} <= signals.figures().keys()
        assert not any(name.startswith("router") for name in signals.figures())
        assert sum(len(module._forward_hooks) for module in model.modules()) == count
