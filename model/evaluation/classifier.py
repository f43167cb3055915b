"""`python -m model.evaluation.classifier`: train the judge of generated pictures.

    python -m model.evaluation.classifier --config RUN.json --out FOLDER [--data FILE]

Two networks are trained. The first does not see one drawing in eight and is measured on those: it knows their
names and styles, but not in this combination. The second sees every picture, also those held out from the
generator, and is the one that is saved. Its accuracy on distorted pictures is measured too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ditserve.commands import command_line
from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.data.transforms import distort
from ditserve.model.evaluation.classifier_network import (
    Classifier,
    ClassifierCard,
    ClassifierError,
    ClassifierOutput,
    classify,
    save_classifier,
    top_k_accuracy,
)
from ditserve.model.spec.command_line import count, guarded, named_path, positive
from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.output_folder import CLASSIFIER, claim
from ditserve.model.train.config import first_mistake, load_config

BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
UNSEEN = 8  # one drawing in so many is kept from the network that is measured


def main(arguments: Sequence[str]) -> int:
    """Train a classifier as the command line says; a mistake is one sentence on stderr and status 2."""
    options = _parser().parse_args(arguments)
    return guarded("model.evaluation.classifier", lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("model.evaluation.classifier"), description="Train the judge of generated pictures."
    )
    parser.add_argument(
        "--config", type=named_path, required=True, help="a training run's file, which selects the pictures"
    )
    parser.add_argument("--data", type=named_path, help="the pictures, if not where the file says")
    parser.add_argument("--out", type=named_path, required=True, help="a folder")
    parser.add_argument("--epochs", type=positive, default=40)
    parser.add_argument(
        "--widths",
        type=positive,
        nargs="+",
        default=[48, 96, 128],
        help="channels at a quarter of the size, and of each halving",
    )
    parser.add_argument("--seed", type=count, default=0)
    return parser


def run(options: argparse.Namespace) -> None:
    """Train, save and report a classifier.

    Raises:
        ClassifierError: a mistake in the training run's file or in the widths.
        DataError: the data cannot be opened, or `train` refuses it.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    try:
        config = load_config(options.config)
    except ValidationError as error:
        raise ClassifierError(first_mistake(error)) from None
    with claim(options.out, CLASSIFIER, apart=(options.data or config.data.path,)) as folder:
        dataset = config.open_dataset(options.data)
        try:
            with Progress(*columns) as progress:
                network, card = train(
                    dataset,
                    widths=options.widths,
                    epochs=options.epochs,
                    seed=options.seed,
                    progress=progress,
                )
        except ValidationError as error:
            raise ClassifierError(first_mistake(error)) from None
        save_classifier(network, folder, card)
    for name, value in card.accuracy.items():
        print(f"{name:24} {value:.4f}")
    print(f"wrote {options.out}")


def train(
    dataset: Dataset, *, widths: Sequence[int], epochs: int, seed: int, progress: Progress
) -> tuple[Classifier, ClassifierCard]:
    """Return the classifier of all pictures, and its card with the measured accuracies; see the module.

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
    if len(dataset.size) > 2:
        raise DataError("the data holds clips or volumes: a classifier reads pictures")
    images = torch.from_numpy(dataset.batch(every, np.random.default_rng(seed)))
    labels = torch.from_numpy(dataset.labels)
    card = ClassifierCard(
        image_size=(dataset.size[0], dataset.size[1]),
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
    final = fit(images, labels, card, steps=steps(len(images)), seed=seed, progress=progress)
    distorted = distort(images, torch.Generator().manual_seed(seed + 1))
    accuracy = {
        **accuracies(classify(measured, images[unseen]), labels[unseen], card.factors, "unseen"),
        **accuracies(classify(final, images), labels, card.factors, "seen"),
        **accuracies(classify(final, distorted), labels, card.factors, "distorted"),
    }
    training = {
        "pictures": len(images),
        "unseen": len(unseen),
        "epochs": epochs,
        "seed": seed,
        "torch": torch.__version__,
    }
    return final, card.model_copy(update={"accuracy": accuracy, "training": training})


def fit(
    images: Tensor, labels: Tensor, card: ClassifierCard, *, steps: int, seed: int, progress: Progress
) -> Classifier:
    """Train a classifier on pictures (N, 3, H, W) in [−1, 1] and labels (N, F).

    Pictures are distorted anew in every batch. The result depends on `seed`, not on torch's global generator.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(card)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    task = progress.add_task(f"{len(images)} pictures", total=steps, loss="")
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        index, order = order[:BATCH], order[BATCH:]
        output = network(distort(images[index], generator))
        losses = [
            F.cross_entropy(logits, labels[index, column], label_smoothing=LABEL_SMOOTHING)
            for column, logits in enumerate(output.logits)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(task, completed=step + 1, loss=f"loss {loss.item():.3f}")
    return network.eval().requires_grad_(False)


def accuracies(
    output: ClassifierOutput, labels: Tensor, factors: Sequence[Factor], suffix: str
) -> dict[str, float]:
    """Return `<factor>_top1_<suffix>` of each factor, and `_top5_` of factors with more than ten classes."""
    shares = {}
    for column, (factor, logits) in enumerate(zip(factors, output.logits, strict=True)):
        for k in (1, 5) if len(factor.classes) > 10 else (1,):
            accuracy = top_k_accuracy(logits, labels[:, column], k)
            shares[f"{factor.name}_top{k}_{suffix}"] = round(accuracy, 4)
    return shares


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
