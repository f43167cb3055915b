"""`python -m model.evaluate MODEL --data FILE`: what a model's pictures are worth, measured.

python -m model.evaluate model/zoo/emoji --data data/emoji64.npz --steps 20
python -m model.evaluate runs/mine --data photos --features inception --weights inception-2015-12-05.pt --limit 5000

It makes pictures for labels of the training set and for all combinations of labels that were kept from training, and writes
evaluation.json, evaluation.md, closest.png (pictures above their nearest training picture) and held-out.png (pictures above the
real ones the model has never seen) to the model's folder or to `--out`. Several models are each evaluated into a folder of `--out`, and
comparison.md there sets them side by side, with what they cost:

python -m model.evaluate model/zoo/emoji runs/student runs/pruned --data data/emoji64.npz --out comparison
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.classifier_network import (
    CLASSIFIER,
    Classifier,
    ClassifierError,
    open_classifier,
)
from ditserve.model.evaluation.comparison import EvaluatedModel, comparison_table
from ditserve.model.evaluation.features import (
    FeatureError,
    FeatureNetwork,
    classifier_features,
    inception_features,
)
from ditserve.model.evaluation.measures import (
    FEATURE_FIGURES,
    NearestTraining,
    markdown_table,
    measure,
    notes,
)
from ditserve.model.evaluation.picture_sets import (
    GENERATED,
    REAL_UNSEEN,
    TRAINING,
    UNSEEN,
    EvaluationPlan,
    PictureSet,
    collect_sets,
    open_data,
)
from ditserve.model.nets.autoencoder import AutoencoderError, open_autoencoder
from ditserve.model.sampling.sheet import picture_grid, to_pixels
from ditserve.model.spec.bundle import MANIFEST, BundleError, write_atomic, write_manifest
from ditserve.model.spec.errors import ModelError
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel, LoadError

SHEET = 16  # columns of the written pictures


class EvaluationError(ModelError):
    """An evaluation that cannot be made; the message is one sentence."""


def draw(sets: Mapping[str, PictureSet], near: Mapping[str, NearestTraining], folder: Path) -> None:
    """closest.png: pictures above the training picture nearest in pixels, nearest first; held-out.png: above the real ones."""
    generated, found = sets[GENERATED], near[GENERATED].pixels
    order = found.distances[:, 0].argsort()[: 4 * SHEET]
    nearest = sets[TRAINING].images[found.indices[order, 0]]
    paired(generated.images[order], nearest).save(folder / "closest.png")
    if UNSEEN in sets:
        shown, drawn = sets[UNSEEN], sets[REAL_UNSEEN]
        rows = [
            (k, same)
            for k, row in enumerate(shown.labels)
            for same in (drawn.labels == row).all(1).nonzero()[:1]
        ]
        above, below = (torch.tensor(side) for side in zip(*rows, strict=True))
        paired(shown.images[above], drawn.images[below]).save(folder / "held-out.png")


def paired(above: Tensor, below: Tensor) -> Image.Image:
    """Two rows of pictures (N, 3, H, W), each above its counterpart, wrapped into a sheet."""
    blank = torch.ones(-len(above) % SHEET, *above.shape[1:])
    rows = [torch.cat([side, blank]).split(SHEET) for side in (above, below)]
    sheet = [row for pair in zip(*rows, strict=True) for row in pair]
    return picture_grid(to_pixels(torch.cat(sheet)), SHEET)


def open_judges(options: argparse.Namespace, opened: LoadedModel) -> tuple[FeatureNetwork, Classifier | None]:
    """The feature network, and the classifier that tells what pictures show: none beside Inception unless asked for.

    Raises:
        EvaluationError: a classifier that knows none of the model's classes, or no file for Inception.
        ClassifierError, FeatureError: one that cannot be opened.
    """
    classifier = None
    if options.features == "classifier" or options.classifier:
        folder = options.classifier or CLASSIFIER
        classifier = open_classifier(folder)
        known = {(factor.name, name) for factor in classifier.card.factors for name in factor.classes}
        mine = {(factor.name, name) for factor in opened.manifest.factors for name in factor.classes}
        if not known & mine:
            raise EvaluationError(
                f"the classifier in {folder} knows none of the model's classes: train one with python -m model.evaluation.classifier"
            )
    if options.features == "inception":
        if options.weights is None:
            raise EvaluationError("--features inception needs the network's file: pass it with --weights")
        return inception_features(options.weights), classifier
    assert classifier is not None
    return classifier_features(classifier), classifier


def choose(opened: LoadedModel, options: argparse.Namespace) -> EvaluationPlan:
    """What the command line says, else the bundle's defaults.

    Raises:
        EvaluationError: a count below 1.
    """
    wanted = opened.manifest.defaults
    if min(options.limit, options.per_pair, options.reference) < 1:
        raise EvaluationError("--limit, --per-pair and --reference must be at least 1")
    return EvaluationPlan(
        limit=options.limit,
        per_pair=options.per_pair,
        reference=options.reference,
        steps=options.steps or wanted.steps,
        solver=options.solver or wanted.solver,
        grid=options.grid or wanted.grid,
        guidance_scale=wanted.guidance_scale if options.scale is None else options.scale,
        guidance_interval=tuple(options.interval or wanted.guidance_interval),
        seed=options.seed,
    )


def run(options: argparse.Namespace) -> str:
    """Do what the command line says and return the report in Markdown; see `main` for what can go wrong."""
    models: list[Path] = options.models
    if len(models) == 1:
        return report(evaluate(models[0], options.out or models[0], options).record)
    names = [model.resolve().name for model in models]
    if options.out is None or len(set(names)) < len(names):
        raise EvaluationError(
            "several models are compared in --out FOLDER, each in a folder of its own name: give it, and models of different names"
        )
    text = comparison_table(
        [evaluate(model, options.out / model.resolve().name, options) for model in models]
    )
    write_atomic(options.out / "comparison.md", f"{text}\n".encode())
    return text


def evaluate(model: Path, folder: Path, options: argparse.Namespace) -> EvaluatedModel:
    """Evaluate one model, and write what there is to tell into `folder`."""
    began = time.monotonic()
    opened = load_model(model, data=options.data)
    manifest = opened.manifest
    if options.write and not (model / MANIFEST).is_file():
        raise EvaluationError(f"{model} is no bundle: only a bundle has a manifest to write to")
    network, classifier = open_judges(options, opened)
    plan = choose(opened, options)
    decoder = open_autoencoder(manifest.decoder, options.vae, manifest.latents)
    sets = collect_sets(opened, decoder, open_data(opened, options.data), network, plan)
    found = measure(sets, classifier, manifest.factors, plan.seed)
    folder.mkdir(parents=True, exist_ok=True)
    draw(sets, found.nearest, folder)
    record = {
        "model": f"{manifest.name} {manifest.version}",
        "data": options.data.name,
        "features": network.name,
        "sampling": asdict(plan),
        "pictures": {name: len(each) for name, each in sets.items()},
        "figures": found.figures,
        "notes": notes(sets, network),
        "classifier_accuracy": classifier.card.accuracy if classifier else {},
        "seconds": round(time.monotonic() - began),
    }
    write_atomic(
        folder / "evaluation.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    )
    write_atomic(folder / "evaluation.md", report(record).encode())
    if options.write:
        write_manifest(
            model, manifest.model_copy(update={"metrics": {**manifest.metrics, **metrics(record)}})
        )
    return EvaluatedModel(folder.name, opened, record)


def report(record: Mapping[str, Any]) -> str:
    """evaluation.md."""
    how = record["sampling"]
    counts = ", ".join(f"{count} {name}" for name, count in record["pictures"].items())
    low, high = how["guidance_interval"]
    lines = [
        f"# {record['model']}",
        f"{how['solver']}, {how['steps']} steps ({how['grid']}), guidance {how['guidance_scale']:g} in {low:g}–{high:g}, "
        f"seed {how['seed']}; {record['data']}. Pictures: {counts}.",
        markdown_table(record["figures"]),
        *record["notes"],
    ]
    return "\n\n".join(lines) + "\n"


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The manifest's figures of generated pictures: `held_out_` those of labels kept from training."""
    prefixes = {GENERATED: "", UNSEEN: "held_out_"}
    return {
        f"{prefix}{key}_{record['features']}" if key in FEATURE_FIGURES else f"{prefix}{key}": round(value, 5)
        for name, prefix in prefixes.items()
        for key, value in record["figures"].get(name, {}).items()
    }


