"""The training pictures, and the Fréchet distance of generated pictures to them.

The features are those of a small classifier of the same pictures, so the distances compare rungs of one
bundle with each other and with nothing published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.classifier_network import open_classifier
from ditserve.model.evaluation.features import classifier_features
from ditserve.model.evaluation.fidelity import frechet_distance
from ditserve.model.evaluation.front import OperatingPoint
from ditserve.model.evaluation.ladder import LadderInputs, OnRows, draw_pictures
from ditserve.model.evaluation.picture_sets import real_pictures, round_to_8_bits
from ditserve.model.nets.autoencoder import Identity
from ditserve.model.spec.manifest import RungSpec
from ditserve.model.train.loaded_model import LoadedModel

CHUNK = 64  # pictures whose features are computed at once


class TrainingPictures:
    """The features of all training pictures, and the labels of `pictures` of them, drawn at random.

    Pictures to compare are generated for those labels.

    Raises:
        DataError: the model does not draw pixels.
        ClassifierError: there is no classifier.
    """

    def __init__(self, model: LoadedModel, dataset: Dataset, classifier: Path, *, pictures: int) -> None:
        if model.manifest.decoder != "identity":
            raise DataError(
                "a Fréchet distance is measured for models that draw pixels only: leave --classifier out"
            )
        self._model = model
        self._network = classifier_features(open_classifier(classifier))
        rows = [int(row) for row in dataset.training]
        drawn = np.random.default_rng(0).permutation(rows)[:pictures]
        self.inputs = LadderInputs(torch.from_numpy(np.asarray(dataset.labels)[drawn]), None)
        chunks = [
            self._network.features(images).pooled for images in real_pictures(dataset, Identity(), rows)
        ]
        self._features = torch.cat(chunks)

    def distances(self, ladder: Sequence[RungSpec], on_rows: OnRows) -> dict[str, float]:
        """Return the squared Fréchet distance by rung, each for the same labels and noise.

        It shrinks with the number of pictures: compare equal counts.
        """
        distances = {}
        for rung in ladder:
            point = OperatingPoint(rung.solver, rung.steps, rung.grid, rung.guidance_interval, rung.stretches)
            distances[rung.name] = self._distance(draw_pictures(self._model, self.inputs, point, on_rows))
        return distances

    @torch.no_grad()
    def _distance(self, pictures: Tensor) -> float:
        chunks = round_to_8_bits(pictures).split(CHUNK)
        return frechet_distance(
            self._features, torch.cat([self._network.features(chunk).pooled for chunk in chunks])
        )
