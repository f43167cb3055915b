"""State dicts in diffusers' layout, converted to ours and back.

diffusers' DiT has q, k and v apart, and copies of the timestep and label embedders in every block. It also
computes another function than the official DiT: its timestep frequencies have k/127 instead of k/128, and the
epsilon before the MLP is 1e-5 instead of 1e-6. An argument therefore says which function imported weights
were trained for. Files are read and written in `model.weights.files`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.weights.official import TABLE, Weights, WeightsError, check_plain, check_weights, refuse

Function = Literal["published", "diffusers"]
# The classes of diffusers that a DiT's configuration names, the newer first.
CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")

# Our name → diffusers' name, outside the blocks.
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# The same in block i: blocks.i.* → transformer_blocks.i.*
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# Our one tensor → the copy of it in every block of diffusers.
_COPIED = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    TABLE: "norm1.emb.class_embedder.embedding_table.weight",
}


def from_diffusers(
    state: Mapping[str, Tensor], fields: Mapping[str, Any], *, function: Function
) -> tuple[Weights, DiTConfig]:
    """Return weights and configuration from a state dict of diffusers and the fields of its config.json.

    `function` is "published" for weights that were converted from the official release, which diffusers runs
    slightly wrong, and "diffusers" for weights that were trained with diffusers: the result then computes
    what diffusers computes.

    Raises:
        WeightsError: not a DiT, an option we lack, copies that disagree, or names and shapes that do not fit.
    """
    config = _config_from_fields(fields, function)
    rest = {
        name: tensor for name, tensor in state.items() if name not in ("pos_embed", "pos_embed.pos_embed")
    }
    weights: Weights = {}
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in rest:
            missing.append(name)
        return rest.pop(name, torch.empty(0))

    for ours, theirs in _COPIED.items():
        weights[ours] = _single_copy(
            [take(f"transformer_blocks.{k}.{theirs}") for k in range(config.depth)], theirs
        )
    for part in ("weight", "bias"):
        for ours, theirs in _OUTER.items():
            weights[f"{ours}.{part}"] = take(f"{theirs}.{part}")
        for k in range(config.depth):
            for ours, theirs in _BLOCK.items():
                weights[f"blocks.{k}.{ours}.{part}"] = take(f"transformer_blocks.{k}.{theirs}.{part}")
            qkv = [take(f"transformer_blocks.{k}.attn1.to_{letter}.{part}") for letter in "qkv"]
            weights[f"blocks.{k}.attn.qkv.{part}"] = torch.cat(qkv)
    refuse("the weights are not those of diffusers' DiT", missing=missing, extra=sorted(rest))
    check_weights(weights, config)
    return weights, config


def to_diffusers(weights: Mapping[str, Tensor], config: DiTConfig) -> tuple[Weights, dict[str, Any]]:
    """Return our weights in diffusers' layout, and the fields of its config.json.

    diffusers has no option for the official timestep frequencies: unless `config.frequency_shift` is 1, it
    computes another function of these weights.

    Raises:
        WeightsError: the configuration uses an option that diffusers lacks, or the weights do not fit it.
    """
    check_plain(config)
    if config.image_size[0] != config.image_size[1] or config.mlp_ratio != 4:
        raise WeightsError(
            "diffusers' DiT is square with an mlp_ratio of 4: these weights cannot be exported to it"
        )
    check_weights(weights, config)
    out: Weights = {}
    for part in ("weight", "bias"):
        for ours, theirs in _OUTER.items():
            out[f"{theirs}.{part}"] = weights[f"{ours}.{part}"]
        for k in range(config.depth):
            for ours, theirs in _BLOCK.items():
                out[f"transformer_blocks.{k}.{theirs}.{part}"] = weights[f"blocks.{k}.{ours}.{part}"]
            for letter, tensor in zip("qkv", weights[f"blocks.{k}.attn.qkv.{part}"].chunk(3), strict=True):
                out[f"transformer_blocks.{k}.attn1.to_{letter}.{part}"] = tensor.clone()
    for k in range(config.depth):
        for ours, theirs in _COPIED.items():
            out[f"transformer_blocks.{k}.{theirs}"] = weights[ours].clone()
    return out, {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.head_size,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.mlp_norm_eps,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.classes[0],
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.image_size[0],
    }


def _config_from_fields(fields: Mapping[str, Any], function: Function) -> DiTConfig:
    """Return the configuration of config.json; a field that is left out has the default of diffusers 0.3x."""
    needed = {
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
    }
    wrong = [f"{name} {fields[name]!r}" for name, value in needed.items() if fields.get(name, value) != value]
    if wrong:
        raise WeightsError(f"the configuration is not a DiT's: {', '.join(wrong)}")
    as_diffusers = function == "diffusers"
    try:
        heads, size = int(fields.get("num_attention_heads", 16)), int(fields.get("sample_size", 32))
        channels = int(fields.get("in_channels", 4))
        return DiTConfig(
            image_size=(size, size),
            patch_size=int(fields.get("patch_size", 2)),
            in_channels=channels,
            hidden_size=heads * int(fields.get("attention_head_dim", 72)),
            depth=int(fields.get("num_layers", 28)),
            num_heads=heads,
            classes=(int(fields.get("num_embeds_ada_norm", 1000)),),
            learn_sigma=(fields.get("out_channels") or channels) == 2 * channels,
            frequency_shift=1 if as_diffusers else 0,
            mlp_norm_eps=float(fields.get("norm_eps", 1e-5)) if as_diffusers else 1e-6,
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the configuration makes no DiT: {error}") from None


def _single_copy(copies: Sequence[Tensor], name: str) -> Tensor:
    different = [k for k, copy in enumerate(copies) if not torch.equal(copy, copies[0])]
    if different:
        raise WeightsError(
            f"the copies of {name} disagree: "
            f"block {different[0]} differs from block 0, so no one embedder fits"
        )
    return copies[0]
