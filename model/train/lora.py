"""A low-rank adapter in training: the network of a bundle stays as it is, and the terms beside it learn.

    python -m model.train --data pictures --set init=BUNDLE --set lora.rank=8

A term starts at zero, so that the run starts from the bundle's own pictures (Hu et al., arXiv:2106.09685).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ditserve.model.nets.factory import Network, network_of
from ditserve.model.nets.lora import adaptable_layers
from ditserve.model.spec.bundle import Bundle, write_atomic
from ditserve.model.train.base_model import LowRankConfig
from ditserve.model.train.loaded_model import load_bundle
from ditserve.model.weights.lora import BASE, PREFIXES, adapter_base

DOWN, UP = "lora_A", "lora_B"


class _Term(nn.Module):
    """The two factors of a term; `lora_B` starts at zero."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, h: Tensor) -> Tensor:
        output: Tensor = self.lora_B(self.lora_A(h))
        return output


class AdaptedNetwork(nn.Module):
    """The network of a bundle with a term beside each layer that `spec` names.

    Its parameters are those of the terms alone, named `<layer>.lora_A.weight` and `<layer>.lora_B.weight`:
    optimiser, averages and checkpoints hold nothing else.

    Raises:
        ValueError: no layer has such a name.
        LoadError: the bundle's weights cannot be read.
    """

    def __init__(self, bundle: Bundle, spec: LowRankConfig, device: str = "cpu") -> None:
        super().__init__()
        self.bundle, self.spec = bundle, spec
        base = load_bundle(bundle).network.to(device)
        # In a tuple, in which torch does not look for parameters.
        self._base = (base,)
        conditioner, backbone = adaptable_layers(base, base.config)
        layers = {**conditioner, **backbone}
        self.layers = {
            name: layer
            for name, layer in layers.items()
            if any(fnmatchcase(name, pattern) for pattern in spec.targets)
        }
        if not self.layers:
            known = ", ".join(sorted(layers)[:6])
            raise ValueError(f"lora.targets names no layer of {bundle.manifest.name}, such as {known}")
        for name, layer in self.layers.items():
            self._add(name, _Term(layer, spec.rank).to(device))
            layer.register_forward_hook(self._adding(name))
        base.train()

    @property
    def base(self) -> Network:
        """The network itself, whose layers add the terms."""
        return self._base[0]

    def forward(self, x: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        """Return the output (N, C_out, H, W), as the network does of these inputs, with the terms."""
        output: Tensor = self.base(x, timestep, *conditions)
        return output

    def embed(self, labels: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the condition embeddings of the network."""
        return self.base.embed(labels, text)

    @torch.no_grad()
    def merged(self, terms: Mapping[str, Tensor]) -> Network:
        """Return the network with these terms added to its weights, in evaluation mode."""
        weights = dict(self.base.state_dict())
        for name in self.layers:
            down, up = (terms[f"{name}.{part}.weight"].float() for part in (DOWN, UP))
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + self.spec.scale * (up @ down)
        return network_of(self.base.config, weights)

    def _add(self, name: str, term: nn.Module) -> None:
        """Register a term under the name of its layer."""
        *parents, last = name.split(".")
        parent: nn.Module = self
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, term)

    def _adding(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        term, scale = self.get_submodule(name), self.spec.scale

        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            changed: Tensor = output + scale * term(inputs[0])
            return changed

        return add


def write_adapter(target: Path, network: AdaptedNetwork, terms: Mapping[str, Tensor]) -> None:
    """Write an adapter in the layout of PEFT, for the folder `adapters` of its bundle.

    The scale of a term is part of its `lora_B`, so that every reader draws the same, whatever alpha it takes.

    Raises:
        OSError: it cannot be written.
    """
    scales = {DOWN: 1.0, UP: network.spec.scale}
    tensors = {
        f"{PREFIXES[0]}{name}": (tensor * scales[name.split(".")[-2]]).cpu().contiguous()
        for name, tensor in terms.items()
    }
    metadata = {"format": "pt", BASE: json.dumps(adapter_base(network.bundle))}
    write_atomic(target, serialise(tensors, metadata))
