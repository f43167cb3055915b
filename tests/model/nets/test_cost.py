"""The cost of networks, compared with counts by hand and with what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ditserve.model.nets.cost import Cost, cost
from ditserve.model.nets.dit import DiT
from ditserve.model.spec.dit_config import BlockKind, DiTConfig
from ditserve.model.spec.unet_config import UNetConfig

Tiny = Callable[..., DiTConfig]


def test_cost_by_hand() -> None:
    """The cost of a DiT with one block equals a count of every matrix product by hand."""
    d, tokens, heads = 8, 16, 2
    config = DiTConfig(
        image_size=(8, 8),
        in_channels=3,
        hidden_size=d,
        depth=1,
        num_heads=heads,
        classes=(5,),
        learn_sigma=False,
    )
    actual = cost(config)
    assert actual.conditioner_macs == 256 * d + d * d + 6 * d * d + 2 * d * d
    block = tokens * (3 + 1 + 4 + 4) * d * d + 2 * tokens * tokens * d
    assert actual.backbone_macs == tokens * 12 * d + block + tokens * d * 12
    assert (actual.tokens, actual.attention_macs) == (tokens, 2 * tokens * tokens * d)
    assert actual.convolution_macs == tokens * 12 * d
    assert actual.linear_macs + actual.attention_macs + actual.convolution_macs == actual.macs
    assert actual.flops == 2 * (actual.conditioner_macs + actual.backbone_macs)
    assert actual.parameters == sum(p.numel() for p in DiT(config).parameters()) + tokens * d


def test_of_experts_only_those_of_a_token_are_active_and_count() -> None:
    def expert_cost(**changes: int) -> Cost:
        shape = {"image_size": (8, 8), "hidden_size": 8, "depth": 2, "num_heads": 2}
        return cost(DiTConfig(**shape, **changes))  # type: ignore[arg-type]

    dense, sparse = expert_cost(), expert_cost(experts=4, top_k=1)
    expert = 8 * 32 + 32 + 32 * 8 + 8
    router = 8 * 4 + 4
    assert sparse.parameters == dense.parameters + 2 * (3 * expert + router)
    assert sparse.active_parameters == dense.active_parameters + 2 * router
    assert dense.active_parameters == dense.parameters
    assert sparse.macs == dense.macs + 2 * 16 * 8 * 4


def test_operations_by_kind() -> None:
    """Cross-attention reads its own keys, condition tokens attend too, and a U-Net is mostly convolutions."""

    def dit(kind: BlockKind) -> Cost:
        shape = DiTConfig(hidden_size=8, depth=1, num_heads=2, image_size=(8, 8), blocks=(kind,))
        return cost(shape)

    plain, in_context = dit("adaln_zero"), dit("in_context")
    assert dit("cross_attention").attention_macs == plain.attention_macs + 2 * 16 * 2 * 8
    assert (in_context.tokens, in_context.attention_macs) == (18, 2 * 18 * 18 * 8)
    unet = cost(
        UNetConfig(image_size=(8, 8), base_channels=8, multipliers=(1, 2), attention=(0,), head_size=8)
    )
    assert unet.tokens == 64
    assert unet.convolution_macs > 0.5 * unet.macs
    assert unet.linear_macs > 0


def test_activation_memory_of_a_row(tiny: Tiny) -> None:
    """Training keeps as much as autograd keeps of real tensors; inference holds a few token matrices."""
    config = tiny(depth=2)
    dit = DiT(config)
    x, t, labels = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 2, dtype=torch.int64)
    own = {p.data_ptr() for p in (*dit.parameters(), *dit.buffers())}
    kept: dict[int, torch.Tensor] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    )
    with hooks:
        out = dit(x, t, labels)
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    actual = cost(config)
    assert out.requires_grad
    # Attention keeps other tensors on other devices.
    assert actual.training_bytes == pytest.approx(real, rel=0.15)
    tokens = 16 * 32 * 4
    assert 4 * tokens < actual.inference_bytes < 20 * tokens
    deeper = cost(tiny(depth=6))
    assert deeper.training_bytes > 2.5 * actual.training_bytes
    assert deeper.inference_bytes < 2 * actual.inference_bytes


def test_size_option(tiny: Tiny) -> None:
    config = tiny()
    assert cost(config, (16, 16)).backbone_macs > 4 * cost(config).backbone_macs
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        cost(config, (9, 8))
