"""The state of a run whose parameters are shared out over processes: each writes what it holds, and reads what it needs.

The tensors on disk (`model.blocks`) are blocks of the published ones, so any number of processes reads what any other wrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ditserve.model.distributed.parallel import Share, local
from ditserve.model.train.tensor_blocks import Part, block_file, block_key

Parts = Mapping[str, Mapping[str, Tensor]]  # file → name → tensor
Span = tuple[int, int]  # along a dimension: begin in the whole, and length


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a tensor without gaps: where it begins in the whole, and where it lies in what this process holds."""

    offset: tuple[int, ...]
    held: tuple[slice, ...]


def whole_shape(share: Share, key: str, tensor: Tensor) -> list[int]:
    """Of what `tensor` is this process's part of."""
    shape = list(tensor.shape)
    split = share.splits.get(share.parameter(key))
    if split is not None and shape:
        shape[split.dim] *= share.tensor_size
    return shape


def blocks(share: Share, key: str, tensor: Tensor) -> list[Block]:
    """The blocks of the whole that this process holds; `tensor` is a parameter, or kept like one."""
    spans: list[list[Span]] = [[(0, size)] for size in tensor.shape]
    split = share.splits.get(share.parameter(key))
    if split is not None and spans:
        size, each = share.tensor_size, tensor.shape[split.dim] // split.parts
        spans[split.dim] = [((part * size + share.tensor_rank) * each, each) for part in range(split.parts)]
    if isinstance(tensor, DTensor):  # rows, as FSDP2 deals them out: as many to each as are left
        first = min(-(-tensor.shape[0] // share.replicas) * share.replica, tensor.shape[0])
        spans[0] = list(_cut(spans[0], first, first + len(local(tensor))))
    return [
        Block(tuple(begin for begin, _ in choice), tuple(held for _, held in choice))
        for choice in itertools.product(*map(_laid, spans))
    ]


def _laid(spans: Sequence[Span]) -> list[tuple[int, slice]]:
    """Spans that are held one behind the other: where each begins in the whole, and where it is held."""
    ends = list(itertools.accumulate(length for _, length in spans))
    return [(begin, slice(end - length, end)) for (begin, length), end in zip(spans, ends, strict=True)]


def _cut(spans: Sequence[Span], first: int, end: int) -> Iterator[Span]:
    """What of them lies in first..end, counted as they are held."""
    for begin, held in _laid(spans):
        low, high = max(first, held.start), min(end, held.stop)
        if low < high:
            yield begin + low - held.start, high - low


def make_index(share: Share, parts: Parts) -> dict[str, Any] | None:
    """What the checkpoint's JSON must tell of the files; None where tensors are written whole."""
    if not share.partial:
        return None
    shapes = {
        part: {key: whole_shape(share, key, tensor) for key, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    return {"processes": share.world.size, "shapes": shapes}


def write(folder: Path, share: Share, parts: Parts) -> list[Path]:
    """Write what this process has to write of every part, and tell the files.

    Raises:
        OSError, SafetensorError: they cannot be written.
    """
    if not share.partial and not share.world.first:
        return []
    index = make_index(share, parts)
    files = []
    for part, tensors in parts.items():
        mine = {
            block_key(key, block.offset, index): local(tensor)[block.held].contiguous()
            for key, tensor in tensors.items()
            if share.writes(key, tensor)
            for block in blocks(share, key, tensor)
        }
        files.append(block_file(folder, part, share.world.rank, index))
        save_file(mine, files[-1])
    return files


@torch.no_grad()
def read(folder: Path, share: Share, part: str, index: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """This process's share of a part of a checkpoint, whichever processes wrote it.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing or damaged, or of another network.
    """
    found = Part(folder, part, index)
    parameters = dict(share.network.named_parameters())
    tensors: dict[str, Tensor] = {}
    for key, shape in found.shapes.items():
        if not shape:  # an optimiser's count of steps
            tensors[key] = found.whole(key)
            continue
        like = parameters[share.parameter(key)]
        if list(shape) != whole_shape(share, key, like):
            raise ValueError(f"{part} holds {key} of another network")
        tensors[key] = torch.empty_like(like)
        for block in blocks(share, key, like):
            found.fill(key, block.offset, local(tensors[key])[block.held])
    return tensors
