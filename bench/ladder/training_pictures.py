"""The training pictures, and the Fréchet distance of generated pictures to them.

The features are those of a small classifier of the same pictures, so the distances compare rungs of one
bundle with each other and with nothing published.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.classifier_network import open_classifier
from ditserve.model.evaluation.features import classifier_features
from ditserve.model.evaluation.fidelity import frechet_distance
from ditserve.model.evaluation.picture_sets import open_data, real_pictures
from ditserve.model.nets.autoencoder import Identity
from ditserve.model.train.load import load_model

CHUNK = 64  # pictures whose features are computed at once


class TrainingPictures:
    """The features of all training pictures, and the labels (N, F) of `pictures` of them, drawn at random.

    Pictures to compare are generated for those labels.

    Raises:
        DataError: these are not the data that the model was trained on, or the model does not draw pixels.
        ClassifierError: there is no classifier.
    """

    def __init__(self, bundle: Path, data: Path, classifier: Path, *, pictures: int, seed: int = 0) -> None:
        model = load_model(bundle)
        if model.manifest.decoder != "identity":
            raise DataError(
                "a Fréchet distance is measured for models that draw pixels only: leave --data out"
            )
        dataset = open_data(model, data)
        self._network = classifier_features(open_classifier(classifier))
        rows = [int(row) for row in dataset.training]
        drawn = np.random.default_rng(seed).permutation(rows)[:pictures]
        self.labels: npt.NDArray[np.int64] = np.asarray(dataset.labels)[drawn]
        chunks = [
            self._network.features(images).pooled for images in real_pictures(dataset, Identity(), rows)
        ]
        self._features = torch.cat(chunks)

    @torch.no_grad()
    def distance(self, pixels: npt.NDArray[np.uint8]) -> float:
        """Return the squared Fréchet distance of pictures (N, H, W, 3).

        It shrinks with N: compare equal counts.
        """
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # (N, 3, H, W)
        features = [self._network.features(part).pooled for part in images.split(CHUNK)]
        return frechet_distance(self._features, torch.cat(features))
