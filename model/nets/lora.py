"""Low-rank adapters (LoRA): terms that are added to the linear layers of a network, row by row.

    bank = AdapterBank(layers, {"pixel-art": {"blocks.0.attn.qkv": LowRank(down, up)}})
    with bank.applied([(("pixel-art", 0.8),), ()]):
        output = network.backbone(x, state)         # row 0 is drawn with it, row 1 without

A layer W then gives W·h + Σ scale · up·(down·h) in each row, the sum being over the adapters of that row
(Hu et al., arXiv:2106.09685, §4.1). Rows with different adapters share the pass: the factors of all adapters
of a layer lie in one slab, from which those of each row are gathered. Rows without one are not touched, and
outside of `applied` the network is as if there were no adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditserve.model.spec.network_config import BundleConfig

# The adapters of a row by name, with their scales.
RowAdapters = Sequence[tuple[str, float]]
Layers = Mapping[str, nn.Linear]


class LowRank(NamedTuple):
    """The two factors of a term: down (r, in) and up (out, r). What scales the term is part of `up`."""

    down: Tensor
    up: Tensor


class AdapterBank:
    """The adapters of a network, and the layers of it, by their names, that they may change.

    The factors are held in the precision of their layer. A layer's slab has room for the largest rank there.
    """

    def __init__(self, layers: Layers, adapters: Mapping[str, Mapping[str, LowRank]]) -> None:
        self._layers, self._device = layers, next((layer.weight.device for layer in layers.values()), None)
        self._numbers = {name: number for number, name in enumerate(adapters, start=1)}
        self._reached = {name: frozenset(terms) for name, terms in adapters.items()}
        self._slabs = {
            layer: _Slab.of(layers[layer].weight, [terms.get(layer) for terms in adapters.values()])
            for layer in sorted(set().union(*self._reached.values()))
        }

    def reached(self, name: str) -> frozenset[str]:
        """Return the layers that an adapter changes."""
        return self._reached[name]

    @contextmanager
    def applied(self, rows: Sequence[RowAdapters]) -> Iterator[None]:
        """Draw each row of the passes within with its adapters. Raises `KeyError` for an unknown one."""
        adapted = [index for index, uses in enumerate(rows) if uses]
        if not adapted:
            yield
            return
        most = max(len(rows[index]) for index in adapted)
        numbers = torch.zeros(len(adapted), most, dtype=torch.int64)
        scales = torch.zeros(len(adapted), most)
        for row, index in enumerate(adapted):
            for column, (name, scale) in enumerate(rows[index]):
                numbers[row, column], scales[row, column] = self._numbers[name], scale
        places = None if len(adapted) == len(rows) else torch.tensor(adapted, device=self._device)
        use = _Use(len(rows), places, numbers.to(self._device), scales.to(self._device))
        changed = set().union(*(self._reached[name] for index in adapted for name, _ in rows[index]))
        with ExitStack() as hooks:
            for layer in changed:
                hook = self._layers[layer].register_forward_hook(_adding(self._slabs[layer], use, layer))
                hooks.callback(hook.remove)
            yield


class _Use(NamedTuple):
    """The adapters of a pass of so many rows.

    `places` (n,) are the rows that have any, None for all; `numbers` and `scales` (n, k) are theirs, of which
    number 0 is no adapter.
    """

    rows: int
    places: Tensor | None
    numbers: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Slab:
    """The factors of all adapters of one layer: down (s, r, in) and up (s, out, r), zeros in slot 0.

    `slots` has the slot of each adapter by its number: 0 for those that do not change the layer.
    """

    down: Tensor
    up: Tensor
    slots: Tensor

    @classmethod
    def of(cls, weight: Tensor, terms: Sequence[LowRank | None]) -> _Slab:
        there = [term for term in terms if term is not None]
        outputs, inputs = weight.shape
        rank = max(len(term.down) for term in there)
        down = weight.new_zeros(1 + len(there), rank, inputs)
        up = weight.new_zeros(1 + len(there), outputs, rank)
        for slot, factors in enumerate(there, start=1):
            down[slot, : len(factors.down)], up[slot, :, : len(factors.down)] = factors
        slots, used = [0], 0
        for term in terms:
            used += term is not None
            slots.append(used if term is not None else 0)
        return cls(down, up, torch.tensor(slots, device=weight.device))

    def added(self, h: Tensor, use: _Use) -> Tensor:
        """Return what the adapters add, (n, T, out), for inputs h (n, T, in) of the rows that have any."""
        slots = self.slots[use.numbers]  # (n, k)
        down = self.down[slots].flatten(1, 2)  # (n, k, r, in) → (n, k·r, in)
        scaled = self.up[slots] * use.scales[:, :, None, None].to(self.up.dtype)  # (n, k, out, r)
        up = scaled.transpose(2, 3).flatten(1, 2)  # (n, k·r, out)
        return h @ down.transpose(1, 2) @ up


def _adding(slab: _Slab, use: _Use, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        h: Tensor = inputs[0]
        if len(h) != use.rows:
            raise ValueError(f"{name} is given {len(h)} rows where the pass has {use.rows}")
        h = h if use.places is None else h[use.places]
        added = slab.added(h.reshape(len(h), -1, h.shape[-1]), use).reshape(*h.shape[:-1], -1)
        # The output is the layer's own, and no gradient is taken here.
        return output.add_(added) if use.places is None else output.index_add_(0, use.places, added)

    return add


def adaptable_layers(network: Any, config: BundleConfig, rows: int = 3) -> tuple[Layers, Layers]:
    """Return the linear layers that can be adapted: those of the conditioner, and those of the backbone.

    They are found by a pass of a few rows.
    """
    device = next(network.parameters()).device
    labels = torch.zeros((rows, len(config.classes)), dtype=torch.int64, device=device)
    text = torch.zeros(rows, config.text_width, device=device) if config.text_width else None
    x = torch.zeros(rows, config.in_channels, *config.image_size, device=device)
    state: list[Tensor] = []

    def condition() -> None:
        state.extend(network.modulate(torch.ones(rows, device=device), network.embed(labels, text)))

    with torch.inference_mode():
        conditioner = row_layers(network, condition, rows)
        return conditioner, row_layers(network, lambda: network.backbone(x, state), rows)


def row_layers(network: nn.Module, run: Callable[[], object], rows: int) -> dict[str, nn.Linear]:
    """Return the linear layers that `run`, a pass of so many rows, calls with the rows as they are.

    A network may also use the weights of a layer without calling it, or call it with the tokens of all rows
    in one list.
    """
    seen: dict[str, bool] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, inputs: Any) -> None:
            seen[name] = seen.get(name, True) and bool(inputs) and len(inputs[0]) == rows

        return note

    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(watch(name)).remove)
        run()
    return {name: layers[name] for name, by_rows in seen.items() if by_rows}
