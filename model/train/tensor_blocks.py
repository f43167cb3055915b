"""Tensors on disk in blocks, for reading: whole, or only what is needed.

<checkpoint>/ema.safetensors                      written whole by one process, or
<checkpoint>/ema-00001-of-00002.safetensors …     in blocks, a file per process: "blocks.0.attn.qkv.weight@16,0" begins at [16, 0]
                                                  of the published tensor, whatever the process had made of it in memory

The `index`, a part of the checkpoint's JSON, tells how many files there are and how large the whole tensors; it is None where
tensors were written whole. Nothing is pickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

Index = Mapping[str, Any]


def block_file(folder: Path, part: str, rank: int, index: Index | None) -> Path:
    """Where a process writes its blocks of a part, such as "ema", of a checkpoint."""
    return folder / (
        f"{part}-{rank:05}-of-{index['processes']:05}.safetensors" if index else f"{part}.safetensors"
    )


def block_key(name: str, offset: Sequence[int], index: Index | None) -> str:
    """What a block of tensor `name` that begins at `offset` is called in the file."""
    return f"{name}@{','.join(map(str, offset))}" if index else name


class Part:
    """A part of a checkpoint on disk, read block by block; `shapes` has every tensor that is whole in all its files together.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, part: str, index: Index | None) -> None:
        self.part = part
        self.shapes: dict[str, Sequence[int]] = dict(index["shapes"][part]) if index else {}
        self.blocks: dict[str, list[tuple[Sequence[int], Any]]] = {}  # where it begins, and what to slice
        for rank in range(index["processes"] if index else 1):
            file = cast(Any, safe_open(block_file(folder, part, rank, index), framework="pt"))
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                block = file.get_slice(key)
                name, _, offset = key.partition("@")
                shape = self.shapes.setdefault(name, block.get_shape())
                begin = [int(each) for each in offset.split(",") if each] or [0] * len(shape)
                self.blocks.setdefault(name, []).append((begin, block))

    def whole(self, name: str) -> Tensor:
        """All of a tensor, fp32."""
        shape = self.shapes[name]
        return self.fill(name, [0] * len(shape), torch.empty(tuple(shape)))

    def fill(self, name: str, offset: Sequence[int], out: Tensor) -> Tensor:
        """Fill `out` with what begins at `offset` of the whole tensor.

        Raises:
            ValueError: some of it is in no file.
        """
        filled = 0
        for begin, block in self.blocks.get(name, []):
            ends = (a + m for a, m in zip(begin, block.get_shape(), strict=True))
            high = [min(end, b + n) for end, b, n in zip(ends, offset, out.shape, strict=True)]
            low = [max(a, b) for a, b in zip(begin, offset, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                out[_within(low, high, offset)] = block[_within(low, high, begin)]
                filled += math.prod(b - a for a, b in zip(low, high, strict=True))
        if filled != out.numel():
            raise ValueError(f"{self.part} lacks a block of {name}")
        return out


def _within(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> Any:
    """The slices low..high of what begins at `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True)) or ...


def read_whole(folder: Path, part: str, index: Index | None) -> dict[str, Tensor]:
    """All of a part of a checkpoint, fp32, whichever processes wrote it.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """
    found = Part(folder, part, index)
    return {name: found.whole(name) for name in found.shapes}
