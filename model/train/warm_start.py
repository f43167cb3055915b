"""Initial weights from a bundle or another run: tensors whose shape fits, and label tables by class name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ditserve.model.nets.conditioner import class_tensors, match_classes, resize_classes
from ditserve.model.spec.manifest import Factor
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadError


@dataclass(frozen=True, slots=True)
class WarmStart:
    """The result of a warm start: tensors taken over, names of the others, and known classes of all."""

    taken: int
    fresh: tuple[str, ...]
    known_classes: int
    classes: int

    def __str__(self) -> str:
        left = f", {len(self.fresh)} start afresh ({', '.join(self.fresh[:3])} …)" if self.fresh else ""
        return f"{self.taken} tensors taken over{left}; {self.known_classes} of {self.classes} classes known"


def warm_start(network: nn.Module, factors: Sequence[Factor], source: Path) -> WarmStart:
    """Load into `network` the tensors of the model at `source` that fit.

    The label tables of `network` belong to `factors`. A class starts as the class of the same name in the
    factor of the same name. A new class starts as the null class.

    Raises:
        LoadError: `source` is no model, or nothing of it fits.
        BundleError: a bundle that is damaged.
    """
    weights, known = _weights_for(source, factors)
    fitting = load_fitting(network, weights)
    if not fitting:
        raise LoadError(
            f"nothing of {source} fits this network: make model agree with its configuration, "
            "or leave out init"
        )
    fresh = tuple(sorted(network.state_dict().keys() - fitting))
    return WarmStart(len(fitting), fresh, known, sum(len(factor.classes) for factor in factors))


def load_fitting(network: nn.Module, weights: Mapping[str, Tensor]) -> frozenset[str]:
    """Load into `network` the weights whose names and shapes it has; return their names."""
    own = network.state_dict()
    fitting = {
        name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape
    }
    with torch.no_grad():
        network.load_state_dict(fitting, strict=False)
    return frozenset(fitting)


def _weights_for(source: Path, factors: Sequence[Factor]) -> tuple[dict[str, Tensor], int]:
    """Return the weights of the model at `source`, with tables for `factors`, and its known classes."""
    model = load_model(source)
    weights, config = dict(model.network.state_dict()), model.network.config
    tables: dict[str, Tensor] = {}
    known = 0
    old_numbers = {factor.name: number for number, factor in enumerate(model.manifest.factors)}
    for number, factor in enumerate(factors):
        if factor.name not in old_numbers:
            continue
        old = old_numbers[factor.name]
        keep = match_classes(model.manifest.factors[old].classes, factor.classes)
        known += sum(row is not None for row in keep)
        resized, _ = resize_classes(weights, config, old, keep)
        for name in class_tensors(old, resized):
            tables[name.replace(f".{old}.", f".{number}.")] = resized[name]
    of_classes = {name for number in old_numbers.values() for name in class_tensors(number, weights)}
    others = {name: tensor for name, tensor in weights.items() if name not in of_classes}
    return {**others, **tables}, known
