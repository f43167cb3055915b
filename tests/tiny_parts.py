"""Parts of tiny pipelines with random weights: tokenizers of a small vocabulary, text encoders, autoencoders.

Weights are drawn wider than they are initialised, so that conditions and noise levels make a difference.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("a", "red", "fox", "in", "the", "snow", "blue", "cat", "blurry", "photo", "of", "moon")


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


WORD = r"\n|\w+|[^\w\s]"
SPECIAL = ("<pad>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>")


def word_tokenizer(text: str, *, bos: bool, template: str | None = None) -> Any:
    """Return a tokenizer of a language model's kind, of a text's words and of letters, and pads with 0.

    `template` is that of a chat.
    """
    words = dict.fromkeys([*WORDS, *re.findall(WORD, text)])
    pieces = [*SPECIAL, *(word for word in words if len(word) > 1 or word not in LETTERS)]
    pieces += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>" if bos else None,
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=template,
    )


VOCABULARY = 320  # of the language models
LANGUAGE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 4,
}


def gemma() -> Any:
    return transformers.Gemma2Model(transformers.Gemma2Config(**LANGUAGE, query_pre_attn_scalar=12))


def qwen3() -> Any:
    return transformers.Qwen3Model(transformers.Qwen3Config(**LANGUAGE))


def qwen_vl() -> Any:
    text = {name: value for name, value in LANGUAGE.items() if name != "head_dim"}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10_000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={**vision, "fullatt_block_indexes": [0]},
        )
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


def deep_vae(channels: int) -> Any:
    """Return a DC-AE, whose latents cover 8 pixels on a side; those of the release cover 32."""
    levels = 4
    return diffusers.AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=4,
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
        scaling_factor=0.4,
    )


def video_vae(channels: int) -> Any:
    """Return the autoencoder of Qwen-Image, with statistics for each channel of a latent."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1 * k for k in range(channels)],
        latents_std=[1.0 + 0.2 * k for k in range(channels)],
    )


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """Return a module whose small parameters were drawn anew, so that no path is near zero."""
    for parameter in module.parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                inputs = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1]
                parameter.normal_(0.0, 1.2 / inputs**0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()
