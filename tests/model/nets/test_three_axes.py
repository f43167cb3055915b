"""Clips and volumes: the same network over three axes, compared with plain loops over frames and places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditserve.model.nets.attention_kinds import LocalAttention, from_blocks, make_attention, to_blocks
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.layers import Attention, rotary_tables, sincos_positions, unpatchify
from ditserve.model.nets.token_merging import squares_apart, squares_together
from ditserve.model.spec.attention_kinds import attention_kind
from ditserve.model.spec.dit_config import DiTConfig

GRID = (4, 2, 6)
CLIPS = DiTConfig(
    image_size=(4, 8, 24), patch_size=4, in_channels=3, hidden_size=24, depth=2, num_heads=3, classes=(3,)
)


def test_positions_of_three_axes_are_those_of_each_axis() -> None:
    table, spacing = sincos_positions(20, GRID, (1.0, 0.5, 1.0)).numpy(), (1.0, 0.5, 1.0)
    # Ten pairs: three of frames, three of rows and four of columns, whose sines and cosines come first.
    counts = (3, 3, 4)
    rows = []
    for place in np.ndindex(GRID):
        parts = []
        for count, index, distance in reversed(list(zip(counts, place, spacing, strict=True))):
            angle = index * distance * 10000.0 ** (-np.arange(count) / count)
            parts += [np.sin(angle), np.cos(angle)]
        rows.append(np.concatenate(parts))
    np.testing.assert_allclose(table, np.stack(rows), atol=1e-6)


def test_rotary_angles_of_three_axes() -> None:
    cos, sin = rotary_tables(12, GRID)
    angles = [
        np.concatenate([index * 10000.0 ** (-np.arange(2) / 2) for index in place])
        for place in np.ndindex(GRID)
    ]
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


def attention_of(word: str) -> Attention:
    torch.manual_seed(0)
    return make_attention(CLIPS, attention_kind(word), None)


def heads(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, *shape, 8, generator=generator) for _ in range(3))
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return full attention over the tokens of (N, H, T, d), by its formula."""
    return torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1) @ v


@torch.no_grad()
def test_space_is_full_attention_frame_by_frame() -> None:
    q, k, v = heads(*GRID)
    frames = [plain(*(part[:, :, f].flatten(2, 3) for part in (q, k, v))) for f in range(GRID[0])]
    mixed = attention_of("space").attend(q.flatten(2, 4), k.flatten(2, 4), v.flatten(2, 4), GRID)
    torch.testing.assert_close(mixed, torch.cat(frames, dim=2))


@torch.no_grad()
def test_time_is_full_attention_place_by_place() -> None:
    q, k, v = heads(*GRID)
    expected = torch.zeros_like(v)
    for i, j in np.ndindex(GRID[1:]):
        expected[:, :, :, i, j] = plain(*(part[:, :, :, i, j] for part in (q, k, v)))
    mixed = attention_of("time").attend(q.flatten(2, 4), k.flatten(2, 4), v.flatten(2, 4), GRID)
    torch.testing.assert_close(mixed, expected.flatten(2, 4))


@torch.no_grad()
@pytest.mark.parametrize("word", ["window:2", "window:2+1", "neighbourhood:1", "axial", "space", "time"])
def test_local_kinds_mix_the_tokens_that_their_places_allow(word: str) -> None:
    attention = attention_of(word)
    assert isinstance(attention, LocalAttention)
    q, k, v = (part.flatten(2, 4) for part in heads(*GRID))
    allowed = attention.allowed(GRID)
    # Every token sees itself, none sees all, and what is seen is seen back.
    assert allowed.diagonal(dim1=-2, dim2=-1).all()
    assert not allowed.all(dim=-1).any()
    assert torch.equal(allowed, allowed.transpose(-1, -2))
    torch.testing.assert_close(attention.attend(q, k, v, GRID), attention.probabilities(q, k, GRID) @ v)


def test_windows_reach_as_far_along_frames_as_along_rows() -> None:
    attention = attention_of("window:2")
    assert isinstance(attention, LocalAttention)
    seen = attention.allowed(GRID)[0].reshape(GRID).nonzero().tolist()
    assert seen == [[f, i, j] for f in (0, 1) for i in (0, 1) for j in (0, 1)]


def test_blocks_are_cut_and_joined_again() -> None:
    tokens = torch.arange(2 * 3 * 48 * 2).reshape(2, 3, 48, 2)
    for sides in ((1, 2, 6), (4, 1, 1), (2, 2, 3)):
        blocks = to_blocks(tokens, GRID, sides)
        assert torch.equal(from_blocks(blocks, GRID, sides), tokens)
    assert torch.equal(to_blocks(tokens, GRID, (1, 2, 6))[:, :3], tokens[:, :, :12])


