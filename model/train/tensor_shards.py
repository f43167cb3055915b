"""Tensors of a checkpoint, written in shards by their processes, and read by any number of processes.

<checkpoint>/ema.safetensors                    written whole by one process, or
<checkpoint>/ema-00001-of-00002.safetensors …   in shards, one file per process

The shard "blocks.0.attn.qkv.weight@16,0" begins at [16, 0] of the full tensor with the published name.

A checkpoint has sections: "model", "optimizer", and one for each average ("ema", …). The `index`, a part of
the checkpoint's JSON, gives the number of files and the shapes of the full tensors; it is None where tensors
are written whole. Nothing is pickled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ditserve.model.distributed.parallel import ParallelNetwork, local_tensor

Index = Mapping[str, Any]
Sections = Mapping[str, Mapping[str, Tensor]]
"""Section → name → tensor."""
Span = tuple[int, int]
"""(begin in the full tensor, length) along one dimension."""


@dataclass(frozen=True, slots=True)
class TensorShard:
    """A part of a tensor without gaps: its offset in the full tensor, and slices of the local tensor."""

    offset: tuple[int, ...]
    local: tuple[slice, ...]


def shard_file(folder: Path, section: str, rank: int, index: Index | None) -> Path:
    """Return the file that process `rank` writes its shards of a section to."""
    return folder / (
        f"{section}-{rank:05}-of-{index['processes']:05}.safetensors" if index else f"{section}.safetensors"
    )


def shard_key(name: str, offset: Sequence[int], index: Index | None) -> str:
    """Return the key, in its file, of the shard of tensor `name` that begins at `offset`."""
    return f"{name}@{','.join(map(str, offset))}" if index else name


def full_shape(network: ParallelNetwork, key: str, tensor: Tensor) -> list[int]:
    """Return the shape of the full tensor that `tensor` is this process's part of."""
    shape, name = list(tensor.shape), network.parameter_name(key)
    if name in network.absent and shape:
        return network.absent[name]
    split = network.splits.get(name)
    if split is not None and shape:
        shape[split.dim] *= network.tensor_size
    return shape


