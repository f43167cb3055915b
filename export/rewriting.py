"""Rewriting of graphs for the runtimes that open them: smaller, faster, or of types that all of them know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

# The table of positions of a DiT, which is no weight.
POSITIONS = "pos_embed"
# A convolution with at most this many output channels is narrow.
NARROW_CHANNELS = 4


def replace_float64(graph: onnx.GraphProto) -> None:
    """Replace float64, in which positions are computed, by float32: TensorRT has no float64.

    It changes an angle by 1e-6.
    """
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.DOUBLE:
            single = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(single, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.DOUBLE:
                attribute.i = TensorProto.FLOAT


def factor_positions(graph: onnx.GraphProto, grid: Sequence[int]) -> None:
    """Replace a table of positions (T, D) by small ones, if each of its channels tells the place on one axis.

    The runtime puts the table together when it opens the graph. A table of other channels stays.
    """
    table = next((each for each in graph.initializer if each.name == POSITIONS), None)
    if table is None:
        return
    values = numpy_helper.to_array(table).reshape(*grid, -1)
    lines = [
        values[tuple(slice(None) if k == axis else slice(1) for k in range(len(grid)))]
        for axis in range(len(grid))
    ]
    told = [(line == values).all(tuple(range(len(grid)))) for line in lines]  # (D,) for each axis
    if not np.any(told, axis=0).all():
        return
    axes = np.argmax(told, axis=0)
    starts = [0, *(np.flatnonzero(np.diff(axes)) + 1).tolist()]
    names = [f"{POSITIONS}.{k}" for k in range(len(starts))]
    nodes: list[onnx.NodeProto] = []
    graph.initializer.remove(table)
    for name, first, end in zip(names, starts, [*starts[1:], len(axes)], strict=True):
        shape = np.array([*grid, end - first], np.int64)
        line = np.ascontiguousarray(lines[axes[first]][..., first:end])
        graph.initializer.extend([numpy_helper.from_array(line, name)])
        graph.initializer.extend([numpy_helper.from_array(shape, f"{name}.shape")])
        nodes.append(
            onnx.helper.make_node("Expand", [name, f"{name}.shape"], [f"{name}.all"], f"{name}/Expand")
        )
    whole = np.array(values.reshape(-1, values.shape[-1]).shape, np.int64)
    graph.initializer.extend([numpy_helper.from_array(whole, f"{POSITIONS}.shape")])
    parts, joined = [f"{name}.all" for name in names], f"{POSITIONS}.all"
    nodes.append(onnx.helper.make_node("Concat", parts, [joined], f"{POSITIONS}/Concat", axis=len(grid)))
    reshape = [joined, f"{POSITIONS}.shape"], [POSITIONS], f"{POSITIONS}/Reshape"
    nodes.append(onnx.helper.make_node("Reshape", *reshape))
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *body])


def transpose_narrow_convolutions(graph: onnx.GraphProto) -> None:
    """Replace narrow convolutions that keep the size by transposed ones with flipped kernels: the same sums.

    A CPU's convolution fills whole vectors with output channels. With three channels most of a vector is
    wasted, and it takes 4 times as long.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or weight.dims[0] > NARROW_CHANNELS or not _keeps_size(node, weight.dims[2:]):
            continue
        values = numpy_helper.to_array(weight)
        flipped = np.flip(values, tuple(range(2, values.ndim))).swapaxes(0, 1)
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(flipped), weight.name))
        node.op_type = "ConvTranspose"


def _keeps_size(node: onnx.NodeProto, kernel: Sequence[int]) -> bool:
    """Return True for an odd kernel with half of it as padding, and no stride, dilation or groups."""
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    plain = {"group": 1, "strides": [1] * len(kernel), "dilations": [1] * len(kernel)}
    return (
        all(side % 2 for side in kernel)
        and attributes.get("pads") == [side // 2 for side in kernel] * 2
        and all(attributes.get(name, value) == value for name, value in plain.items())
    )


def drop_unused_inputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the inputs of `proto` that no node reads, in place; return `proto`."""
    used = {name for node in proto.graph.node for name in node.input}
    for value in [value for value in proto.graph.input if value.name not in used]:
        proto.graph.input.remove(value)
    return proto
