"""The networks by whose features pictures are compared: the standard Inception, or a classifier of `model.classifier`.

Inception is NVIDIA's TorchScript translation of the network that FID is defined by. TorchScript holds no Python and its reader
builds only tensors and plain values, but what it holds is a program all the same, so no file is opened but the one with the
known hash. Classifiers are safetensors and JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ditserve.model.evaluation.classifier import Classifier, read
from ditserve.model.spec.bundle import digest
from ditserve.model.spec.errors import ModelError

INCEPTION = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CHUNK = 64  # pictures read by Inception at once


class FeatureError(ModelError):
    """A feature network that cannot be opened; the message is one sentence naming the file."""


@dataclass(frozen=True, slots=True)
class Features:
    """Of N pictures: features (N, D), features of detail (N, S) or none, and class probabilities (N, K)."""

    pooled: Tensor
    detail: Tensor | None
    probabilities: Tensor


@dataclass(frozen=True, slots=True)
class FeatureNetwork:
    """Pictures (N, 3, H, W) in [−1, 1] → features; `name` says whose, `note` what the figures may be compared with."""

    name: str
    note: str
    features: Callable[[Tensor], Features]


def classifier_features(classifier: Classifier) -> FeatureNetwork:
    """Features before a classifier's heads, and what its first layer finds; the probabilities are those of its first factor.

    The second stand in for the spatial features of sFID (Nash et al., arXiv:2103.03841), with the same purpose.
    """

    def features(images: Tensor) -> Features:
        reading = read(classifier, images)
        return Features(reading.features, reading.detail, reading.logits[0].softmax(1))

    return FeatureNetwork(
        "classifier",
        "Distances are between features of a small classifier trained on this data: not comparable with published FID, KID or IS. "
        "It sees what is meant and forgives how it is drawn; the distance of details, of its first layer, does not.",
        features,
    )


def inception_features(file: Path, sha256: str = INCEPTION_SHA256) -> FeatureNetwork:
    """The network of published FID, KID, IS, precision and recall; it resizes to 299×299 itself and has no features of detail.

    Raises:
        FeatureError: no such file, or another one.
    """
    if not file.is_file():
        raise FeatureError(f"{file} does not exist: pass NVIDIA's {INCEPTION}")
    if digest(file) != sha256:
        raise FeatureError(f"{file} is not NVIDIA's {INCEPTION}, the only file opened: its sha256 differs")
    network = torch.jit.load(str(file), map_location="cpu").eval()

    @torch.no_grad()
    def features(images: Tensor) -> Features:
        pooled, probabilities = [], []
        for chunk in (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).split(CHUNK):
            pooled.append(cast(Tensor, network(chunk, return_features=True)))
            probabilities.append(cast(Tensor, network(chunk, no_output_bias=True)))
        return Features(torch.cat(pooled).flatten(1), None, torch.cat(probabilities))

    return FeatureNetwork(
        "inception",
        "Distances are between features of the standard Inception network: comparable with published ones of equal counts, data and preprocessing.",
        features,
    )