def test_patches_of_clips_are_put_back_in_their_places() -> None:
    clip = torch.arange(2 * 3 * 4 * 4 * 6).reshape(2, 3, 4, 4, 6)
    patch, grid = (2, 1, 3), (2, 4, 2)
    tokens = [
        clip[:, :, 2 * f : 2 * f + 2, i : i + 1, 3 * j : 3 * j + 3].flatten(1) for f, i, j in np.ndindex(grid)
    ]
    assert torch.equal(unpatchify(torch.stack(tokens, dim=1), grid, patch), clip)


def test_tokens_of_one_frame_are_merged() -> None:
    tokens = torch.arange(48).reshape(1, 48, 1)
    apart = squares_apart(tokens, GRID)
    # The first of every 2×2 of a frame of 2 rows and 6 columns.
    assert apart[0, :12, 0].tolist() == [12 * f + j for f in range(4) for j in (0, 2, 4)]
    assert torch.equal(squares_together(apart, GRID), tokens)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"attention": ("space", "time"), "rope": True, "num_heads": 3},
        {"attention": "window:2", "conv_mlp": True, "head_channels": 6, "learn_sigma": False},
        {"levels": (0, 1), "image_size": (4, 16, 24)},
        {"merge_tokens": 0.5},
        {"patch_size": (2, 4, 4), "layout_rank": 2},
        {"blocks": "in_context"},
    ],
)
def test_a_network_over_clips_answers_each_row_by_itself(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = DiT(replace(CLIPS, **options)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 3, *network.config.image_size)
    t, labels = torch.tensor([5.0, 600.0]), torch.tensor([[0], [2]])
    together = network(x, t, labels)
    assert together.shape == (2, network.config.out_channels, *network.config.image_size)
    for row in range(2):
        alone = network(x[row : row + 1], t[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    # No frame is left out of the answer.
    assert all(together[:, :, f].abs().max() > 0 for f in range(x.shape[2]))


@torch.no_grad()
def test_frames_see_each_other_by_time_alone() -> None:
    torch.manual_seed(0)

    def changed_frames(attention: tuple[str, ...]) -> list[bool]:
        network = DiT(replace(CLIPS, attention=attention, depth=len(attention))).eval()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        x = torch.randn(1, 3, *CLIPS.image_size)
        other = x.clone()
        other[:, :, 1] += 1.0
        t, labels = torch.tensor([5.0]), torch.tensor([[0]])
        change = (network(x, t, labels) - network(other, t, labels)).abs().amax(dim=(0, 1, 3, 4))
        return [bool(largest > 1e-6) for largest in change]

    assert changed_frames(("space", "space")) == [False, True, False, False]
    assert changed_frames(("space", "time")) == [True] * 4


@torch.no_grad()
def test_more_frames_than_trained_stand_in_the_range_of_the_trained_ones() -> None:
    network = DiT(replace(CLIPS, attention=("space", "time")))
    assert network.config.position_scale((8, 2, 6)) == (0.5, 1.0, 1.0)
    longer = network.positions((8, 2, 6)).reshape(8, 2, 6, -1)
    torch.testing.assert_close(longer[::2], network.pos_embed.reshape(4, 2, 6, -1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (4, 8, 8, 8)}, "image_size must be two or three positive numbers"),
        (
            {"image_size": (4, 8, 10)},
            "image_size 4x8x10 is not divisible by patch_size 4: change one of them",
        ),
        ({"patch_size": (3, 4, 4)}, "image_size 4x8x24 is not divisible by patch_size 3x4x4"),
        ({"patch_size": (4, 4)}, "patch_size must be a positive number, or one for each of the 3 axes"),
        ({"patch_size": (0, 4, 4)}, "patch_size must be a positive number, or one for each of the 3 axes"),
        ({"base_size": (8, 8)}, "base_size must be three positive numbers"),
        ({"attention": "window:4"}, "image_size 4x8x24 is not divisible by the side of windows .* 4x16x16"),
        ({"attention": "axial", "num_heads": 2}, "over 3 axes needs num_heads divisible by 3, not 2"),
        ({"hidden_size": 4, "num_heads": 1}, "with three axes at least 8"),
        ({"rope": True, "num_heads": 6}, "not 4, and with three axes at least 8: change num_heads"),
    ],
)
def test_configurations_of_three_axes_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CLIPS, **changes)


@pytest.mark.parametrize("word", ["space", "time"])
def test_pictures_have_no_factorised_attention(word: str) -> None:
    with pytest.raises(ValueError, match=f"attention {word} needs an image_size of three axes: use full"):
        replace(CLIPS, image_size=(8, 24), attention=(word,))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 24), r"x must be \(N, 3, F, H, W\)"),
        ((1, 3, 4, 8, 22), "size 4x8x22 is not a multiple of the patch 4"),
        ((1, 3, 3, 8, 24), "size 3x8x24 is not a multiple of 2x8x8, which the windows"),
    ],
)
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    network = DiT(replace(CLIPS, attention=("window:2",)))
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64))