def shards_of(network: ParallelNetwork, key: str, tensor: Tensor) -> list[TensorShard]:
    """Return the shards of the full tensor that this process holds.

    `tensor` is a parameter, or has the shape of one. A parameter of q, k and v stacked has 12 rows, and the
    second of two processes in tensor parallelism holds 6 of them: its shards begin at rows 2, 6 and 10, and
    lie at rows 0–1, 2–3 and 4–5 of what it holds.
    """
    spans: list[list[Span]] = [[(0, size)] for size in tensor.shape]
    split = network.splits.get(network.parameter_name(key))
    if split is not None and spans:
        size, length = network.tensor_size, tensor.shape[split.dim] // split.parts
        spans[split.dim] = [((part * size + network.part) * length, length) for part in range(split.parts)]
    if isinstance(tensor, DTensor):
        # FSDP2 deals out rows: equally many to each process, as long as there are some left.
        first = min(-(-tensor.shape[0] // network.replicas) * network.replica, tensor.shape[0])
        spans[0] = list(_select(spans[0], first, first + len(local_tensor(tensor))))
    return [
        TensorShard(tuple(begin for begin, _ in choice), tuple(local for _, local in choice))
        for choice in itertools.product(*map(_local_slices, spans))
    ]


def _local_slices(spans: Sequence[Span]) -> list[tuple[int, slice]]:
    """Return (begin in the full tensor, local slice) of spans that are held one behind the other."""
    ends = list(itertools.accumulate(length for _, length in spans))
    return [(begin, slice(end - length, end)) for (begin, length), end in zip(spans, ends, strict=True)]


def _select(spans: Sequence[Span], first: int, end: int) -> Iterator[Span]:
    """Yield the spans, cut to the local positions first..end."""
    for begin, local in _local_slices(spans):
        low, high = max(first, local.start), min(end, local.stop)
        if low < high:
            yield begin + low - local.start, high - low


def make_index(network: ParallelNetwork, sections: Sections) -> dict[str, Any] | None:
    """Return the index of the files for the checkpoint's JSON; None where tensors are written whole."""
    if not network.is_partial:
        return None
    shapes = {
        section: {key: full_shape(network, key, tensor) for key, tensor in tensors.items()}
        for section, tensors in sections.items()
    }
    return {"processes": network.world.size, "shapes": shapes}


def write_shards(folder: Path, network: ParallelNetwork, sections: Sections) -> list[Path]:
    """Write the shards that this process has to write of every section. Return the files.

    Raises:
        OSError, SafetensorError: they cannot be written.
    """
    if not network.is_partial and not network.world.is_first:
        return []
    index = make_index(network, sections)
    files = []
    for section, tensors in sections.items():
        shards = {
            shard_key(key, shard.offset, index): local_tensor(tensor)[shard.local].contiguous()
            for key, tensor in tensors.items()
            if network.writes_shard(key, tensor)
            for shard in shards_of(network, key, tensor)
        }
        files.append(shard_file(folder, section, network.world.rank, index))
        save_file(shards, files[-1])
    return files


class SectionReader:
    """A section of a checkpoint on disk; `shapes` are those of the full tensors that its files hold together.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, section: str, index: Index | None) -> None:
        self.section = section
        self.shapes: dict[str, Sequence[int]] = dict(index["shapes"][section]) if index else {}
        # Tensor name → (offset in the full tensor, slice of a file).
        self.shards: dict[str, list[tuple[Sequence[int], Any]]] = {}
        for rank in range(index["processes"] if index else 1):
            file = cast(Any, safe_open(shard_file(folder, section, rank, index), framework="pt"))
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                shard = file.get_slice(key)
                name, _, offset = key.partition("@")
                shape = self.shapes.setdefault(name, shard.get_shape())
                begin = [int(number) for number in offset.split(",") if number] or [0] * len(shape)
                self.shards.setdefault(name, []).append((begin, shard))

    def read_full(self, name: str) -> Tensor:
        """Return a full tensor, fp32."""
        shape = self.shapes[name]
        return self.read_into(name, [0] * len(shape), torch.empty(tuple(shape)))

    def read_into(self, name: str, offset: Sequence[int], out: Tensor) -> Tensor:
        """Fill `out` with the part of the full tensor that begins at `offset`. Return `out`.

        Raises:
            ValueError: some of it is in no file.
        """
        filled = 0
        for begin, shard in self.shards.get(name, []):
            ends = (a + m for a, m in zip(begin, shard.get_shape(), strict=True))
            high = [min(end, b + n) for end, b, n in zip(ends, offset, out.shape, strict=True)]
            low = [max(a, b) for a, b in zip(begin, offset, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                out[_slices(low, high, offset)] = shard[_slices(low, high, begin)]
                filled += math.prod(b - a for a, b in zip(low, high, strict=True))
        if filled != out.numel():
            raise ValueError(f"{self.section} lacks a block of {name}")
        return out


def _slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> Any:
    """Return the slices low..high of a tensor that begins at `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True)) or ...


def read_full(folder: Path, section: str, index: Index | None) -> dict[str, Tensor]:
    """Return the full tensors of a section, fp32, whichever processes wrote it.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """
    reader = SectionReader(folder, section, index)
    return {name: reader.read_full(name) for name in reader.shapes}


@torch.no_grad()
def read_shards(
    folder: Path, network: ParallelNetwork, section: str, index: Index | None
) -> dict[str, Tensor]:
    """Return this process's part of a section, whichever processes wrote it.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing or damaged, or of another network.
    """
    reader = SectionReader(folder, section, index)
    parameters = dict(network.network.named_parameters())
    tensors: dict[str, Tensor] = {}
    for key, shape in reader.shapes.items():
        # The only scalars are an optimiser's counts of steps.
        if not shape:
            tensors[key] = reader.read_full(key)
            continue
        like = parameters[network.parameter_name(key)]
        if list(shape) != full_shape(network, key, like):
            raise ValueError(f"{section} holds {key} of another network")
        tensors[key] = torch.empty_like(like)
        if network.parameter_name(key) in network.absent:
            continue
        for shard in shards_of(network, key, like):
            reader.read_into(key, shard.offset, local_tensor(tensors[key])[shard.local])
    return tensors
