"""INT8 by explicit Q/DQ: symmetric, static per tensor for activations, per channel for weights, four linears of each block.

Two forms of one recipe. "cpu" quantises the fp32 backbone for ONNX Runtime, with 7-bit weights where the processor lacks VNNI: its
8-bit kernels saturate silently there, up to 37 times the error. "tensorrt" quantises the fp16 backbone, which keeps fused attention.
What is not quantised: attention's own products, the patch embedding, the final layer, the convolution head and the conditioner.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from ditserve.export.calibrate import Rows
from ditserve.export.errors import ExportError
from ditserve.export.graph import backbone_graph
from ditserve.export.half import half_graph
from ditserve.export.smooth import int8_linears
from ditserve.export.storage import data_file, save_graph, save_whole
from ditserve.model.nets.dit import DiT

Target = Literal["cpu", "tensorrt"]
FILES: dict[Target, str] = {"cpu": "backbone.int8.onnx", "tensorrt": "backbone.int8.fp16.onnx"}
PRODUCTS = ("MatMul", "Gemm")
VNNI = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "asimddp"})


@dataclass(frozen=True, slots=True)
class Processor:
    """What decides how 8-bit weights must be stored for this machine."""

    flags: frozenset[str]

    @property
    def vnni(self) -> bool:
        """Accumulates 8-bit products without saturating at 16 bits."""
        return bool(self.flags & VNNI)


def this_processor(source: Path = Path("/proc/cpuinfo")) -> Processor:
    """Read the processor's features; none where they cannot be read, which is the careful answer."""
    try:
        lines = source.read_text().splitlines()
    except OSError:
        return Processor(frozenset())
    return Processor(
        frozenset(word for line in lines if line.startswith(("flags", "Features")) for word in line.split())
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Feeds calibration rows as inputs of the backbone."""

    def __init__(self, batches: Iterator[dict[str, npt.NDArray[Any]]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        return next(self.batches, None)


@torch.no_grad()
def backbone_inputs(dit: DiT, rows: Rows, batch: int = 16) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The backbone's inputs by name for `rows`, `batch` at a time."""
    names = ("x", *(name for name, _ in dit.config.state()))
    for index in torch.arange(len(rows)).split(batch):
        part = rows.at(index)
        tensors = (part.x, *part.state(dit))
        yield {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}


def excluded(proto: onnx.ModelProto, dit: DiT) -> list[str]:
    """Names of the products that stay in floating point: all but those of the INT8 linears."""
    kept = {f"{name}/{kind}" for name in int8_linears(dit) for kind in PRODUCTS}
    products = [node.name for node in proto.graph.node if node.op_type in PRODUCTS]
    missing = [
        name for name in int8_linears(dit) if not any(f"{name}/{kind}" in products for kind in PRODUCTS)
    ]
    if missing:
        raise ExportError(f"the graph has no product named after {missing[0]}: it cannot be quantised")
    return [name for name in products if name not in kept]


def write_int8(dit: DiT, folder: Path, rows: Rows, target: Target, *, reduce_range: bool) -> Path:
    """Quantise the backbone of `dit`, calibrated on `rows`, into `folder`, which holds its weights; returns the file.

    Raises:
        ExportError: the graph lacks a linear that should be quantised.
    """
    proto = backbone_graph(dit) if target == "cpu" else half_graph(dit, "fp16")
    skip = excluded(proto, dit)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), _silenced():
        warnings.simplefilter("ignore")
        source, quantised = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
        save_whole(proto, source)
        quantize_static(
            source,
            quantised,
            _Reader(backbone_inputs(dit, rows)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_exclude=skip,
            per_channel=True,
            reduce_range=reduce_range,
            use_external_data_format=data_file(source).is_file(),
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": [*PRODUCTS, "Conv"],
            },
        )
        result = onnx.load(quantised)
    del result.graph.value_info[:]
    del result.metadata_props[:]
    path = folder / FILES[target]
    save_graph(result, path)
    return path


class _silenced:
    """onnxruntime's quantiser advises on the root logger."""

    def __enter__(self) -> None:
        self.level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self.level)
