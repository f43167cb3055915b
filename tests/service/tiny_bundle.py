"""A tiny bundle of random weights with everything that a backend may ask for.

Its graphs are a few matrix products with the interface of exported ones, and its weights are those of a tiny
DiT. The graphs do not compute that DiT: the tests of the export check that graphs and weights agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ditserve.model.spec.bundle import write_manifest
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Defaults, Factor, Manifest, StateTensor

CONFIG = DiTConfig(
    image_size=(8, 8),
    patch_size=4,
    in_channels=3,
    hidden_size=32,
    depth=2,
    num_heads=2,
    classes=(5, 2),
    learn_sigma=False,
)
MANIFEST = Manifest(
    name="tiny",
    version="1",
    description="random weights",
    config=CONFIG,
    diffusion=DiffusionSpec(schedule="cosine", prediction="v"),
    factors=(Factor(name="label", classes=tuple("abcde")), Factor(name="style", classes=("flat", "round"))),
    embedding_size=32,
    state=tuple(StateTensor(name=name, shape=shape) for name, shape in CONFIG.state()),
    defaults=Defaults(
        steps=10, solver="ddim", grid="leading", guidance_scale=2.0, guidance_interval=(0.0, 1.0)
    ),
    licence="Apache-2.0",
)
_PIXELS = 3 * 8 * 8
_rng = np.random.default_rng(0)


def write_bundle(folder: Path, *, weights: bool) -> None:
    """Write a complete bundle into `folder`; the weights only on demand, because they need torch."""
    _save(folder / "embedder.onnx", *_embedder(), {"label": None, "style": None}, ["embedding"])
    state = dict(CONFIG.state())
    _save(folder / "conditioner.onnx", *_conditioner(), {"timestep": (), "embedding": (32,)}, list(state))
    _save(folder / "backbone.onnx", *_backbone(), {"x": (3, 8, 8), **state}, ["output"])
    if weights:
        import torch
        from safetensors.torch import save_file

        from ditserve.model.nets.dit import DiT

        torch.manual_seed(0)
        model = DiT(CONFIG)
        tensors = {name: value + 0.02 * torch.randn_like(value) for name, value in model.state_dict().items()}
        save_file(tensors, folder / "weights.safetensors")
    write_manifest(folder, MANIFEST)


def _embedder() -> tuple[list[Any], list[Any]]:
    nodes = [
        helper.make_node("Gather", ["labels", "label"], ["l"]),
        helper.make_node("Gather", ["styles", "style"], ["s"]),
        helper.make_node("Add", ["l", "s"], ["embedding"]),
    ]
    return nodes, [_weight("labels", 6, 32), _weight("styles", 3, 32)]


def _conditioner() -> tuple[list[Any], list[Any]]:
    """Return a graph that makes each state tensor by a linear map of embedding + t / 1000."""
    nodes = [
        helper.make_node("Div", ["timestep", "thousand"], ["level"]),
        helper.make_node("Unsqueeze", ["level", "one"], ["column"]),
        helper.make_node("Add", ["column", "embedding"], ["c"]),
    ]
    tensors = [numpy_helper.from_array(np.array(1000.0, np.float32), "thousand"), _integers("one", 1)]
    for name, shape in CONFIG.state():
        nodes.append(helper.make_node("MatMul", ["c", f"{name}_w"], [f"{name}_flat"]))
        nodes.append(helper.make_node("Reshape", [f"{name}_flat", f"{name}_shape"], [name]))
        tensors += [_weight(f"{name}_w", 32, int(np.prod(shape))), _integers(f"{name}_shape", -1, *shape)]
    return nodes, tensors


def _backbone() -> tuple[list[Any], list[Any]]:
    """Return a graph: down to 32 numbers a row, plus a tanh of each state tensor, and up to an image."""
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "down"], ["h"]),
    ]
    last = "h"
    for name, _ in CONFIG.state():
        nodes.append(helper.make_node("ReduceMean", [name, "one"], [f"{name}_mean"], keepdims=0))
        nodes.append(helper.make_node("Add", [last, f"{name}_mean"], [f"{name}_sum"]))
        nodes.append(helper.make_node("Tanh", [f"{name}_sum"], [last := f"{name}_h"]))
    nodes.append(helper.make_node("MatMul", [last, "up"], ["y"]))
    nodes.append(helper.make_node("Reshape", ["y", "image"], ["output"]))
    tensors = [_weight("down", _PIXELS, 32), _weight("up", 32, _PIXELS), _integers("one", 1)]
    return nodes, [*tensors, _integers("flat", -1, _PIXELS), _integers("image", -1, 3, 8, 8)]


def _weight(name: str, *shape: int) -> Any:
    return numpy_helper.from_array((_rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32), name)


def _integers(name: str, *values: int) -> Any:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _save(
    path: Path,
    nodes: list[Any],
    tensors: list[Any],
    inputs: dict[str, tuple[int, ...] | None],
    outputs: list[str],
) -> None:
    values = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["n"])
        if shape is None
        else helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])
        for name, shape in inputs.items()
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, path.stem, values, results, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
