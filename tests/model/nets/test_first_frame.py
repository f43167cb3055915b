"""A clip's first frame as condition tokens: harmless at the start, learned from, and of its own row alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.denoise import Conditions
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.mixing import assign_blocks, splice_states

PLAIN = DiTConfig(
    image_size=(4, 8, 12), patch_size=4, in_channels=3, hidden_size=24, depth=2, num_heads=2, classes=(3,),
    learn_sigma=False,
)  # fmt: skip
TOLD = replace(PLAIN, first_frame=True)
FRAMES = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(4)) * 2 - 1
FRAMES[1] = 0  # the second row is told none


def network_of(config: DiTConfig) -> DiT:
    """Return a network of random weights, the same in every module that configurations share."""
    network = DiT(config).eval()
    for number, (name, parameter) in enumerate(sorted(network.named_parameters())):
        seed = number if not name.startswith("frame_embedder") else 1000
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            parameter.copy_(0.2 * noise)
    return network


def inputs(size: tuple[int, ...] = PLAIN.image_size) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([10.0, 700.0]), torch.tensor([[0], [2]])


@torch.no_grad()
def test_a_network_starts_as_one_without_first_frames() -> None:
    """New weights are zero, so a model goes on from an older one bit by bit, told or not."""
    old, new = network_of(PLAIN), DiT(TOLD).eval()
    missing = new.load_state_dict(old.state_dict(), strict=False).missing_keys
    assert missing == ["frame_embedder.proj.weight", "frame_embedder.proj.bias"]
    expected = old(*inputs())
    assert torch.equal(new(*inputs()), expected)
    assert torch.equal(new(*inputs(), None, FRAMES), expected)


def test_without_the_option_nothing_is_drawn_or_named() -> None:
    torch.manual_seed(0)
    names = set(DiT(PLAIN).state_dict())
    assert not [name for name in names if "frame" in name]
    assert "first_frame" not in dict(PLAIN.state())
    assert (PLAIN.embedding_size, TOLD.embedding_size) == (24, 24 + 3 * 8 * 12)
    assert TOLD.state()[-1] == ("first_frame", (6, 24))


def test_the_gradient_reaches_the_patches_of_told_rows_alone() -> None:
    network = network_of(TOLD)
    assert network.frame_embedder is not None
    weight = network.frame_embedder.proj.weight
    for frames, reached in ((FRAMES, True), (torch.zeros_like(FRAMES), False)):
        network.zero_grad()
        network(*inputs(), None, frames).square().mean().backward()
        assert weight.grad is not None
        assert bool(weight.grad.any()) is reached


@torch.no_grad()
@pytest.mark.parametrize("attention", [("full",), ("space", "time")])
def test_told_rows_and_others_share_a_batch(attention: tuple[str, ...]) -> None:
    network = network_of(replace(TOLD, attention=attention))
    x, t, labels = inputs()
    together = network(x, t, labels, None, FRAMES)
    for row in (slice(0, 1), slice(1, 2)):
        alone = network(x[row], t[row], labels[row], None, FRAMES[row])
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)
    untold = network(x, t, labels)
    torch.testing.assert_close(together[1], untold[1], rtol=0, atol=1e-5)
    # Every frame of the clip is drawn otherwise.
    assert (together[0] - untold[0]).abs().amax(dim=(0, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_other_numbers_of_frames_and_other_sides_are_drawn() -> None:
    network = network_of(TOLD)
    _, t, labels = inputs()
    state = network.modulate(t, network.embed(labels, None, FRAMES))
    for size in ((1, 8, 12), (6, 8, 12), (2, 16, 8)):
        x, _, _ = inputs(size)
        output = network.backbone(x, state)
        assert output.shape == x.shape
        traced = network.with_symbolic_positions().backbone(x, state)
        torch.testing.assert_close(traced, output, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_frame_is_told_to_every_condition_of_a_sample() -> None:
    network = network_of(TOLD)
    frame, embedding = FRAMES[0], network.embed(torch.tensor([[0], [2]]))
    told = Conditions((embedding,)).begun(network, frame)
    assert torch.equal(told.embeddings[0], network.embed(torch.tensor([[0], [2]]), None, frame[None]))
    null = network.embed(torch.tensor([[3], [3]]), None, frame.expand(2, -1, -1, -1))
    assert torch.equal(told.negative if told.negative is not None else null[:0], null)
    states = [network.modulate(torch.ones(2), embedding) for embedding in (told.embeddings[0], null)]
    layered = splice_states(TOLD, states, assign_blocks(2, 2))
    assert torch.equal(layered[-1], states[0][-1])


@pytest.mark.parametrize(
    ("config", "frames", "message"),
    [
        (PLAIN, FRAMES, "takes a first frame of none: its first_frame is false, not 2x3x8x12"),
        (TOLD, FRAMES[:, :, :4], "takes a first frame of 3x8x12, not 2x3x4x12"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(config: DiTConfig, frames: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(config).embed(torch.tensor([[0], [2]]), None, frames)


def test_pictures_have_no_first_frame() -> None:
    changes: dict[str, Any] = {"image_size": (8, 12), "first_frame": True}
    with pytest.raises(ValueError, match="first_frame is for clips: give image_size three axes"):
        replace(PLAIN, **changes)
