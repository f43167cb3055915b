"""Each graph in ONNX Runtime against the network in torch, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditserve.export.calibrate import Backbone, Rows
from ditserve.export.graph import TEXT
from ditserve.export.session import open_session, run
from ditserve.export.verify import LIMITS, Band, Limits, check, compare
from ditserve.model.nets.autoencoder import Autoencoder
from ditserve.model.nets.factory import Network
from ditserve.model.spec.bundle import BACKBONE, CONDITIONER, EMBEDDER, Manifest
from ditserve.model.spec.network_config import size_multiple
from ditserve.model.train.loaded_model import LoadedModel

CHUNK = 32  # rows of one forward pass
Arrays = dict[str, npt.NDArray[Any]]


@torch.no_grad()
def forward(network: Network, rows: Rows, backbone: Backbone | None = None) -> Tensor:
    """Output (N, C_out, H, W) on `rows`, of the network or with another `backbone` behind its conditioner."""
    parts = (rows.at(index) for index in torch.arange(len(rows)).split(CHUNK))
    run_backbone = backbone or network.backbone
    return torch.cat([run_backbone(part.x, part.state(network)) for part in parts])


def graph_backbone(network: Network, path: Path, options: Mapping[str, str] | None = None) -> Backbone:
    """The backbone in `path`; `options` are session configuration entries."""
    session = open_session(path, options=options)
    names = ("x", *(name for name, _ in network.config.state()))

    def backbone(x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        inputs = {name: tensor.numpy() for name, tensor in zip(names, (x, *state), strict=True)}
        return torch.from_numpy(run(session, inputs)["output"])

    return backbone


def compare_rows(source: LoadedModel, rows: Rows, backbone: Backbone) -> tuple[Band, ...]:
    """Errors of `backbone` against the network on `rows`, per band of noise."""
    want, got = (forward(source.network, rows, each).numpy() for each in (None, backbone))
    return compare(want, got, rows.timestep.numpy(), source.manifest.diffusion.timesteps)


def verify_graphs(source: LoadedModel, folder: Path, rows: Rows) -> dict[str, tuple[Band, ...]]:
    """Errors of each graph in `folder`; of the backbone also at a size it was not trained at, if it takes any.

    Raises:
        ExportError: beyond the fp32 limit.
    """
    network, manifest = source.network, source.manifest
    with torch.no_grad():
        embedding = network.embed(rows.labels, rows.text)
        state = dict(zip((name for name, _ in network.config.state()), rows.state(network), strict=True))
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    conditions = _conditions(manifest, rows)
    found = {}
    if conditions:
        got = run(open_session(folder / EMBEDDER), conditions)["embedding"]
        found[EMBEDDER] = _bands(manifest, rows, embedding.numpy(), got)
    asked = {"timestep": rows.timestep.numpy(), "embedding": embedding.numpy()}
    answered = run(open_session(folder / CONDITIONER), asked)
    found[CONDITIONER] = _bands(manifest, rows, _flat(arrays), _flat(answered))
    backbone = graph_backbone(network, folder / BACKBONE)
    found[BACKBONE] = compare_rows(source, rows, backbone)
    multiple = size_multiple(network.config)
    if multiple is not None:
        height, width = (
            side + multiple * k for k, side in zip((2, 1), network.config.image_size, strict=True)
        )
        few = rows.at(torch.linspace(0, len(rows) - 1, 4).long())
        drawn = torch.randn(4, rows.x.shape[1], height, width, generator=torch.Generator().manual_seed(0))
        other = Rows(drawn, few.timestep, few.labels, few.text)
        found[f"{BACKBONE} at {height}x{width}"] = compare_rows(source, other, backbone)
    for name, bands in found.items():
        check(name, bands, LIMITS["fp32"])
    return found


def verify_decoder(autoencoder: Autoencoder, path: Path, channels: int) -> tuple[Band, ...]:
    """Errors of the decoder's graph on random latents of two sizes, as one band.

    Raises:
        ExportError: beyond the limit.
    """
    session, generator = open_session(path), torch.Generator().manual_seed(0)
    bands: list[Band] = []
    for height, width in ((8, 8), (4, 12)):
        latent = torch.randn(2, channels, height, width, generator=generator)
        with torch.no_grad():
            want = autoencoder.decode(latent).numpy()
        got = run(session, {"latent": latent.numpy()})["image"]
        bands += compare(want, got, np.zeros(len(latent), np.float32), 1)
    check(path.name, bands, Limits(relative_l2=1e-3, cosine=0.999999))
    return tuple(bands)


def _conditions(manifest: Manifest, rows: Rows) -> Arrays:
    inputs: Arrays = {factor.name: rows.labels[:, k].numpy() for k, factor in enumerate(manifest.factors)}
    return inputs if rows.text is None else {**inputs, TEXT: rows.text.numpy()}


def _bands(manifest: Manifest, rows: Rows, want: npt.NDArray[Any], got: npt.NDArray[Any]) -> tuple[Band, ...]:
    return compare(want, got, rows.timestep.numpy(), manifest.diffusion.timesteps)


def _flat(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate([arrays[name].reshape(len(arrays[name]), -1) for name in sorted(arrays)], axis=1)
