"""Low-rank adapters: a pass of rows with different ones is each row alone, and that with merged weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.lora import AdapterBank, LowRank, RowAdapters, row_layers
from ditserve.model.spec.dit_config import DiTConfig

CONFIG = DiTConfig(
    image_size=(8, 8), patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2, classes=(5,)
)
ROWS: tuple[RowAdapters, ...] = (
    [("a", 0.8)],
    [],
    [("a", 1.0), ("b", -0.5)],
    [("b", 2.0)],
    [],
)


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.manual_seed(0)
    network = DiT(CONFIG).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    return x, torch.linspace(10, 900, rows), torch.arange(rows)[:, None] % 5


def layers_of(dit: DiT) -> dict[str, nn.Linear]:
    return row_layers(dit, lambda: dit(*inputs(3)), 3)


def made_adapters(layers: Mapping[str, nn.Linear]) -> dict[str, dict[str, LowRank]]:
    """Return two adapters of different ranks, one of them of the conditioner's layers too."""
    generator = torch.Generator().manual_seed(2)

    def term(layer: nn.Linear, rank: int) -> LowRank:
        down = 0.3 * torch.randn(rank, layer.in_features, generator=generator)
        return LowRank(down, 0.3 * torch.randn(layer.out_features, rank, generator=generator))

    return {
        "a": {name: term(layer, 3) for name, layer in layers.items()},
        "b": {name: term(layer, 5) for name, layer in layers.items() if ".attn." in name},
    }


def merged(dit: DiT, adapters: Mapping[str, Mapping[str, LowRank]], uses: RowAdapters) -> DiT:
    network = copy.deepcopy(dit)
    for name, scale in uses:
        for layer, term in adapters[name].items():
            network.get_submodule(layer).get_parameter("weight").add_(scale * term.up @ term.down)
    return network


def test_a_mixed_pass_is_each_row_with_its_own_weights(dit: DiT) -> None:
    layers = layers_of(dit)
    adapters = made_adapters(layers)
    bank = AdapterBank(layers, adapters)
    x, t, labels = inputs(len(ROWS))
    with torch.inference_mode(), bank.applied(ROWS):
        together = dit(x, t, labels)
    for row, uses in enumerate(ROWS):
        one = slice(row, row + 1)
        with torch.inference_mode():
            expected = merged(dit, adapters, uses)(x[one], t[one], labels[one])
            with bank.applied([uses]):
                alone = dit(x[one], t[one], labels[one])
        assert (alone - expected).abs().max() < 2e-5
        assert (together[one] - alone).abs().max() < 2e-5
    with torch.inference_mode():
        assert (together[:1] - dit(x[:1], t[:1], labels[:1])).abs().max() > 0.01, "it does something"


def test_rows_without_an_adapter_are_not_touched(dit: DiT) -> None:
    """They are bit for bit as in a pass without adapters, and so is the network afterwards."""
    layers = layers_of(dit)
    bank = AdapterBank(layers, made_adapters(layers))
    with torch.inference_mode():
        plain = dit(*inputs(5))
        with bank.applied(ROWS):
            mixed = dit(*inputs(5))
        with bank.applied([[]] * 5):
            assert not any(layer._forward_hooks for layer in layers.values()), "no cost where none is used"
        assert torch.equal(dit(*inputs(5)), plain)
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(mixed[4], plain[4])


def test_a_failed_pass_leaves_nothing_behind(dit: DiT) -> None:
    layers = layers_of(dit)
    bank = AdapterBank(layers, made_adapters(layers))
    wrong = pytest.raises(ValueError, match="is given 5 rows where the pass has 2")
    with torch.inference_mode(), wrong, bank.applied([[("a", 1.0)], []]):
        dit(*inputs(5))
    assert not any(layer._forward_hooks for layer in layers.values())


def test_only_layers_that_are_called_by_rows_can_be_adapted(dit: DiT) -> None:
    layers = layers_of(dit)
    assert {"blocks.0.attn.qkv", "blocks.1.mlp.fc2", "blocks.0.adaLN_modulation.1"} <= layers.keys()
    assert "final_layer.linear" not in layers, "its weights are used without calling it"
    tokens = nn.Linear(4, 4)
    assert not row_layers(nn.Sequential(tokens), lambda: tokens(torch.zeros(7, 4)), 3)
