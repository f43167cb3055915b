"""Decoder and encoder of a model on latents: exported from an autoencoder, or copied from another bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

from ditserve.export.errors import ExportError
from ditserve.export.graph import decoder_graph, encoder_graph
from ditserve.export.parity import verify_decoder, verify_encoder
from ditserve.export.storage import data_file, save_graph, save_whole
from ditserve.export.verify import Band
from ditserve.model.nets.autoencoder import PictureAutoencoder, SdVae, SmallVae, open_decoder
from ditserve.model.nets.small_autoencoder import DESCRIPTION
from ditserve.model.spec.bundle import DECODER, ENCODER, GOLDEN, SMALL_AUTOENCODER, WEIGHTS
from ditserve.model.spec.manifest import Golden, Manifest


def write_decoder(
    manifest: Manifest, folder: Path, *, vae: Path | None = None, graph: Path | None = None
) -> dict[str, tuple[Band, ...]]:
    """Write the decoder and the encoder of a model on latents; return their errors.

    They are those of the autoencoder in `vae`, or a copy of another bundle's `graph` of the decoder and of
    the encoder beside it, if there is one. A small autoencoder comes along whole. Nothing is written for a
    model on pixels. Graphs that are copied from another export are not verified again.

    Raises:
        ExportError: a graph differs from torch.
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
        if isinstance(autoencoder, SmallVae):
            copy_small_autoencoder(vae, folder / SMALL_AUTOENCODER)
        return save_autoencoder(autoencoder, folder, channels)
    assert graph is not None
    for file in (graph, graph.with_name(ENCODER)):
        for part in (file, data_file(file)):
            if part.is_file():
                shutil.copy(part, folder)
    small = graph.with_name(SMALL_AUTOENCODER)
    if small.is_dir():
        copy_small_autoencoder(small, folder / SMALL_AUTOENCODER)
    return {}


def copy_small_autoencoder(source: Path, target: Path) -> None:
    """Copy the two files of a small autoencoder, by which torch draws what the graphs draw."""
    target.mkdir()
    for name in (DESCRIPTION, WEIGHTS):
        shutil.copy(source / name, target)


def save_autoencoder(
    autoencoder: PictureAutoencoder, folder: Path, channels: int
) -> dict[str, tuple[Band, ...]]:
    """Write the graphs of an autoencoder; return their errors. Raises `ExportError` as `write_decoder`."""
    # The weights of a small autoencoder lie beside its graphs.
    save = save_graph if isinstance(autoencoder, SmallVae) else save_whole
    save(decoder_graph(autoencoder, channels), folder / DECODER)
    save(encoder_graph(autoencoder), folder / ENCODER)
    return {
        DECODER: verify_decoder(autoencoder, folder / DECODER, channels),
        ENCODER: verify_encoder(autoencoder, folder / ENCODER),
    }


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
