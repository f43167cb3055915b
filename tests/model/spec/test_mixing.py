"""Mixing, composing and layering of conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.guidance import guided
from ditserve.model.spec.mixing import (
    Mix,
    assign_blocks,
    compose_outputs,
    mix_embeddings,
    normalised_weights,
    slerp,
    splice_states,
    state_sources,
)
from tests.model.nets.unet_cases import TINY_UNET

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]
A, B, C = np.eye(3)


def test_linear_mix_is_the_weighted_mean() -> None:
    np.testing.assert_allclose(mix_embeddings([A, B, C], [1, 2, 1]), [0.25, 0.5, 0.25])


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_spherical_mix_keeps_length_and_divides_the_angle(share: float, seed: int) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, 16))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    between = slerp(a, b, share)
    assert np.linalg.norm(between) == pytest.approx(1)
    assert np.arccos(np.clip(a @ between, -1, 1)) == pytest.approx(share * np.arccos(a @ b), abs=1e-6)


def test_spherical_mix_of_three_stays_on_the_sphere() -> None:
    blend = mix_embeddings([A, B, C], [1, 1, 1], "spherical")
    assert np.linalg.norm(blend) == pytest.approx(1)
    assert (blend > 0.4).all()


def test_parallel_and_single_conditions() -> None:
    np.testing.assert_allclose(mix_embeddings([A, 3 * A], [1, 1], "spherical"), 2 * A)
    np.testing.assert_array_equal(mix_embeddings([A], [0.3], "spherical"), A)


def test_torch_and_numpy_agree() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 8))
    mixes: tuple[Mix, ...] = ("linear", "spherical")
    for mix in mixes:
        ours = mix_embeddings([torch.from_numpy(a), torch.from_numpy(b)], [1, 3], mix)
        np.testing.assert_allclose(ours.numpy(), mix_embeddings([a, b], [1, 3], mix))


def test_weights_are_relative_and_must_sum_to_something() -> None:
    assert normalised_weights([1, 3], 2) == [0.25, 0.75]
    assert normalised_weights([3, -1], 2) == [1.5, -0.5]
    for weights in ([0, 0], [1, -1], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="sum to more than 0"):
            normalised_weights(weights, len(weights))
    for weights, count in (([], 0), ([1], 2), ([1, 2], 1)):
        with pytest.raises(ValueError, match=f"one or more conditions, not {len(weights)} for {count}"):
            normalised_weights(weights, count)
    with pytest.raises(ValueError, match="linear, spherical"):
        mix_embeddings([A], [1], "cubic")  # type: ignore[arg-type]


def test_composition_is_a_sum_of_guidance_terms() -> None:
    """Both forms are u + Σ w_k (c_k − u), Liu et al. (2022)."""
    rng = np.random.default_rng(0)
    u, c1, c2 = rng.standard_normal((3, 2, 4, 4))
    expected = u + 4.5 * (c1 - u) - 1.5 * (c2 - u)
    np.testing.assert_allclose(guided(compose_outputs([c1, c2], [1.5, -0.5]), u, 3.0), expected)


def test_blocks_are_assigned_from_shallow_to_deep() -> None:
    assert assign_blocks(6, 3) == [0, 0, 1, 1, 2, 2]
    assert assign_blocks(7, 2) == [0, 0, 0, 0, 1, 1, 1]
    assert assign_blocks(4, 1) == [0] * 4
    for conditions in (0, 5):
        with pytest.raises(ValueError, match=f"4 blocks can follow 1 to 4 conditions, not {conditions}"):
            assign_blocks(4, conditions)


def test_splice_gives_each_block_its_condition(tiny: Tiny, network: Make) -> None:
    config = tiny(layout_rank=2)
    dit = network(config)
    labels = torch.tensor([[0, 0], [1, 1], [2, 2]])
    states = [dit.modulate(torch.tensor([500.0]), dit.embed(label[None])) for label in labels]
    spliced = splice_states(config, states, [0, 1, 2])
    for tensor, source in enumerate((0, 1, 2, 2, 0)):  # blocks, final, layout
        assert torch.equal(spliced[tensor], states[source][tensor])
    assert all(
        torch.equal(a, b) for a, b in zip(splice_states(config, states, [1, 1, 1]), states[1], strict=True)
    )
    x = torch.randn(1, 3, 8, 8)
    outputs = [dit.backbone(x, state) for state in (*states, spliced)]
    assert all(not torch.allclose(outputs[3], output) for output in outputs[:3])


def test_text_tokens_are_of_one_condition(tiny: Tiny) -> None:
    config = tiny(text_size=4, text_tokens=2)
    assert state_sources(config, [1] * config.depth) == (1,) * config.depth + (1, 1)  # final, text
    with pytest.raises(ValueError, match="text tokens"):
        state_sources(config, assign_blocks(config.depth, 2))


def test_splice_of_a_hybrid(tiny: Tiny, network: Make) -> None:
    """Token blocks read one pair of tokens, so they follow one condition; modulated blocks are free."""
    config = tiny(blocks=("adaln_zero", "cross_attention", "cross_attention"))
    dit = network(config)
    states = [dit.modulate(torch.tensor([500.0]), dit.embed(torch.tensor([[k, k]]))) for k in range(2)]
    spliced = splice_states(config, states, [0, 1, 1])
    assert torch.equal(spliced[0], states[0][0])
    assert torch.equal(spliced[1], states[1][1])
    with pytest.raises(ValueError, match="share one condition"):
        splice_states(config, states, [0, 0, 1])
    with pytest.raises(ValueError, match="3 blocks, not for 2"):
        splice_states(config, states, [0, 1])


def test_splice_of_a_unet() -> None:
    """The blocks go from input to output: the way down follows one condition, the way up another."""
    unet = UNet(TINY_UNET)
    states = [unet.modulate(torch.tensor([500.0]), unet.embed(torch.tensor([[k, k]]))) for k in range(2)]
    spliced = splice_states(TINY_UNET, states, assign_blocks(TINY_UNET.depth, 2))
    assert torch.equal(spliced[0], states[0][0])
    assert torch.equal(spliced[-1], states[1][-1])
