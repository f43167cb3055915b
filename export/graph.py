"""Graphs from torch to ONNX, opset 20: embedder, conditioner, backbone, and an autoencoder.

The batch is free. The size of the picture is free too, except with a layout path, which has weights for every
token of one size. A node is named after its module ("blocks.0.attn.qkv/MatMul"): quantisation chooses its
layers by these names, and TensorRT has them in its errors. Nothing of the exporting machine (paths, stack
traces) stays in a graph. Given a `bundle` that holds the weights, a graph refers to them instead of holding
copies.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ditserve.export.errors import ExportError
from ditserve.export.rewriting import (
    drop_unused_inputs,
    factor_positions,
    replace_float64,
    transpose_narrow_convolutions,
)
from ditserve.export.storage import put_tensors, share_weights, take_tensors
from ditserve.export.translations import TRANSLATIONS
from ditserve.model.nets.autoencoder import PictureAutoencoder, PictureDecoder
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.heap import compact_heap
from ditserve.model.spec.network_config import graph_multiples
from ditserve.model.spec.sizes import Size

OPSET = 20
# The embedder's input for sentence embeddings.
TEXT = "text"
SCOPES = "pkg.torch.onnx.name_scopes"
# The names of the free sides, of which pictures have the last two; frames may be those of depth.
SIDES = ("frames", "rows", "columns")
# Prefixes that the exporter's names of weights, inputs and outputs get here.
NETWORK, INPUT, OUTPUT = "network.", "in.", "out."


class _Embedder(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, *conditions: Tensor) -> Tensor:
        """Return the embedding (N, E) of F tensors (N,), and of text (N, text_width) if there is any."""
        factors = len(self.network.config.classes)
        empty = torch.zeros(conditions[0].shape[0], 0, dtype=torch.int64)
        labels = torch.stack(conditions[:factors], dim=1) if factors else empty
        return self.network.embed(labels, *conditions[factors:])


class _Conditioner(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, timestep: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.modulate(timestep, embedding))


class _Backbone(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        """Return the output in fp32 for fp32 inputs, whatever the dtype of the weights.

        The casts are in the graph because rounding the condition state took a host longer than the step took
        its GPU.
        """
        dtype = next(self.network.parameters()).dtype
        return self.network.backbone(x.to(dtype), [tensor.to(dtype) for tensor in state]).float()


class _Trunk(nn.Module):
    def __init__(self, network: DiT, blocks: int) -> None:
        super().__init__()
        self.network, self.count = network, blocks

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        return self.network.trunk(x, state, self.count)


class _Tail(nn.Module):
    def __init__(self, network: DiT, blocks: int) -> None:
        super().__init__()
        self.network, self.count = network, blocks

    def forward(self, x: Tensor, change: Tensor, *state: Tensor) -> Tensor:
        return self.network.tail(x, state, change, self.count)


class _Encoder(nn.Module):
    def __init__(self, autoencoder: PictureAutoencoder) -> None:
        super().__init__()
        self.network = getattr(autoencoder, "network", None)
        self.autoencoder = autoencoder

    def forward(self, image: Tensor) -> Tensor:
        return self.autoencoder.encode(image)


class _Decoder(nn.Module):
    def __init__(self, autoencoder: PictureDecoder) -> None:
        super().__init__()
        # A submodule, so that its weights become part of the graph.
        self.network = getattr(autoencoder, "network", None)
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.autoencoder.decode(latent)


@dataclass(frozen=True, slots=True)
class _GraphSpec:
    """A module to export, with an example of its inputs.

    `strict` exports from Python's bytecode, which sees through `len` of a tensor.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    variadic: int = 0  # trailing inputs that the module takes as *args
    sides: Size = ()  # the sides of the first input are multiples of these; none: fixed
    patch: Size = ()  # the second input is in patches of these; none: it is of one size
    batch: int = 65536  # largest batch for which the module has no branch of its own
    strict: bool = True


