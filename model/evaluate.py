"""Measure what a model's pictures are worth: `python -m model.evaluate MODEL --data FILE`.

    python -m model.evaluate model/zoo/emoji --data data/emoji64.npz --steps 20
    python -m model.evaluate runs/mine --data photos --features inception --weights inception-2015-12-05.pt

The command draws pictures for labels of the training set, and for all combinations of labels that were kept
from training. It writes to the folder of the model, or to `--out`:

    evaluation.json, evaluation.md    the figures
    closest.png                       pictures above the training picture nearest to each
    held-out.png                      pictures of unseen combinations above the real ones

Of a model of clips or volumes it measures the motion (`model.evaluation.motion`), and writes clips.webp:
drawn clips above the real ones of their labels.

Several models are each evaluated into a folder of `--out`, and comparison.md there sets them and their cost
side by side:

    python -m model.evaluate model/zoo/emoji runs/student runs/pruned --data data/emoji64.npz --out comparison
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from ditserve.commands import command_line
from ditserve.model.data.dataset import Dataset
from ditserve.model.evaluation.comparison import EvaluatedModel, comparison_table
from ditserve.model.evaluation.judges import EvaluationError, known_classes, open_metric_networks
from ditserve.model.evaluation.measures import (
    FEATURE_FIGURES,
    NearestTraining,
    markdown_table,
    measure,
    notes,
    shortfalls,
)
from ditserve.model.evaluation.motion import measure_motion
from ditserve.model.evaluation.picture_sets import (
    GENERATED,
    REAL_UNSEEN,
    TRAINING,
    UNSEEN,
    EvaluationPlan,
    Given,
    PictureSet,
    Wordings,
    choose_rows,
    collect_sets,
    open_data,
    picture_size,
    texts_instead,
)
from ditserve.model.nets.autoencoder import PictureDecoder, autoencoder_folder, open_decoder
from ditserve.model.sampling.sheet import SLICES, Sheet, picture_grid, to_pixels
from ditserve.model.spec.bundle import MANIFEST, write_atomic, write_manifest
from ditserve.model.spec.command_line import count, finite, guarded, named_path, positive, share
from ditserve.model.spec.grids import choose_grid
from ditserve.model.spec.heap import memory_bytes
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.output_folder import BUNDLE, EVALUATION, RUN, claim
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel

COLUMNS = 16  # pictures side by side in closest.png and held-out.png


def write_pictures(sets: Mapping[str, PictureSet], near: Mapping[str, NearestTraining], folder: Path) -> None:
    """Write closest.png, pictures above their nearest training picture, nearest first, and held-out.png.

    The latter shows pictures of unseen labels above the first real one of the same labels; it is left out
    where the training set holds all labels.
    """
    generated, nearest = sets[GENERATED], near[GENERATED].pixels
    order = nearest.distances[:, 0].argsort()[: 4 * COLUMNS]
    training = sets[TRAINING].images[nearest.indices[order, 0]]
    paired(generated.images[order], training).save(folder / "closest.png")
    if UNSEEN in sets:
        unseen, real = sets[UNSEEN], sets[REAL_UNSEEN]
        pairs = [
            (k, match)
            for k, labels in enumerate(unseen.labels)
            for match in (real.labels == labels).all(1).nonzero()[:1]
        ]
        above, below = (torch.tensor(side) for side in zip(*pairs, strict=True))
        paired(unseen.images[above], real.images[below]).save(folder / "held-out.png")


def paired(above: Tensor, below: Tensor) -> Image.Image:
    """Return a sheet of pictures (N, 3, H, W) in pairs of rows: `above[k]` stands over `below[k]`."""
    blank = torch.ones(-len(above) % COLUMNS, *above.shape[1:])
    rows = [torch.cat([side, blank]).split(COLUMNS) for side in (above, below)]
    sheet = [row for pair in zip(*rows, strict=True) for row in pair]
    return picture_grid(to_pixels(torch.cat(sheet)), COLUMNS)


def make_plan(loaded: LoadedModel, options: argparse.Namespace) -> EvaluationPlan:
    """Return the plan of the command line; what it leaves out is the default of the model.

    Raises:
        EvaluationError: more pictures than the memory holds, or than `--limit` for one combination.
    """
    defaults = loaded.manifest.defaults
    needed = options.limit * 4 * 3 * math.prod(picture_size(loaded))
    if needed > memory_bytes():
        raise EvaluationError(f"--limit {options.limit} pictures take {needed / 2**30:,.0f} GiB: lower it")
    if options.per_pair is not None and options.per_pair > options.limit:
        raise EvaluationError(f"--per-pair {options.per_pair} is above --limit {options.limit}: lower it")
    solver, steps = options.solver or defaults.solver, options.steps or defaults.steps
    schedule = loaded.schedule
    return EvaluationPlan(
        limit=options.limit,
        per_pair=options.per_pair,
        reference=options.reference,
        steps=steps,
        solver=solver,
        grid=choose_grid(options.grid, stated=defaults.grid, solver=solver, steps=steps, schedule=schedule),
        guidance_scale=defaults.guidance_scale if options.scale is None else options.scale,
        guidance_interval=tuple(options.interval or defaults.guidance_interval),
        seed=options.seed,
        given=options.given or usual_conditions(loaded.manifest, options.wordings),
        wordings=options.wordings,
    )


def usual_conditions(manifest: Manifest, wordings: Wordings) -> Given:
    """Return what a model is told that the command line leaves out: all, or what training told together."""
    if not texts_instead(manifest):
        return "all"
    return "text" if wordings == "unseen" else "labels"


def evaluate_all(options: argparse.Namespace) -> str:
    """Evaluate the models of the command line, and return the report of one, or the comparison of several.

    Raises:
        ModelError, ValueError, OSError: a model, its data or a metric network cannot be opened, or an option
            is not possible.
    """
    models: list[Path] = options.models
    if len(models) == 1:
        return report(evaluate(models[0], options.out or models[0], options).record)
    names = [model.resolve().name for model in models]
    if options.out is None or len(set(names)) < len(names):
        raise EvaluationError(
            "several models are compared in --out FOLDER, each in a folder of its own name: "
            "give it, and models of different names"
        )
    with claim(options.out, EVALUATION, apart=(*models, options.data)) as out:
        text = comparison_table([evaluate(model, out / model.resolve().name, options) for model in models])
        write_atomic(out / "comparison.md", f"{text}\n".encode())
    return text


def evaluate(model: Path, folder: Path, options: argparse.Namespace) -> EvaluatedModel:
    """Evaluate one model, and write the report and the pictures into `folder`."""
    with claim(folder, EVALUATION, BUNDLE, RUN, apart=(options.data,)):
        return _evaluate(model, folder, options)


def _evaluate(model: Path, folder: Path, options: argparse.Namespace) -> EvaluatedModel:
    began = time.monotonic()
    loaded = load_model(model, data=options.data)
    manifest = loaded.manifest
    if options.write and not (model / MANIFEST).is_file():
        raise EvaluationError(f"{model} is no bundle: only a bundle has a manifest to write to")
    decoder = open_decoder(manifest, autoencoder_folder(model, options.vae))
    if manifest.first_axis is not None:
        record = _evaluate_motion(loaded, decoder, folder, options)
        record["seconds"] = round(time.monotonic() - began)
        return _write_record(model, folder, loaded, record, write=options.write)
    network, classifier = open_metric_networks(options, loaded)
    plan = make_plan(loaded, options)
    dataset = open_data(loaded, options.data, pictures=True)
    check_conditions_told(dataset, plan)
    rows = choose_rows(dataset, plan)
    # What cannot be told is said before hours of sampling.
    missing = shortfalls({name: len(index) for name, index in rows.items()}, network.width)
    if classifier is not None:
        known, wanted = known_classes(classifier, loaded)
        if known < wanted:
            missing.append(f"the classifier knows {known} of {wanted} classes, which its figures are of")
    for sentence in missing:
        print(f"model.evaluate: {sentence}", file=sys.stderr)
    sets = collect_sets(loaded, decoder, dataset, network, plan, rows)
    measured = measure(sets, classifier, manifest.factors, plan.seed)
    write_pictures(sets, measured.nearest, folder)
    record = {
        "model": f"{manifest.name} {manifest.version}",
        "data": options.data.name,
        "features": network.name,
        "sampling": asdict(plan),
        "pictures": {name: len(pictures) for name, pictures in sets.items()},
        "figures": measured.figures,
        "deviations": measured.deviations,
        "notes": [*notes(sets, network), *missing],
        "classifier_accuracy": classifier.card.accuracy if classifier else {},
        "seconds": round(time.monotonic() - began),
    }
    return _write_record(model, folder, loaded, record, write=options.write)


def _evaluate_motion(
    loaded: LoadedModel, decoder: PictureDecoder, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure the motion of clips, write clips.webp, and return the record without its seconds."""
    plan, dataset = make_plan(loaded, options), open_data(loaded, options.data, pictures=True)
    check_conditions_told(dataset, plan)
    rows = choose_rows(dataset, plan)
    measured = measure_motion(loaded, decoder, dataset, plan, rows)
    above, below = measured.generated[: 4 * COLUMNS], measured.real[: 4 * COLUMNS]
    frames = (paired(above[:, :, f], below[:, :, f]) for f in range(above.shape[2]))
    Sheet(tuple(frames), loaded.manifest.fps or SLICES).save(folder / "clips.webp")
    return {
        "model": f"{loaded.manifest.name} {loaded.manifest.version}",
        "data": options.data.name,
        "features": "pixels",
        "sampling": asdict(plan),
        "pictures": {name: len(rows[name]) for name in (GENERATED, UNSEEN) if name in rows},
        "figures": measured.figures,
        "deviations": {},
        "notes": ["Figures are of pixels, in steps of 255; see model.evaluation.motion."],
        "classifier_accuracy": {},
    }


