"""The networks to measure: bundles, or published sizes with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch

from ditserve.export.graph_files import write_graphs
from ditserve.export.half import half_file, half_graph
from ditserve.export.storage import save_graph
from ditserve.model.nets.cost import cost
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import make_network
from ditserve.model.spec.bundle import MANIFEST, Bundle, write_manifest
from ditserve.model.spec.dit_config import DiTConfig, published_config
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import own_config
from ditserve.model.weights.files import write_bundle
from ditserve.model.weights.imported import ImportedWeights

Floats = npt.NDArray[np.float32]

# The spread of the noise added to all weights: a freshly initialised DiT is the identity.
SPREAD = 0.02


def random_network(config: DiTConfig, *, seed: int = 0) -> DiT:
    """Return a DiT with random weights that all matter."""
    torch.manual_seed(seed)
    network = make_network(config).eval().requires_grad_(False)
    for tensor in network.parameters():
        tensor.add_(torch.randn_like(tensor), alpha=SPREAD)
    return network


def random_bundle(config: DiTConfig, folder: Path, *, seed: int = 0, half: bool = False) -> Bundle:
    """Write a bundle with random weights and its graphs to `folder`, for figures that depend on shapes alone.

    `half` adds the graph in half precision. The latents stand for pixels, so that the bundle needs no
    decoder.
    """
    network = random_network(config, seed=seed)
    manifest = write_bundle(folder, ImportedWeights(network.state_dict(), config), licence="none")
    manifest = manifest.model_copy(update={"decoder": "identity"})
    write_graphs(network, manifest, folder)
    if half:
        save_graph(half_graph(network, "fp16"), folder / half_file("fp16"))
    write_manifest(folder, manifest)
    return Bundle.open(folder)


def open_bundle(name: str, folder: Path, *, half: bool = False) -> Bundle:
    """Open the bundle in the folder `name`, or write one of the published size `name` to `folder`.

    Raises:
        ValueError: `name` is neither a bundle nor a published size.
    """
    if (Path(name) / MANIFEST).is_file():
        return Bundle.open(name)
    return random_bundle(published_config(name), folder, half=half)


@contextmanager
def opened_bundles(names: Sequence[str], *, half: bool = False) -> Iterator[dict[str, Bundle]]:
    """Open all bundles by name; those of published sizes live in a temporary folder."""
    with TemporaryDirectory(prefix="dit-") as folder:
        yield {name: open_bundle(name, Path(folder) / str(k), half=half) for k, name in enumerate(names)}


def inputs(manifest: Manifest, rows: int, *, seed: int = 0) -> tuple[Floats, tuple[Floats, ...]]:
    """Return random latents (rows, C, H, W) and the condition state of as many rows."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, manifest.config.in_channels, *manifest.config.image_size), np.float32)
    return x, tuple(
        0.1 * random.standard_normal((rows, *tensor.shape), np.float32) for tensor in manifest.state
    )


def row_flops(bundle: Bundle) -> int:
    """Return the operations of the backbone for one row; the conditioner's results are cached in service."""
    config = own_config(bundle.manifest.name, bundle.manifest.config)
    return 2 * cost(config).backbone_macs
