"""torch → ONNX, opset 20: embedder, conditioner and backbone of a network, and the decoder of a model on latents.

The batch is free, and so is the size of the picture, except under a layout path, which has numbers for every token of one size.
Node names say where in the network a node belongs ("blocks.0.attn.qkv/MatMul"): quantisation picks its layers by them and
TensorRT names them in errors. Nothing of the exporting machine (paths, stack traces) stays in a graph.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from onnxscript import opset20 as op
from torch import Tensor, nn

from ditserve.export.errors import ExportError
from ditserve.model.nets.autoencoder import Autoencoder
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network
from ditserve.model.spec.network_config import size_multiple

OPSET = 20
TEXT = "text"  # the embedder's input for sentence embeddings
NARROW = 4  # output channels
SCOPES = "pkg.torch.onnx.name_scopes"
NETWORK, INPUT, OUTPUT = "network.", "in.", "out."  # what the exporter's names of values begin with


class _Embedder(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, *conditions: Tensor) -> Tensor:
        """F × (N,), and (N, text_size) where the model takes text → (N, E)."""
        factors = len(self.network.config.classes)
        empty = torch.zeros(conditions[0].shape[0], 0, dtype=torch.int64)
        labels = torch.stack(conditions[:factors], dim=1) if factors else empty
        return self.network.embed(labels, *conditions[factors:])


class _Conditioner(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, timestep: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.network.modulate(timestep, embedding)


class _Backbone(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        """fp32 in and out, whatever the weights: to round the condition state took a host longer than the step took its GPU."""
        dtype = next(self.network.parameters()).dtype
        return self.network.backbone(x.to(dtype), [each.to(dtype) for each in state]).float()


class _Decoder(nn.Module):
    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.network = getattr(autoencoder, "vae", None)  # its weights are part of the graph
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.autoencoder.decode(latent)


@dataclass(frozen=True, slots=True)
class _Wiring:
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    variadic: int = 0  # trailing inputs that the module takes as *args
    sides: int = 0  # height and width of the first input are any multiples of this; 0: fixed
    batch: int = 65536  # the largest that the module takes without looking at it
    strict: bool = True  # read Python's bytecode, which sees through `len` of a tensor


def embedder_graph(network: Network, factors: Sequence[str]) -> onnx.ModelProto | None:
    """One int64 input (B,) per factor, named as the factor, and `text` (B, text_size) → `embedding` (B, E).

    None for a model without conditions: its embedding is zero.
    """
    inputs = {name: torch.zeros(2, dtype=torch.int64) for name in factors}
    if network.config.text_size:
        inputs[TEXT] = torch.ones(2, network.config.text_size)
    return _export(_Wiring(_Embedder(network), inputs, ("embedding",), len(inputs))) if inputs else None


def conditioner_graph(network: Network) -> onnx.ModelProto:
    """`timestep` float32 (B,), `embedding` (B, E) → one output (B, *shape) per tensor of the condition state."""
    inputs = {"timestep": torch.tensor([1.0, 999.0]), "embedding": torch.randn(2, network.config.hidden_size)}
    names = tuple(name for name, _ in network.config.state())
    return _export(_Wiring(_Conditioner(network), inputs, names))


def backbone_graph(network: Network) -> onnx.ModelProto:
    """`x` (B, C, H, W) and one input (B, *shape) per tensor of the condition state → `output` (B, C_out, H, W), all float32.

    It computes in the dtype of the network's weights: in fp32, which CPUs run, with their kernels in mind. H and W are free where
    `size_multiple` says.
    """
    config = network.config
    inputs = {"x": torch.randn(2, config.in_channels, *config.image_size)}
    inputs |= {name: torch.randn(2, *shape) for name, shape in config.state()}
    sides = size_multiple(config) or 0
    dit = isinstance(network, DiT)
    module = _Backbone(network.with_symbolic_positions() if isinstance(network, DiT) and sides else network)
    proto = _export(_Wiring(module, inputs, ("output",), len(inputs) - 1, sides, strict=not dit))
    if next(network.parameters()).dtype == torch.float32:
        _turn_narrow(proto.graph)
    return proto


def decoder_graph(autoencoder: Autoencoder, channels: int) -> onnx.ModelProto:
    """`latent` (B, C, h, w) → `image` (B, 3, H, W), any batch and size; C is `channels`."""
    inputs = {"latent": torch.randn(2, channels, 8, 8)}
    # diffusers lays larger batches out anew, which changes nothing but would be a condition in the graph
    return _export(_Wiring(_Decoder(autoencoder), inputs, ("image",), sides=1, batch=63, strict=False))


def _export(wiring: _Wiring) -> onnx.ModelProto:
    shapes = _shapes(wiring)
    example = tuple(wiring.inputs.values())
    with _quiet(), torch.no_grad():
        traced = torch.export.export(
            wiring.module.eval(), example, dynamic_shapes=shapes, strict=wiring.strict
        )
        program = torch.onnx.export(
            traced,
            example,
            input_names=[INPUT + name for name in wiring.inputs],
            output_names=[OUTPUT + name for name in wiring.outputs],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=shapes,
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention},
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program: use torch 2.9 or later")
    return _clean(program.model_proto)


def _attention(q: Any, k: Any, v: Any) -> Any:
    """softmax(q·kᵀ/√d)·v of (B, H, T, d). The exporter's own takes ten more nodes to turn the keys, and copies them twice."""
    scores = op.MatMul(op.Mul(q, op.CastLike(q.shape[3] ** -0.5, q)), op.Transpose(k, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def _shapes(wiring: _Wiring) -> tuple[Any, ...]:
    """The free dimensions of each input, nested as the module takes them."""
    dim = torch.export.Dim
    batch = dim("batch", min=1, max=wiring.batch)
    axes: list[dict[int, Any]] = [{0: batch} for _ in wiring.inputs]
    if wiring.sides:
        rows, columns = dim("rows", min=1, max=4096), dim("columns", min=1, max=4096)
        axes[0] |= {2: wiring.sides * rows, 3: wiring.sides * columns}
    plain = len(axes) - wiring.variadic
    return (*axes[:plain], *([tuple(axes[plain:])] if wiring.variadic else []))


def _clean(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Name nodes and values by their scope and parameters as in the model; drop documentation and metadata."""
    graph = proto.graph
    _narrow(graph)
    names = {
        value.name: value.name.removeprefix(INPUT).removeprefix(OUTPUT)
        for value in (*graph.input, *graph.output)
    }
    for tensor in graph.initializer:
        known = tensor.name.startswith(NETWORK)
        names[tensor.name] = tensor.name.removeprefix(NETWORK) if known else f"constant/{tensor.name}"
    counts: Counter[str] = Counter()
    for node in graph.node:
        name = f"{_scope(node)}/{node.op_type}".lstrip("/")
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name] - 1}"
        for k, value in enumerate(node.output):
            names.setdefault(value, f"{node.name}:{k}")
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
        node.doc_string = ""
        del node.metadata_props[:]
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.name, item.doc_string = names[item.name], ""
        del item.metadata_props[:]
    del graph.value_info[:]
    del graph.metadata_props[:]
    del proto.metadata_props[:]
    graph.name, graph.doc_string, proto.doc_string = "dit", "", ""
    return proto


def _narrow(graph: onnx.GraphProto) -> None:
    """float64, in which positions are computed, becomes float32: TensorRT has no other. It costs 1e-6 of an angle."""
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.DOUBLE:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            )
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.DOUBLE:
                attribute.i = TensorProto.FLOAT


def _turn_narrow(graph: onnx.GraphProto) -> None:
    """Convolutions that keep the size and give few channels become transposed ones, their kernels turned round: the same sums.

    A CPU's kernels fill whole vectors with output channels; of three, most of that is waste (4 times as long).
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or weight.dims[0] > NARROW or not _keeps_size(node, weight.dims[2:]):
            continue
        turned = numpy_helper.to_array(weight)[:, :, ::-1, ::-1].swapaxes(0, 1)
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turned), weight.name))
        node.op_type = "ConvTranspose"


def _keeps_size(node: onnx.NodeProto, kernel: Sequence[int]) -> bool:
    """Whether a convolution has an odd kernel, half of it as padding, and neither stride, dilation nor groups."""
    told = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    plain = {"group": 1, "strides": [1, 1], "dilations": [1, 1]}
    return (
        all(side % 2 for side in kernel)
        and told.get("pads") == [side // 2 for side in kernel] * 2
        and all(told.get(name, value) == value for name, value in plain.items())
    )


def _scope(node: onnx.NodeProto) -> str:
    """The module a node comes from, such as "blocks.0.attn.qkv"; "" at the top or where the exporter made the node."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            outside = ("", NETWORK.rstrip("."), "_empty_nn_module_stack_from_metadata_hook")
            names = [name for name in ast.literal_eval(entry.value)[:-1] if name not in outside]
            return str(names[-1]).removeprefix(NETWORK) if names else ""
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about packages and axis names that do not concern the user; its errors still come through."""
    loggers = [
        logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.__trace", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
