"""A gate of the condition and a shared modulation, by their formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ditserve.model.nets.blocks import Block
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.layers import layer_norm
from ditserve.model.spec.dit_config import DiTConfig

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]


def test_the_gate_scales_shift_and_scale_of_every_token(tiny: Tiny, network: Make) -> None:
    block = network(tiny(condition_gate=True)).blocks[0]
    assert isinstance(block, Block)
    gate = block.condition_gate
    assert gate is not None
    h, state = torch.randn(2, 16, 32), torch.randn(2, 7, 32)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m, of_condition = state[:, :, None].unbind(1)
    with torch.no_grad():
        alpha = 2 * torch.sigmoid(gate.fc2(F.silu(gate.fc1(layer_norm(h)) + of_condition)))
        assert alpha.shape == (2, 16, 1)
        assert alpha.std() > 0.01
        a = h + gate_a * block.attn(layer_norm(h) * (1 + alpha * scale_a) + alpha * shift_a)
        expected = a + gate_m * block.mlp(layer_norm(a) * (1 + alpha * scale_m) + alpha * shift_m)
        assert torch.allclose(block(h, state), expected, atol=1e-5)


def test_gates_start_at_1(tiny: Tiny, network: Make) -> None:
    """With the weights of a network without gates it computes the same, whatever the gate's own vector is."""
    plain, gated = network(tiny()), DiT(tiny(condition_gate=True)).eval()
    weights = dict(plain.state_dict())
    for name, tensor in gated.state_dict().items():
        if name.endswith(("adaLN_modulation.1.weight", "adaLN_modulation.1.bias")) and "blocks" in name:
            weights[name] = torch.cat([weights[name], torch.randn(32, *tensor.shape[1:])])
        weights.setdefault(name, tensor)
    gated.load_state_dict(weights)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5.0, 700.0])
    labels = torch.tensor([[1, 2], [5, 3]])
    with torch.no_grad():
        assert torch.allclose(plain(x, t, labels), gated(x, t, labels), atol=1e-6)


def test_blocks_share_a_modulation_and_add_their_own_offsets(tiny: Tiny, network: Make) -> None:
    dit = network(tiny(shared_modulation=True))
    assert dit.shared_modulation is not None
    labels = torch.tensor([[1, 2], [5, 3]])
    with torch.no_grad():
        embedding, t = dit.embed(labels), torch.tensor([5.0, 700.0])
        shared = dit.shared_modulation(dit.t_embedder(t) + embedding)
        for block, state in zip(dit.blocks, dit.modulate(t, embedding), strict=False):
            offsets = block.get_parameter("adaLN_modulation.offsets")
            assert torch.equal(state, (shared + offsets).reshape(2, 6, 32))
