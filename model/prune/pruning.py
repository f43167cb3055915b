"""Removal of the least important heads and MLP channels; every block loses as many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ditserve.model.nets.dit import DiT
from ditserve.model.prune.importance import Importance, group_counts
from ditserve.model.spec.dit_config import SWIGLU_MULTIPLE, DiTConfig, mlp_ratio
from ditserve.model.spec.errors import ModelError
from ditserve.model.train.loaded_model import build


class PruneError(ModelError):
    """A model that cannot be pruned so; the message is one sentence."""


def pruned_config(dit: DiT, heads: float, mlp: float, tokens: float = 0.0) -> DiTConfig:
    """Return the configuration without the shares `heads` and `mlp`, in 0 … 1, of every block's groups.

    The share `tokens` of the tokens is merged into others.

    Raises:
        PruneError: a share removes everything, or rounds to nothing though it is not 0; or the network's
            heads or channels are not alike.
    """
    config = dit.config
    whole = {f"attention {kind.name}" for kind in config.attention_plan if heads and not kind.heads_are_alike}
    whole |= {"conv_mlp"} if mlp and config.conv_mlp else set()
    if whole:
        raise PruneError(f"{whole.pop()} cannot be pruned: its heads or channels are not alike")
    if config.experts:
        raise PruneError("pruning removes channels of one MLP for all tokens, and this model has experts")
    counts = group_counts(dit)
    kept_heads = _kept("heads", counts["blocks.0.attn.proj"], heads, 1)
    multiple = SWIGLU_MULTIPLE if config.swiglu else 1
    channels = _kept("mlp", counts["blocks.0.mlp.fc2"], mlp, multiple)
    width = kept_heads * config.head_size
    changes: dict[str, Any] = {}
    if kept_heads != config.num_heads:
        changes |= {
            "num_heads": kept_heads,
            "attention_width": None if width == config.hidden_size else width,
        }
    if channels != counts["blocks.0.mlp.fc2"]:
        changes["mlp_ratio"] = mlp_ratio(channels, config.hidden_size, swiglu=config.swiglu)
    try:
        return replace(config, **changes, merge_tokens=tokens or config.merge_tokens)
    except ValueError as error:
        raise PruneError(f"--tokens {tokens:g}: {error}") from None


def _kept(what: str, count: int, share: float, multiple: int) -> int:
    """Return how many of `count` remain without `share`, to a multiple: 64 channels without 0.25 are 48."""
    if not 0 <= share < 1:
        raise PruneError(f"--{what} is the share to take away, from 0 up to but not 1: not {share:g}")
    kept = round((count - share * count) / multiple) * multiple
    if share and not 0 < kept < count:
        least = multiple / count
        raise PruneError(
            f"--{what} {share:g} of {count} takes away {count - kept} and leaves {kept}: "
            f"choose between {least:.2g} and {1 - least:.2g}"
        )
    return kept if share else count


def prune(dit: DiT, importances: Importance, config: DiTConfig) -> DiT:
    """Reduce `dit` to `config`: every block keeps its most important heads and channels, in their order."""
    weights = dict(dit.state_dict())
    channels = mlp_channels(config)
    for name, groups in group_counts(dit).items():
        is_mlp = name.endswith("mlp.fc2")
        count, group_size = (channels, 1) if is_mlp else (config.num_heads, dit.config.head_size)
        keep = importances[name].topk(count).indices.sort().values
        for linear, dim, parts in _linear_maps(name, dit):
            for leaf in ("weight", "bias") if dim == 0 else ("weight",):
                full = weights[f"{linear}.{leaf}"]
                groups_kept = full.unflatten(dim, (parts, groups, group_size)).index_select(dim + 1, keep)
                weights[f"{linear}.{leaf}"] = groups_kept.flatten(dim, dim + 2)
    return build(config, weights, Path("pruned"))


def mlp_channels(config: DiTConfig) -> int:
    """Return the number of MLP channels of every block."""
    with torch.device("meta"):
        return group_counts(
            DiT(replace(config, depth=1, blocks=config.plan[:1], attention=config.attention[:1], levels=(0,)))
        )["blocks.0.mlp.fc2"]


def _linear_maps(name: str, dit: DiT) -> Iterator[tuple[str, int, int]]:
    """Yield (name, dimension, stacked matrices) of the linear maps that make or use the groups of `name`."""
    block, branch, _ = name.rsplit(".", 2)
    yield name, 1, 1
    if branch == "attn":
        yield f"{block}.attn.qkv", 0, 3
    elif branch == "cross":
        yield f"{block}.cross.q", 0, 1
        yield f"{block}.cross.kv", 0, 2
    else:
        yield f"{block}.mlp.fc1", 0, 2 if dit.config.swiglu else 1
