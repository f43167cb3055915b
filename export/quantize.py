"""INT8 graphs by explicit Q/DQ nodes: the four linears of each block, symmetric scales.

Activations have one static scale per tensor, weights one per channel. There are two forms. "cpu" quantises
the fp32 backbone for ONNX Runtime. On a processor without VNNI its weights have 7 bits, because 8-bit kernels
saturate silently there, with up to 37 times the error. "tensorrt" quantises the fp16 backbone, and attention
stays fused. Never quantised: the products inside attention, the patch embedding, the final layer, the
convolution head and the conditioner.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from ditserve.export.calibrate import CalibrationRows
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
    """The features of a CPU, of which one decides how its 8-bit weights are stored."""

    flags: frozenset[str]

    @property
    def vnni(self) -> bool:
        """True if it accumulates 8-bit products without saturating at 16 bits."""
        return bool(self.flags & VNNI)


def local_processor(source: Path = Path("/proc/cpuinfo")) -> Processor:
    """Read the features of this machine's CPU; a CPU that cannot be read counts as one without VNNI."""
    try:
        lines = source.read_text().splitlines()
    except OSError:
        return Processor(frozenset())
    return Processor(
        frozenset(word for line in lines if line.startswith(("flags", "Features")) for word in line.split())
    )


class _RowReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """The calibration rows as inputs of the backbone, batch by batch."""

    def __init__(self, batches: Iterator[dict[str, npt.NDArray[Any]]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        return next(self.batches, None)


@torch.no_grad()
def backbone_inputs(
    dit: DiT, rows: CalibrationRows, batch: int = 16
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield the backbone's inputs by name for `rows`, `batch` rows at a time."""
    names = ("x", *(name for name, _ in dit.config.state()))
    for index in torch.arange(len(rows)).split(batch):
        part = rows.at(index)
        tensors = (part.x, *part.state(dit))
        yield {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}


def float_products(proto: onnx.ModelProto, dit: DiT) -> list[str]:
    """Return the names of the products that stay in floating point: all but those of the INT8 linears.

    Raises:
        ExportError: the graph lacks a linear that should be quantised.
    """
    int8_names = {f"{name}/{kind}" for name in int8_linears(dit) for kind in PRODUCTS}
    products = [node.name for node in proto.graph.node if node.op_type in PRODUCTS]
    missing = [
        name for name in int8_linears(dit) if not any(f"{name}/{kind}" in products for kind in PRODUCTS)
    ]
    if missing:
        raise ExportError(f"the graph has no product named after {missing[0]}: it cannot be quantised")
    return [name for name in products if name not in int8_names]


def write_int8(dit: DiT, folder: Path, rows: CalibrationRows, target: Target, *, reduce_range: bool) -> Path:
    """Quantise the backbone of `dit`, calibrated on `rows`; return the new file in `folder`.

    `folder` holds the weights. `reduce_range` stores INT8 weights in 7 bits.

    Raises:
        ExportError: the graph lacks a linear that should be quantised.
    """
    proto = backbone_graph(dit) if target == "cpu" else half_graph(dit, "fp16")
    excluded = float_products(proto, dit)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), _silent_root_logger():
        warnings.simplefilter("ignore")
        source, quantised = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
        save_whole(proto, source)
        quantize_static(
            source,
            quantised,
            _RowReader(backbone_inputs(dit, rows)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_exclude=excluded,
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


@contextmanager
def _silent_root_logger() -> Iterator[None]:
    """Silence the root logger below errors: onnxruntime's quantiser writes its advice there."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
