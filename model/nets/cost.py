"""The cost of a network: parameters, multiply-adds and activation memory of one row.

Parameters include the position table, as the paper counts them. Multiply-adds (MACs) are counted from the
operations that one row runs; FLOPs are twice that, and the paper's "Gflops" are multiply-adds. Activation
memory is that of one fp32 row: in inference the largest amount alive at once, in training what is kept for
the backward pass. The network runs on torch's meta device, so nothing is computed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ditserve.model.nets.experts import ExpertMlp
from ditserve.model.nets.factory import Network, make_network
from ditserve.model.nets.layers import Attention, CrossAttention
from ditserve.model.spec.network_kinds import NetworkConfig
from ditserve.model.spec.sizes import Size

# The names of the modules that attend, and the operations of the linear layers in them.
ATTENTION = frozenset({"attn", "cross", "attention"})
LINEAR = frozenset({"aten.mm", "aten.addmm"})

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # x, timestep, labels, text


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one row of a forward pass; bytes are those of fp32 activations.

    `attention_macs` are the products of queries, keys and values that the kind of attention forms, and
    `convolution_macs` those of convolutions, the patch embedding included. `active_parameters` are those that
    act on one token, of its experts `top_k`. `tokens` is the longest sequence that enters an attention; 0:
    there is none.
    """

    parameters: int
    active_parameters: int
    tokens: int
    conditioner_macs: int
    backbone_macs: int
    attention_macs: int
    convolution_macs: int
    inference_bytes: int
    training_bytes: int

    @property
    def macs(self) -> int:
        return self.conditioner_macs + self.backbone_macs

    @property
    def linear_macs(self) -> int:
        """The multiply-adds of linear layers: all that are neither attention's nor of convolutions."""
        return self.macs - self.attention_macs - self.convolution_macs

    @property
    def flops(self) -> int:
        return 2 * self.macs


class _LiveBytes(TorchDispatchMode):
    """A counter of the bytes of live tensors, and of their peak; the storages in `given` are not counted."""

    def __init__(self, given: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = set(given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True, slots=True)
class PartCost:
    """The cost of a part of a network for one row: its multiply-adds, and the shape of its output, fp32."""

    name: str
    macs: int
    shape: tuple[int, ...]

    @property
    def output_bytes(self) -> int:
        return 4 * math.prod(self.shape)


def part_costs(config: NetworkConfig, size: Size | None = None) -> list[PartCost]:
    """Return the cost of every block and every other part of the backbone, in the order that they run.

    Raises:
        ValueError: a size that the network cannot take.
    """
    parts: list[PartCost] = []
    with torch.device("meta"), torch.no_grad():
        network = make_network(config)
        x, t, labels, text = _example(config, size or config.image_size)
        state = network.modulate(t, network.embed(labels, text))
        counter = FlopCounterMode(display=False)

        def measured(name: str, module: nn.Module) -> None:
            before = [0]
            module.register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops()))
            module.register_forward_hook(
                lambda module, inputs, out: parts.append(
                    PartCost(name, (counter.get_total_flops() - before[-1]) // 2, tuple(out.shape[1:]))
                )
            )

        for name, module in network.named_children():
            pieces = module.named_children() if name == "blocks" else [("", module)]
            for number, piece in pieces:
                measured(f"{name}.{number}" if number else name, piece)
        with counter:
            network.backbone(x, state)
    return parts


def cost(config: NetworkConfig, size: Size | None = None) -> Cost:
    """Return what a network costs per row at `size`, (H, W) or (F, H, W), the trained one unless given.

    Raises:
        ValueError: a size that the network cannot take.
    """
    with torch.device("meta"):
        network = make_network(config)
        inputs = _example(config, size or config.image_size)
        tokens, remove = _record_tokens(network)
        conditioner, backbone, attention, convolution = _macs_by_part(network, inputs)
        remove()
        given = {p.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers())}
        with _LiveBytes(given) as live, torch.no_grad():
            network(*inputs)
        training = _saved_bytes(network, inputs, given)
    positions = getattr(network, "pos_embed", torch.empty(0)).numel()
    parameters = sum(p.numel() for p in network.parameters()) + positions
    return Cost(
        parameters=parameters,
        active_parameters=parameters - sum(map(_idle_parameters, network.modules())),
        tokens=max(tokens, default=0),
        conditioner_macs=conditioner,
        backbone_macs=backbone,
        attention_macs=attention,
        convolution_macs=convolution,
        inference_bytes=live.peak,
        training_bytes=training,
    )


def _idle_parameters(module: nn.Module) -> int:
    """Return the parameters of the experts that a token does not take, at a mean over the tokens."""
    if not isinstance(module, ExpertMlp):
        return 0
    experts = sum(p.numel() for layer in (module.fc1, module.fc2) for p in layer.parameters())
    return experts * (module.experts - module.top_k) // module.experts


def macs(network: Network, inputs: Inputs) -> tuple[int, int]:
    """Return the multiply-adds of the conditioner and the backbone for `inputs`, also on the meta device."""
    conditioner, backbone, *_ = _macs_by_part(network, inputs)
    return conditioner, backbone


def _macs_by_part(network: Network, inputs: Inputs) -> tuple[int, int, int, int]:
    """Return the multiply-adds of conditioner, backbone, and in both those of attention and convolutions."""
    x, t, labels, text = inputs
    with FlopCounterMode(display=False) as conditioner, torch.no_grad():
        state = network.modulate(t, network.embed(labels, text))
    with FlopCounterMode(display=False) as backbone, torch.no_grad():
        network.backbone(x, state)
    attention = convolution = 0
    for counter in (conditioner, backbone):
        for module, operations in counter.get_flop_counts().items():
            for operation, flops in operations.items():
                if module == "Global" and "convolution" in str(operation):
                    convolution += flops
                # Linear layers are products of two matrices; those of attention have a batch of heads.
                if module.rpartition(".")[2] in ATTENTION and str(operation) not in LINEAR:
                    attention += flops
    return (
        conditioner.get_total_flops() // 2,
        backbone.get_total_flops() // 2,
        attention // 2,
        convolution // 2,
    )


def _record_tokens(network: Network) -> tuple[list[int], Callable[[], None]]:
    """Record the tokens that enter every attention from now on. Return the list, and a way to end it."""
    tokens: list[int] = []

    def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        tokens.append(arguments[0].shape[1])

    layers = [layer for layer in network.modules() if isinstance(layer, Attention | CrossAttention)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return tokens, remove


def _example(config: NetworkConfig, size: Size) -> Inputs:
    labels = torch.empty(1, len(config.classes), dtype=torch.int64)
    text = torch.empty(1, config.text_width) if config.text_size else None
    return torch.empty(1, config.in_channels, *size), torch.empty(1), labels, text


def _saved_bytes(network: Network, inputs: Inputs, given: set[int]) -> int:
    """Return the bytes that autograd keeps for the backward pass, without the storages in `given`."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # `out` stays alive while counting, so that no storage's address is used twice.
        out = network(*inputs)
    assert out.requires_grad
    return sum(saved.values())
