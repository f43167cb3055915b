"""The graphs of a bundle, written beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch

from ditserve.export.graph import OPSET, backbone_graph, conditioner_graph, embedder_graph
from ditserve.export.storage import save_graph
from ditserve.model.nets.factory import Network
from ditserve.model.spec.bundle import BACKBONE, CONDITIONER, EMBEDDER
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import BundleConfig, graph_multiples


def write_graphs(network: Network, manifest: Manifest, folder: Path) -> None:
    """Write embedder, conditioner and backbone into `folder`, which holds the weights.

    A model without conditions has no embedder.
    """
    embedder = embedder_graph(network, [factor.name for factor in manifest.factors], folder)
    if embedder is not None:
        save_graph(embedder, folder / EMBEDDER)
    save_graph(conditioner_graph(network, folder), folder / CONDITIONER)
    save_graph(backbone_graph(network, folder), folder / BACKBONE)


def export_record(config: BundleConfig) -> dict[str, Any]:
    """Return what made the graphs of a network, and the sizes that they take: for a manifest's provenance."""
    sizes = "any" if graph_multiples(config) else "trained"
    version = str(torch.__version__).partition("+")[0]
    return {"torch": version, "onnx": onnx.__version__, "opset": OPSET, "sizes": sizes}
