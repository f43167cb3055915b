"""What another backbone costs in pictures: how far they are from those of fp32, and how far both are from real ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditserve.export.calibrate import Backbone, Walk, pictures, with_backbone
from ditserve.export.errors import ExportError
from ditserve.export.session import open_session, run
from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.classifier_network import ClassifierError, open_classifier
from ditserve.model.evaluation.features import classifier_features
from ditserve.model.evaluation.fidelity import frechet_distance
from ditserve.model.evaluation.picture_sets import (
    EvaluationPlan,
    choose_examples,
    generate,
    open_data,
    real_pictures,
)
from ditserve.model.nets.autoencoder import Autoencoder, Identity
from ditserve.model.train.loaded_model import LoadedModel

SEEN = Walk(samples=4, steps=20, seed=3_000)  # pictures of which every pixel is compared


@dataclass(frozen=True, slots=True)
class Judge:
    """`data`: the pictures the model was trained on; `classifier`: a folder of `model.classifier`, whose features are compared;
    `decoder`: the graph of a model on latents."""

    data: Path
    classifier: Path
    pictures: int = 300
    steps: int = 20
    decoder: Path | None = None


def picture_psnr(source: LoadedModel, backbone: Backbone) -> float:
    """PSNR in dB of what the network denoises, finished by `backbone` against fp32 from the same noise; its range is 2."""
    error = (pictures(with_backbone(source, backbone), SEEN) - pictures(source, SEEN)).square().mean()
    return 10 * math.log10(4 / max(float(error), 1e-12))


def frechet_report(source: LoadedModel, backbone: Backbone, judge: Judge) -> dict[str, float]:
    """Fréchet distances of the same pictures made with fp32 and with `backbone`: to real ones, and to each other.

    `quality_loss` is the relative growth of the first. Source of the distance: `model.fidelity`.

    Raises:
        ExportError: the data or the classifier cannot be opened, or the data is not what the model was trained on.
    """
    try:
        dataset = open_data(source, judge.data)
        network = classifier_features(open_classifier(judge.classifier))
    except (DataError, ClassifierError) as error:
        raise ExportError(str(error)) from None
    manifest = source.manifest
    decoder = Identity() if judge.decoder is None else _Graph(judge.decoder)
    plan = EvaluationPlan(
        limit=judge.pictures,
        per_pair=1,
        reference=0,
        steps=judge.steps,
        solver=manifest.defaults.solver,
        grid=manifest.defaults.grid,
        guidance_scale=manifest.defaults.guidance_scale,
        guidance_interval=manifest.defaults.guidance_interval,
        seed=0,
    )
    rows, _ = choose_examples(dataset, plan)

    def features(images: Iterable[Tensor]) -> Tensor:
        return torch.cat([network.features(chunk).pooled for chunk in images])

    every = [int(row) for row in dataset.training]
    shown = features(real_pictures(dataset, decoder, every))
    fp32 = features(generate(source, decoder, dataset, rows, plan))
    other = features(generate(with_backbone(source, backbone), decoder, dataset, rows, plan))
    before, after = frechet_distance(shown, fp32), frechet_distance(shown, other)
    return {
        "pictures": len(rows),
        "reference": len(every),
        "frechet_fp32": round(before, 5),
        "frechet": round(after, 5),
        "frechet_between": round(frechet_distance(fp32, other), 5),
        "quality_loss": round(after / before - 1, 5),
    }


class _Graph(Autoencoder):
    """A bundle's decoder."""

    def __init__(self, path: Path) -> None:
        self.session = open_session(path)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError("a bundle holds no encoder")

    def decode(self, latents: Tensor) -> Tensor:
        images = run(self.session, {"latent": latents.numpy()}, batch=1)["image"]
        return torch.from_numpy(images.astype(np.float32))
