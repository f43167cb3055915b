"""Tensor parallelism: processes share the heads of an attention and the channels of an MLP.

Source: arXiv:1909.08053, §3. Each process keeps its own rows of the first linear map of a branch, and its own
columns of the second. One sum over the processes in the forward pass and one in the backward pass give the
result of a single process. All processes compute modulation, embeddings and the output alike. Parameters stay
plain tensors, so that data parallelism of either kind can be applied on top.
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
from ditserve.model.nets.layers import Attention, CrossAttention, RmsNorm, SwiGlu, rms_norm


@dataclass(frozen=True, slots=True)
class Split:
    """The division of a parameter along `dim`.

    A parameter may stack several matrices (q, k, v: `parts` = 3); each is divided by itself. With two
    processes and twelve rows, process 0 holds rows 0–1, 4–5 and 8–9.
    """

    dim: Literal[0, 1]
    parts: int = 1

    def shard(self, full: Tensor, mesh: DeviceMesh) -> Tensor:
        """Return this process's part of a tensor that all processes of `mesh` hold."""
        parts = full.unflatten(self.dim, (self.parts, -1))
        placed = distribute_tensor(parts, mesh, [Shard(self.dim + 1)], src_data_rank=None)
        return placed.to_local().flatten(self.dim, self.dim + 1)

    def gather(self, shard: Tensor, mesh: DeviceMesh) -> Tensor:
        """Return the full tensor on every process of `mesh`; all must call."""
        parts = shard.unflatten(self.dim, (self.parts, -1))
        full = DTensor.from_local(parts, mesh, [Shard(self.dim + 1)]).full_tensor()
        return full.flatten(self.dim, self.dim + 1)


def parallelize_blocks(network: nn.Module, mesh: DeviceMesh) -> Mapping[str, Split]:
    """Reduce every block's attention and MLP to this process's part. Return the splits by parameter name.

    Raises:
        ValueError: the network is no DiT, or its heads or channels are not divisible by the processes.
    """
    splits: dict[str, Split] = {}
    for index, block in enumerate(check_divisible(network, mesh.size()).blocks):
        plan = _plan(block)
        parallelize_module(block, mesh, plan)
        for name, style in plan.items():
            splits |= {f"blocks.{index}.{name}.{leaf}": split for leaf, split in _splits(style).items()}
    return splits


def check_divisible(network: nn.Module, size: int) -> DiT:
    """Return the network, whose heads and channels can be divided among `size` processes.

    Raises:
        ValueError: they cannot.
    """
    if not isinstance(network, DiT):
        raise ValueError(f"parallel.tensor {size} is for a DiT, not for a U-Net: leave it at 1")
    config = network.config
    whole = [f"attention {kind.name}" for kind in config.attention_plan if not kind.heads_are_alike]
    whole += ["conv_mlp"] if config.conv_mlp else []
    whole += ["experts"] if config.experts else []
    if whole:
        raise ValueError(f"parallel.tensor {size} does not divide {whole[0]}: leave it at 1")
    for count, what in ((config.num_heads, "num_heads"), (_mlp_channels(network), "the MLP's width")):
        if count % size:
            raise ValueError(f"parallel.tensor {size} does not divide {what} {count}: change one of them")
    return network


def _plan(block: nn.Module) -> dict[str, ParallelStyle]:
    """Return the parallel style of each module of a block, by name."""
    plan: dict[str, ParallelStyle] = {
        "attn.qkv": ColwiseParallel(parts=3),
        "attn.proj": RowwiseParallel(),
        "attn": HeadParallel(),
        "mlp.fc1": ColwiseParallel(parts=2 if isinstance(block.mlp, SwiGlu) else 1),
        "mlp.fc2": RowwiseParallel(),
    }
    if hasattr(block, "cross"):
        plan |= {
            "cross.q": ColwiseParallel(),
            "cross.kv": ColwiseParallel(parts=2),
            "cross.proj": RowwiseParallel(),
            "cross": HeadParallel(),
        }
    kinds = (nn.LayerNorm, RmsNorm)
    norms = [name for name in ("q_norm", "k_norm") if isinstance(getattr(block.attn, name), kinds)]
    return plan | {f"attn.{name}": HeadNormParallel() for name in norms}


def _splits(style: ParallelStyle) -> Mapping[str, Split]:
    if isinstance(style, ColwiseParallel):
        return {"weight": Split(0, style.parts), "bias": Split(0, style.parts)}
    return {"weight": Split(1)} if isinstance(style, RowwiseParallel) else {}


def _mlp_channels(network: DiT) -> int:
    mlp = cast(nn.Module, network.blocks[0].mlp)
    return cast(nn.Linear, mlp.fc2).in_features


class ColwiseParallel(ParallelStyle):
    """A linear map whose outputs are divided: torch's ColwiseParallel, for stacked matrices too."""

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _shard_parameters(module, _splits(self), device_mesh)
        module.register_forward_pre_hook(
            lambda _, inputs: (_copy_to_processes(inputs[0], device_mesh), *inputs[1:])
        )
        return module


class RowwiseParallel(ParallelStyle):
    """A linear map whose inputs are divided: a sum over the processes, plus the bias once."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _shard_parameters(module, _splits(self), device_mesh)
        module.forward = partial(_rowwise_linear, cast(nn.Linear, module), device_mesh)
        return module


class HeadNormParallel(ParallelStyle):
    """A norm within each head; heads share its parameters, so gradients are summed over the processes."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.forward = partial(_head_norm, cast(nn.LayerNorm | RmsNorm, module), device_mesh)
        return module


class HeadParallel(ParallelStyle):
    """An attention over this process's heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        attention = cast(Attention | CrossAttention, module)
        attention.num_heads //= device_mesh.size()
        return module


def _shard_parameters(module: nn.Module, splits: Mapping[str, Split], mesh: DeviceMesh) -> None:
    for leaf, split in splits.items():
        shard = split.shard(module.get_parameter(leaf).detach(), mesh)
        module.register_parameter(leaf, nn.Parameter(shard.contiguous()))


def _rowwise_linear(linear: nn.Linear, mesh: DeviceMesh, h: Tensor) -> Tensor:
    """Map (N, T, inputs of this process) to (N, T, outputs)."""
    out = _sum_over_processes(F.linear(h, linear.weight), mesh)
    return out + linear.bias.to(out.dtype)


def _head_norm(norm: nn.LayerNorm | RmsNorm, mesh: DeviceMesh, h: Tensor) -> Tensor:
    weight = _copy_to_processes(norm.weight, mesh)
    if isinstance(norm, RmsNorm):
        return rms_norm(h) * weight
    return F.layer_norm(h, norm.normalized_shape, weight, _copy_to_processes(norm.bias, mesh), norm.eps)


def _copy_to_processes(h: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the same tensor; its gradient is summed over the processes (f of arXiv:1909.08053, §3)."""
    everywhere: list[Placement] = [Replicate()]
    return DTensor.from_local(h, mesh, everywhere).to_local(grad_placements=[Partial()])


def _sum_over_processes(h: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum over the processes; each process gets the whole gradient (g of arXiv:1909.08053, §3)."""
    return DTensor.from_local(h, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()