def embedder_graph(
    network: Network, factors: Sequence[str], bundle: Path | None = None
) -> onnx.ModelProto | None:
    """Export the embedder: the conditions → `embedding` (B, E).

    Its inputs are one int64 (B,) per factor, named as the factor, and `text` (B, text_width).
    Return None for a model without conditions: its embedding is zero.
    """
    inputs = {name: torch.zeros(2, dtype=torch.int64) for name in factors}
    if network.config.text_size:
        inputs[TEXT] = torch.ones(2, network.config.text_width)
    if not inputs:
        return None
    return _export(_GraphSpec(_Embedder(network), inputs, ("embedding",), len(inputs)), bundle)


def conditioner_graph(network: Network, bundle: Path | None = None) -> onnx.ModelProto:
    """Export the conditioner: `timestep` (B,), `embedding` (B, E) → (B, *shape) per tensor of the state."""
    embedding = torch.randn(2, network.config.embedding_size)
    inputs = {"timestep": torch.tensor([1.0, 999.0]), "embedding": embedding}
    names = tuple(name for name, _ in network.config.state())
    return _export(_GraphSpec(_Conditioner(network), inputs, names), bundle)


def backbone_graph(network: Network, bundle: Path | None = None) -> onnx.ModelProto:
    """Export the backbone: `x` (B, C, H, W) and each state tensor (B, *shape) → `output` (B, C_out, H, W).

    Inputs and output are float32. The graph computes in the dtype of the weights; a graph in fp32 is arranged
    for the kernels of CPUs. Sides are free in multiples of `graph_multiples`, if there are any. With three
    axes `x` is (B, C, F, H, W).
    """
    inputs, sides = _backbone_inputs(network), graph_multiples(network.config) or ()
    module = _Backbone(network.with_symbolic_positions() if isinstance(network, DiT) and sides else network)
    spec = _GraphSpec(module, inputs, ("output",), len(inputs) - 1, sides, strict=isinstance(network, UNet))
    proto = _export(spec, bundle)
    if next(network.parameters()).dtype == torch.float32:
        transpose_narrow_convolutions(proto.graph)
    return proto


def trunk_graph(network: DiT, blocks: int, bundle: Path | None = None) -> onnx.ModelProto:
    """Export the first `blocks` blocks: `x` and condition state → `change` (B, h, w, D), see `DiT.trunk`.

    The state is only what these blocks take.
    """
    inputs, sides = _backbone_inputs(network), graph_multiples(network.config) or ()
    module = _Trunk(network.with_symbolic_positions() if sides else network, blocks)
    spec = _GraphSpec(module, inputs, ("change",), len(inputs) - 1, sides, strict=False)
    proto = drop_unused_inputs(_export(spec, bundle))
    factor_positions(proto.graph, network.config.grid_size)
    return proto


def tail_graph(network: DiT, blocks: int, bundle: Path | None = None) -> onnx.ModelProto:
    """Export the rest: `x`, `change` (B, h, w, D) and condition state → `output`, see `DiT.tail`."""
    config, sides = network.config, graph_multiples(network.config) or ()
    x, *state = _backbone_inputs(network).items()
    inputs = dict([x, ("change", torch.randn(2, *config.grid_size, config.hidden_size)), *state])
    module = _Tail(network.with_symbolic_positions() if sides else network, blocks)
    patch = config.patch if sides else ()
    spec = _GraphSpec(module, inputs, ("output",), len(state), sides, patch=patch, strict=False)
    proto = drop_unused_inputs(_export(spec, bundle))
    transpose_narrow_convolutions(proto.graph)
    factor_positions(proto.graph, config.grid_size)
    return proto


def _backbone_inputs(network: Network) -> dict[str, Tensor]:
    """Return examples of `x` and of the condition state, by name."""
    config = network.config
    inputs = {"x": torch.randn(2, config.in_channels, *config.image_size)}
    return inputs | {name: torch.randn(2, *shape) for name, shape in config.state()}


def decoder_graph(autoencoder: PictureDecoder, channels: int) -> onnx.ModelProto:
    """Export the decoder: `latent` (B, `channels`, h, w) → `image` (B, 3, H, W), any batch and size."""
    inputs = {"latent": torch.randn(2, channels, 8, 8)}
    # From batch 64 on diffusers changes the memory layout: the numbers are the same, but it would be a branch
    # in the graph.
    return _export(
        _GraphSpec(_Decoder(autoencoder), inputs, ("image",), sides=(1, 1), batch=63, strict=False)
    )


