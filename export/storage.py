"""Storage of graphs with one copy of the weights: they refer to tensors in safetensors files by offset.

The files are a bundle's weights.safetensors and those of its small autoencoder, or those of an imported
pipeline's transformer. safetensors lays tensors out raw and contiguous, which ONNX calls external data. If
the file has another precision, or the graph wants the transpose, a Cast or Transpose follows the reference.
Every runtime folds both when it loads the graph, so the arithmetic stays that of the graph. The other tensors
of a graph stay in it, or go into a file beside it, `<graph>.data`, where the two together would pass the
2 GiB limit of a protocol buffer.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from ditserve.export.errors import ExportError
from ditserve.model.spec.bundle import PIPELINE, SMALL_AUTOENCODER, WEIGHTS, write_atomic

MIN_BYTES = 1024  # smaller tensors stay in the graph
# The most bytes of a graph's own tensors that stay in it: 1.5 GiB leaves room for its nodes below 2 GiB.
INLINE_BYTES = 3 << 29
STORED = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

Key = tuple[bytes, tuple[int, ...]]  # digest and shape of a tensor


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file of weights: that file, its name, ONNX type, shape, and its range of bytes."""

    file: Path
    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    length: int

    def read(self) -> bytes:
        """Return its bytes."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


def save_weights(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write `weights` as `dtype`.

    Raises:
        ExportError: a weight does not fit in `dtype`.
    """
    kind = {torch.float32: "F32", torch.float16: "F16"}[dtype]
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in weights.items()}
    header = _header({name: (kind, tensor.shape, sizes[name]) for name, tensor in weights.items()})
    # One tensor after the other: a second copy of all would be alive for a moment.
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in weights.items():
            stored = tensor.detach().to(dtype).contiguous()
            if not torch.isfinite(stored).all():
                raise ExportError(
                    f"weight {name} is not finite in {str(dtype).removeprefix('torch.')}: "
                    "train again, or export with --weights fp32"
                )
            file.write(stored.numpy().data)
    path.chmod(0o644)


def write_stored(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """Write `tensors`, which may be of the file `path` itself, to it."""
    kinds = {int(value): kind for kind, value in STORED.items()}
    header = _header({each.name: (kinds[each.type], each.shape, each.length) for each in tensors})
    write_atomic(path, header + b"".join(each.read() for each in tensors))


def _header(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """Return the head of a safetensors file of tensors, given by name: dtype, shape, and bytes."""
    entries, end = {}, 0
    for name, (kind, shape, size) in tensors.items():
        begin, end = end, end + size
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def take_tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Replace the weights of a traced model, in place, by placeholders; return them by name, not copied.

    Convolutions keep theirs, since those of narrow ones are still rearranged.
    """
    taken = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype.value not in FLOATS or len(tensor.shape) != 2:
            continue
        taken[name] = tensor
        value.const_value = ir.ExternalTensor(
            WEIGHTS, None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return taken


def put_tensors(proto: onnx.ModelProto, taken: Mapping[str, ir.TensorProtocol]) -> onnx.ModelProto:
    """Copy the weights that were taken into `proto`, in place; return it."""
    for tensor in proto.graph.initializer:
        if tensor.name in taken:
            tensor.CopyFrom(_whole(tensor.name, taken[tensor.name]))
    return proto


def _whole(name: str, taken: ir.TensorProtocol) -> TensorProto:
    tensor: TensorProto = ir.to_proto(taken)
    tensor.name = name
    return tensor


def weight_files(bundle: Path) -> list[Path]:
    """Return the files of the weights in the folder of a bundle, its small autoencoder's too."""
    own = [file for file in (bundle / WEIGHTS, bundle / SMALL_AUTOENCODER / WEIGHTS) if file.is_file()]
    return own or sorted((bundle / PIPELINE / "transformer").glob("*.safetensors"))


def share_weights(
    proto: onnx.ModelProto, bundle: Path, taken: Mapping[str, ir.TensorProtocol] | None = None
) -> onnx.ModelProto:
    """Replace initializers of `proto`, in place, by references into the weights of a bundle; return `proto`.

    An initializer is replaced if it equals a stored tensor or its transpose. The graph must then be saved in
    the folder of the bundle. `taken` has the values of placeholders; given, only these are replaced.
    """
    tables: dict[int, dict[Key, tuple[StoredTensor, bool]]] = {}
    initializers: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    sought = [tensor for tensor in proto.graph.initializer if _is_sought(tensor, taken)]
    shapes = {tuple(sorted(tensor.dims)) for tensor in sought}
    names = {tensor.name for tensor in sought}
    for tensor in proto.graph.initializer:
        held, match = (taken or {}).get(tensor.name), None
        if tensor.name in names:
            if tensor.data_type not in tables:
                tables[tensor.data_type] = _table(weight_files(bundle), tensor.data_type, shapes)
            value = numpy_helper.to_array(tensor) if held is None else held.numpy()
            match = tables[tensor.data_type].get(_key(value))
        if match is None:
            initializers.append(tensor if held is None else _whole(tensor.name, held))
            continue
        restoring = list(_restoring_nodes(tensor, *match))
        name = tensor.name + ".stored" if restoring else tensor.name
        initializers.append(_reference(name, match[0], bundle))
        nodes += restoring
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(initializers)
    body = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *body])
    return proto