def _write_record(
    model: Path, folder: Path, loaded: LoadedModel, record: dict[str, Any], *, write: bool
) -> EvaluatedModel:
    """Write the report into `folder`, and the figures into the manifest of the bundle `model` if asked to."""
    encoded = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    write_atomic(folder / "evaluation.json", encoded)
    write_atomic(folder / "evaluation.md", report(record).encode())
    if write:
        merged = {**loaded.manifest.metrics, **metrics(record)}
        write_manifest(model, loaded.manifest.model_copy(update={"metrics": merged}))
    return EvaluatedModel(folder.name, loaded, record)


def check_conditions_told(dataset: Dataset, plan: EvaluationPlan) -> None:
    """Raise EvaluationError if the data does not hold what the model is to be told."""
    if plan.given == "text" and dataset.texts is None:
        raise EvaluationError("--given text is for a model trained on captions, and this one was not")
    if plan.unseen_wordings and (dataset.texts is None or plan.given == "labels"):
        raise EvaluationError("--wordings unseen is for a model that is told a text")
    if plan.unseen_wordings and dataset.texts is not None and not any(dataset.texts.unseen):
        raise EvaluationError(
            "--wordings unseen: no caption of the data has wordings kept from training, after an empty line"
        )


def report(record: Mapping[str, Any]) -> str:
    """Return the text of evaluation.md."""
    sampling = record["sampling"]
    counts = ", ".join(f"{count} {name}" for name, count in record["pictures"].items())
    low, high = sampling["guidance_interval"]
    lines = [
        f"# {record['model']}",
        f"{sampling['solver']}, {sampling['steps']} steps ({sampling['grid']}), "
        f"guidance {sampling['guidance_scale']:g} in {low:g}–{high:g}, "
        f"seed {sampling['seed']}; {record['data']}{_told(sampling)}. Pictures: {counts}.",
        markdown_table(record["figures"], record["deviations"]),
        *record["notes"],
    ]
    return "\n\n".join(lines) + "\n"


