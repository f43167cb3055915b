"""Imported weights as a value, and the facts that an import asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Defaults, LatentSpec
from ditserve.model.weights.official import Weights, without_variance

ImportFunction = Literal["published", "diffusers", "sit", "repa", "lightningdit"]
# The published results at 256 px use 250 steps of DDPM at guidance 1.5; 50 of DDIM are as good (FID 2.26).
# `choose_grid` finds the grids of the other solvers and counts of steps.
DEFAULTS = Defaults(
    steps=50, solver="ddim", grid="ddim-stride", guidance_scale=1.5, guidance_interval=(0.0, 1.0)
)
# SiT and REPA publish 250 steps of an SDE; 50 steps of Euler's method are near it.
FLOW_DEFAULTS = DEFAULTS.model_copy(update={"solver": "euler", "grid": "uniform"})


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """The facts that a file of weights may not hold; None leaves them to the file.

    `num_heads` and `image_size` are for shapes that are not published, `num_classes` for a class table,
    `predicts_noise` for weights that do not look as if they did. `function` is "published" or "diffusers" for
    diffusers' layout, and in the official layout the kind of a flow.
    """

    num_heads: int | None = None
    image_size: tuple[int, int] | None = None
    function: ImportFunction | None = None
    num_classes: int | None = None
    predicts_noise: bool = False


@dataclass(frozen=True, slots=True)
class ImportedWeights:
    """Weights in our layout, their configuration, and what else the source tells.

    `notes` are sentences that tell what was read and what was assumed; `classes` are names of the classes.
    `diffusion` is that of a flow, None: the published one. `latents` is the normalisation of latents other
    than the published models'. `vae` is the folder of the autoencoder of a pipeline. `guided_channels` are
    those of a latent that guidance acts on: the published code guides 3 of 4. None: all.
    """

    weights: Weights
    config: DiTConfig
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    diffusion: DiffusionSpec | None = None
    defaults: Defaults = DEFAULTS
    latents: LatentSpec | None = None
    vae: Path | None = None
    guided_channels: int | None = 3

    def without_variance(self) -> ImportedWeights:
        """Return the weights of a flow without the outputs of a learned variance, which a flow never uses."""
        if not self.config.learn_sigma:
            return self
        weights, config = without_variance(self.weights, self.config)
        note = "the second half of its outputs, which a flow never uses, is left out"
        return replace(self, weights=weights, config=config, notes=(*self.notes, note))
