"""Parity: each graph in ONNX Runtime against the network in torch, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditserve.export.calibrate import Backbone, CalibrationRows
from ditserve.export.graph import TEXT
from ditserve.export.verify import LIMITS, Band, ParityLimits, check, compare, open_session, run
from ditserve.model.nets.autoencoder import Autoencoder
from ditserve.model.nets.factory import Network
from ditserve.model.spec.bundle import BACKBONE, CONDITIONER, EMBEDDER, Manifest
from ditserve.model.spec.network_config import size_multiple
from ditserve.model.train.loaded_model import LoadedModel

CHUNK = 32  # rows of one forward pass
DECODER_LIMITS = ParityLimits(relative_l2=1e-3, cosine=0.999999)
Array = npt.NDArray[Any]


@torch.no_grad()
def forward(network: Network, rows: CalibrationRows, backbone: Backbone | None = None) -> Tensor:
    """Return the output (N, C_out, H, W) on `rows`; `backbone` replaces that of the network if given."""
    parts = (rows.at(index) for index in torch.arange(len(rows)).split(CHUNK))
    run_backbone = backbone or network.backbone
    return torch.cat([run_backbone(part.x, part.state(network)) for part in parts])


def graph_backbone(network: Network, path: Path, options: Mapping[str, str] | None = None) -> Backbone:
    """Return the backbone in `path` as a function; `options` are session configuration entries."""
    session = open_session(path, options=options)
    names = ("x", *(name for name, _ in network.config.state()))

    def backbone(x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        inputs = {name: tensor.numpy() for name, tensor in zip(names, (x, *state), strict=True)}
        return torch.from_numpy(run(session, inputs)["output"])

    return backbone


def compare_rows(source: LoadedModel, rows: CalibrationRows, backbone: Backbone) -> tuple[Band, ...]:
    """Return the errors of `backbone` against the network's own on `rows`, by band of noise."""
    expected = forward(source.network, rows).numpy()
    return _bands(source.manifest, rows, expected, forward(source.network, rows, backbone).numpy())


def verify_graphs(source: LoadedModel, folder: Path, rows: CalibrationRows) -> dict[str, tuple[Band, ...]]:
    """Return the errors of each graph in `folder` by name, the graphs of a bundle that is being written.

    A backbone that takes other sizes than the trained one is also verified at another size.

    Raises:
        ExportError: a graph is beyond the fp32 limit.
    """
    network, manifest = source.network, source.manifest
    with torch.no_grad():
        embedding = network.embed(rows.labels, rows.text).numpy()
        state = dict(zip((name for name, _ in network.config.state()), rows.state(network), strict=True))
    bands = {}
    if conditions := _embedder_inputs(manifest, rows):
        actual = run(open_session(folder / EMBEDDER), conditions)["embedding"]
        bands[EMBEDDER] = _bands(manifest, rows, embedding, actual)
    expected_state = {name: tensor.numpy() for name, tensor in state.items()}
    conditioner_inputs = {"timestep": rows.timestep.numpy(), "embedding": embedding}
    actual_state = run(open_session(folder / CONDITIONER), conditioner_inputs)
    bands[CONDITIONER] = _bands(manifest, rows, _flat(expected_state), _flat(actual_state))
    backbone = graph_backbone(network, folder / BACKBONE)
    bands[BACKBONE] = compare_rows(source, rows, backbone)
    multiple = size_multiple(network.config)
    if multiple is not None:
        other = _rows_of_another_size(rows, network.config.image_size, multiple)
        height, width = other.x.shape[2:]
        bands[f"{BACKBONE} at {height}x{width}"] = compare_rows(source, other, backbone)
    for name, graph_bands in bands.items():
        check(name, graph_bands, LIMITS["fp32"])
    return bands


def verify_decoder(autoencoder: Autoencoder, path: Path, channels: int) -> tuple[Band, ...]:
    """Return the errors of the decoder's graph on random latents of two sizes, one band for each size.

    Raises:
        ExportError: the graph is beyond the limit.
    """
    session, generator = open_session(path), torch.Generator().manual_seed(0)
    bands: list[Band] = []
    for height, width in ((8, 8), (4, 12)):
        latent = torch.randn(2, channels, height, width, generator=generator)
        with torch.no_grad():
            expected = autoencoder.decode(latent).numpy()
        actual = run(session, {"latent": latent.numpy()})["image"]
        bands += compare(expected, actual, np.zeros(len(latent)))
    check(path.name, bands, DECODER_LIMITS)
    return tuple(bands)


def _rows_of_another_size(
    rows: CalibrationRows, image_size: tuple[int, int], multiple: int
) -> CalibrationRows:
    """Return four rows with random x that is higher and wider than `image_size`, by different amounts."""
    height, width = image_size[0] + 2 * multiple, image_size[1] + multiple
    four = rows.at(torch.linspace(0, len(rows) - 1, 4).long())
    x = torch.randn(4, rows.x.shape[1], height, width, generator=torch.Generator().manual_seed(0))
    return CalibrationRows(x, four.timestep, four.labels, four.text)


def _embedder_inputs(manifest: Manifest, rows: CalibrationRows) -> dict[str, Array]:
    inputs: dict[str, Array] = {
        factor.name: rows.labels[:, k].numpy() for k, factor in enumerate(manifest.factors)
    }
    return inputs if rows.text is None else {**inputs, TEXT: rows.text.numpy()}


def _bands(manifest: Manifest, rows: CalibrationRows, expected: Array, actual: Array) -> tuple[Band, ...]:
    noise = manifest.diffusion.noise_schedule().share_told(rows.timestep.numpy())
    return compare(expected, actual, noise)


def _flat(arrays: Mapping[str, Array]) -> Array:
    """Return all arrays (N, …) side by side as one (N, D), in the order of their names."""
    return np.concatenate([arrays[name].reshape(len(arrays[name]), -1) for name in sorted(arrays)], axis=1)
