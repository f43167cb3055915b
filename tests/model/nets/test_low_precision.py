"""Half precision and FP8: the error, the conditioner, and rows that depend on themselves alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ditserve.model.nets import low_precision
from ditserve.model.nets.blocks import Block
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.layers import Attention, padded_attention
from ditserve.model.nets.low_precision import Fp8Linear, fp8_objection, lower_precision, quantized_rows
from ditserve.model.spec.dit_config import DiTConfig

PLAIN = DiTConfig(image_size=(8, 8), in_channels=4, hidden_size=64, depth=2, num_heads=4, patch_size=2)
ROTARY = replace(PLAIN, rope=True, qk_norm=True)
TEXT = replace(PLAIN, text_size=16, text_tokens=3)
EXPERTS = replace(PLAIN, experts=4, shared_expert=True, shared_modulation=True, condition_gate=True)
# Precision → the relative error of the output that rounding explains.
LIMITS = {"fp16": 5e-3, "bf16": 3e-2, "fp8": 5e-2}


def network_of(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    network = DiT(config).eval().requires_grad_(False)
    for tensor in network.parameters():
        tensor.add_(torch.randn_like(tensor), alpha=0.05)
    return network


def rows_of(network: DiT, count: int = 5) -> tuple[Tensor, tuple[Tensor, ...]]:
    config = network.config
    text = torch.randn(count, config.text_width) if config.text_size else None
    embedding = network.embed(torch.zeros(count, len(config.classes), dtype=torch.int64), text)
    x = torch.randn(count, config.in_channels, *config.image_size)
    return x, network.modulate(torch.linspace(0, 900, count), embedding)


@pytest.mark.parametrize("config", [PLAIN, ROTARY, TEXT, EXPERTS], ids=["plain", "rotary", "text", "experts"])
@pytest.mark.parametrize("precision", list(LIMITS))
@torch.inference_mode()
def test_the_backbone_is_rounded_and_the_conditioner_is_not(config: DiTConfig, precision: str) -> None:
    network = network_of(config)
    lowered = copy.deepcopy(network)
    backbone = lower_precision(lowered, precision)
    x, state = rows_of(network)
    exact, rounded = network.backbone(x, state), backbone(x, state)
    assert rounded.dtype == torch.float32
    assert 1e-6 < float((rounded - exact).norm() / exact.norm()) < LIMITS[precision]
    embedding = torch.randn(3, config.embedding_size)
    for one, other in zip(
        network.modulate(torch.ones(3), embedding), lowered.modulate(torch.ones(3), embedding), strict=True
    ):
        assert torch.equal(one, other)


@torch.inference_mode()
def test_a_row_in_fp8_depends_on_itself_alone() -> None:
    network = network_of(PLAIN)
    x, state = rows_of(network)
    backbone = lower_precision(network, "fp8")
    together = backbone(x, state)
    alone = backbone(x[2:3], [tensor[2:3] for tensor in state])
    torch.testing.assert_close(alone[0], together[2], rtol=0, atol=1e-5)
    x[1], others = torch.nan, [0, 2, 3, 4]
    spoilt = backbone(x, state)
    assert not torch.isfinite(spoilt[1]).any()
    assert torch.equal(spoilt[others], together[others])


def test_layers_of_blocks_are_in_fp8_where_their_sides_allow_it() -> None:
    network = network_of(PLAIN)
    block = network.blocks[0]
    assert isinstance(block, Block)
    block.mlp.fc1 = nn.Linear(64, 100)
    block.mlp.fc2 = nn.Linear(100, 64)
    lower_precision(network, "fp8")
    assert isinstance(block.attn.qkv, Fp8Linear)
    assert isinstance(block.mlp.fc1, nn.Linear)
    assert block.mlp.fc1.weight.dtype == torch.bfloat16
    assert isinstance(block.adaLN_modulation[1], nn.Linear)
    assert block.adaLN_modulation[1].weight.dtype == torch.float32


def test_every_row_has_a_scale_of_its_own() -> None:
    rows = torch.tensor([[1e-3, -2e-3], [300.0, 100.0], [0.0, 0.0]])
    values, scale = quantized_rows(rows)
    torch.testing.assert_close(values.float() * scale, rows, rtol=2**-4, atol=0)
    assert float(values.float().abs().max()) == low_precision.FP8_MAX


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_a_gpu_without_products_in_fp8_is_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    objection = fp8_objection(torch.device("cuda"))
    assert (objection is not None) == refused
    if refused:
        assert objection == "NVIDIA A10 has compute capability 8.6, and products in FP8 need 8.9"


@torch.inference_mode()
def test_wider_heads_give_the_same_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 72)
    torch.testing.assert_close(padded_attention(q, k, v, 80), padded_attention(q, k, v, 72))
    attention, h = Attention(72, 6).eval(), torch.randn(2, 9, 72)
    expected = attention(h)
    attention.computed_width = 16
    torch.testing.assert_close(attention(h), expected)
