"""One copy of the weights that a further backbone has in common with the bundle's own network.

A student begins as its teacher, and some tensors stay as they are: tables of the pictures' means, for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from ditserve.export.storage import MIN_BYTES, StoredTensor, stored_tensors, write_stored
from ditserve.model.spec.bundle import CONDITION_GRAPHS, WEIGHTS, write_atomic


def leave_out_shared(place: Path, whole: Path) -> tuple[str, ...]:
    """Remove from the weights in `place` what those in `whole` have under the same name; return the names.

    `place` lies within `whole`. The graphs in it are changed to find their weights again. Those of the
    conditions refer to both files, from `whole` on; a tensor that another graph uses is kept.
    """
    own = {tensor.name: tensor for tensor in stored_tensors(whole / WEIGHTS)}
    further = {tensor.name: tensor for tensor in stored_tensors(place / WEIGHTS)}
    by_offset = {tensor.offset: tensor.name for tensor in further.values()}
    graphs = {path: onnx.load(path, load_external_data=False) for path in sorted(place.glob("*.onnx"))}
    apart = {
        by_offset[int(reference["offset"])]
        for path, graph in graphs.items()
        if path.name not in CONDITION_GRAPHS
        for _, reference in _references(graph)
    }
    shared = tuple(
        name
        for name, tensor in further.items()
        if name not in apart and tensor.length >= MIN_BYTES and name in own and _equal(tensor, own[name])
    )
    if not shared:
        return ()
    write_stored(place / WEIGHTS, [tensor for name, tensor in further.items() if name not in shared])
    kept = {tensor.name: tensor for tensor in stored_tensors(place / WEIGHTS)}
    for path, graph in graphs.items():
        from_whole = path.name in CONDITION_GRAPHS
        for tensor, reference in _references(graph):
            name = by_offset[int(reference["offset"])]
            stored = own[name] if name in shared else kept[name]
            location = stored.file.relative_to(whole if from_whole else place)
            _refer(tensor, {**reference, "location": str(location), "offset": str(stored.offset)})
        write_atomic(path, graph.SerializeToString())
    return shared


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    return (a.type, a.shape) == (b.type, b.shape) and a.read() == b.read()


def _references(graph: onnx.ModelProto) -> Iterator[tuple[TensorProto, dict[str, str]]]:
    """Yield the tensors of a graph that are stored among the weights, with where they are."""
    for tensor in graph.graph.initializer:
        reference = {entry.key: entry.value for entry in tensor.external_data}
        if reference.get("location") == WEIGHTS:
            yield tensor, reference


def _refer(tensor: TensorProto, reference: dict[str, str]) -> None:
    del tensor.external_data[:]
    for key, value in reference.items():
        tensor.external_data.add(key=key, value=value)
