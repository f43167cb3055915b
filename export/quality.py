"""The cost of another backbone in pictures: their distance from those of fp32, and of both from real ones."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditserve.commands import command_line
from ditserve.export.calibrate import Backbone, TrajectorySettings, sample_pictures, with_backbone
from ditserve.export.decoder import decoder_of
from ditserve.export.errors import ExportError
from ditserve.export.verify import open_session, run
from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.classifier_network import (
    CLASSIFIER,
    ClassifierError,
    open_classifier,
    reading_factor,
)
from ditserve.model.evaluation.features import FeatureNetwork, classifier_features
from ditserve.model.evaluation.fidelity import frechet_distance
from ditserve.model.evaluation.picture_sets import (
    EvaluationPlan,
    choose_examples,
    generate,
    open_data,
    picture_size,
    real_pictures,
)
from ditserve.model.nets.autoencoder import Identity, PictureDecoder
from ditserve.model.spec.command_line import named_path, positive
from ditserve.model.spec.grids import choose_grid
from ditserve.model.train.loaded_model import LoadedModel

# The pictures that are compared pixel by pixel.
COMPARED_PICTURES = TrajectorySettings(samples=4, steps=20, seed=3_000)


@dataclass(frozen=True, slots=True)
class FrechetSettings:
    """The settings of a measurement of Fréchet distances.

    Args:
        data: the pictures that the model was trained on.
        classifier: a folder of `model.evaluation.classifier`, whose features are compared.
        pictures: number of pictures that are made.
        steps: of each picture.
        decoder: the decoder's graph of a model on latents.
    """

    data: Path
    classifier: Path
    pictures: int = 300
    steps: int = 20
    decoder: Path | None = None


def picture_psnr(source: LoadedModel, backbone: Backbone) -> float:
    """Return the PSNR in dB of finished samples by `backbone` against those of fp32 from the same noise.

    The samples are compared before decoding, in the range of 2 that the network works in.
    """
    actual = sample_pictures(with_backbone(source, backbone), COMPARED_PICTURES)
    error = (actual - sample_pictures(source, COMPARED_PICTURES)).square().mean()
    return 10 * math.log10(4 / max(float(error), 1e-12))


def open_references(source: LoadedModel, settings: FrechetSettings) -> tuple[Dataset, FeatureNetwork]:
    """Open the pictures to compare with, and the network whose features are compared.

    Raises:
        ExportError: either cannot be opened, or does not fit the model.
    """
    try:
        dataset = open_data(source, settings.data, pictures=True)
        classifier = open_classifier(settings.classifier)
        reading_factor(classifier.card, picture_size(source))
        return dataset, classifier_features(classifier)
    except (DataError, ClassifierError) as error:
        raise ExportError(str(error)) from None


def frechet_report(source: LoadedModel, backbone: Backbone, settings: FrechetSettings) -> dict[str, float]:
    """Return Fréchet distances of pictures by fp32 and by `backbone`: to real ones, and to each other.

    Both make the same pictures, from the same noise.
    `quality_loss` is the relative growth of the distance to real ones. Source: `model.evaluation.fidelity`.

    Raises:
        ExportError: the data or the classifier cannot be opened, or the model was trained on other data.
    """
    dataset, network = open_references(source, settings)
    decoder = Identity() if settings.decoder is None else _GraphDecoder(settings.decoder)
    plan = _plan(source, settings)
    rows, _ = choose_examples(dataset, plan)

    def features(images: Iterable[Tensor]) -> Tensor:
        return torch.cat([network.features(chunk).pooled for chunk in images])

    training = [int(row) for row in dataset.training]
    reference = features(real_pictures(dataset, decoder, training))
    fp32 = features(generate(source, decoder, dataset, rows, plan))
    candidate = features(generate(with_backbone(source, backbone), decoder, dataset, rows, plan))
    before, after = frechet_distance(reference, fp32), frechet_distance(reference, candidate)
    return {
        "pictures": len(rows),
        "reference": len(training),
        "frechet_fp32": round(before, 5),
        "frechet": round(after, 5),
        "frechet_between": round(frechet_distance(fp32, candidate), 5),
        "quality_loss": round(after / before - 1, 5),
    }


def _plan(source: LoadedModel, settings: FrechetSettings) -> EvaluationPlan:
    defaults, schedule = source.manifest.defaults, source.schedule
    solver, steps = defaults.solver, settings.steps
    return EvaluationPlan(
        limit=settings.pictures,
        per_pair=1,
        reference=0,
        steps=steps,
        solver=solver,
        grid=choose_grid(None, stated=defaults.grid, solver=solver, steps=steps, schedule=schedule),
        guidance_scale=defaults.guidance_scale,
        guidance_interval=defaults.guidance_interval,
        seed=0,
    )


class _GraphDecoder(PictureDecoder):
    """The decoder's graph of a bundle."""

    def __init__(self, path: Path) -> None:
        self.session = open_session(path)

    def decode(self, latents: Tensor) -> Tensor:
        images = run(self.session, {"latent": latents.numpy()}, batch=1)["image"]
        return torch.from_numpy(images.astype(np.float32))


def add_frechet_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a measurement of Fréchet distances, which `frechet_settings` reads."""
    parser.add_argument(
        "--data", type=named_path, help="the training pictures, to measure Fréchet distances with"
    )
    parser.add_argument("--pictures", type=positive, default=300, help="pictures to measure them on")
    parser.add_argument(
        "--classifier",
        type=named_path,
        default=CLASSIFIER,
        help=f"folder of {command_line('model.evaluation.classifier')}",
    )


def frechet_settings(options: argparse.Namespace) -> FrechetSettings | None:
    """Return the settings that a command line gives for the bundle `options.bundle`; None without data."""
    if not options.data:
        return None
    decoder = decoder_of(options.bundle)
    return FrechetSettings(options.data, options.classifier, options.pictures, decoder=decoder)


def quality_metrics(name: str, summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the manifest's metrics of a lower precision, from its summary in the parity report."""
    return {
        f"{name}_relative_l2": max(band["relative_l2"] for band in summary["error"]),
        f"{name}_pictures_psnr_db": summary["pictures_psnr_db"],
        **{f"{name}_{key}": value for key, value in summary["quality"].items() if key == "quality_loss"},
    }


def tell_quality(summary: Mapping[str, Any]) -> list[str]:
    """Return the figures of such a summary, as a command prints them."""
    told = [
        f"relative L2 at most {max(band['relative_l2'] for band in summary['error']):.1e}",
        f"pictures {summary['pictures_psnr_db']} dB",
    ]
    if summary["quality"]:
        told.append("Fréchet distance {frechet} (fp32 {frechet_fp32})".format(**summary["quality"]))
    return told
