"""A network distributed over the processes of a run: data parallel, sharded, tensor or pipeline parallel.

    torchrun --nproc-per-node 2 -m model.train --config run.json

Replicas (DDP), sharded replicas (FSDP2: parameters, gradients and optimiser state), and within each replica
tensor parallelism (`model.distributed.tensor_parallel`) or a pipeline (`model.distributed.pipeline`) give the
step that a single process would take.
Tested with two processes over gloo on the CPU; CUDA with NCCL takes the same path, but this project has not
run it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ditserve.model.distributed.pipeline import BlockPipeline, all_reduce_gradients
from ditserve.model.distributed.processes import ParallelSpec, World
from ditserve.model.distributed.tensor_parallel import Split, parallelize_blocks


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def single_process(network: nn.Module) -> ParallelNetwork:
    """Wrap a network that one process holds as a whole."""
    return ParallelNetwork(network, World(), ParallelSpec())


class ParallelNetwork:
    """One process's part of a network, and the operations that the processes do together.

    `network` keeps its published parameter names; each of its parameters is the part that this process holds.
    `forward` is the module to call. Every method must be called by all processes. `half` is the 16-bit format
    of mixed precision, None in fp32.

    Raises:
        ValueError: the processes, the network or the precision do not suit `spec`.
    """

    def __init__(
        self, network: nn.Module, world: World, spec: ParallelSpec, half: torch.dtype | None = None
    ) -> None:
        replicas = spec.replicas(world)
        self.network, self.world, self.replicas = network, world, replicas
        self.forward: nn.Module = network
        self.splits: Mapping[str, Split] = {}
        self.pipeline: BlockPipeline | None = None
        self.sharded = spec.mode == "fsdp" and replicas > 1
        self.replica, self.part = divmod(world.rank, spec.parts)
        self.tensor_size = spec.tensor
        self.parameter_names = [name for name, _ in network.named_parameters()]
        self.parameter_count = sum(parameter.numel() for parameter in network.parameters())
        if world.size == 1:
            network.to(world.device)
            return
        # The parts of a replica: its processes in tensor parallelism, or the stages of its pipeline.
        names = ("replica", "part")
        self.mesh = init_device_mesh(world.device, (replicas, spec.parts), mesh_dim_names=names)
        if spec.tensor > 1:
            # The loss scale of fp16 would differ: each process would set it by the gradients of its own part.
            if half is torch.float16:
                raise ValueError("precision fp16 is not for parallel.tensor: take bf16")
            self.splits = parallelize_blocks(network, self.mesh["part"])
        if spec.pipeline > 1:
            if half is torch.float16:
                raise ValueError("precision fp16 is not for parallel.pipeline: take bf16")
            self.pipeline = BlockPipeline(network, self.mesh.get_group("part"), world.device)
        if self.sharded:
            _shard(network, self.mesh["replica"], half)
        network.to(world.device)
        if replicas > 1 and not self.sharded and self.pipeline is None:
            self.forward = data_parallel = DistributedDataParallel(
                network,
                device_ids=[world.local_rank] if world.device == "cuda" else None,
                process_group=self.mesh.get_group("replica"),
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )
            if spec.compress:
                # DDP wants types and not their names in a hook's signature, or none.
                data_parallel.register_comm_hook(
                    self.mesh.get_group("replica"), lambda state, bucket: _average_in_bf16(state, bucket)
                )

    @property
    def is_partial(self) -> bool:
        """True if a process may hold only a part of a parameter."""
        return self.sharded or bool(self.splits) or self.pipeline is not None

    @property
    def absent(self) -> Mapping[str, list[int]]:
        """The full shapes of the parameters that other processes of this replica hold as a whole."""
        return {} if self.pipeline is None else self.pipeline.absent

    def parameter_name(self, key: str) -> str:
        """Return the name of the parameter that a stored tensor has the shape of.

        `key` is the parameter's own name, or `<number of the parameter>.<what>` for optimiser state:
        "3.exp_avg" is a moment of the fourth parameter.
        """
        return key if key in self.parameter_names else self.parameter_names[int(key.partition(".")[0])]

    def writes_shard(self, key: str, tensor: Tensor) -> bool:
        """Return True if this process writes its part of a tensor; one of those with equal parts does."""
        name = self.parameter_name(key)
        split = name in self.splits and tensor.ndim > 0
        owner = 0 if self.pipeline is None else self.pipeline.owner.get(name, 0)
        return (self.replica == 0 or isinstance(tensor, DTensor)) and (self.part == owner or split)

    def gradient_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context for forward and backward of one micro-batch.

        Gradients are averaged over the replicas with the last micro-batch of a step.
        """
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(last)
        elif isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return nullcontext()

    def clip_gradients(self, limit: float | None) -> float:
        """Scale the gradients to a norm over the whole network of at most `limit`. Return the norm before."""
        gradients = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        divided = self.splits if self.pipeline is None else self.pipeline.owner
        norm = _total_norm(gradient for name, gradient in gradients.items() if name not in divided)
        if divided:
            squared = _total_norm(gradients[name] for name in divided if name in gradients).square()
            dist.all_reduce(squared, group=self.mesh.get_group("part"))
            norm = (norm.square() + squared).sqrt()
        nn.utils.clip_grads_with_norm_(self.network.parameters(), limit or math.inf, norm)
        return norm.item()

    def average_pipelines(self) -> None:
        """Average the gradients of pipelines over the replicas, as DDP and FSDP do by themselves."""
        if self.replicas > 1:
            parameters = [p for p in self.network.parameters() if p.grad is not None]
            all_reduce_gradients(parameters, self.mesh.get_group("replica"))
            for parameter in parameters:
                cast(Tensor, parameter.grad).div_(self.replicas)

    def all_reduce_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each value over the replicas."""
        if self.replicas == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(tensor, group=self.mesh.get_group("replica"))
        return dict(zip(values, (tensor / self.replicas).tolist(), strict=True))

    def full_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Gather the parts of parameter `name`, or of a tensor of its shape, from all processes."""
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if self.pipeline is not None:
            return self.pipeline.broadcast(tensor, name)
        return self.splits[name].gather(tensor, self.mesh["part"]) if name in self.splits else tensor


def _average_in_bf16(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over a group, sent in bf16: torch's own hook is for GPUs alone."""
    gradients = bucket.buffer()
    sent = (gradients / group.size()).to(torch.bfloat16)
    work = dist.all_reduce(sent, group=group, async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(
        lambda done: gradients.copy_(done.value()[0])
    )
    return future


def _shard(network: nn.Module, mesh: DeviceMesh, half: torch.dtype | None) -> None:
    """Apply FSDP2 block by block.

    The modulation of a block is computed ahead of the block, so it is a unit of its own. Parameters are
    gathered in the half format, as autocast would round them; gradients are averaged in fp32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False
    )
    for block in network.get_submodule("blocks").children():
        for name, module in block.named_children():
            if name in ("adaLN_modulation", "modulation"):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)


def _total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients together, () on every process."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
