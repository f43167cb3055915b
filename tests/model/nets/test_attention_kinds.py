"""Kinds of attention against softmax under a mask that is made token by token, and against einsums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditserve.model.distributed.tensor_parallel import check_divisible
from ditserve.model.nets.attention_kinds import ConvMlp, make_attention
from ditserve.model.nets.cost import cost
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.hierarchy import TokenLevels
from ditserve.model.nets.token_merging import TokenMerging, squares_apart, squares_together
from ditserve.model.prune.pruning import PruneError, pruned_config
from ditserve.model.spec.attention_kinds import attention_kind
from ditserve.model.spec.dit_config import DiTConfig

HEADS, SIZE = 2, 8
ROWS, COLUMNS = 4, 8
TOKENS = ROWS * COLUMNS
WORDS = ["window:4", "window:4+1", "window:2+1", "neighbourhood:1", "neighbourhood:2", "axial", "linear"]
WORDS += ["low_rank:3", "channel"]

Place = tuple[int, int]
Near = Callable[[Place, Place], bool]


def same_window(side: int, shift: int = 0) -> Near:
    return lambda a, b: all((x - shift) // side == (y - shift) // side for x, y in zip(a, b, strict=True))


LOCAL: dict[str, Near] = {
    "window:4": same_window(4),
    "window:4+1": same_window(4, 1),
    "window:2+1": same_window(2, 1),
    "neighbourhood:1": lambda a, b: max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1,
    "neighbourhood:2": lambda a, b: max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 2,
}


def config(word: str, size: tuple[int, int] = (ROWS, COLUMNS)) -> DiTConfig:
    return DiTConfig(
        image_size=size, patch_size=1, in_channels=3, hidden_size=HEADS * SIZE, depth=1, num_heads=HEADS,
        attention=(word,), classes=(4,),
    )  # fmt: skip


def masked(q: Tensor, k: Tensor, v: Tensor, near: Near) -> Tensor:
    places = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
    mask = torch.tensor([[near(a, b) for b in places] for a in places])
    scores = torch.einsum("nhtd,nhsd->nhts", q, k) / SIZE**0.5
    return torch.einsum("nhts,nhsd->nhtd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def reference(word: str, q: Tensor, k: Tensor, v: Tensor, layer: torch.nn.Module) -> Tensor:
    """Return the mixes of values by the formula, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    if word in LOCAL:
        return masked(q, k, v, LOCAL[word])
    if word == "axial":
        row = masked(q[:, :1], k[:, :1], v[:, :1], lambda a, b: a[0] == b[0])
        return torch.cat([row, masked(q[:, 1:], k[:, 1:], v[:, 1:], lambda a, b: a[1] == b[1])], 1)
    if word == "linear":
        weights = torch.einsum("nhtd,nhsd->nhts", q.clamp(min=0), k.clamp(min=0))
        return torch.einsum("nhts,nhsd->nhtd", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    if word == "channel":
        unit_q, unit_k = q / q.norm(dim=2, keepdim=True), k / k.norm(dim=2, keepdim=True)
        temperature = layer.get_parameter("temperature").double()
        mixing = (temperature * torch.einsum("nhtc,nhtd->nhcd", unit_q, unit_k)).softmax(-1)
        return torch.einsum("nhcd,nhtd->nhtc", mixing, v)
    landmarks = layer.get_parameter("landmarks").double()
    mixing = (torch.einsum("hrd,nhtd->nhrt", landmarks, k) / SIZE**0.5).softmax(-1)
    keys, values = (torch.einsum("nhrt,nhtd->nhrd", mixing, part) for part in (k, v))
    scores = torch.einsum("nhtd,nhrd->nhtr", q, keys) / SIZE**0.5
    return torch.einsum("nhtr,nhrd->nhtd", scores.softmax(-1), values)


@pytest.mark.parametrize("word", WORDS)
def test_a_kind_is_its_formula(word: str) -> None:
    torch.manual_seed(0)
    layer = make_attention(config(word), attention_kind(word), None)
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, SIZE)
    with torch.no_grad():
        actual = layer.attend(q, k, v, (ROWS, COLUMNS))
        expected = reference(word, q, k, v, layer)
        assert torch.allclose(actual.double(), expected, atol=1e-5)
        if layer.over_tokens:
            weights = layer.probabilities(q, k, (ROWS, COLUMNS))
            assert weights.shape == (2, HEADS, TOKENS, TOKENS)
            assert torch.allclose((weights @ v).double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("word", "each"),
    [
        ("full", 2 * TOKENS),
        ("window:4+1", 2 * 16),
        ("neighbourhood:1", 2 * 16),
        ("axial", ROWS + COLUMNS),
        ("linear", 2 * SIZE),
        ("low_rank:3", 5 * 3),
        ("channel", 2 * SIZE),
    ],
)
def test_multiply_adds_of_a_kind(word: str, each: int) -> None:
    """`each` counts the multiply-adds of attention for every channel of every token."""
    assert cost(config(word)).attention_macs == each * TOKENS * HEADS * SIZE
    assert cost(config(word)).tokens == TOKENS


