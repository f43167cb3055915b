"""The configuration of an autoencoder's training run, from a JSON file."""

from __future__ import annotations

from pathlib import Path

from ditserve.model.data.dataset import NamedPath
from ditserve.model.nets.small_autoencoder import SmallAutoencoderConfig
from ditserve.model.train.run_config import Count, Positive, RunConfig, Weight, read_fields


class AutoencoderTrainConfig(RunConfig):
    """The configuration of one training run of a small autoencoder.

    Every `sheet_every` steps held-out pictures are measured and shown, and the autoencoder is written.
    """

    autoencoder: SmallAutoencoderConfig = SmallAutoencoderConfig()
    decoder_of: NamedPath | None = None
    """Go on from the autoencoder in this folder, and train its decoder alone: latents that its encoder made
    stay what they are. `autoencoder` may then name the sizes of another decoder, which begins with
    those weights whose shapes are the same."""
    batch: Count = 16
    lr: Positive = 2e-3
    crop: Count | None = None
    """Train on random squares of this many pixels; None: on whole pictures."""
    edge_weight: Weight = 0.5
    """Weight of the absolute error of the differences between neighbouring pixels, which keeps lines sharp
    and areas flat."""
    latent_weight: Weight = 1e-4
    """Weight of the mean squared latent."""


def load_autoencoder_config(file: Path) -> AutoencoderTrainConfig:
    """Load the run that a JSON file describes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON.
        ValidationError: a wrong or unknown field.
    """
    return AutoencoderTrainConfig.model_validate(read_fields(file))