def _told(sampling: Mapping[str, Any]) -> str:
    given, wordings = sampling.get("given", "all"), sampling.get("wordings", "first")
    told = {"all": "", "labels": ", told labels alone", "text": ", told the text alone"}[given]
    return told + (", in words kept from training" if wordings == "unseen" else "")


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the manifest's figures of generated pictures; `held_out_` marks those of unseen labels."""
    prefixes = {GENERATED: "", UNSEEN: "held_out_"}
    return {
        f"{prefix}{key}_{record['features']}" if key in FEATURE_FIGURES else f"{prefix}{key}": round(value, 5)
        for name, prefix in prefixes.items()
        for key, value in record["figures"].get(name, {}).items()
    }


def run(options: argparse.Namespace) -> None:
    """Evaluate as the command line says, and print the report or the comparison."""
    print(evaluate_all(options))


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; an error is one sentence on stderr and status 2."""
    options = _parser().parse_args(arguments)
    return guarded("model.evaluate", lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("model.evaluate"), description="Measure what a model's pictures are worth."
    )
    parser.add_argument(
        "models",
        type=named_path,
        nargs="+",
        metavar="MODEL",
        help="a bundle, or a training run; several: to compare",
    )
    parser.add_argument(
        "--data",
        type=named_path,
        required=True,
        help="the data it was trained on; of a bundle on latents also their pictures",
    )
    parser.add_argument(
        "--out", type=named_path, help="folder for the report and pictures (default: the model's)"
    )
    parser.add_argument("--write", action="store_true", help="put the figures into the bundle's manifest")
    parser.add_argument("--features", choices=("classifier", "inception"), default="classifier")
    parser.add_argument("--weights", type=named_path, help="NVIDIA's inception-2015-12-05.pt")
    parser.add_argument(
        "--classifier",
        type=named_path,
        help=f"folder of {command_line('model.evaluation.classifier')} (default: the emoji's)",
    )
    parser.add_argument("--limit", type=positive, default=200, help="pictures for labels of the training set")
    parser.add_argument(
        "--per-pair",
        type=positive,
        help="pictures of each combination of labels, at most (as often as in training)",
    )
    parser.add_argument(
        "--reference", type=positive, default=10_000, help="training pictures compared with, at most"
    )
    parser.add_argument(
        "--given",
        choices=get_args(Given),
        help="conditions of an example that the model is told; all, but of one that learned texts in place "
        "of labels the labels, or the text for wordings that it has not seen",
    )
    parser.add_argument(
        "--wordings",
        choices=get_args(Wordings),
        default="first",
        help="texts: the first of a caption, or one that is kept from training",
    )
    parser.add_argument("--seed", type=count, default=0)
    parser.add_argument("--steps", type=positive)
    parser.add_argument("--solver")
    parser.add_argument("--grid")
    parser.add_argument("--scale", type=finite, help="guidance scale; 1 is none")
    parser.add_argument(
        "--interval", type=share, nargs=2, metavar=("LOW", "HIGH"), help="where guidance acts, in 0..1"
    )
    parser.add_argument("--vae", type=named_path, help="its autoencoder's folder, if the bundle has none")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
