"""State dicts in the layout of the official DiT release, converted to ours and back.

The official names are our names, except for the label table, and for the position table, which we compute.
Weights that do not fit are refused with a list of what does not. Files are read in
`model.weights.imports`; diffusers' layout is in `model.weights.diffusers`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import make_network
from ditserve.model.spec.dit_config import SIZES, DiTConfig, mlp_ratio
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.network_config import NetworkConfig

Weights = dict[str, Tensor]

PATCHES = "x_embedder.proj.weight"
TABLE, OFFICIAL_TABLE = "y_embedder.tables.0.weight", "y_embedder.embedding_table.weight"
# The options that the official DiT has, beside its one label factor.
PLAIN_FIELDS = (
    *("image_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio"),
    *("learn_sigma", "frequency_shift", "mlp_norm_eps"),
)
_HEADS = {hidden: heads for _, hidden, heads in SIZES.values()}


class WeightsError(ModelError):
    """Weights that do not fit; the message lists what is missing, extra, misshaped or contradictory."""


def check_weights(weights: Mapping[str, Tensor], config: NetworkConfig) -> None:
    """Raise WeightsError unless the names and shapes of `weights` are exactly those of `config`.

    The message lists what is missing, what is extra, and every wrong shape.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in make_network(config).state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong_shapes = [
        f"{name} {actual[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    refuse(
        "the weights do not fit the configuration",
        missing=sorted(expected.keys() - actual.keys()),
        extra=sorted(actual.keys() - expected.keys()),
        wrong_shape=wrong_shapes,
    )


def from_official(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    extensions: Mapping[str, Any] | None = None,
) -> tuple[Weights, DiTConfig]:
    """Return weights and configuration from a state dict in the official layout.

    `extensions` are fields of the configuration that `fold_extensions` found. The shapes say everything
    except the number of heads, which is known for the published widths only, and the sides of the image in
    latent pixels, which are taken as equal unless given.

    Raises:
        WeightsError: names or shapes that are not a DiT's, an unknown number of heads or size, or trained
            positions.
    """
    state = dict(state)
    pos_embed = state.pop("pos_embed", None)
    weights = {TABLE if name == OFFICIAL_TABLE else name: tensor for name, tensor in state.items()}
    size = image_size or _square_size(weights, pos_embed)
    config = _infer_config(weights, size, num_heads, extensions or {})
    check_weights(weights, config)
    if pos_embed is not None:
        with torch.device("cpu"):
            ours = DiT(replace(config, depth=1)).pos_embed
        if pos_embed.numel() != ours.numel():
            raise WeightsError(
                f"pos_embed has {pos_embed.numel() // config.hidden_size} tokens, but image_size "
                f"{config.image_size} has {len(ours)}"
            )
        rounding = max(1e-4, torch.finfo(pos_embed.dtype).eps) if pos_embed.is_floating_point() else 0.0
        if not torch.allclose(pos_embed.reshape(ours.shape).float().cpu(), ours, atol=rounding):
            raise WeightsError(
                "pos_embed is not the 2-D sine-cosine table: trained positions cannot be imported"
            )
    return weights, config


def without_variance(weights: Weights, config: DiTConfig) -> tuple[Weights, DiTConfig]:
    """Return the weights of the same prediction without the second half of the output channels."""
    kept, rows = dict(weights), math.prod(config.patch)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        # Rows are laid out (P, P, C_out).
        by_channel = weights[name].unflatten(0, (rows, 2 * config.in_channels))
        kept[name] = by_channel[:, : config.in_channels].flatten(0, 1).contiguous()
    return kept, replace(config, learn_sigma=False)


def to_official(weights: Mapping[str, Tensor], config: DiTConfig) -> Weights:
    """Return our weights in the official layout, with the position table.

    Raises:
        WeightsError: the configuration uses an option that the official DiT lacks, or the weights do not fit
            it.
    """
    check_plain(config)
    if (config.frequency_shift, config.mlp_norm_eps) != (0, 1e-6):
        raise WeightsError(
            "these weights are for diffusers' function (k/127, eps 1e-5): "
            "the published layout has no sign for it"
        )
    check_weights(weights, config)
    out = {OFFICIAL_TABLE if name == TABLE else name: tensor for name, tensor in weights.items()}
    return {"pos_embed": DiT(replace(config, depth=1)).pos_embed[None], **out}


