"""The training pictures, and the Fréchet distance of generated pictures to them.

The features are those of a small classifier of the same pictures, so the distances compare rungs of one
bundle with each other and with nothing published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditserve.export.verify import open_session, run
from ditserve.model.data.dataset import Dataset
from ditserve.model.data.texture import grain
from ditserve.model.evaluation.classifier_network import open_classifier
from ditserve.model.evaluation.features import classifier_features
from ditserve.model.evaluation.fidelity import frechet_distance
from ditserve.model.evaluation.front import OperatingPoint
from ditserve.model.evaluation.ladder import LadderInputs, OnRows, draw_pictures
from ditserve.model.evaluation.picture_sets import real_pictures, round_to_8_bits
from ditserve.model.nets.autoencoder import Identity, PictureDecoder
from ditserve.model.spec.bundle import DECODER, Bundle
from ditserve.model.spec.manifest import RungSpec
from ditserve.model.train.loaded_model import LoadedModel

CHUNK = 64  # pictures whose features are computed at once


@dataclass(frozen=True, slots=True)
class PictureFigures:
    """The squared Fréchet distance of pictures to the training pictures, and their grain, of 255."""

    frechet: float
    grain: float


class GraphDecoder:
    """The decoder of a bundle on latents, by its graph."""

    def __init__(self, bundle: Bundle) -> None:
        self._session = open_session(bundle.file(DECODER))

    def decode(self, latents: Tensor) -> Tensor:
        return torch.from_numpy(run(self._session, {"latent": latents.numpy()})["image"])


class TrainingPictures:
    """The features of all training pictures, and the conditions of `pictures` of them, drawn at random.

    Pictures to compare are generated for those conditions. The pictures of a model on latents are those that
    its decoder makes, real ones too.

    Raises:
        BundleError: a model on latents without its decoder.
        ClassifierError: there is no classifier.
        DataError: the encoder of the captions cannot be opened.
    """

    def __init__(
        self, bundle: Bundle, model: LoadedModel, dataset: Dataset, classifier: Path, *, pictures: int
    ) -> None:
        self._model = model
        self._decoder: PictureDecoder = (
            Identity() if model.manifest.decoder == "identity" else GraphDecoder(bundle)
        )
        self._network = classifier_features(open_classifier(classifier))
        rows = [int(row) for row in dataset.training]
        drawn = np.random.default_rng(0).permutation(rows)[:pictures]
        text = None if dataset.texts is None else torch.from_numpy(dataset.texts.draw(drawn))
        self.inputs = LadderInputs(torch.from_numpy(np.asarray(dataset.labels)[drawn]), text)
        chunks = [
            self._network.features(images).pooled for images in real_pictures(dataset, self._decoder, rows)
        ]
        self._features = torch.cat(chunks)

    def figures(self, rungs: Sequence[RungSpec], on_rows: OnRows) -> dict[str, PictureFigures]:
        """Return the figures by rung, each for the same conditions and noise.

        A Fréchet distance shrinks with the number of pictures: compare equal counts.
        """
        figures = {}
        for rung in rungs:
            point = OperatingPoint(rung.solver, rung.steps, rung.grid, rung.guidance_interval, rung.stretches)
            figures[rung.name] = self._compared(draw_pictures(self._model, self.inputs, point, on_rows))
        return figures

    @torch.no_grad()
    def _compared(self, latents: Tensor) -> PictureFigures:
        chunks = [round_to_8_bits(self._decoder.decode(chunk)) for chunk in latents.split(CHUNK)]
        features = torch.cat([self._network.features(chunk).pooled for chunk in chunks])
        return PictureFigures(frechet_distance(self._features, features), grain(torch.cat(chunks)))