def main(arguments: Sequence[str]) -> int:
    """Command line; whatever is wrong is said in one sentence, with status 2."""
    options = _parser().parse_args(arguments)
    try:
        print(run(options))
    except (
        EvaluationError,
        LoadError,
        BundleError,
        DataError,
        ClassifierError,
        FeatureError,
        AutoencoderError,
        ValueError,
        OSError,
    ) as error:
        print(f"model.evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluate", description="Measure what a model's pictures are worth."
    )
    parser.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="a bundle, or a training run; several: to compare",
    )
    parser.add_argument("--data", type=Path, required=True, help="the data it was trained on")
    parser.add_argument("--out", type=Path, help="folder for the report and pictures (default: the model's)")
    parser.add_argument("--write", action="store_true", help="put the figures into the bundle's manifest")
    parser.add_argument("--features", choices=("classifier", "inception"), default="classifier")
    parser.add_argument("--weights", type=Path, help="NVIDIA's inception-2015-12-05.pt")
    parser.add_argument(
        "--classifier",
        type=Path,
        help="folder of python -m model.evaluation.classifier (default: the emoji's)",
    )
    parser.add_argument("--limit", type=int, default=200, help="pictures for labels of the training set")
    parser.add_argument("--per-pair", type=int, default=1, help="pictures of each combination of labels")
    parser.add_argument(
        "--reference", type=int, default=10_000, help="training pictures compared with, at most"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--solver")
    parser.add_argument("--grid")
    parser.add_argument("--scale", type=float, help="guidance scale; 1 is none")
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="where guidance acts, in 0..1"
    )
    parser.add_argument("--vae", type=Path, help="diffusers AutoencoderKL folder, for latent models")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
