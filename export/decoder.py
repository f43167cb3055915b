"""The decoder of a model on latents: exported from an autoencoder, or copied from another bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

from ditserve.export.errors import ExportError
from ditserve.export.graph import decoder_graph
from ditserve.export.parity import verify_decoder
from ditserve.export.storage import data_file, save_whole
from ditserve.export.verify import Band
from ditserve.model.nets.autoencoder import SdVae, open_decoder
from ditserve.model.spec.bundle import DECODER, GOLDEN
from ditserve.model.spec.manifest import Golden, Manifest


def write_decoder(
    manifest: Manifest, folder: Path, *, vae: Path | None = None, graph: Path | None = None
) -> dict[str, tuple[Band, ...]]:
    """Write the decoder of a model on latents; return its errors.

    It is that of the autoencoder in `vae`, or a copy of another bundle's `graph`.
    Nothing is written for a model on pixels. A decoder that is copied from another export is not verified
    again.

    Raises:
        ExportError: its graph differs from torch.
        AutoencoderError: the autoencoder cannot be opened.
    """
    channels = manifest.config.in_channels
    if manifest.decoder == "identity":
        return {}
    if vae is not None:
        autoencoder = open_decoder(manifest, vae)
        if isinstance(autoencoder, SdVae):
            # Tiling is chosen by the size, and a graph of any size cannot branch on it.
            autoencoder.vae.disable_tiling()
        save_whole(decoder_graph(autoencoder, channels), folder / DECODER)
        return {DECODER: verify_decoder(autoencoder, folder / DECODER, channels)}
    assert graph is not None
    for file in (graph, data_file(graph)):
        if file.is_file():
            shutil.copy(file, folder)
    return {}


def check_decoder(manifest: Manifest, *, vae: Path | None = None, graph: Path | None = None) -> None:
    """Refuse a model on latents without a decoder, before anything is computed.

    Raises:
        ExportError: neither an autoencoder nor a graph of its decoder is given.
        AutoencoderError: the autoencoder cannot be opened.
    """
    channels = manifest.config.in_channels
    if manifest.decoder == "identity" and channels != 3:
        raise ExportError(
            f"the model makes {channels} channels, not red, green and blue: "
            "name the folder of its autoencoder with --vae"
        )
    if manifest.decoder != "identity" and vae is None and graph is None:
        raise ExportError("the model works on latents: name the folder of its autoencoder with --vae")
    if manifest.decoder != "identity" and vae is not None:
        open_decoder(manifest, vae)


def copy_golden(manifest: Manifest, folder: Path, graph: Path | None) -> Golden | None:
    """Copy the golden image that lies beside a copied decoder; return its record, or None if there is none.

    A model on latents cannot draw it again without its autoencoder.
    """
    file = None if graph is None else graph.with_name(GOLDEN)
    if manifest.golden is None or file is None or not file.is_file():
        return None
    shutil.copy(file, folder)
    return manifest.golden


def decoder_of(bundle: Path) -> Path | None:
    """Return the decoder's graph in a bundle, if it has one."""
    return bundle / DECODER if (bundle / DECODER).is_file() else None
