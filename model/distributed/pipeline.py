"""Pipeline parallelism: processes share the blocks of a network, and the pieces of a batch flow through them.

Source: Huang et al., arXiv:1811.06965; the order of work is 1F1B (Narayanan et al., arXiv:1806.03377), by
`torch.distributed.pipelining`. Each process holds consecutive blocks; the embedders and the last layer, a
small part, are in all of them. The condition is computed in every process, so only the tokens travel.
Parameters of the blocks of other processes keep their names and are empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import floordiv
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from ditserve.model.nets.blocks import Block
from ditserve.model.nets.dit import DiT
from ditserve.model.spec.mixing import assign_blocks

LossOfRows = Callable[[Tensor, Tensor], Tensor]
"""(output (n, C_out, H, W) of some rows of the batch, their numbers (n,)) → loss ()."""


class BlockRange(nn.Module):
    """A process's part of a forward pass: from pixels or tokens to tokens, or to the output in the last."""

    def __init__(self, network: DiT, stage: int, stages: int) -> None:
        super().__init__()
        self.network, self.is_first, self.is_last = network, stage == 0, stage == stages - 1
        self.context: Callable[[], AbstractContextManager[None]]

    def forward(
        self, h: Tensor, x: Tensor, timestep: Tensor, labels: Tensor, text: Tensor | None = None
    ) -> Tensor:
        network = self.network
        grid = tuple(map(floordiv, x.shape[2:], network.config.patch))
        with self.context():
            state = network.modulate(timestep, network.embed(labels, text))
            named = dict(zip(network.state_names, state, strict=True))
            h = network.enter(x, named, grid) if self.is_first else h
            h = network.run_blocks(h, named, grid)
            # What travels is contiguous.
            return network.leave(x, h, named, grid).float() if self.is_last else h.float().contiguous()


class BlockPipeline:
    """The pipeline of a replica, seen from its process number `stage`.

    `shared` are the names of the parameters that all its processes hold, `absent` the full shapes of those
    that others hold, and `owner` the process of each parameter of a block.

    Raises:
        ValueError: the network is no DiT, or has fewer blocks than processes.
    """

    def __init__(self, network: nn.Module, group: ProcessGroup, device: str) -> None:
        self.group, self.device = group, torch.device(device)
        self.stage, self.stages = dist.get_rank(group), dist.get_world_size(group)
        check_pipeline(network, self.stages)
        self.network, config = cast(DiT, network), cast(DiT, network).config
        self.owner: dict[str, int] = {}
        self.absent: dict[str, list[int]] = {}
        for number, stage in enumerate(assign_blocks(config.depth, self.stages)):
            block = cast(Block, self.network.blocks[number])
            names = [f"blocks.{number}.{name}" for name, _ in block.named_parameters()]
            self.owner |= dict.fromkeys(names, stage)
            if stage != self.stage:
                width = config.modulation_vectors(block.kind) * config.hidden_size
                self.absent |= _emptied(block, f"blocks.{number}.", width)
        self.shared = [name for name, _ in network.named_parameters() if name not in self.owner]
        self.range = BlockRange(self.network, self.stage, self.stages)
        self._schedule: tuple[tuple[Any, ...], Schedule1F1B] | None = None
        self._loss: LossOfRows

    def run(
        self,
        inputs: Sequence[Tensor | None],
        pieces: int,
        loss: LossOfRows,
        context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Run the forward and backward passes of a batch in equal pieces; gradients are those of Σ loss.

        `inputs` are x (N, C, H, W), what the network is told (N,), labels (N, F) and text. `loss` is called
        for every piece in the last process alone; forward passes run inside `context`. All must call.
        """
        x, timestep, labels, text = inputs
        assert x is not None
        self._loss, self.range.context = loss, context
        rows = torch.arange(len(x))
        named: dict[str, Any] = {"x": x, "timestep": timestep, "labels": labels}
        named |= {} if text is None else {"text": text}
        first = (x,) if self.range.is_first else ()
        target = rows if self.range.is_last else None
        schedule = self._schedule_for(x, pieces)
        schedule.step(*first, target=target, return_outputs=False, **named)
        self._sum_shared()

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        """Return parameter `name`, or a tensor of its shape, from the process that holds it."""
        if name not in self.owner:
            return tensor
        if name in self.absent:
            tensor = torch.empty(self.absent[name], dtype=tensor.dtype, device=tensor.device)
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=self.group, group_src=self.owner[name])
        return tensor

    def of_last(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values that the last process passes, in all of them."""
        objects = [dict(values)]
        dist.broadcast_object_list(objects, group=self.group, group_src=self.stages - 1)
        return objects[0]

    def _schedule_for(self, x: Tensor, pieces: int) -> Schedule1F1B:
        """Return the schedule for pictures of this size: the buffers between processes have one shape."""
        key = (*x.shape, pieces)
        if self._schedule is None or self._schedule[0] != key:
            config, rows = self.network.config, len(x) // pieces
            tokens = math.prod(map(floordiv, x.shape[2:], config.patch)) + 2 * ("in_context" in config.plan)
            between = torch.empty(rows, tokens, config.hidden_size, requires_grad=True)
            output = torch.empty(rows, config.out_channels, *x.shape[2:], requires_grad=True)
            stage = PipelineStage(
                self.range,
                self.stage,
                self.stages,
                self.device,
                input_args=x[:rows] if self.range.is_first else between,
                output_args=output if self.range.is_last else between,
                group=self.group,
            )
            # The loss of a piece carries its weight.
            schedule = Schedule1F1B(stage, pieces, loss_fn=self._loss_of_rows, scale_grads=False)
            self._schedule = key, schedule
        return self._schedule[1]

    def _loss_of_rows(self, output: Tensor, rows: Tensor) -> Tensor:
        return self._loss(output, rows)

    def _sum_shared(self) -> None:
        """Sum the gradients of the parameters that all processes hold: each has those of its own blocks."""
        parameters = [self.network.get_parameter(name) for name in self.shared]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        all_reduce_gradients(parameters, self.group)


def all_reduce_gradients(parameters: Sequence[nn.Parameter], group: ProcessGroup) -> None:
    """Replace each gradient by its sum over the processes of a group, in one exchange."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def check_pipeline(network: nn.Module, stages: int) -> None:
    """Raise ValueError unless the blocks of a network can be shared out to so many processes."""
    if not isinstance(network, DiT):
        raise ValueError(f"parallel.pipeline {stages} is for a DiT, not for a U-Net: leave it at 1")
    if network.config.depth < stages:
        raise ValueError(
            f"parallel.pipeline {stages} is more than the {network.config.depth} blocks: lower it"
        )
    if any(network.config.level_plan):
        raise ValueError("parallel.pipeline is for blocks of one level: leave it at 1, or levels out")
    if network.config.experts:
        raise ValueError("parallel.pipeline does not balance experts: leave it at 1, or experts at 0")


def _emptied(block: Block, prefix: str, width: int) -> dict[str, list[int]]:
    """Make a block hand on its tokens, without parameters of its own. Return their shapes by name.

    Its modulation, of `width` numbers, becomes zeros.
    """
    shapes: dict[str, list[int]] = {}
    for module_name, module in block.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            shapes[f"{prefix}{module_name}{'.' if module_name else ''}{leaf}"] = list(parameter.shape)
            module.register_parameter(leaf, nn.Parameter(parameter.new_empty(0)))
    block.forward = lambda h, *rest: h  # type: ignore[method-assign]
    if hasattr(block, "adaLN_modulation"):
        block.adaLN_modulation.forward = lambda c: c.new_zeros(len(c), width)
    return shapes
