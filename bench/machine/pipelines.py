"""A pipeline of diffusers with the transformer of Stable Diffusion 3 medium and random weights, as a folder.

The weights are written shard by shard, so that they are never held together. The other parts are small: text
encoders of one layer, and a narrow autoencoder with the 16 channels of the real one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

# Of stabilityai/stable-diffusion-3-medium, transformer/config.json.
TRANSFORMER: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
SHARD_BYTES = 400_000_000
SPREAD = 0.02
WEIGHTS = "diffusion_pytorch_model"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_sd3(folder: Path, *, layers: int = 24, dtype: torch.dtype = torch.float16) -> int:
    """Write the pipeline to a new folder, with so many layers; return the bytes of the transformer."""
    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = diffusers.SD3Transformer2DModel(**{**TRANSFORMER, "num_layers": layers})
    inner = folder / "transformer"
    inner.mkdir(parents=True)
    transformer.save_config(inner)
    shards = {name: number for number, names in enumerate(_shards(transformer, dtype)) for name in names}
    index: dict[str, str] = {}
    for number in range(max(shards.values()) + 1):
        file = f"{WEIGHTS}-{number:05}.safetensors"
        names = [name for name, shard in shards.items() if shard == number]
        save_file({name: _random(transformer.state_dict()[name], dtype) for name in names}, inner / file)
        index |= dict.fromkeys(names, file)
    listed = {"metadata": {}, "weight_map": index}
    (inner / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(listed))
    _write_other_parts(folder)
    return sum(file.stat().st_size for file in inner.glob("*.safetensors"))


def _shards(transformer: Any, dtype: torch.dtype) -> Iterator[list[str]]:
    """Yield the names of the tensors of each shard."""
    names, size = list[str](), 0
    for name, tensor in transformer.state_dict().items():
        names.append(name)
        size += tensor.numel() * dtype.itemsize
        if size >= SHARD_BYTES:
            yield names
            names, size = [], 0
    yield names


def _random(shape: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape.shape).mul_(SPREAD).to(dtype)


def _write_other_parts(folder: Path) -> None:
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None]}
    for suffix, width in (("", 768), ("_2", 1280)):
        _clip(width).half().save_pretrained(folder / f"text_encoder{suffix}")
        _write_tokenizer(folder / f"tokenizer{suffix}")
        index[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection"]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    decoder = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    decoder.half().save_pretrained(folder / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index |= {
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer_3": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def _clip(width: int) -> Any:
    """Return a text encoder of one layer, of the width of CLIP's of SD3."""
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=2 * len(LETTERS) + 2,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
            projection_dim=width,
            bos_token_id=2 * len(LETTERS),
            eos_token_id=2 * len(LETTERS) + 1,
        )
    )


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single letters."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({piece: k for k, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(
        folder, local_files_only=True, model_max_length=77
    ).save_pretrained(folder)