@pytest.mark.parametrize(
    "word", ["window:8", "window:8+4", "neighbourhood:2", "linear", "low_rank:16", "channel"]
)
def test_memory_grows_with_the_tokens_alone(word: str) -> None:
    """Four times the tokens take four times the memory; T×T numbers would take sixteen times."""
    small, large = (cost(config(word, (side, side))).inference_bytes for side in (32, 64))
    assert large < 4.2 * small
    quadratic = [cost(config("full", (side, side))).inference_bytes for side in (32, 64)]
    assert quadratic[1] > 8 * quadratic[0]


def test_a_convolutional_mlp_is_its_formula() -> None:
    torch.manual_seed(0)
    mlp, h = ConvMlp(16, 24), torch.randn(2, TOKENS, 16)
    assert mlp.conv.bias is not None
    inner = F.silu(F.linear(h, mlp.fc1.weight, mlp.fc1.bias)).reshape(2, ROWS, COLUMNS, -1)
    padded = F.pad(inner, (0, 0, 1, 1, 1, 1))
    kernel = mlp.conv.weight[:, 0]  # (channels, 3, 3)
    parts = [padded[:, i : i + ROWS, j : j + COLUMNS] * kernel[:, i, j] for i in range(3) for j in range(3)]
    value, gate = (torch.stack(parts).sum(0) + mlp.conv.bias).flatten(1, 2).chunk(2, dim=-1)
    expected = F.linear(value * gate * gate.sigmoid(), mlp.fc2.weight, mlp.fc2.bias)
    assert torch.allclose(mlp(h, (ROWS, COLUMNS)), expected, atol=1e-5)


