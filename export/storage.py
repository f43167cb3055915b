"""One copy of the weights: graphs refer to the tensors in weights.safetensors by offset instead of carrying their own.

What a graph still carries lies in a file beside it, `<graph>.data`, where the two together would pass the 2 GiB that a protocol
buffer may have. safetensors lays tensors out raw and contiguous, which is what ONNX calls external data. Where the file holds another precision
or the graph wants the transpose, a Cast or Transpose follows the reference; every runtime folds both when it loads the graph,
so the arithmetic is that of the graph before.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor

from ditserve.export.errors import ExportError
from ditserve.model.spec.bundle import WEIGHTS

MIN_BYTES = 1024  # smaller tensors stay in the graph
INLINE_BYTES = (
    3 << 29
)  # of a graph's own tensors; 1.5 GiB leaves room for its nodes below the 2 GiB of a protocol buffer
STORED = {"F32": (TensorProto.FLOAT, np.float32), "F16": (TensorProto.FLOAT16, np.float16)}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

Key = tuple[bytes, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in the file."""

    type: int
    shape: tuple[int, ...]
    offset: int
    length: int


def save_weights(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Write `weights` as `dtype`; returns them as a reader of the file sees them, in fp32.

    Raises:
        ExportError: a weight does not fit in `dtype`.
    """
    stored = {name: tensor.detach().to(dtype).contiguous() for name, tensor in weights.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            kind = str(dtype).removeprefix("torch.")
            raise ExportError(
                f"weight {name} is not finite in {kind}: train again, or export with --weights fp32"
            )
    save_file(stored, path)
    path.chmod(0o644)
    return {name: tensor.float() for name, tensor in stored.items()}


def share_weights(proto: onnx.ModelProto, weights: Path) -> onnx.ModelProto:
    """Replace, in place, each initializer equal to a tensor of `weights` or its transpose by a reference into that file.

    The graph must then be saved in the folder that `weights` lies in.
    """
    tables: dict[int, dict[Key, tuple[_Place, bool]]] = {}
    kept: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    for tensor in proto.graph.initializer:
        found = None
        if tensor.data_type in FLOATS and np.prod(tensor.dims) * 4 >= MIN_BYTES:
            if tensor.data_type not in tables:
                tables[tensor.data_type] = _table(weights, tensor.data_type)
            found = tables[tensor.data_type].get(_key(numpy_helper.to_array(tensor)))
        if found is None:
            kept.append(tensor)
            continue
        steps = list(_chain(tensor, *found))
        name = tensor.name + ".stored" if steps else tensor.name
        kept.append(_reference(name, found[0], weights.name))
        nodes += steps
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    body = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *body])
    return proto


def save_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph that shares the weights lying in the same folder."""
    save_whole(share_weights(proto, path.parent / WEIGHTS), path)
    onnx.checker.check_model(str(path))


def save_whole(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph with all it carries: in one file, or with its tensors in `<graph>.data`."""
    remove_graph(path)
    own = sum(tensor.ByteSize() for tensor in proto.graph.initializer)
    onnx.save(
        proto,
        path,
        save_as_external_data=own > INLINE_BYTES,
        location=data_file(path).name,
        size_threshold=MIN_BYTES,
    )


def remove_graph(path: Path) -> None:
    """Delete a graph and its tensors, if they are there."""
    path.unlink(missing_ok=True)
    data_file(path).unlink(missing_ok=True)


def data_file(path: Path) -> Path:
    """Where the tensors of a large graph lie."""
    return path.with_name(f"{path.name}.data")


def _chain(tensor: TensorProto, place: _Place, transposed: bool) -> Iterator[onnx.NodeProto]:
    source = tensor.name + ".stored"
    if place.type != tensor.data_type:
        target = tensor.name + ".cast" if transposed else tensor.name
        yield helper.make_node("Cast", [source], [target], name=f"{tensor.name}/Cast", to=tensor.data_type)
        source = target
    if transposed:
        yield helper.make_node(
            "Transpose", [source], [tensor.name], name=f"{tensor.name}/Transpose", perm=[1, 0]
        )


def _reference(name: str, place: _Place, location: str) -> TensorProto:
    tensor = TensorProto(
        name=name, data_type=place.type, dims=place.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _table(weights: Path, data_type: int) -> dict[Key, tuple[_Place, bool]]:
    """Content of every stored matrix and vector, seen as `data_type`, and of the matrices' transposes → its place."""
    dtype: Any = helper.tensor_dtype_to_np_dtype(data_type)
    table: dict[Key, tuple[_Place, bool]] = {}
    for place in _layout(weights):
        numpy_type = next(kind for onnx_type, kind in STORED.values() if onnx_type == place.type)
        raw: npt.NDArray[Any] = np.memmap(
            weights, dtype=numpy_type, mode="r", offset=place.offset, shape=place.shape
        )
        value = np.asarray(raw).astype(dtype)
        if value.ndim == 2:
            table.setdefault(_key(value.T), (place, True))
        table[_key(value)] = (place, False)
    return table


def _layout(weights: Path) -> Iterator[_Place]:
    with weights.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in STORED and entry["shape"]:
            begin, end = entry["data_offsets"]
            yield _Place(STORED[entry["dtype"]][0], tuple(entry["shape"]), 8 + size + begin, end - begin)


def _key(value: npt.NDArray[Any]) -> Key:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest(), value.shape