def encoder_graph(autoencoder: PictureAutoencoder) -> onnx.ModelProto:
    """Export the encoder: `image` (B, 3, H, W) → `latent` (B, C, h, w), the mean; any batch and size."""
    factor = autoencoder.factor
    inputs = {"image": torch.randn(2, 3, 8 * factor, 8 * factor)}
    return _export(
        _GraphSpec(_Encoder(autoencoder), inputs, ("latent",), sides=(factor,) * 2, batch=63, strict=False)
    )


def _export(spec: _GraphSpec, bundle: Path | None = None) -> onnx.ModelProto:
    """Export a module; with `bundle`, its tensors are not copied but refer to the weights there."""
    with compact_heap():
        model = _traced(spec)
        taken = {_weight_name(name): tensor for name, tensor in take_tensors(model).items()}
        proto = _clean(ir.to_proto(model))
        return put_tensors(proto, taken) if bundle is None else share_weights(proto, bundle, taken)


def _traced(spec: _GraphSpec) -> ir.Model:
    shapes = _shapes(spec)
    example = tuple(spec.inputs.values())
    with _silence_exporter(), torch.no_grad():
        traced = torch.export.export(spec.module.eval(), example, dynamic_shapes=shapes, strict=spec.strict)
        program = torch.onnx.export(
            traced,
            example,
            input_names=[INPUT + name for name in spec.inputs],
            output_names=[OUTPUT + name for name in spec.outputs],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=shapes,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    # The tracer remembers the modules that it has seen, with their weights.
    torch._dynamo.reset()
    if program is None:
        raise ExportError("torch.onnx.export returned no program: use torch 2.9 or later")
    return program.model


def _shapes(spec: _GraphSpec) -> tuple[Any, ...]:
    """Return the free dimensions of each input, nested as the module takes its arguments."""
    dim = torch.export.Dim
    batch = dim("batch", min=1, max=spec.batch)
    axes: list[dict[int, Any]] = [{0: batch} for _ in spec.inputs]
    if spec.sides:
        names = SIDES[-len(spec.sides) :]
        dims = [dim(name, min=1, max=4096) for name in names]
        sides = [k * name for k, name in zip(spec.sides, dims, strict=True)]
        axes[0] |= dict(enumerate(sides, 2))
        if spec.patch:
            multiples = zip(spec.sides, spec.patch, dims, strict=True)
            axes[1] |= dict(enumerate((side // patch * name for side, patch, name in multiples), 1))
    plain = len(axes) - spec.variadic
    return (*axes[:plain], *([tuple(axes[plain:])] if spec.variadic else []))


def _clean(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Name nodes and values after their scope, weights as in the model; drop documentation and metadata."""
    graph = proto.graph
    replace_float64(graph)
    names = {
        value.name: value.name.removeprefix(INPUT).removeprefix(OUTPUT)
        for value in (*graph.input, *graph.output)
    }
    for tensor in graph.initializer:
        names[tensor.name] = _weight_name(tensor.name)
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


def _weight_name(name: str) -> str:
    """Return the model's name of a weight, from the exporter's."""
    return name.removeprefix(NETWORK) if name.startswith(NETWORK) else f"constant/{name}"


def _scope(node: onnx.NodeProto) -> str:
    """Return the module that a node comes from, such as "blocks.0.attn.qkv".

    Return "" for a node of the outermost module, and for one that the exporter added.
    """
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            outside = ("", NETWORK.rstrip("."), "_empty_nn_module_stack_from_metadata_hook")
            names = [name for name in ast.literal_eval(entry.value)[:-1] if name not in outside]
            return str(names[-1]).removeprefix(NETWORK) if names else ""
    return ""


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Silence the exporter's warnings about packages and axis names; its errors still come through."""
    names = ("torch", "torch.onnx", "torch.__trace", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
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
