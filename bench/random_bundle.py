"""A bundle of a published size with random weights, for what depends on shapes alone."""

from __future__ import annotations

from pathlib import Path

import torch

from ditserve.export.half import half_file, half_graph
from ditserve.export.onnx import write_graphs
from ditserve.export.storage import save_graph
from ditserve.model.nets.factory import make_network
from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.weights.files import write_bundle

SPREAD = 0.02  # of what is added, since a network fresh from its initialisation is the identity


def random_bundle(config: DiTConfig, folder: Path, *, seed: int = 0, half: bool = False) -> Bundle:
    """Written to `folder`, with its graphs, of which `half` is one more; its latents stand for pixels, so that it needs no decoder."""
    torch.manual_seed(seed)
    network = make_network(config).eval()
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(torch.randn_like(tensor), alpha=SPREAD)
    manifest = write_bundle(folder, network.state_dict(), config, licence="none")
    manifest = manifest.model_copy(update={"decoder": "identity"})
    write_graphs(network, manifest, folder)
    if half:
        save_graph(half_graph(network, "fp16"), folder / half_file("fp16"))
    write_manifest(folder, manifest)
    return Bundle.open(folder)
