"""Parity: each graph in ONNX Runtime against the network in torch, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from ditserve.export.calibrate import Backbone, CalibrationRows
from ditserve.export.graph import TEXT
from ditserve.export.verify import LIMITS, Band, ParityLimits, check, compare, open_session, run
from ditserve.model.nets.autoencoder import PictureAutoencoder, PictureDecoder
from ditserve.model.nets.factory import Network
from ditserve.model.spec.bundle import BACKBONE, CONDITIONER, EMBEDDER
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import BundleConfig, graph_multiples
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.sizes import Size, size_name
from ditserve.model.train.loaded_model import LoadedModel

CHUNK = 32  # rows of one forward pass
# The most numbers of the attention of one pass over a pipeline's tokens, in one head: 67 MB.
ATTENTION = 1 << 24
# Height and width of the latents on which an autoencoder's graphs are compared.
AUTOENCODER_SIDES = ((8, 8), (4, 12))
DECODER_LIMITS = ParityLimits(relative_l2=1e-3, cosine=0.999999)
Array = npt.NDArray[Any]


def rows_at_once(config: BundleConfig) -> int:
    """Return the rows of one forward pass. A graph holds the attention of all its rows at once.

    SD3 at 1024 px has 4096 tokens and 333 of text, which is 2e7 numbers a head: one row.
    """
    if not isinstance(config, PipelineConfig):
        return CHUNK
    return max(1, min(CHUNK, ATTENTION // (config.tokens + config.text_tokens) ** 2))


@torch.no_grad()
def forward(network: Network, rows: CalibrationRows, backbone: Backbone | None = None) -> Tensor:
    """Return the output (N, C_out, H, W) on `rows`; `backbone` replaces that of the network if given."""
    parts = (rows.at(index) for index in torch.arange(len(rows)).split(rows_at_once(network.config)))
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


@dataclass(frozen=True, slots=True)
class ExpectedOutputs:
    """The outputs of a model in torch on verification rows: by graph, and for rows of another size if it may.

    `told` is `embedding` with the first frames of clips, which the conditioner takes. `state` has the
    condition state by name, which is an output of the conditioner and an input of the backbone. With these
    the weights in torch can be freed before a graph is opened.
    """

    embedding: Array
    told: Array
    state: Mapping[str, Array]
    output: Array
    other: tuple[CalibrationRows, Mapping[str, Array], Array] | None


@torch.no_grad()
def expected_outputs(network: Network, rows: CalibrationRows) -> ExpectedOutputs:
    """Compute the outputs that graphs are compared with."""
    multiples, other = graph_multiples(network.config), None
    if multiples is not None:
        others = _rows_of_another_size(rows, network.config.image_size, multiples)
        other = others, _state(network, others), forward(network, others).numpy()
    return ExpectedOutputs(
        network.embed(rows.labels, rows.text).numpy(),
        rows.embedding(network).numpy(),
        _state(network, rows),
        forward(network, rows).numpy(),
        other,
    )


def verify_graphs(
    manifest: Manifest, folder: Path, rows: CalibrationRows, expected: ExpectedOutputs
) -> dict[str, tuple[Band, ...]]:
    """Return the errors of each graph in `folder` by name, the graphs of a bundle that is being written.

    A backbone that takes other sizes than the trained one is also verified at another size. One graph is open
    at a time.

    Raises:
        ExportError: a graph is beyond the fp32 limit.
    """
    bands = {}
    if conditions := _embedder_inputs(manifest, rows):
        actual = run(open_session(folder / EMBEDDER), conditions)["embedding"]
        bands[EMBEDDER] = _bands(manifest, rows, expected.embedding, actual)
    conditioner_inputs = {"timestep": rows.timestep.numpy(), "embedding": expected.told}
    actual_state = run(open_session(folder / CONDITIONER), conditioner_inputs)
    bands[CONDITIONER] = _bands(manifest, rows, _flat(expected.state), _flat(actual_state))
    del actual_state
    backbone = open_session(folder / BACKBONE)
    bands[BACKBONE] = compare_backbone(backbone, manifest, rows, expected)
    if expected.other is not None:
        others, state, output = expected.other
        inputs = {"x": others.x.numpy(), **state}
        actual = run(backbone, inputs, batch=rows_at_once(manifest.config))["output"]
        bands[f"{BACKBONE} at {size_name(others.x.shape[2:])}"] = _bands(manifest, others, output, actual)
    for name, graph_bands in bands.items():
        check(name, graph_bands, LIMITS["fp32"])
    return bands


def compare_backbone(
    session: ort.InferenceSession, manifest: Manifest, rows: CalibrationRows, expected: ExpectedOutputs
) -> tuple[Band, ...]:
    """Return the errors of a backbone's graph on `rows`, by band of noise."""
    inputs = {"x": rows.x.numpy(), **expected.state}
    actual = run(session, inputs, batch=rows_at_once(manifest.config))["output"]
    return _bands(manifest, rows, expected.output, actual)


def compare_outputs(
    manifest: Manifest, rows: CalibrationRows, expected: Tensor, actual: Tensor
) -> tuple[Band, ...]:
    """Return the errors of outputs on `rows`, by band of noise."""
    return _bands(manifest, rows, expected.numpy(), actual.numpy())


def verify_decoder(autoencoder: PictureDecoder, path: Path, channels: int) -> tuple[Band, ...]:
    """Return the errors of the decoder's graph on random latents of two sizes, one band for each size.

    Raises:
        ExportError: the graph is beyond the limit.
    """
    latents = [
        torch.randn(2, channels, *sides, generator=torch.Generator().manual_seed(0))
        for sides in AUTOENCODER_SIDES
    ]
    return _verify_autoencoder(path, ("latent", "image"), autoencoder.decode, latents)


def verify_encoder(autoencoder: PictureAutoencoder, path: Path) -> tuple[Band, ...]:
    """Return the errors of the encoder's graph on random images of two sizes, one band for each size.

    Raises:
        ExportError: the graph is beyond the limit.
    """
    factor = autoencoder.factor
    sides = [(height * factor, width * factor) for height, width in AUTOENCODER_SIDES]
    images = [
        2.0 * torch.rand(2, 3, *side, generator=torch.Generator().manual_seed(0)) - 1.0 for side in sides
    ]
    return _verify_autoencoder(path, ("image", "latent"), autoencoder.encode, images)


def _verify_autoencoder(
    path: Path, names: tuple[str, str], compute: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]
) -> tuple[Band, ...]:
    """Compare a graph with `compute`; `names` are those of its input and of its output."""
    session, (given, told) = open_session(path), names
    bands: list[Band] = []
    for rows in inputs:
        with torch.no_grad():
            expected = compute(rows).numpy()
        bands += compare(expected, run(session, {given: rows.numpy()})[told], np.zeros(len(rows)))
    check(path.name, bands, DECODER_LIMITS)
    return tuple(bands)


def _rows_of_another_size(rows: CalibrationRows, image_size: Size, multiples: Size) -> CalibrationRows:
    """Return four rows with random x that is longer than `image_size` on every side, by different amounts."""
    times = range(len(image_size), 0, -1)
    size = [side + k * part for side, k, part in zip(image_size, times, multiples, strict=True)]
    four = rows.at(torch.linspace(0, len(rows) - 1, 4).long())
    x = torch.randn(4, rows.x.shape[1], *size, generator=torch.Generator().manual_seed(0))
    return replace(four, x=x)


def _state(network: Network, rows: CalibrationRows) -> dict[str, Array]:
    names = (name for name, _ in network.config.state())
    return {name: tensor.numpy() for name, tensor in zip(names, rows.state(network), strict=True)}


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
