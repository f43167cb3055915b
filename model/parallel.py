"""Training on several processes: what `torchrun` started, and this process's share of the network and of every batch.

    torchrun --nproc-per-node 2 -m model.train --config run.json

Replicas (DDP), replicas whose parameters, gradients and optimiser state are sharded (FSDP2), and tensor parallelism within each
replica (`model.tensor_parallel`) give the step that a single process would take. Tested with two processes over gloo on the
CPU; CUDA with NCCL goes the same way, but has not been run by this project.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model.network import Network
from model.precision import HALVES, Precision
from model.tensor_parallel import Split, share_out


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, and which of them this is: number `rank` of `size`, and `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def agree(self, yes: bool) -> bool:
        """Whether every process says yes; all must call, and none goes on before the others have come here."""
        return self.lowest(float(yes)) > 0

    def lowest(self, value: float) -> float:
        """The least of the processes' values; all must call."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor.item()


@contextmanager
def joined(device: Literal["cpu", "cuda"]) -> Iterator[World]:
    """The processes that `torchrun` started, joined as long as the context lasts; this one alone where it did not.

    On CUDA a process takes the GPU of its local rank, which on the second machine is not its rank, as its current device.
    """
    if not dist.is_torchelastic_launched():
        yield World(device=torch.device(device))
        return
    local_rank = dist.get_node_local_rank()
    if device == "cuda":
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", device_id=place)
    else:
        place = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, place)
    finally:
        dist.destroy_process_group()


class ParallelSpec(BaseModel):
    """How the processes of a run share the work."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mode: Literal["ddp", "fsdp"] = "ddp"
    """Replicas keep all of the training state, or a shard of it each (for networks that do not fit)."""
    tensor: Annotated[int, Field(ge=1)] = 1
    """Processes that share one replica's attention heads and MLP channels."""

    def replicas(self, world: World) -> int:
        """How many replicas share a batch.

        Raises:
            ValueError: the processes do not divide into groups of `tensor`.
        """
        if world.size % self.tensor:
            raise ValueError(
                f"parallel.tensor {self.tensor} does not divide the {world.size} processes of this run: "
                f"start a multiple of {self.tensor} by torchrun, or lower it"
            )
        return world.size // self.tensor

    def rows(self, world: World, batch: int) -> range:
        """The rows of every batch that this process trains on.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        replicas = self.replicas(world)
        if batch % replicas:
            raise ValueError(
                f"batch {batch} is not divisible by {replicas} replicas of the network: make it a multiple"
            )
        share, replica = batch // replicas, world.rank // self.tensor
        return range(replica * share, (replica + 1) * share)


class Share:
    """A process's share of a network: what to call, and what the processes must do together.

    `network` has its published parameter names, each parameter being this process's part of it; `forward` is to be called. Every
    method is to be called by all processes.
    """

    def __init__(
        self,
        network: Network,
        world: World,
        spec: ParallelSpec = ParallelSpec(),
        precision: Precision = "fp32",
    ) -> None:
        replicas = spec.replicas(world)
        self.network, self.world, self.replicas = network, world, replicas
        self.forward: nn.Module = network
        self.splits: Mapping[str, Split] = {}
        self.sharded = spec.mode == "fsdp" and replicas > 1
        self.replica, self.tensor_rank = divmod(world.rank, spec.tensor)
        self.tensor_size = spec.tensor
        self.names = [name for name, _ in network.named_parameters()]
        if world.size == 1:
            network.to(world.device)
            return
        names = ("replica", "tensor")
        self.mesh = init_device_mesh(world.device.type, (replicas, spec.tensor), mesh_dim_names=names)
        if spec.tensor > 1:
            self.splits = share_out(network, self.mesh["tensor"])
        if self.sharded:
            _shard(network, self.mesh["replica"], precision)
        network.to(world.device)
        if replicas > 1 and not self.sharded:
            self.forward = DistributedDataParallel(
                network,
                device_ids=[world.local_rank] if world.device.type == "cuda" else None,
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
        number, _, _ = key.partition(".")
        return self.names[int(number)] if number.isdigit() else key

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


def _shard(network: Network, mesh: DeviceMesh, precision: Precision) -> None:
    """FSDP2, a block at a time; a block's modulation is computed ahead of the block, so it is a unit of its own.

    Blocks are gathered in the half format, as autocast would round them; gradients are averaged in fp32.
    """
    half = HALVES.get(precision)
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False
    )
    for block in network.blocks:
        for name, module in block.named_children():
            if name in ("adaLN_modulation", "modulation"):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    """Of all of them together, () on every process."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
