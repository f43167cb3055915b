"""Feature networks by which pictures are compared: the standard Inception, or our own classifier.

Inception is NVIDIA's TorchScript translation of the network that FID is defined by. A TorchScript file holds
no Python, and its reader builds only tensors and plain values. But it still holds a program, so only the file
with the known hash is opened. Classifiers are safetensors and JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ditserve.model.evaluation.classifier_network import Classifier, classify
from ditserve.model.spec.bundle import digest
from ditserve.model.spec.errors import ModelError

INCEPTION = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_WIDTH = 2048
CHUNK = 64  # pictures read by Inception at once


class FeatureError(ModelError):
    """A feature network that cannot be opened; the message is one sentence naming the file."""


@dataclass(frozen=True, slots=True)
class Features:
    """Features of N pictures: `pooled` (N, D), `detail` (N, S) or None, and class `probabilities` (N, K)."""

    pooled: Tensor
    detail: Tensor | None
    probabilities: Tensor


@dataclass(frozen=True, slots=True)
class FeatureNetwork:
    """A function from pictures (N, 3, H, W) in [−1, 1] to features.

    `name` identifies the network in reports; `note` says with what its figures may be compared. `width` is
    the number of pooled features.
    """

    name: str
    note: str
    width: int
    features: Callable[[Tensor], Features]


def classifier_features(classifier: Classifier) -> FeatureNetwork:
    """Return a feature network of a classifier.

    It gives the features before the heads, the detail of the first layer, and the probabilities of the
    first factor. The detail stands in for the spatial features of sFID (Nash et al., arXiv:2103.03841) and
    has the same purpose.
    """

    def features(images: Tensor) -> Features:
        output = classify(classifier, images)
        return Features(output.features, output.detail, output.logits[0].softmax(1))

    return FeatureNetwork(
        "classifier",
        "Distances are between features of a small classifier trained on this data: "
        "not comparable with published FID, KID or IS. "
        "It sees what is meant and forgives how it is drawn; "
        "the distance of details, of its first layer, does not.",
        classifier.card.widths[-1],
        features,
    )


def inception_features(file: Path, sha256: str = INCEPTION_SHA256) -> FeatureNetwork:
    """Return the network of published FID, KID, IS, precision and recall.

    It resizes pictures to 299×299 itself and has no features of detail.

    Raises:
        FeatureError: the file does not exist, or is another one.
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
        "Distances are between features of the standard Inception network: "
        "comparable with published ones of equal counts, data and preprocessing.",
        INCEPTION_WIDTH,
        features,
    )
