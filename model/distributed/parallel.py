"""Training on several processes: this one's share of the network, and what all of them do together.

    torchrun --nproc-per-node 2 -m model.train --config run.json

Replicas (DDP), replicas whose parameters, gradients and optimiser state are sharded (FSDP2), and tensor parallelism within each
replica (`model.tensor_parallel`) give the step that a single process would take. Tested with two processes over gloo on the
CPU; CUDA with NCCL goes the same way, but has not been run by this project.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ditserve.model.distributed.precision import HALVES, Precision
from ditserve.model.distributed.processes import ParallelSpec, World
from ditserve.model.distributed.tensor_parallel import Split, share_out


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def alone(network: nn.Module) -> Share:
    """All of a network, of a process that has no others."""
    return Share(network, World(), ParallelSpec(), "fp32")


class Share:
    """A process's share of a network: what to call, and what the processes must do together.

    `network` has its published parameter names, each parameter being this process's part of it; `forward` is to be called. Every
    method is to be called by all processes.
    """

    def __init__(self, network: nn.Module, world: World, spec: ParallelSpec, precision: Precision) -> None:
        replicas = spec.replicas(world)
        self.network, self.world, self.replicas = network, world, replicas
        self.forward: nn.Module = network
        self.splits: Mapping[str, Split] = {}
        self.sharded = spec.mode == "fsdp" and replicas > 1
        self.replica, self.tensor_rank = divmod(world.rank, spec.tensor)
        self.tensor_size = spec.tensor
        self.names = [name for name, _ in network.named_parameters()]
        self.elements = sum(parameter.numel() for parameter in network.parameters())
        if world.size == 1:
            network.to(world.device)
            return
        names = ("replica", "tensor")
        self.mesh = init_device_mesh(world.device, (replicas, spec.tensor), mesh_dim_names=names)
        if spec.tensor > 1:
            if precision == "fp16":  # each process would scale by what it finds in its own part
                raise ValueError("precision fp16 is not for parallel.tensor: take bf16")
            self.splits = share_out(network, self.mesh["tensor"])
        if self.sharded:
            _shard(network, self.mesh["replica"], precision)
        network.to(world.device)
        if replicas > 1 and not self.sharded:
            self.forward = DistributedDataParallel(
                network,
                device_ids=[world.local_rank] if world.device == "cuda" else None,
                process_group=self.mesh.get_group("replica"),
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )

    @property
    def partial(self) -> bool:
        """Whether a process may hold only a part of a parameter."""
        return self.sharded or bool(self.splits)

    def parameter(self, key: str) -> str:
        """The name of the parameter that something is kept like, which is called by its name or as `<its number>.<what>`."""
        return key if key in self.names else self.names[int(key.partition(".")[0])]

    def writes(self, key: str, tensor: Tensor) -> bool:
        """Whether this process writes its part of a tensor, or another one does that holds the same."""
        cut = self.parameter(key) in self.splits and tensor.ndim > 0
        return (self.replica == 0 or isinstance(tensor, DTensor)) and (self.tensor_rank == 0 or cut)

    def piece(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a piece of a batch: gradients are averaged over the replicas with the last one."""
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(last)
        elif isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return nullcontext()

    def clip(self, limit: float | None) -> float:
        """Scale the gradients so that their norm over the whole network is at most `limit`, and tell what it was."""
        gradients = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        norm = _norm(gradient for name, gradient in gradients.items() if name not in self.splits)
        if self.splits:
            part = _norm(gradients[name] for name in self.splits if name in gradients).square()
            dist.all_reduce(part, group=self.mesh.get_group("tensor"))
            norm = (norm.square() + part).sqrt()
        nn.utils.clip_grads_with_norm_(self.network.parameters(), limit or math.inf, norm)
        return norm.item()

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The means over the replicas."""
        if self.replicas == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(tensor, group=self.mesh.get_group("replica"))
        return dict(zip(values, (tensor / self.replicas).tolist(), strict=True))

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Of parameter `name`, or of what is kept like it, all of it, from everyone's part."""
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return self.splits[name].join(tensor, self.mesh["tensor"]) if name in self.splits else tensor


def _shard(network: nn.Module, mesh: DeviceMesh, precision: Precision) -> None:
    """FSDP2, a block at a time; a block's modulation is computed ahead of the block, so it is a unit of its own.

    Blocks are gathered in the half format, as autocast would round them; gradients are averaged in fp32.
    """
    half = HALVES.get(precision)
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False
    )
    for block in network.get_submodule("blocks").children():
        for name, module in block.named_children():
            if name in ("adaLN_modulation", "modulation"):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    """Of all of them together, () on every process."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
