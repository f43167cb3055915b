"""The classifier that judges generated pictures: a small convolutional network with a head per label factor.

`model.evaluate` uses it for two questions. Do pictures show what was asked for? How far are the features of
generated pictures from those of real ones? On disk it is a folder of classifier.json and weights.safetensors
(fp16), written by `python -m model.evaluation.classifier`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ditserve.commands import command_line
from ditserve.model.spec.bundle import WEIGHTS, digest, write_atomic
from ditserve.model.spec.errors import ModelError, wrong_field
from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.sizes import Size, size_name

CLASSIFIER = Path(__file__).parents[1] / "zoo" / "emoji-classifier"  # the one that ships
CARD = "classifier.json"
CHUNK = 256  # pictures classified at once


class ClassifierError(ModelError):
    """A classifier that cannot be opened or used; the message is one sentence naming the file."""


class ClassifierCard(BaseModel):
    """The content of classifier.json.

    `widths` are the channels at a quarter of the size, and after each halving.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: Literal[1] = 1
    image_size: tuple[int, int]
    widths: Annotated[tuple[int, ...], Field(min_length=2)]
    factors: Annotated[tuple[Factor, ...], Field(min_length=1)]
    sha256: str = ""
    accuracy: dict[str, float] = {}
    training: dict[str, Any] = {}
    licence: str | None = None
    attribution: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClassifierOutput:
    """The outputs for N pictures: `features` (N, D), `detail` (N, C₀), and `logits` (N, classes) per factor.

    `detail` is the standard deviation over each picture of the first layer's channels, which respond
    to edges and spots. Damage to a picture shows there; the features, which are trained to see what
    is meant, forgive it.
    """

    features: Tensor
    detail: Tensor
    logits: tuple[Tensor, ...]


class ResidualBlock(nn.Module):
    """(N, C, H, W) → (N, C', H/2, W/2): two convolutions beside a projection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.project = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.project(x) + self.norm2(self.conv2(inner)))


class Classifier(nn.Module):
    """A convolutional network with a head per factor."""

    def __init__(self, card: ClassifierCard) -> None:
        super().__init__()
        self.card = card
        first, *rest = card.widths
        self.stem = nn.Conv2d(3, first, 7, stride=4, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(first)
        self.stages = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(card.widths, rest, strict=False))
        self.heads = nn.ModuleList(nn.Linear(rest[-1], len(factor.classes)) for factor in card.factors)

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Classify images (N, 3, H, W) in [−1, 1], of the size on the card."""
        h = F.relu(self.norm(self.stem(images)))  # (N, C₀, H/4, W/4)
        detail = h.std((2, 3), correction=0)  # (N, C₀)
        for stage in self.stages:
            h = stage(h)
        features = h.mean((2, 3))  # (N, D)
        return ClassifierOutput(features, detail, tuple(head(features) for head in self.heads))


def open_classifier(folder: Path) -> Classifier:
    """Return the classifier of a folder, in evaluation mode, fp32.

    Raises:
        ClassifierError: the folder holds no classifier, or a damaged one.
    """
    card_path, weights_path = folder / CARD, folder / WEIGHTS
    try:
        card = ClassifierCard.model_validate_json(card_path.read_text())
        if digest(weights_path) != card.sha256:
            raise ClassifierError(f"{weights_path} differs from the hash in {card_path}: train it again")
        network = Classifier(card)
        weights = load_file(weights_path).items()
        network.load_state_dict(
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights}
        )
    except FileNotFoundError as error:
        raise ClassifierError(
            f"{folder} holds no classifier: {error.filename} is missing; "
            f"{command_line('model.evaluation.classifier')} writes one"
        ) from None
    except ValidationError as error:
        raise ClassifierError(f"{card_path}: {': '.join(wrong_field(error))}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ClassifierError(f"{weights_path} cannot be read: {str(error).splitlines()[0]}") from None
    return network.eval().requires_grad_(False)


def save_classifier(network: Classifier, folder: Path, card: ClassifierCard) -> None:
    """Write a classifier and its card to a folder, the weights as fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    write_atomic(folder / WEIGHTS, save(weights))
    card = card.model_copy(update={"sha256": digest(folder / WEIGHTS)})
    text = json.dumps(card.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_atomic(folder / CARD, f"{text}\n".encode())


@torch.no_grad()
def classify(network: Classifier, images: Tensor) -> ClassifierOutput:
    """Return the network's outputs for pictures (N, 3, H, W) in [−1, 1], computed a few pictures at a time.

    Pictures a whole number of times as large as the classifier's are averaged down to its size.

    Raises:
        ClassifierError: the pictures have a size that the classifier does not read.
    """
    factor = reading_factor(network.card, (images.shape[2], images.shape[3]))
    outputs = [network(F.avg_pool2d(chunk, factor)) for chunk in images.split(CHUNK)]
    return ClassifierOutput(
        torch.cat([output.features for output in outputs]),
        torch.cat([output.detail for output in outputs]),
        tuple(torch.cat(logits) for logits in zip(*(output.logits for output in outputs), strict=True)),
    )


def reading_factor(card: ClassifierCard, size: Size) -> int:
    """Return the times that pictures are as large as a classifier's: 2 for 128×128 and 64×64.

    Raises:
        ClassifierError: it is no whole number, or not the same for height and width.
    """
    (height, width), factor = card.image_size, size[0] // card.image_size[0]
    if factor < 1 or size != (height * factor, width * factor):
        raise ClassifierError(
            f"the classifier reads pictures of {height}×{width}, not {size_name(size, '×')}: "
            "train one for them"
        )
    return factor


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Return the share of rows (N, classes) whose label (N,) is among the k likeliest classes."""
    likeliest = logits.topk(min(k, logits.shape[1])).indices
    return float((likeliest == labels[:, None]).any(1).double().mean())
