"""Tiny pipelines of diffusers with random weights, of its own classes, as folders on disk.

Tokenizers are made of a small vocabulary. Weights are drawn wider than they are initialised, so that
conditions and noise levels make a difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ditserve.model.nets.pipelines.adapters import pack, unpack

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("a", "red", "fox", "in", "the", "snow", "blue", "cat", "blurry", "photo", "of", "moon")
TOKENS = 12  # of a prompt, in the tests


def clip_tokenizer(folder: Path) -> Any:
    """Return a tokenizer of CLIP's kind, of single letters, with 77 tokens a text."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {piece: k for k, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)


def t5_tokenizer() -> Any:
    """Return a tokenizer of T5's kind, of letters and a few words, that pads with 0 and ends with 1."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS if len(word) > 1), *LETTERS]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(k)) for k, piece in enumerate(pieces)], unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def clip(kind: Any, *, width: int, projection: int) -> Any:
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=54,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=projection,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
        )
    )


def t5(width: int) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=64, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, dropout_rate=0.0
        )
    )


def vae(channels: int, *, shift: float | None = None, scale: float = 0.4) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=scale,
        shift_factor=shift,
    )


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """Return a module whose small parameters were drawn anew, so that no path is near zero."""
    for parameter in module.parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def pixart(scratch: Path) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=lively(t5(24)),
        vae=lively(vae(4)),
        transformer=lively(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_schedule="linear", beta_start=1e-4, beta_end=0.02, solver_order=2
        ),
    )


def sd3(scratch: Path) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    encoder = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=lively(vae(4, shift=0.06)),
        text_encoder=lively(clip(encoder, width=16, projection=16)),
        tokenizer=clip_tokenizer(scratch / "clip"),
        text_encoder_2=lively(clip(encoder, width=8, projection=8)),
        tokenizer_2=clip_tokenizer(scratch / "clip2"),
        text_encoder_3=lively(t5(32)),
        tokenizer_3=t5_tokenizer(),
    )


def flux(scratch: Path, *, guidance: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        transformer=lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=lively(vae(4, shift=0.1)),
        text_encoder=lively(clip(transformers.CLIPTextModel, width=16, projection=16)),
        tokenizer=clip_tokenizer(scratch / "clip"),
        text_encoder_2=lively(t5(32)),
        tokenizer_2=t5_tokenizer(),
    )


BUILDERS: dict[str, Callable[[Path], Any]] = {"pixart": pixart, "sd3": sd3, "flux": flux}


def save_pipeline(family: str, folder: Path) -> Any:
    """Write the tiny pipeline of a family to `folder`, and return it."""
    torch.manual_seed(0)
    pipeline = BUILDERS[family](folder.parent / f"{folder.name}-scratch")
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return pipeline


def noise_of(seed: int, channels: int, side: int) -> torch.Tensor:
    """Return the noise (1, C, side, side) that the service draws of a seed."""
    generator = np.random.Generator(np.random.Philox(seed))
    return torch.from_numpy(generator.standard_normal((1, channels, side, side), np.float32))


def expected_latents(
    family: str,
    pipeline: Any,
    *,
    side: int,
    prompt: str,
    steps: int,
    seed: int,
    negative_prompt: str = "",
    guidance_scale: float | None = None,
    guidance_embedded: float | None = None,
) -> Any:
    """Return the latent (C, side, side) that a pipeline itself makes of a request."""
    noise = noise_of(seed, 4, side)
    scale = guidance_scale if guidance_embedded is None else guidance_embedded
    more: dict[str, Any] = {"negative_prompt": negative_prompt or None}
    tokens = TOKENS
    if family == "pixart":
        more = {"negative_prompt": negative_prompt, "use_resolution_binning": False}
    elif family == "flux":
        noise = pack(noise)
        more = {}
    pixels = side * pipeline.vae_scale_factor
    latents = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=noise,
        output_type="latent",
        height=pixels,
        width=pixels,
        max_sequence_length=tokens,
        **more,
    ).images
    if family == "flux":
        latents = unpack(latents, side, side)
    return latents[0].numpy()
