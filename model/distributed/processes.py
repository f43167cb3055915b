"""The processes of a training run that `torchrun` started, and how they share the work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

# The time that the other processes wait for the first, which may count millions of pictures.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, seen from number `rank` of `size`, which is `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """True for the one process that writes files and messages shared by all."""
        return self.rank == 0

    def all_agree(self, yes: bool) -> bool:
        """Return True if `yes` is true in every process. All processes must call; this is also a barrier."""
        return self.all_reduce_min(float(yes)) > 0

    def all_equal(self, value: float) -> bool:
        """Return True if every process passes the same value. All processes must call."""
        return self.all_reduce_min(value) == -self.all_reduce_min(-value)

    def all_reduce_min(self, value: float) -> float:
        """Return the smallest value that any process passes. All processes must call."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor.item()


@contextmanager
def join_processes(device: Literal["cpu", "cuda"]) -> Iterator[World]:
    """Join the processes that `torchrun` started, until the context ends.

    Without `torchrun` this process is the world. On CUDA the process makes the GPU of its local rank its
    current device. On the second machine the local rank differs from the rank.

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
                f"device is cuda, but process {local_rank} of this machine has no GPU of the "
                f"{torch.cuda.device_count()} that torch finds: start one process for each by torchrun "
                "--nproc-per-node, or take device cpu"
            )
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, device)
    finally:
        dist.destroy_process_group()


def made_by_first(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what the first of the processes that `torchrun` started makes, a JSON object, in all of them.

    Without `torchrun` this process makes it. If making it fails in the first process, `torchrun` ends the
    others.
    """
    if not dist.is_torchelastic_launched():
        return make()
    store, rank, _ = next(rendezvous("env://", timeout=PATIENCE))
    shared = PrefixStore("made_by_first", store)
    if rank == 0:
        shared.set("object", json.dumps(make()))
    made: dict[str, Any] = json.loads(shared.get("object"))
    return made


class ParallelSpec(BaseModel):
    """The division of a run's work between its processes: replicas of `tensor` or `pipeline` processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mode: Literal["ddp", "fsdp"] = "ddp"
    """Data parallelism: with "ddp" each replica keeps the whole training state, with "fsdp" a shard of it."""
    tensor: Annotated[int, Field(ge=1)] = 1
    """Number of processes that share one replica's attention heads and MLP channels."""
    pipeline: Annotated[int, Field(ge=1)] = 1
    """Number of processes that share one replica's blocks; the pieces of `accumulate` flow through them."""
    compress: Literal["bf16"] | None = None
    """The format in which replicas average their gradients; None: that of the gradients, fp32."""

    @model_validator(mode="after")
    def _check_fields_agree(self) -> ParallelSpec:
        if self.pipeline > 1 and (self.mode != "ddp" or self.tensor > 1):
            raise ValueError("pipeline is for mode ddp and tensor 1: leave these out, or pipeline")
        if self.compress and (self.mode != "ddp" or self.pipeline > 1):
            raise ValueError("compress is for mode ddp and pipeline 1: leave these out, or compress")
        return self

    @property
    def parts(self) -> int:
        """The number of processes that share a replica."""
        return self.tensor * self.pipeline

    def replicas(self, world: World) -> int:
        """Return the number of replicas that share a batch.

        Raises:
            ValueError: the processes do not divide into groups of `tensor` or `pipeline`.
        """
        if world.size % self.parts:
            field = "pipeline" if self.pipeline > 1 else "tensor"
            raise ValueError(
                f"parallel.{field} {self.parts} does not divide the {world.size} processes of this run: "
                f"start a multiple of {self.parts} by torchrun, or lower it"
            )
        return world.size // self.parts

    def rows(self, world: World, batch: int) -> range:
        """Return the rows of every batch that this process trains on.

        With a batch of 6, four processes and `tensor` 2, ranks 0 and 1 are replica 0 and train on rows 0–2;
        ranks 2 and 3 train on rows 3–5.

        Raises:
            ValueError: the rows cannot be shared out evenly.
        """
        replicas = self.replicas(world)
        if batch % replicas:
            raise ValueError(
                f"batch {batch} is not divisible by {replicas} replicas of the network: make it a multiple"
            )
        count, replica = batch // replicas, world.rank // self.parts
        return range(replica * count, (replica + 1) * count)
