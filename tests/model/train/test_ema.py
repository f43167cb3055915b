"""Averages of weights: several at once, all by the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditserve.model.train.ema import Ema


def test_each_average_follows_its_own_decay_after_a_warm_up() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, (0.5, 0.999))
    expected = {
        decay: {k: p.detach().double() for k, p in module.named_parameters()} for decay in (0.5, 0.999)
    }
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 31):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        ema.update(module.parameters())
        for decay, average in expected.items():
            d = min(decay, (1 + n) / (10 + n))
            for name, parameter in module.named_parameters():
                average[name] = d * average[name] + (1 - d) * parameter.detach().double()
    for decay, average in expected.items():
        for name, tensor in average.items():
            torch.testing.assert_close(ema.averages[decay][name].double(), tensor, rtol=1e-5, atol=1e-6)


def test_the_first_average_is_the_one_to_sample_from() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, (0.9, 0.0))
    with torch.no_grad():
        module.weight.zero_()
    ema.update(module.parameters())
    copy = nn.Linear(3, 2)
    ema.copy_to(copy)
    assert torch.equal(copy.weight, ema.averages[0.9]["weight"])
    assert torch.equal(ema.averages[0.0]["weight"], module.weight)
    assert not torch.equal(copy.weight, module.weight)


@pytest.mark.parametrize("decays", [(), (0.9, 0.9), (1.0,), (-0.1,)])
def test_decays_that_make_no_sense_are_refused(decays: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ema must be one or more different decays"):
        Ema(nn.Linear(2, 2), decays)