def save_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph that shares the weights in the same folder."""
    save_whole(share_weights(proto, path.parent), path)
    # ONNX Runtime opens every graph before it is kept. The checker alone refuses weights with a second name
    # on disk, as those of a pipeline have that was linked.
    if all(file.stat().st_nlink == 1 for file in weight_files(path.parent)):
        onnx.checker.check_model(str(path))


def save_whole(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph with all its tensors: in one file, or with the tensors in `<graph>.data`."""
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
    """Return the file for the tensors of a large graph."""
    return path.with_name(f"{path.name}.data")


def _restoring_nodes(tensor: TensorProto, stored: StoredTensor, transposed: bool) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that make `tensor` of what is stored: Transpose, Cast, both or none.

    Where both are there, the smaller tensor is transposed: a runtime that folds them holds both results.
    """
    source = tensor.name + ".stored"
    cast = stored.type != tensor.data_type
    if transposed:
        target = tensor.name + ".transposed" if cast else tensor.name
        yield helper.make_node("Transpose", [source], [target], name=f"{tensor.name}/Transpose", perm=[1, 0])
        source = target
    if cast:
        yield helper.make_node(
            "Cast", [source], [tensor.name], name=f"{tensor.name}/Cast", to=tensor.data_type
        )


def _reference(name: str, stored: StoredTensor, bundle: Path) -> TensorProto:
    location = stored.file.relative_to(bundle)
    tensor = TensorProto(
        name=name, data_type=stored.type, dims=stored.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", stored.offset), ("length", stored.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _is_sought(tensor: TensorProto, taken: Mapping[str, ir.TensorProtocol] | None) -> bool:
    """Return True for a tensor that is worth sharing: one of those taken, else one that is not shared yet."""
    if tensor.data_type not in FLOATS or np.prod(tensor.dims) * 4 < MIN_BYTES:
        return False
    return tensor.data_location != TensorProto.EXTERNAL if taken is None else tensor.name in taken


def _table(
    files: Iterable[Path], data_type: int, shapes: Collection[tuple[int, ...]]
) -> dict[Key, tuple[StoredTensor, bool]]:
    """Return stored tensors by content as `data_type`, and whether that content is their transpose.

    Only those with the sorted dimensions of one of `shapes` are read.
    """
    dtype: Any = helper.tensor_dtype_to_np_dtype(data_type)
    table: dict[Key, tuple[StoredTensor, bool]] = {}
    for stored in (tensor for file in files for tensor in stored_tensors(file)):
        if tuple(sorted(stored.shape)) not in shapes:
            continue
        stored_type: Any = helper.tensor_dtype_to_np_dtype(stored.type)
        raw: npt.NDArray[Any] = np.memmap(
            stored.file, dtype=stored_type, mode="r", offset=stored.offset, shape=stored.shape
        )
        value = np.asarray(raw).astype(dtype, copy=False)
        if value.ndim == 2:
            table.setdefault(_key(value.T), (stored, True))
        table[_key(value)] = (stored, False)
    return table


def stored_tensors(weights: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a safetensors file, read from its header."""
    with weights.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in STORED and entry["shape"]:
            begin, end = entry["data_offsets"]
            kind, shape = STORED[entry["dtype"]], tuple(entry["shape"])
            yield StoredTensor(weights, name, kind, shape, 8 + size + begin, end - begin)


def _key(value: npt.NDArray[Any]) -> Key:
    contents = np.ascontiguousarray(value).view(np.uint8).data if value.ndim else value.tobytes()
    return hashlib.sha256(contents).digest(), value.shape
