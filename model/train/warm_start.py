"""Weights to start from: those of a bundle or of another run, as far as they fit; label tables by the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ditserve.model.nets.conditioner import match_classes, resize_classes
from ditserve.model.spec.bundle import Factor
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadError


@dataclass(frozen=True, slots=True)
class WarmStart:
    """What was taken over: tensors that fit, tensors left as they were, and classes known by name of all there are."""

    taken: int
    fresh: tuple[str, ...]
    known_classes: int
    classes: int

    def __str__(self) -> str:
        left = f", {len(self.fresh)} start afresh ({', '.join(self.fresh[:3])} …)" if self.fresh else ""
        return f"{self.taken} tensors taken over{left}; {self.known_classes} of {self.classes} classes known"


def warm_start(network: nn.Module, factors: Sequence[Factor], source: Path) -> WarmStart:
    """Load into `network`, whose label tables belong to `factors`, what fits of the model at `source`.

    A class starts as the one of its name, in the factor of its name; a new one as the null class, that is as not given.

    Raises:
        LoadError: `source` is no model, or nothing of it fits.
        BundleError: a bundle that is damaged.
    """
    weights, known = named_tables(source, factors)
    own = network.state_dict()
    fitting = {
        name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape
    }
    if not fitting:
        raise LoadError(
            f"nothing of {source} fits this network: make model agree with its configuration, or leave out init"
        )
    with torch.no_grad():
        network.load_state_dict(fitting, strict=False)
    fresh = tuple(sorted(own.keys() - fitting.keys()))
    return WarmStart(len(fitting), fresh, known, sum(len(factor.classes) for factor in factors))


def named_tables(source: Path, factors: Sequence[Factor]) -> tuple[dict[str, Tensor], int]:
    """The weights of the model at `source`, its label tables those of `factors`; and how many of their classes it knows."""
    opened = load_model(source)
    weights, config = dict(opened.network.state_dict()), opened.network.config
    tables: dict[str, Tensor] = {}
    known = 0
    theirs = {factor.name: place for place, factor in enumerate(opened.manifest.factors)}
    for place, factor in enumerate(factors):
        if factor.name not in theirs:
            continue
        old = theirs[factor.name]
        keep = match_classes(opened.manifest.factors[old].classes, factor.classes)
        known += sum(row is not None for row in keep)
        resized, _ = resize_classes(weights, config, old, keep)
        tables[table(place)] = resized[table(old)]
    others = {name: tensor for name, tensor in weights.items() if not name.startswith("y_embedder.tables.")}
    return {**others, **tables}, known


def table(place: int) -> str:
    return f"y_embedder.tables.{place}.weight"
