"""Conditions: null classes, text, independent dropout, and other classes for fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

from ditserve.model.nets.conditioner import (
    COMMITMENT,
    ConditionEmbedder,
    drop_labels,
    drop_text,
    embedding_penalty,
    match_classes,
    null_labels,
    resize_classes,
)
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.dit_config import DiTConfig
from tests.model.nets.unet_cases import TINY_UNET

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]


def test_factors_are_summed_and_the_null_class_is_the_last_row() -> None:
    embedder = ConditionEmbedder((5, 3), 8)
    first, second = (cast(nn.Embedding, table).weight for table in embedder.tables)
    out = embedder(torch.tensor([[2, 1], [5, 3]]))
    assert torch.equal(out, torch.stack([first[2] + second[1], first[5] + second[3]]))


def test_null_labels_are_the_number_of_classes(tiny: Tiny) -> None:
    assert null_labels(tiny(), 2).tolist() == [[5, 3], [5, 3]]
    assert null_labels(tiny(classes=()), 2).shape == (2, 0)


def test_unconditional_embedding_is_zero() -> None:
    assert torch.equal(ConditionEmbedder((), 8)(torch.zeros(3, 0, dtype=torch.int64)), torch.zeros(3, 8))


def test_fusion_lets_factors_interact() -> None:
    """A change of one factor moves the embedding by the same vector in a sum, but not through an MLP."""
    grid = torch.tensor([[a, b] for a in range(2) for b in range(2)])
    for fusion, additive in (("sum", True), ("mlp", False)):
        torch.manual_seed(0)
        out = ConditionEmbedder((5, 3), 8, fusion=fusion)(grid)
        assert torch.allclose(out[1] - out[0], out[3] - out[2], atol=1e-5) == additive


def test_rows_without_text_get_the_vector_for_none() -> None:
    embedder = ConditionEmbedder((5,), 8, text_size=4)
    torch.nn.init.normal_(embedder.no_text)
    labels, text = torch.tensor([[0], [0]]), torch.randn(2, 4)
    both = embedder(labels, text)
    text[1] = 0
    one = embedder(labels, text)
    none = embedder(labels)
    assert torch.equal(one[0], both[0])
    assert torch.equal(one[1], none[1])
    assert not torch.allclose(one[1], both[1])


def test_a_text_stands_in_for_the_labels_that_are_not_given() -> None:
    embedder = ConditionEmbedder((5, 3), 8, text_size=4, text_labels=True).eval()
    assert embedder.text is not None
    first, second = (cast(nn.Embedding, table).weight for table in embedder.tables)
    with torch.no_grad():
        for parameter in (*embedder.text.parameters(), *embedder.readers.parameters()):
            parameter.zero_()
        # The text says class 2 or 3 of the first factor, and nothing of the second.
        readers = [cast(nn.Linear, reader) for reader in embedder.readers]
        readers[0].weight[2, 0] = readers[0].weight[3, 0] = readers[1].weight[3, 0] = 100.0
    text = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(3, -1).clone()
    text[2] = 0
    out = embedder(torch.tensor([[5, 3], [1, 0], [5, 3]]), text)
    torch.testing.assert_close(out[0], (first[2] + first[3]) / 2 + second[3])
    torch.testing.assert_close(out[1], first[1] + second[0], msg="what is given is not read")
    torch.testing.assert_close(out[2], first[5] + second[3], msg="no text says nothing")
    # What is drawn commits to the likelier class; training sees the shares as they are.
    with torch.no_grad():
        readers[0].weight[3, 0] = 99.0
    likelier = torch.tensor([COMMITMENT, 0.0]).softmax(0) @ first[2:4] + second[3]
    torch.testing.assert_close(embedder(torch.tensor([[5, 3]]), text[:1])[0], likelier)
    open_ = torch.tensor([1.0, 0.0]).softmax(0) @ first[2:4] + second[3]
    torch.testing.assert_close(embedder.train()(torch.tensor([[5, 3]]), text[:1])[0], open_)


def test_wrong_conditions_are_refused() -> None:
    labels = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must be \(N, 2\) whole numbers, not \(2, 1\)"):
        ConditionEmbedder((5, 3), 8)(labels)
    with pytest.raises(ValueError, match="takes no text"):
        ConditionEmbedder((5,), 8)(labels, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"text must be \(2, 4\), not \(2, 3\)"):
        ConditionEmbedder((5,), 8, text_size=4)(labels, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[6, 0]], r"label 6 of factor 0 must be in 0\.\.5, 5 standing for none"),
        ([[0, 0], [0, -1]], r"label -1 of factor 1 must be in 0\.\.3"),
        ([[0.0, 0.0]], "whole numbers"),
        ([0, 0], r"not \(2,\)"),
    ],
)
def test_labels_out_of_range_are_named(labels: list[Any], message: str) -> None:
    """The error names the label; on a device it would be an assertion without a message."""
    with pytest.raises(ValueError, match=message):
        ConditionEmbedder((5, 3), 8)(torch.tensor(labels))


def test_penalty_is_the_mean_squared_length_and_reaches_only_used_rows() -> None:
    assert embedding_penalty(torch.tensor([[3.0, 4.0], [0.0, 1.0]])) == 13.0
    embedder = ConditionEmbedder((5,), 8)
    embedding_penalty(embedder(torch.tensor([[2], [2]]))).backward()
    weight = cast(nn.Embedding, embedder.tables[0]).weight
    assert weight.grad is not None
    assert torch.allclose(weight.grad[2], 2 * weight[2])
    assert not weight.grad[[0, 1, 3, 4, 5]].any()


def test_dropout_is_independent_at_its_rates(tiny: Tiny) -> None:
    labels = torch.zeros(20_000, 2, dtype=torch.int64)
    dropped = drop_labels(labels, tiny(), (0.1, 0.4), torch.Generator().manual_seed(0))
    first, second = dropped[:, 0] == 5, dropped[:, 1] == 3
    assert set(dropped[:, 0].tolist()) == {0, 5}
    assert first.float().mean() == pytest.approx(0.1, abs=0.01)
    assert second.float().mean() == pytest.approx(0.4, abs=0.015)
    assert (first & second).float().mean() == pytest.approx(0.04, abs=0.006)


def test_dropout_of_text() -> None:
    text = torch.ones(20_000, 3)
    kept = drop_text(text, 0.3, torch.Generator().manual_seed(0))
    assert set(kept.sum(1).tolist()) == {0.0, 3.0}
    assert kept.mean() == pytest.approx(0.7, abs=0.02)
    assert torch.equal(drop_text(text, 0.0), text)
    assert not drop_text(text, 1.0).any()


def test_bad_rates_are_refused(tiny: Tiny) -> None:
    labels = torch.zeros(1, 2, dtype=torch.int64)
    for rates in ((0.1,), (0.1, 1.1), (0.1, 0.1, 0.1)):
        with pytest.raises(ValueError, match=r"2 rates in 0\.\.1"):
            drop_labels(labels, tiny(), rates)
    with pytest.raises(ValueError, match="text dropout"):
        drop_text(torch.ones(1, 3), -0.1)


def test_other_classes_start_from_the_old_ones(network: Make) -> None:
    dit = network()
    old, new = ["cat", "dog", "fox", "owl", "bee"], ["fox", "yak", "cat"]
    weights, config = resize_classes(dit.state_dict(), dit.config, 0, match_classes(old, new))
    assert config.classes == (3, 3)
    grown = DiT(config).eval()
    grown.load_state_dict(weights)
    before = torch.tensor([[2, 1], [5, 1], [0, 1], [5, 1]])  # fox, not given, cat, not given
    after = torch.tensor([[0, 1], [1, 1], [2, 1], [3, 1]])  # fox, yak, cat, not given
    assert torch.equal(grown.embed(after), dit.embed(before))
    x, t = torch.randn(4, 3, 8, 8), torch.full((4,), 7)
    with torch.no_grad():
        assert torch.equal(grown(x, t, after), dit(x, t, before))


def test_what_a_text_says_goes_with_the_classes(tiny: Tiny) -> None:
    dit = DiT(tiny(text_size=4, text_labels=True))
    with torch.no_grad():
        for parameter in dit.y_embedder.readers.parameters():
            parameter.normal_()
    weights, config = resize_classes(dit.state_dict(), dit.config, 0, [4, 2, 0, 1, 3])
    grown, text, nothing = DiT(config), torch.randn(2, 4), torch.tensor([[5, 3], [5, 3]])
    grown.load_state_dict(weights)
    torch.testing.assert_close(grown.embed(nothing, text), dit.embed(nothing, text))


def test_classes_of_a_unet_are_resized_too() -> None:
    unet = UNet(TINY_UNET)
    weights, config = resize_classes(unet.state_dict(), TINY_UNET, 1, [2, None])
    grown = UNet(config)
    grown.load_state_dict(weights)
    assert torch.equal(
        grown.embed(torch.tensor([[0, 0], [0, 2]])), unet.embed(torch.tensor([[0, 2], [0, 3]]))
    )


def test_impossible_resizing_is_refused(network: Make) -> None:
    dit = network()
    with pytest.raises(ValueError, match=r"factor must be in 0\.\.1, not 2"):
        resize_classes(dit.state_dict(), dit.config, 2, [0])
    with pytest.raises(ValueError, match="at least one class"):
        resize_classes(dit.state_dict(), dit.config, 0, [])
    with pytest.raises(ValueError, match=r"not \[5\]"):
        resize_classes(dit.state_dict(), dit.config, 0, [1, 5])
