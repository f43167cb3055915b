"""Tiny pipelines of diffusers with random weights, of its own classes, as folders on disk."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
import transformers

from ditserve.model.nets.pipelines.adapters import pack, unpack
from ditserve.model.spec.pipeline_bundle import write_pipeline_bundle
from ditserve.model.spec.pipeline_config import FAMILIES
from ditserve.model.spec.pipeline_folder import read_pipeline
from tests.tiny_parts import (
    clip,
    clip_tokenizer,
    deep_vae,
    gemma,
    lively,
    qwen3,
    qwen_vl,
    t5,
    t5_tokenizer,
    vae,
    video_vae,
    word_tokenizer,
)


def dit(scratch: Path) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    )
    lively(transformer)
    first, *others = transformer.transformer_blocks
    for block in others:
        # The weights of the release have one embedder, of which every block has a copy.
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return diffusers.DiTPipeline(
        transformer=transformer,
        vae=lively(vae(4)),
        scheduler=diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False),
        id2label={k: f"creature {k}, Animal {k}" for k in range(1000)},
    )


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


def sana(scratch: Path) -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=8,
        timestep_scale=0.5,
    )
    call = inspect.signature(diffusers.SanaPipeline.__call__)
    instruction = "\n".join(call.parameters["complex_human_instruction"].default)
    return diffusers.SanaPipeline(
        tokenizer=word_tokenizer(instruction.lower(), bos=True),
        text_encoder=lively(gemma()),
        vae=lively(deep_vae(4)),
        transformer=lively(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
    )


def lumina2(scratch: Path) -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 16, 16),
        cap_feat_dim=24,
    )
    return diffusers.Lumina2Pipeline(
        transformer=lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=lively(vae(4, shift=0.1)),
        text_encoder=lively(gemma()),
        tokenizer=word_tokenizer(FAMILIES["lumina2"].head, bos=True),
    )


def auraflow(scratch: Path) -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=4,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pos_embed_max_size=36,
    )
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=64, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0
        )
    )
    return diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=lively(encoder),
        vae=lively(vae(4)),
        transformer=lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def chroma(scratch: Path) -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=lively(vae(4, shift=0.1)),
        text_encoder=lively(t5(24)),
        tokenizer=t5_tokenizer(),
        transformer=lively(transformer),
    )


def qwen_image(scratch: Path) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, base_shift=0.5, max_shift=0.9
        ),
        vae=lively(video_vae(4)),
        text_encoder=lively(qwen_vl()),
        tokenizer=None,
        transformer=lively(transformer),
    )
    pipeline.register_modules(tokenizer=word_tokenizer(pipeline.prompt_template_encode, bos=False))
    return pipeline


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def z_image(scratch: Path) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 4, 4],
        axes_lens=[128, 16, 16],
        # By 1000, the pipeline's rounding of 1 - sigma to float32 alone would move latents by 1e-4.
        t_scale=200.0,
    )
    family = FAMILIES["z_image"]
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=lively(vae(4, shift=0.1)),
        text_encoder=lively(qwen3()),
        tokenizer=word_tokenizer(family.head + family.tail, bos=False, template=CHAT),
        transformer=lively(transformer),
    )


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "lumina2": lumina2,
    "auraflow": auraflow,
    "chroma": chroma,
    "qwen_image": qwen_image,
    "z_image": z_image,
}
# The most tokens of a prompt in the tests, and those of the pipeline's own words that count.
TOKENS = {"lumina2": 12 + 31, "qwen_image": 12 + 5, "z_image": 12 + 8}


def save_pipeline(family: str, folder: Path) -> Any:
    """Write the tiny pipeline of a family to `folder`, and return it."""
    torch.manual_seed(0)
    pipeline = BUILDERS[family](folder.parent / f"{folder.name}-scratch")
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    if family == "dit":
        # As the published folder, which diffusers does not write again.
        names: dict[int, str] = {}
        for name, k in pipeline.labels.items():
            names[k] = f"{names[k]}, {name}" if k in names else name
        index = json.loads((folder / "model_index.json").read_text())
        index["id2label"] = {str(k): names[k] for k in sorted(names)}
        (folder / "model_index.json").write_text(json.dumps(index))
    return pipeline


def tokens(family: str) -> int:
    """Return the most tokens of a prompt, as `read_pipeline` takes it."""
    return TOKENS.get(family, 12)


def noise_of(seed: int, channels: int, side: int) -> torch.Tensor:
    """Return the noise (1, C, side, side) that the service draws of a seed."""
    generator = np.random.Generator(np.random.Philox(seed))
    return torch.from_numpy(generator.standard_normal((1, channels, side, side), np.float32))


def _with_bool_mask(text: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return text, mask.bool()


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
    if family == "dit":
        return _dit_latents(pipeline, prompt, noise, steps, guidance_scale)
    scale = guidance_scale if guidance_embedded is None else guidance_embedded
    more: dict[str, Any] = {"guidance_scale": scale}
    if family == "qwen_image":
        more = {"true_cfg_scale": scale}
    if family != "flux":
        more["negative_prompt"] = negative_prompt
    if family in ("pixart", "sana"):
        more["use_resolution_binning"] = False
    if family == "chroma":
        # It hands over numbers, which the attention adds instead of leaving the padding out.
        encode = type(pipeline)._get_t5_prompt_embeds
        pipeline._get_t5_prompt_embeds = lambda *given, **named: _with_bool_mask(
            *encode(pipeline, *given, **named)
        )
    packed = FAMILIES[family].packs == 2
    pixels = side * pipeline.vae_scale_factor
    latents = pipeline(
        prompt,
        num_inference_steps=steps,
        latents=pack(noise) if packed else noise,
        output_type="latent",
        height=pixels,
        width=pixels,
        max_sequence_length=tokens(family) + (family == "sana"),
        **more,
    ).images
    if packed:
        latents = unpack(latents, side, side)
    return latents[0].numpy()


def expected_pictures(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return the pictures (N, 3, H, W) in [-1, 1] of latents, by the formula of the pipelines."""
    vae, config = pipeline.vae, pipeline.vae.config
    with torch.no_grad():
        if config.get("latents_mean"):
            mean, deviation = (torch.tensor(config[name]) for name in ("latents_mean", "latents_std"))
            frames = latents[:, :, None] * deviation.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)
            pictures: torch.Tensor = vae.decode(frames).sample[:, :, 0]
            return pictures
        pictures = vae.decode(latents / config.scaling_factor + (config.get("shift_factor") or 0.0)).sample
        return pictures


def _dit_latents(pipeline: Any, name: str, noise: torch.Tensor, steps: int, scale: float | None) -> Any:
    """Return the latent of a class. The pipeline takes no noise and gives no latents, so both are patched."""
    decoded: list[torch.Tensor] = []

    def decode(latents: torch.Tensor) -> Any:
        decoded.append(latents)
        return SimpleNamespace(sample=latents)

    with (
        patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: noise),
        patch.object(pipeline.vae, "decode", decode),
    ):
        labels = [pipeline.labels[name]]
        pipeline(class_labels=labels, guidance_scale=scale, num_inference_steps=steps, output_type="pt")
    return (decoded[0] * pipeline.vae.config.scaling_factor)[0].numpy()


def main(root: Path) -> None:
    """Write the tiny pipeline of every family, and its bundle, to a new folder."""
    for family in BUILDERS:
        save_pipeline(family, root / "pipelines" / family)
        if family != "dit":
            found = read_pipeline(
                root / "pipelines" / family, name=family, licence="x", size=(8, 8), tokens=tokens(family)
            )
            write_pipeline_bundle(found, root / family)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
