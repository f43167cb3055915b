"""The processes of a run: which `torchrun` started, and how they share the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, and which of them this is: number `rank` of `size`, and `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def agree(self, yes: bool) -> bool:
        """Whether every process says yes; all must call, and none goes on before the others have come here."""
        return self.lowest(float(yes)) > 0

    def same(self, value: float) -> bool:
        """Whether every process has this value; all must call."""
        return self.lowest(value) == -self.lowest(-value)

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

    Raises:
        ValueError: there is no GPU for this process.
    """
    if not dist.is_torchelastic_launched():
        yield World(device=device)
        return
    local_rank = dist.get_node_local_rank()
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"device is cuda, but process {local_rank} of this machine has no GPU of the {torch.cuda.device_count()} that "
                "torch finds: start one process for each by torchrun --nproc-per-node, or take device cpu"
            )
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, device)
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
