"""torch → ONNX: the embedder, the conditioner and the backbone of a DiT as three graphs, opset 20, any batch size.

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

import onnx
import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError

from export.errors import ExportError
from model.dit import DiT

OPSET = 20
SCOPES = "pkg.torch.onnx.name_scopes"
PREFIX, INPUT, OUTPUT = (
    "dit.",
    "in.",
    "out.",
)  # what the exporter's names of parameters, inputs and outputs begin with


class _Embedder(nn.Module):
    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, *labels: Tensor) -> Tensor:
        return self.dit.embed(torch.stack(labels, dim=1))  # F × (N,) → (N, E)


class _Conditioner(nn.Module):
    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, timestep: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.dit.modulate(timestep, embedding)


class _Backbone(nn.Module):
    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        return self.dit.backbone(x, state)


@dataclass(frozen=True, slots=True)
class _Wiring:
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    variadic: int  # trailing inputs that the module takes as *args


def embedder_graph(dit: DiT, factors: Sequence[str]) -> onnx.ModelProto:
    """One int64 input (B,) per factor, named as the factor → `embedding` (B, E)."""
    inputs = {name: torch.zeros(2, dtype=torch.int64) for name in factors}
    return _export(_Wiring(_Embedder(dit), inputs, ("embedding",), len(inputs)))


def conditioner_graph(dit: DiT) -> onnx.ModelProto:
    """`timestep` float32 (B,), `embedding` (B, E) → one output (B, *shape) per tensor of the condition state."""
    inputs = {"timestep": torch.tensor([1.0, 999.0]), "embedding": torch.randn(2, dit.config.hidden_size)}
    names = tuple(name for name, _ in dit.config.state())
    return _export(_Wiring(_Conditioner(dit), inputs, names, 0))


def backbone_graph(dit: DiT) -> onnx.ModelProto:
    """`x` (B, C, H, W) and one input (B, *shape) per tensor of the condition state → `output` (B, C_out, H, W).

    Inputs and output have the dtype of `dit`'s weights.
    """
    dtype = next(dit.parameters()).dtype
    inputs = {"x": torch.randn(2, dit.config.in_channels, *dit.config.image_size, dtype=dtype)}
    inputs |= {name: torch.randn(2, *shape, dtype=dtype) for name, shape in dit.config.state()}
    return _export(_Wiring(_Backbone(dit), inputs, ("output",), len(inputs) - 1))


def _export(wiring: _Wiring) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=65536)
    axes = [{0: batch} for _ in wiring.inputs]
    plain = len(axes) - wiring.variadic
    shapes = (*axes[:plain], *([tuple(axes[plain:])] if wiring.variadic else []))
    example = tuple(wiring.inputs.values())
    with _quiet(), torch.no_grad():
        traced = _trace(wiring.module.eval(), example, shapes)
        program = torch.onnx.export(
            traced,
            example,
            input_names=[INPUT + name for name in wiring.inputs],
            output_names=[OUTPUT + name for name in wiring.outputs],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=shapes,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program: use torch 2.9 or later")
    return _clean(program.model_proto)


def _trace(
    module: nn.Module, example: tuple[Tensor, ...], shapes: tuple[Any, ...]
) -> torch.export.ExportedProgram:
    """The quick way, or where that would fix the batch size (Python's `len` of a tensor does) the thorough one."""
    try:
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    except UserError:
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=True)


def _clean(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Name nodes and values by their scope and parameters as in the model; drop documentation and metadata."""
    graph = proto.graph
    names = {
        value.name: value.name.removeprefix(INPUT).removeprefix(OUTPUT)
        for value in (*graph.input, *graph.output)
    }
    for tensor in graph.initializer:
        names[tensor.name] = (
            tensor.name.removeprefix(PREFIX) if tensor.name.startswith(PREFIX) else f"constant/{tensor.name}"
        )
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


def _scope(node: onnx.NodeProto) -> str:
    """The module a node comes from, such as "blocks.0.attn.qkv"; "" at the top or where the exporter made the node."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            names = [
                name for name in ast.literal_eval(entry.value)[:-1] if name not in ("", PREFIX.rstrip("."))
            ]
            return str(names[-1]).removeprefix(PREFIX) if names else ""
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