def _square_size(weights: Mapping[str, Tensor], pos_embed: Tensor | None) -> tuple[int, int] | None:
    """Return the size of a square image in latent pixels; None: no positions, or not those of a square."""
    tokens = 0 if pos_embed is None or pos_embed.ndim < 2 else pos_embed.shape[-2]
    side = math.isqrt(tokens)
    patch = weights[PATCHES].shape[-1] if PATCHES in weights and weights[PATCHES].ndim else 0
    return (side * patch, side * patch) if tokens and side**2 == tokens else None


def _infer_config(
    weights: Mapping[str, Tensor],
    size: tuple[int, int] | None,
    heads: int | None,
    extensions: Mapping[str, Any],
) -> DiTConfig:
    needed = (PATCHES, "final_layer.linear.weight", TABLE, "blocks.0.mlp.fc1.weight")
    refuse("the weights are not a published DiT's", missing=[name for name in needed if name not in weights])
    patch_weight, out_weight, table, fc1 = (weights[name] for name in needed)
    if patch_weight.ndim != 4 or any(tensor.ndim != 2 for tensor in (out_weight, table, fc1)):
        raise WeightsError(
            "the weights are not a published DiT's: its patches, its class table or a linear map have other "
            "axes"
        )
    hidden, channels, patch = patch_weight.shape[0], patch_weight.shape[1], patch_weight.shape[-1]
    if size is None:
        raise WeightsError("the image size cannot be read off the positions, so it must be given: --size")
    blocks = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    swiglu = bool(extensions.get("swiglu"))
    told = {**extensions, "num_heads": _heads(hidden, heads, extensions.get("num_heads"))}
    try:
        return DiTConfig(
            image_size=size,
            patch_size=patch,
            in_channels=channels,
            hidden_size=hidden,
            depth=max(blocks) + 1,
            mlp_ratio=mlp_ratio(fc1.shape[0] // (2 if swiglu else 1), hidden, swiglu=swiglu),
            classes=(table.shape[0] - 1,),
            learn_sigma=out_weight.shape[0] == 2 * channels * patch * patch,
            **told,
        )
    except ValueError as error:
        raise WeightsError(f"the weights' shapes make no DiT: {error}") from None


def _heads(hidden: int, given: int | None, told: int | None) -> int:
    """Return the number of heads: as the weights tell, as published for the width, or as the user gives."""
    known = told or _HEADS.get(hidden)
    if given and known and given != known:
        raise WeightsError(f"this DiT of width {hidden} has {known} heads, not {given}: leave out --heads")
    if not (given or known):
        raise WeightsError(
            f"hidden size {hidden} is no published one, so its number of heads must be given: --heads"
        )
    return given or known or 0


def check_plain(config: DiTConfig) -> None:
    """Raise WeightsError unless the configuration uses only options that the official DiT has."""
    kept = {field: getattr(config, field) for field in PLAIN_FIELDS}
    plain = DiTConfig(**kept, classes=config.classes[:1] or (1,))
    extra = [
        field.name
        for field in fields(plain)
        if field.name != "blocks" and getattr(config, field.name) != getattr(plain, field.name)
    ]
    extra += [] if plain.plan == config.plan else ["blocks"]
    if extra:
        raise WeightsError(
            f"only a plain adaLN-Zero DiT with one label factor can be exported: undo {', '.join(extra)}"
        )


def refuse(reason: str, **lists: Sequence[str]) -> None:
    """Raise WeightsError with `reason` and up to eight names of each list, if any list has names."""
    parts = [
        f"{kind.replace('_', ' ')} ({len(names)}): {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        for kind, names in lists.items()
        if names
    ]
    if parts:
        raise WeightsError(f"{reason}; {'; '.join(parts)}")
