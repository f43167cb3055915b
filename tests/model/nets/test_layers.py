"""The layers, compared with the formulas of their papers in plain numpy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ditserve.model.nets.layers import (
    Attention,
    CrossAttention,
    QkNorm,
    SwiGlu,
    TimestepEmbedder,
    apply_rotary,
    layer_norm,
    rms_norm,
    rotary_tables,
    sincos_positions,
    timestep_features,
    unpatchify,
)

Floats = npt.NDArray[np.float64]


def reference_positions(width: int, rows: int, columns: int, scale: tuple[float, float]) -> Floats:
    """Return the table computed number by number, from the definition."""
    quarter = width // 4
    table = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                omega = 10000.0 ** (-k / quarter)
                x, y = column * scale[1] * omega, row * scale[0] * omega
                parts = (math.sin(x), math.cos(x), math.sin(y), math.cos(y))
                for part, value in enumerate(parts):
                    table[row * columns + column, part * quarter + k] = value
    return table


@settings(max_examples=20, deadline=None)
@given(
    quarter=st.integers(1, 6),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    scale=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)),
)
def test_positions_are_the_formula(quarter: int, rows: int, columns: int, scale: tuple[float, float]) -> None:
    table = sincos_positions(4 * quarter, (rows, columns), scale)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(
        table.numpy(), reference_positions(4 * quarter, rows, columns, scale), atol=1e-7
    )


def test_positions_put_the_column_first() -> None:
    table = sincos_positions(8, (2, 2))
    np.testing.assert_allclose(
        table[1], [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01), 0, 0, 1, 1]
    )


@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_features_are_the_formula(shift: int) -> None:
    t = np.array([0.0, 1.0, 50.0, 500.0, 999.0])
    k = np.arange(128)
    angles = t[:, None] * np.exp(-np.log(10000.0) * k / (128 - shift))[None]
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    got = timestep_features(torch.tensor(t), shift=shift)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-4)  # fp32 angles up to 999


def test_diffusers_frequencies_are_another_function() -> None:
    t = torch.tensor([999.0])
    assert (timestep_features(t) - timestep_features(t, shift=1)).abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_timesteps_distinct(dtype: torch.dtype) -> None:
    """In bfloat16, 998 and 999 are one number: the sinusoids must be computed before rounding."""
    embedder = TimestepEmbedder(16).to(dtype)
    out = embedder(torch.tensor([998.0, 999.0]))
    assert out.dtype == dtype
    assert not torch.equal(out[0], out[1])


def test_layer_norm_statistics_are_fp32() -> None:
    h = torch.randn(4, 64, dtype=torch.float64) * 500 + 3000  # the variance overflows fp16
    expected = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    np.testing.assert_allclose(layer_norm(h.half()).double(), expected, atol=2e-2)
    assert layer_norm(h.half()).dtype == torch.float16


def test_rms_norm_is_its_formula_and_its_mean_is_fp32() -> None:
    h = torch.randn(4, 64, dtype=torch.float64) * 500 + 3000  # the squares overflow fp16
    expected = h / (h.square().mean(1, keepdim=True) + 1e-6).sqrt()
    np.testing.assert_allclose(rms_norm(h), expected, atol=1e-6)
    np.testing.assert_allclose(rms_norm(h.half()).double(), expected, atol=2e-3)
    assert rms_norm(h.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_is_fp32(dtype: torch.dtype) -> None:
    """A score near 100, rounded to half precision before the softmax, would be off by a part of 1."""
    torch.manual_seed(0)
    attention = Attention(32, 2).to(dtype)
    attention.proj = nn.Identity()  # type: ignore[assignment]
    h = (10 * torch.randn(1, 256, 32)).to(dtype)
    with torch.no_grad():
        q, k, v = attention.heads(h)
        expected = torch.softmax(q.double() @ k.double().transpose(-1, -2) / 4, -1) @ v.double()
        naive = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
        ours = attention(h).reshape(1, 256, 2, 16).transpose(1, 2)

    def error(out: torch.Tensor) -> float:
        return float((out.double() - expected).norm() / expected.norm())

    eps = torch.finfo(dtype).eps
    assert error(ours) < 0.5 * eps < 2 * eps < error(naive)


def test_rotation_by_relative_position() -> None:
    """The scores of rotated queries and keys depend only on the offset of their positions."""
    cos, sin = rotary_tables(8, (3, 4))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    turned_q, turned_k = (apply_rotary(part.expand(1, 1, 12, 8), cos, sin)[0, 0] for part in (q, k))
    scores = turned_q @ turned_k.T  # (T, T)
    assert torch.allclose(scores[0, 5], scores[5, 10], atol=1e-5)  # both one row down, one column right
    assert torch.allclose(scores[1, 4], scores[6, 9], atol=1e-5)  # one row down, one column left
    assert not torch.allclose(scores[0, 1], scores[0, 4], atol=1e-5)  # rows and columns differ
    assert torch.allclose(turned_q.norm(dim=1), q.norm().expand(12), atol=1e-5)


@pytest.mark.parametrize("qk_norm", [None, "layer", "rms"])
def test_attention_is_softmax_of_scores(qk_norm: QkNorm | None) -> None:
    attention = Attention(12, 3, qk_norm=qk_norm).eval()
    h = torch.randn(2, 5, 12)
    _, _, v = attention.heads(h)  # (N, H, T, D/H)
    weights = attention.weights(h)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 5))
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 12))
    assert torch.allclose(attention(h), expected, atol=1e-6)


def test_attention_rows_of_qkv_are_head_major() -> None:
    """The published order of rows is [q; k; v], and in each of them head after head."""
    attention = Attention(8, 2)
    h = torch.randn(1, 3, 8)
    q, k, v = attention.heads(h)
    flat = attention.qkv(h)
    for part, start in ((q, 0), (k, 8), (v, 16)):
        assert torch.equal(part[0, 1], flat[0, :, start + 4 : start + 8])


def test_cross_attention_agrees_with_torch() -> None:
    ours = CrossAttention(12, 3)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    h, tokens = torch.randn(2, 5, 12), torch.randn(2, 2, 12)
    assert torch.allclose(ours(h, tokens), theirs(h, tokens, tokens)[0], atol=1e-6)


def test_swiglu_has_as_many_parameters_as_the_plain_mlp() -> None:
    count = sum(p.numel() for p in SwiGlu(384, 1536).parameters())
    assert count == pytest.approx(2 * 384 * 1536 + 1536 + 384, rel=0.01)


def test_unpatchify_inverts_patches() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = x.reshape(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 12)  # (N, T, C·P·P)
    assert torch.equal(unpatchify(tokens, (2, 3), (2, 2)), x)
