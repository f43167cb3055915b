"""Tensor parallelism: an attention's heads and an MLP's channels shared out over processes (arXiv:1909.08053, §3).

Every process keeps its own rows of the first linear map of a branch, and its own columns of the second; one sum over the processes
in the forward pass and one in the backward pass make the result that of a single process. Modulation, embeddings and the
output are computed alike by all. Parameters stay plain tensors, so data parallelism of either kind goes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.layers import Attention, CrossAttention, SwiGlu


@dataclass(frozen=True, slots=True)
class Split:
    """How a parameter is shared out: along `dim`, each of the `parts` matrices stacked in it for itself (q, k, v: three)."""

    dim: Literal[0, 1]
    parts: int = 1

    def cut(self, whole: Tensor, mesh: DeviceMesh) -> Tensor:
        """This process's part of a tensor that all of `mesh` hold."""
        parts = whole.unflatten(self.dim, (self.parts, -1))
        placed = distribute_tensor(parts, mesh, [Shard(self.dim + 1)], src_data_rank=None)
        return placed.to_local().flatten(self.dim, self.dim + 1)

    def join(self, part: Tensor, mesh: DeviceMesh) -> Tensor:
        """The whole again, on every process of `mesh`; all must call."""
        parts = part.unflatten(self.dim, (self.parts, -1))
        whole = DTensor.from_local(parts, mesh, [Shard(self.dim + 1)]).full_tensor()
        return whole.flatten(self.dim, self.dim + 1)


def share_out(network: nn.Module, mesh: DeviceMesh) -> Mapping[str, Split]:
    """Keep of every block's attention and MLP what is this process's part; tells how each parameter that is not whole was cut.

    Raises:
        ValueError: a network that cannot be shared out so.
    """
    size = mesh.size()
    if not isinstance(network, DiT):
        raise ValueError(f"parallel.tensor {size} is for a DiT, not for a U-Net: leave it at 1")
    heads, inner = network.config.num_heads, _inner(network)
    for count, what in ((heads, "num_heads"), (inner, "the MLP's width")):
        if count % size:
            raise ValueError(f"parallel.tensor {size} does not divide {what} {count}: change one of them")
    splits: dict[str, Split] = {}
    for index, block in enumerate(network.blocks):
        plan = _plan(block)
        parallelize_module(block, mesh, plan)
        for name, style in plan.items():
            splits |= {f"blocks.{index}.{name}.{leaf}": split for leaf, split in _splits(style).items()}
    return splits


def _plan(block: nn.Module) -> dict[str, ParallelStyle]:
    """Module of a block → what becomes of it."""
    plan: dict[str, ParallelStyle] = {
        "attn.qkv": Columns(parts=3),
        "attn.proj": Rows(),
        "attn": Heads(),
        "mlp.fc1": Columns(parts=2 if isinstance(block.mlp, SwiGlu) else 1),
        "mlp.fc2": Rows(),
    }
    if hasattr(block, "cross"):
        plan |= {"cross.q": Columns(), "cross.kv": Columns(parts=2), "cross.proj": Rows(), "cross": Heads()}
    norms = [name for name in ("q_norm", "k_norm") if isinstance(getattr(block.attn, name), nn.LayerNorm)]
    return plan | {f"attn.{name}": HeadNorm() for name in norms}


def _splits(style: ParallelStyle) -> Mapping[str, Split]:
    if isinstance(style, Columns):
        return {"weight": Split(0, style.parts), "bias": Split(0, style.parts)}
    return {"weight": Split(1)} if isinstance(style, Rows) else {}


def _inner(network: DiT) -> int:
    mlp = cast(nn.Module, network.blocks[0].mlp)
    return cast(nn.Linear, mlp.fc2).in_features


class Columns(ParallelStyle):
    """A linear map whose outputs are shared out: each process computes its own."""

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _keep(module, _splits(self), device_mesh)
        module.register_forward_pre_hook(lambda _, inputs: (_entering(inputs[0], device_mesh), *inputs[1:]))
        return module


class Rows(ParallelStyle):
    """A linear map whose inputs are shared out: the sum over the processes, and the bias once."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _keep(module, _splits(self), device_mesh)
        module.forward = partial(_summed, cast(nn.Linear, module), device_mesh)
        return module


class HeadNorm(ParallelStyle):
    """A norm within each head: all heads share its parameters, so their gradient is the sum over the processes."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.forward = partial(_normed, cast(nn.LayerNorm, module), device_mesh)
        return module


class Heads(ParallelStyle):
    """An attention over this process's heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        attention = cast(Attention | CrossAttention, module)
        attention.num_heads //= device_mesh.size()
        return module


def _keep(module: nn.Module, splits: Mapping[str, Split], mesh: DeviceMesh) -> None:
    for leaf, split in splits.items():
        part = split.cut(module.get_parameter(leaf).detach(), mesh)
        module.register_parameter(leaf, nn.Parameter(part.contiguous()))


def _summed(linear: nn.Linear, mesh: DeviceMesh, h: Tensor) -> Tensor:
    """(N, T, inputs of this process) → (N, T, outputs)."""
    out = _leaving(F.linear(h, linear.weight), mesh)
    return out + linear.bias.to(out.dtype)


def _normed(norm: nn.LayerNorm, mesh: DeviceMesh, h: Tensor) -> Tensor:
    weight, bias = (_entering(parameter, mesh) for parameter in (norm.weight, norm.bias))
    return F.layer_norm(h, norm.normalized_shape, weight, bias, norm.eps)


def _entering(h: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same tensor; its gradient is summed over the processes."""
    everywhere: list[Placement] = [Replicate()]
    return DTensor.from_local(h, mesh, everywhere).to_local(grad_placements=[Partial()])


def _leaving(h: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the processes; its gradient is everyone's."""
    return DTensor.from_local(h, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()
