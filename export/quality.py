"""The cost of another backbone in pictures: their distance from those of fp32, and of both from real ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditserve.export.calibrate import Backbone, TrajectorySettings, sample_pictures, with_backbone
from ditserve.export.errors import ExportError
from ditserve.export.verify import open_session, run
from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.classifier_network import ClassifierError, open_classifier
from ditserve.model.evaluation.features import FeatureNetwork, classifier_features
from ditserve.model.evaluation.fidelity import frechet_distance
from ditserve.model.evaluation.picture_sets import (
    EvaluationPlan,
    choose_examples,
    generate,
    open_data,
    real_pictures,
)
from ditserve.model.nets.autoencoder import Identity, PictureDecoder
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
        return open_data(source, settings.data), classifier_features(open_classifier(settings.classifier))
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
