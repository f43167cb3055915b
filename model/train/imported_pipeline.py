"""An imported pipeline of diffusers in memory, so that prompts are drawn with it as with a model of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditserve.model.nets.autoencoder import PictureAutoencoder
from ditserve.model.spec.bundle import MANIFEST, PIPELINE, Bundle
from ditserve.model.spec.network_config import negative_mark
from ditserve.model.spec.pipeline_bundle import cached_bundle
from ditserve.model.spec.pipeline_config import PipelineConfig, missing_package
from ditserve.model.spec.pipeline_folder import VAE, is_pipeline
from ditserve.model.spec.prompt_limit import PromptLimit
from ditserve.model.train.loaded_model import LoadedModel, LoadError

# Imported by name: they load diffusers and transformers, which other models do without.
PIPELINES = "ditserve.model.nets.pipelines"


def imported_pipeline(path: Path) -> Bundle | None:
    """Open the bundle of an imported pipeline, or of the folder of one; None for any other source.

    Raises:
        BundleError, PipelineFolderError: it is damaged, or cannot be brought in.
    """
    if is_pipeline(path) and not (path / MANIFEST).is_file():
        path = cached_bundle(path)
    if not (path / MANIFEST).is_file():
        return None
    found = Bundle.open(path, verify=False)
    return Bundle.open(path) if isinstance(found.manifest.config, PipelineConfig) else None


def encode_texts(bundle: Bundle, prompts: Sequence[str], negative: str = "") -> tuple[Tensor, Tensor]:
    """Return the encodings (N, text_width) of prompts, and that (1, text_width) of what guidance subtracts.

    The text encoders are in memory only here.

    Raises:
        LoadError: a text has more tokens than the model takes, or the text encoders cannot be opened.
        BundleError: the tokens of a text cannot be counted.
    """
    manifest, limit = bundle.manifest, PromptLimit(bundle.manifest.config, bundle.path / PIPELINE)
    counted = [limit.excess(prompt) for prompt in prompts] + [limit.excess(negative, negative=True)]
    for text, excess in zip([*prompts, negative], counted, strict=True):
        if excess:
            raise LoadError(f"the text that begins {text[:40]!r} has {excess}: shorten it")
    with _opening(bundle):
        texts = import_module(f"{PIPELINES}.texts")
        encoder: Any = texts.PipelineTexts(bundle.path / PIPELINE, manifest.config, key="")
    encodings = [torch.from_numpy(encoder.encode(prompt)) for prompt in prompts]
    subtracted = torch.from_numpy(encoder.encode(negative_mark(manifest.config) + negative))
    return torch.stack(encodings), subtracted[None]


def open_pipeline(bundle: Bundle, device: str | torch.device = "cpu") -> LoadedModel:
    """Open the transformer of an imported pipeline in fp32.

    Raises:
        LoadError: it cannot be opened.
    """
    with _opening(bundle):
        network = import_module(f"{PIPELINES}.network")
        folder, config = bundle.path / PIPELINE, bundle.manifest.config
        opened: Any = network.open_network(folder, config, dtype=torch.float32, device=device)
    # It has the methods of a network of ours that drawing calls.
    return LoadedModel(opened, bundle.manifest)


def open_pipeline_decoder(bundle: Bundle, device: str | torch.device = "cpu") -> PictureAutoencoder:
    """Open the autoencoder of an imported pipeline.

    Raises:
        LoadError: it cannot be opened.
    """
    with _opening(bundle):
        decoder = import_module(f"{PIPELINES}.decoder")
        folder, latents = bundle.path / PIPELINE / VAE, bundle.manifest.latents
        opened: PictureAutoencoder = decoder.PipelineDecoder(folder, latents, device=device)
    return opened


@contextmanager
def _opening(bundle: Bundle) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise LoadError(missing_package(bundle.manifest.name, error)) from error
