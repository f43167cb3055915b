"""`python -m export.half BUNDLE`: the backbone in half precision, with fp32 islands, beside the fp32 one.

LayerNorm statistics are computed in fp32 and the conditioner stays fp32 altogether: rounding its timestep frequencies alone would
raise the whole model's error tenfold. fp16 is taken unless activations on real trajectories come near its largest number, then bf16.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ditserve.export.calibrate import Backbone, Rows
from ditserve.export.command import guarded
from ditserve.export.errors import ExportError
from ditserve.export.graph import backbone_graph
from ditserve.export.parity import compare_rows, graph_backbone
from ditserve.export.source import open_source
from ditserve.export.storage import remove_graph, save_graph
from ditserve.export.verify import CALIBRATION, LIMITS, Band, check, worst
from ditserve.model.nets.factory import Network
from ditserve.model.nets.layers import Attention
from ditserve.model.spec.bundle import write_manifest
from ditserve.model.train.loaded_model import LoadedModel

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FP16_MAX = 65504.0
HEADROOM = 8.0  # other conditions and noise than the probed may go higher


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest absolute activation seen, and the module it came from."""

    value: float
    module: str

    @property
    def precision(self) -> str:
        """The half precision that holds it with room to spare."""
        return "fp16" if self.value * HEADROOM < FP16_MAX else "bf16"


def filename(precision: str) -> str:
    """The graph file of a half precision."""
    return f"backbone.{precision}.onnx"


@torch.no_grad()
def probe(network: Network, rows: Rows) -> Peak:
    """The peak over the output of every module of the backbone and every attention score, along `rows`."""
    peaks: dict[str, float] = {}
    for index in torch.arange(len(rows)).split(32):
        part = rows.at(index)
        state = part.state(network)  # the conditioner stays fp32: its numbers do not count
        with _watch(network, peaks):
            network.backbone(part.x, state)
    name = max(peaks, key=lambda key: peaks[key])
    return Peak(peaks[name], name)


@contextmanager
def _watch(network: Network, peaks: dict[str, float]) -> Iterator[None]:
    def record(name: str, value: Tensor) -> None:
        largest = float(value.abs().max())
        peaks[name] = max(peaks.get(name, 0.0), largest if math.isfinite(largest) else math.inf)

    def watcher(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                record(name, output)
            if isinstance(module, Attention):
                q, k, _ = module.heads(*inputs)
                record(f"{name} (scores)", q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)

        return hook

    handles = [
        module.register_forward_hook(watcher(name)) for name, module in network.named_modules() if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def half_graph(network: Network, precision: str) -> onnx.ModelProto:
    """The backbone with weights, inputs and output in `precision`."""
    return backbone_graph(halved(network, precision))


def halved(network: Network, precision: str) -> Network:
    """A copy of `network` in `precision`."""
    return copy.deepcopy(network).to(DTYPES[precision])


def write_half(
    source: LoadedModel, folder: Path, rows: Rows, precision: str = "auto"
) -> tuple[str, Peak, tuple[Band, ...]]:
    """Write the half-precision backbone into `folder`, which holds the weights; returns precision, peak and errors.

    fp16 is run in ONNX Runtime; bf16, which it cannot run on a CPU, in torch.

    Raises:
        ExportError: the graph is beyond the limit of its precision; it is then removed.
    """
    peak = probe(source.network, rows)
    chosen = peak.precision if precision == "auto" else precision
    path = folder / filename(chosen)
    save_graph(half_graph(source.network, chosen), path)
    served = graph_backbone(source.network, path) if chosen == "fp16" else _in_torch(source.network, chosen)
    bands = compare_rows(source, rows, served)
    try:
        check(path.name, bands, LIMITS[chosen])
    except ExportError as error:
        remove_graph(path)
        raise ExportError(f"{error}; the largest activation is {peak.value:.3g} in {peak.module}") from None
    return chosen, peak, bands


def _in_torch(network: Network, precision: str) -> Backbone:
    half, dtype = halved(network, precision), DTYPES[precision]
    return lambda x, state: half.backbone(x.to(dtype), [tensor.to(dtype) for tensor in state]).float()


def main(arguments: list[str]) -> int:
    """Command line; 0 done, 2 refused with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m export.half", description="Add a half-precision backbone to a bundle."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return guarded("export.half", lambda: _run(options.bundle, options.precision))


def _run(bundle: Path, precision: str) -> None:
    source = open_source(bundle)
    rows = Rows.load(bundle / CALIBRATION).with_null(source.network.config)
    chosen, peak, bands = write_half(source, bundle, rows, precision)
    write_manifest(bundle, source.manifest)
    print(
        f"{bundle / filename(chosen)}: within {worst(bands).relative_l2:.1e} of fp32 (relative L2), "
        f"largest activation {peak.value:.3g} in {peak.module}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
