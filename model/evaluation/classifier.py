"""`python -m model.evaluation.classifier --data FILE --config RUN.json --out FOLDER`: a small network that tells what pictures show.

`model.evaluate` judges generated pictures by it: are they what was asked for, and how far are its features of theirs from those
of real ones. It is a folder of classifier.json and weights.safetensors (fp16).

Two networks are trained. The first does not see one drawing in eight, and is measured on those: names and styles it knows,
in a combination it has never seen. The second sees every picture, also those kept from the generator, and is the one that is
saved; how it stands distorted pictures is measured too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ditserve.model.data.augmentation import distorted
from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.spec.bundle import WEIGHTS, Factor, digest, write_atomic
from ditserve.model.spec.errors import ModelError
from ditserve.model.train.config import first_mistake, load_config

CLASSIFIER = Path(__file__).parents[1] / "zoo" / "emoji-classifier"  # the one that ships
CARD = "classifier.json"
BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
UNSEEN = 8  # one drawing in so many is kept from the network that is measured


class ClassifierError(ModelError):
    """A classifier that cannot be opened or used; the message is one sentence naming the file."""


class Card(BaseModel):
    """classifier.json."""

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
class Reading:
    """Of N pictures: features (N, D), logits (N, classes) per factor, and how cleanly they are drawn (N, C₀).

    The last is the standard deviation over each picture of what the first layer, of edges and spots, finds: damage shows there
    that the features, trained to see what is meant, forgive.
    """

    features: Tensor
    detail: Tensor
    logits: tuple[Tensor, ...]


class Residual(nn.Module):
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

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        first, *rest = card.widths
        self.stem = nn.Conv2d(3, first, 7, stride=4, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(first)
        self.stages = nn.ModuleList(Residual(a, b) for a, b in zip(card.widths, rest, strict=False))
        self.heads = nn.ModuleList(nn.Linear(rest[-1], len(factor.classes)) for factor in card.factors)

    def forward(self, images: Tensor) -> Reading:
        """(N, 3, H, W) in [−1, 1], of the size on the card."""
        h = F.relu(self.norm(self.stem(images)))  # (N, C₀, H/4, W/4)
        detail = h.std((2, 3), correction=0)  # (N, C₀)
        for stage in self.stages:
            h = stage(h)
        features = h.mean((2, 3))  # (N, D)
        return Reading(features, detail, tuple(head(features) for head in self.heads))


def open_classifier(folder: Path) -> Classifier:
    """The classifier in a folder, in evaluation mode, fp32.

    Raises:
        ClassifierError: no classifier there, or a damaged one.
    """
    source, weights = folder / CARD, folder / WEIGHTS
    try:
        card = Card.model_validate_json(source.read_text())
        if digest(weights) != card.sha256:
            raise ClassifierError(f"{weights} differs from the hash in {source}: train it again")
        network = Classifier(card)
        network.load_state_dict(
            {
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in load_file(weights).items()
            }
        )
    except FileNotFoundError as error:
        raise ClassifierError(
            f"{folder} holds no classifier: {error.filename} is missing; python -m model.evaluation.classifier writes one"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ClassifierError(f"{source}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ClassifierError(f"{weights} cannot be read: {str(error).splitlines()[0]}") from None
    return network.eval().requires_grad_(False)


def save_classifier(network: Classifier, folder: Path, card: Card) -> None:
    """Write a classifier, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    write_atomic(folder / WEIGHTS, save(weights))
    card = card.model_copy(update={"sha256": digest(folder / WEIGHTS)})
    write_atomic(
        folder / CARD,
        (json.dumps(card.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode(),
    )


@torch.no_grad()
def read(network: Classifier, images: Tensor) -> Reading:
    """What the network makes of pictures (N, 3, H, W), a few at a time.

    Raises:
        ClassifierError: pictures of another size.
    """
    size = (images.shape[2], images.shape[3])
    if size != network.card.image_size:
        wanted = network.card.image_size
        raise ClassifierError(
            f"the classifier reads pictures of {wanted[0]}×{wanted[1]}, these are {size[0]}×{size[1]}: train one for them"
        )
    parts = [network(chunk) for chunk in images.split(256)]
    return Reading(
        torch.cat([part.features for part in parts]),
        torch.cat([part.detail for part in parts]),
        tuple(torch.cat(logits) for logits in zip(*(part.logits for part in parts), strict=True)),
    )


def top(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """The share of rows (N, classes) whose label (N,) is among the k likeliest classes."""
    likeliest = logits.topk(min(k, logits.shape[1])).indices
    return float((likeliest == labels[:, None]).any(1).double().mean())


def accuracies(reading: Reading, labels: Tensor, factors: Sequence[Factor], suffix: str) -> dict[str, float]:
    """`<factor>_top1_<suffix>`, and top 5 where a factor has more than ten classes."""
    found = {}
    for column, (factor, logits) in enumerate(zip(factors, reading.logits, strict=True)):
        for k in (1, 5) if len(factor.classes) > 10 else (1,):
            found[f"{factor.name}_top{k}_{suffix}"] = round(top(logits, labels[:, column], k), 4)
    return found


def fit(
    images: Tensor, labels: Tensor, card: Card, *, steps: int, seed: int, progress: Progress
) -> Classifier:
    """Train on pictures (N, 3, H, W) in [−1, 1] and labels (N, F), distorted anew each time; repeatable by seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(card)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    task = progress.add_task(f"{len(images)} pictures", total=steps, loss="")
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        index, order = order[:BATCH], order[BATCH:]
        reading = network(distorted(images[index], generator))
        losses = [
            F.cross_entropy(logits, labels[index, column], label_smoothing=LABEL_SMOOTHING)
            for column, logits in enumerate(reading.logits)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        pace.step()
        progress.update(task, completed=step + 1, loss=f"loss {loss.item():.3f}")
    return network.eval().requires_grad_(False)


def train(
    dataset: Dataset, *, widths: Sequence[int], epochs: int, seed: int, progress: Progress
) -> tuple[Classifier, Card]:
    """The classifier of all pictures, and its card with what was measured; see the module.

    Raises:
        DataError: no label factors, latents, or too few pictures.
    """
    every = np.arange(len(dataset.labels))
    if not dataset.factors:
        raise DataError("the data has no labels: a classifier needs them")
    if dataset.channels != 3:
        raise DataError(
            f"the data has {dataset.channels} channels: a classifier reads pictures, which have 3"
        )
    if len(every) < UNSEEN * 2:
        raise DataError(f"the data holds {len(every)} pictures: a classifier needs at least {UNSEEN * 2}")
    images = torch.from_numpy(dataset.batch(every, np.random.default_rng(seed)))
    labels = torch.from_numpy(dataset.labels)
    card = Card(
        image_size=dataset.size,
        widths=tuple(widths),
        factors=dataset.factors,
        licence=dataset.licence,
        attribution=dataset.attribution,
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    unseen, seen = order[::UNSEEN], order[torch.arange(len(order)) % UNSEEN != 0]

    def steps(count: int) -> int:
        return max(20, epochs * count // BATCH)

    measured = fit(images[seen], labels[seen], card, steps=steps(len(seen)), seed=seed, progress=progress)
    whole = fit(images, labels, card, steps=steps(len(images)), seed=seed, progress=progress)
    shaken = distorted(images, torch.Generator().manual_seed(seed + 1))
    accuracy = {
        **accuracies(read(measured, images[unseen]), labels[unseen], card.factors, "unseen"),
        **accuracies(read(whole, images), labels, card.factors, "seen"),
        **accuracies(read(whole, shaken), labels, card.factors, "distorted"),
    }
    training = {
        "pictures": len(images),
        "unseen": len(unseen),
        "epochs": epochs,
        "seed": seed,
        "torch": torch.__version__,
    }
    return whole, card.model_copy(update={"accuracy": accuracy, "training": training})


def main(arguments: Sequence[str]) -> int:
    """Command line; whatever is wrong is said in one sentence, with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluation.classifier", description="Train the judge of generated pictures."
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="a training run's file, which selects the pictures"
    )
    parser.add_argument("--data", type=Path, help="the pictures, if not where the file says")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[48, 96, 128],
        help="channels at a quarter of the size, and of each halving",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    try:
        dataset = load_config(options.config).open_dataset(options.data)
        with Progress(*columns) as progress:
            network, card = train(
                dataset, widths=options.widths, epochs=options.epochs, seed=options.seed, progress=progress
            )
        save_classifier(network, options.out, card)
    except (DataError, ValueError, OSError) as error:
        sentence = first_mistake(error) if isinstance(error, ValidationError) else str(error)
        print(f"model.evaluation.classifier: {sentence}", file=sys.stderr)
        return 2
    for name, value in card.accuracy.items():
        print(f"{name:24} {value:.4f}")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
