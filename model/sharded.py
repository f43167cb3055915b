"""Tensors on disk in blocks: every process writes what it holds, and any number of processes read what they need.

<checkpoint>/ema.safetensors                      written whole by one process, or
<checkpoint>/ema-00001-of-00002.safetensors …     in blocks, a file per process: "blocks.0.attn.qkv.weight@16,0" begins at [16, 0]
                                                  of the published tensor, whatever the process had made of it in memory

`index` is what the checkpoint's JSON must tell to have the blocks put together again. Nothing is pickled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.parallel import Share

Span = tuple[int, int]  # begin and length


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a tensor without gaps: where it begins in the whole, and where it lies in what this process holds."""

    offset: tuple[int, ...]
    held: tuple[slice, ...]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
        Block(
            tuple(begin for begin, _ in places),
            tuple(slice(at, at + n) for at, (_, n) in zip(held, places, strict=True)),
        )
        for held, places in (
            zip(*choice, strict=True) if choice else ((), ())
            for choice in itertools.product(*map(_laid, spans))
        )
    ]


def _laid(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """Spans that lie one behind the other, each with where it begins there."""
    ends = itertools.accumulate((length for _, length in spans), initial=0)
    return list(zip(ends, spans, strict=False))


def _cut(spans: Sequence[Span], first: int, end: int) -> Iterator[Span]:
    """What of them lies in first..end, counted in the row of them all."""
    for at, (begin, length) in _laid(spans):
        low, high = max(first - at, 0), min(end - at, length)
        if low < high:
            yield begin + low, high - low


def index(share: Share, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any] | None:
    """For the checkpoint's JSON: the number of files, and the shape of every whole tensor; None if files hold whole tensors."""
    if not share.partial:
        return None
    shapes = {
        part: {key: whole_shape(share, key, tensor) for key, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    return {"processes": share.world.size, "shapes": shapes}


def write(folder: Path, share: Share, parts: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
    """Write this process's blocks of every part, and tell the files.

    Raises:
        OSError, SafetensorError: they cannot be written.
    """
    if not share.partial and not share.world.first:
        return []
    files = []
    for part, tensors in parts.items():
        rank = share.world.rank if share.partial else None
        file = _file(folder, part, rank, share.world.size)
        save_file(dict(_written(share, tensors)), file)
        files.append(file)
    return files


def _written(share: Share, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tensors.items():
        if not share.partial:
            yield key, tensor.contiguous()
        elif share.writes(key, tensor):
            held = local(tensor)
            for block in blocks(share, key, tensor):
                yield f"{key}@{','.join(map(str, block.offset))}", held[block.held].contiguous()


def _file(folder: Path, part: str, rank: int | None, size: int) -> Path:
    return folder / (f"{part}.safetensors" if rank is None else f"{part}-{rank:05}-of-{size:05}.safetensors")


class Part:
    """A part of a checkpoint on disk, such as "ema", read block by block; `told` is its index.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, part: str, told: Mapping[str, Any] | None) -> None:
        self.folder, self.part = folder, part
        ranks = range(told["processes"]) if told else [None]
        files = [safe_open(_file(folder, part, rank, len(ranks)), framework="pt") for rank in ranks]
        self.blocks: dict[str, list[tuple[tuple[int, ...], Any]]] = {}  # where it begins, and what to slice
        for file in files:
            for key in file.keys():  # noqa: SIM118
                name, _, offset = key.partition("@")
                block = file.get_slice(key)
                begin = (
                    tuple(map(int, filter(None, offset.split(","))))
                    if told
                    else (0,) * len(block.get_shape())
                )
                self.blocks.setdefault(name, []).append((begin, block))
        self.shapes: Mapping[str, Sequence[int]] = (
            told["shapes"][part]
            if told
            else {name: found[0][1].get_shape() for name, found in self.blocks.items()}
        )

    def whole(self, key: str) -> Tensor:
        """All of a tensor."""
        shape = self.shapes[key]
        return self.fill(key, (0,) * len(shape), torch.empty(*shape))

    def fill(self, key: str, offset: Sequence[int], out: Tensor) -> Tensor:
        """Fill `out` with what begins at `offset` of the whole tensor."""
        filled = 0
        for begin, block in self.blocks.get(key, []):
            shape = block.get_shape()
            low = [max(a, b) for a, b in zip(begin, offset, strict=True)]
            high = [min(a + m, b + n) for a, m, b, n in zip(begin, shape, offset, out.shape, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))
                target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
                found = block[source] if source else block[...]
                out[target] = found
                filled += found.numel()
        if filled != out.numel():
            raise ValueError(f"{self.part} lacks a block of {key}")
        return out


def read_whole(folder: Path, part: str, told: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """All of a part of a checkpoint.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """
    found = Part(folder, part, told)
    return {key: found.whole(key) for key in found.shapes}


@torch.no_grad()
def read(folder: Path, part: str, told: Mapping[str, Any] | None, share: Share) -> dict[str, Tensor]:
    """This process's share of a part of a checkpoint, whichever processes wrote it.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing or damaged, or is of another network.
    """
    found = Part(folder, part, told)
    parameters = dict(share.network.named_parameters())
    tensors: dict[str, Tensor] = {}
    for key, shape in found.shapes.items():
        if not shape:  # a count of steps
            tensors[key] = found.whole(key)
            continue
        like = parameters[share.parameter(key)]
        if list(shape) != whole_shape(share, key, like):
            raise ValueError(f"{part} holds {key} in another shape")
        tensors[key] = torch.empty_like(like)
        held = local(tensors[key])
        for block in blocks(share, key, like):
            found.fill(key, block.offset, held[block.held])
    return tensors