def test_levels_merge_and_split_the_tokens_of_a_square() -> None:
    """A merged token knows its four tokens alone, and gives to them alone."""
    torch.manual_seed(0)
    levels, h = TokenLevels(4, (0, 1, 2, 1)), torch.randn(1, TOKENS, 4)
    skips: list[Tensor] = []
    merged, grid = levels(h, (ROWS, COLUMNS), 1, skips)
    assert (merged.shape, grid, len(skips)) == ((1, TOKENS // 4, 4), (2, 4), 1)
    other = h.clone()
    other[0, 2 * COLUMNS + 5] += 1  # row 2, column 5 is in the square of row 1, column 2
    changed = (levels(other, (ROWS, COLUMNS), 1, [])[0] != merged).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 2]
    coarse, grid = levels(merged, grid, 2, skips)
    assert (coarse.shape, grid) == ((1, 2, 4), (1, 2))
    fine, grid = levels(coarse, grid, 3, skips)
    whole, grid = levels(fine, grid, 4, skips)
    assert (whole.shape, grid, skips) == (h.shape, (ROWS, COLUMNS), [])
    bumped = levels(fine + torch.eye(8)[6][None, :, None], (2, 4), 4, [h])[0]
    places = (bumped != levels(fine, (2, 4), 4, [h])[0]).any(-1)[0].nonzero().flatten().tolist()
    assert places == [row * COLUMNS + column for row in (2, 3) for column in (4, 5)]


def test_levels_start_as_the_network_without_them() -> None:
    """The way back starts at zero: before training only the skip connection counts."""
    shape = replace(config("full", (8, 8)), depth=3, levels=(0, 1, 0))
    dit = DiT(shape)
    assert dit.levels is not None
    h = torch.randn(2, 64, HEADS * SIZE)
    skips = [h]
    back, _ = dit.levels(torch.randn(2, 16, HEADS * SIZE), (4, 4), 2, skips)
    assert torch.equal(back, h)


def test_merged_tokens_are_computed_with_the_destination_that_they_are_most_like() -> None:
    """Token by token: the upper left of every 2×2 is a destination, and half of all tokens go to one."""
    torch.manual_seed(0)
    h, grid = torch.randn(2, TOKENS, 5), (ROWS, COLUMNS)
    places = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
    is_first = torch.tensor([row % 2 == 0 and column % 2 == 0 for row, column in places])
    apart = squares_apart(h, grid)
    assert torch.equal(apart[:, : TOKENS // 4], h[:, is_first])
    assert torch.equal(squares_together(apart, grid), h)
    merging, x = TokenMerging(apart, 0.5), torch.randn(2, TOKENS, 3)
    actual = squares_together(merging.spread(2 * merging.merge(squares_apart(x, grid))), grid)
    for row in range(2):
        unit = F.normalize(h[row], dim=-1)
        others = (~is_first).nonzero().flatten().tolist()
        firsts = is_first.nonzero().flatten().tolist()
        likeness = {k: (unit[k] @ unit[firsts].T).max(0) for k in others}
        ranked = sorted(others, key=lambda k: -float(likeness[k].values))
        groups = {first: [first] for first in firsts}
        for k in ranked[: TOKENS // 2]:
            groups[firsts[int(likeness[k].indices)]].append(k)
        expected = 2 * x[row]
        for group in groups.values():
            expected[group] = 2 * x[row, group].mean(0)
        assert torch.allclose(actual[row], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention": "swin"}, "unknown attention 'swin': use full, window:8, "),
        ({"attention": "window:0"}, "needs a number of at least 1"),
        ({"attention": "window:4+4"}, "shifts its windows by their side or more"),
        ({"attention": "window:3"}, "image_size 4x8 is not divisible by the side of windows"),
        ({"attention": ("full", "linear")}, "attention must be one value, or one per block for depth 1"),
        (
            {"attention": "axial", "num_heads": 1},
            "attention axial over 2 axes needs num_heads divis",
        ),
        ({"attention": "linear", "rope": True}, "attention linear cannot take rope"),
        ({"levels": (2,)}, "must begin and end at 0 or 1"),
        ({"levels": (1,), "attention": "window:4"}, "not divisible by .*8"),
        ({"merge_tokens": 0.9}, "merge_tokens is a share from 0 to 0.75"),
        ({"merge_tokens": 0.5, "rope": True}, "merge_tokens leaves no grid of tokens"),
        ({"conv_mlp": True, "swiglu": True}, "conv_mlp has a gate of its own"),
        ({"conv_mlp": True, "blocks": "in_context"}, "use no block of the kind in_context"),
    ],
)
def test_a_network_that_cannot_be_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(config("full"), **changes)  # type: ignore[arg-type]


def test_sizes_that_windows_and_levels_cannot_cut_are_refused() -> None:
    shape = replace(config("window:2"), depth=1, levels=(1,))
    assert (shape.token_multiples, shape.size_multiples) == ((4, 4), (4, 4))
    with pytest.raises(ValueError, match="size 4x6 is not a multiple of 4, which the windows or levels"):
        DiT(shape)(torch.zeros(1, 3, 4, 6), torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("changes", [{"attention": "axial"}, {"attention": "low_rank:3"}, {"conv_mlp": True}])
def test_heads_and_channels_that_have_a_place_are_neither_shared_nor_pruned(
    changes: dict[str, object],
) -> None:
    dit = DiT(replace(config("full"), **changes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"parallel\.tensor"):
        check_divisible(dit, 2)
    with pytest.raises(PruneError, match="cannot be pruned"):
        pruned_config(dit, 0.5, 0.5)
