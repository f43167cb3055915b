"""Dropout of conditions in training: each condition alone, and all of them together.

Guidance subtracts the prediction without any condition. With two factors, each dropped at 0.1, only 1 % of
the rows train that prediction. So a run of several conditions also drops all of them together, at a rate that
makes `UNCONDITIONAL` of the rows unconditional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.nets.conditioner import drop_labels, drop_text, null_labels
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.train.config import TrainConfig

# Share of rows without any condition: that of one condition at the rate of the DiT paper.
UNCONDITIONAL = 0.1


@dataclass(frozen=True, slots=True)
class ConditionDropout:
    """The rates at which each label factor, the text (None: no text), and all together are dropped.

    `instead` is the share of rows that have a text and no first label; the others have no text. None: text
    and labels are dropped independently.
    """

    labels: tuple[float, ...]
    text: float | None
    joint: float
    instead: float | None = None

    @property
    def unconditional(self) -> float:
        """The share of rows without any condition; 0 for a model that has no conditions."""
        if not _rates(self.labels, self.text):
            return 0.0
        return self.joint + (1 - self.joint) * _nothing(self.labels, self.text, self.instead)

    def apply(
        self, labels: Tensor, text: Tensor | None, network: NetworkConfig, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Return labels (N, F) and text (N, text_width) after dropout.

        With a joint rate of 0 the generator draws no more than it did before there was one.
        """
        labels = drop_labels(labels, network, self.labels, generator)
        if text is not None:
            text = drop_text(text, self.text or 0.0, generator)
        if text is not None and self.instead is not None:
            told = torch.rand(len(labels), 1, generator=generator) < self.instead  # (N, 1)
            first = torch.where(told, null_labels(network, len(labels))[:, :1], labels[:, :1])
            labels, text = torch.cat([first, labels[:, 1:]], dim=1), text * told
        if self.joint:
            dropped = torch.rand(len(labels), 1, generator=generator) < self.joint  # (N, 1)
            labels = torch.where(dropped, null_labels(network, len(labels)), labels)
            text = None if text is None else text * ~dropped
        return labels, text


def condition_dropout(config: TrainConfig, dataset: Dataset) -> ConditionDropout:
    """Return the dropout of a run. Without `joint_dropout`, several conditions get a rate that follows.

    Two factors at 0.1 are dropped together by chance in 1 % of the rows, and 0.0909 + 0.9091 · 0.01 = 0.1. If
    one of the conditions is never dropped, the model is to have no unconditional rows, and the rate is 0.

    Raises:
        ValueError: as many rates as the data has factors are needed.
    """
    count = len(dataset.factors)
    labels = config.label_dropout * (count if len(config.label_dropout) == 1 else 1)
    if len(labels) != count:
        names = ", ".join(factor.name for factor in dataset.factors)
        raise ValueError(
            f"label_dropout has {len(labels)} rates, but the data has {count} factors ({names}): "
            "give one, or one each"
        )
    text = None if dataset.texts is None else config.text_dropout
    joint, instead = config.joint_dropout, config.text_instead
    if instead is not None and (text is None or not count):
        raise ValueError("text_instead needs texts and labels: set data.text, or leave it out")
    if joint is None:
        joint = _joint(_rates(labels, text), _nothing(labels, text, instead))
    return ConditionDropout(labels, text, joint, instead)


def _nothing(labels: Sequence[float], text: float | None, instead: float | None) -> float:
    """Return the share of rows without any condition, before all are dropped together."""
    if text is None or instead is None:
        return math.prod(_rates(labels, text))
    return (instead * text + (1 - instead) * labels[0]) * math.prod(labels[1:])


def _rates(labels: Sequence[float], text: float | None) -> tuple[float, ...]:
    return tuple(labels) if text is None else (*labels, text)


def _joint(rates: Sequence[float], chance: float) -> float:
    if len(rates) < 2 or not 0 < chance < UNCONDITIONAL:
        return 0.0
    return (UNCONDITIONAL - chance) / (1 - chance)
