"""Edits by diffusers' own pipelines from picture to picture, and for inpainting, with the noise of a seed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from ditserve.model.nets.pipelines.adapters import unpack
from ditserve.model.spec.pipeline_config import FAMILIES
from tests.tiny_pipelines import noise_of, tokens

# A family → the name of its pipeline from picture to picture, and of that for inpainting. That of SD3 takes
# transformers of 16 channels only.
EDITORS: Mapping[str, tuple[str, str | None]] = {
    "sd3": ("StableDiffusion3Img2ImgPipeline", None),
    "flux": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "qwen_image": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "z_image": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
}


def expected_edit(
    family: str,
    pipeline: Any,
    *,
    side: int,
    image: Image.Image,
    mask: Image.Image | None,
    seed: int,
    **body: Any,
) -> Any:
    """Return the latent (C, side, side) that diffusers makes of a picture; it encodes to the mean."""
    name = EDITORS[family][mask is not None]
    assert name is not None
    editor = getattr(diffusers, name)(**pipeline.components)
    editor.set_progress_bar_config(disable=True)
    noise, pixels = noise_of(seed, 4, side), side * pipeline.vae_scale_factor
    scale = body["guidance_embedded"] if family == "flux" else body["guidance_scale"]
    more = {"mask_image": mask} if mask is not None else {}
    module = sys.modules[type(editor).__module__]
    with ExitStack() as patches:
        patches.enter_context(
            patch.object(module, "randn_tensor", lambda shape, **_: noise.reshape(tuple(shape)))
        )
        patches.enter_context(
            patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
        )
        latents: torch.Tensor = editor(
            body["prompt"],
            image=image,
            strength=body["strength"],
            num_inference_steps=body["steps"],
            height=pixels,
            width=pixels,
            output_type="latent",
            max_sequence_length=tokens(family),
            **{"true_cfg_scale" if family == "qwen_image" else "guidance_scale": scale},
            **({} if family == "flux" else {"negative_prompt": ""}),
            **more,
        ).images
    if FAMILIES[family].packs == 2:
        latents = unpack(latents, side, side)
    result: np.ndarray[Any, Any] = latents[0].numpy()
    return result
