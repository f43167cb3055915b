"""`python -m export.backbone BUNDLE NAME SOURCE`: add the network of another bundle to a bundle.

The two must share their latents, conditions and noise. A lighter network may then take a part of the noise
range, and a distilled student whole pictures, as rungs of one ladder: `python -m bench.ladder` measures which
of them pay, and writes them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path

import numpy as np
import onnxruntime as ort
from pydantic import TypeAdapter, ValidationError

from ditserve.commands import command_line
from ditserve.export.decoder import copy_small_autoencoder
from ditserve.export.errors import ExportError
from ditserve.export.shared_weights import leave_out_shared
from ditserve.export.verify import Arrays, open_session, run
from ditserve.model.nets.autoencoder import AUTOENCODER
from ditserve.model.spec.bundle import (
    AUTOENCODER_GRAPHS,
    BACKBONE,
    BACKBONES,
    BUNDLE_FILES,
    CALIBRATION,
    DECODER,
    GOLDEN,
    SMALL_AUTOENCODER,
    WEIGHTS,
    Bundle,
    write_manifest,
)
from ditserve.model.spec.class_names import same_classes
from ditserve.model.spec.command_line import guarded, named_path
from ditserve.model.spec.manifest import BackboneSpec, Manifest, Name
from ditserve.model.spec.output_folder import check_apart, revision

# What a further backbone has of a bundle: not what decodes and encodes latents, nor what verified it.
COPIED = BUNDLE_FILES - {CALIBRATION, GOLDEN} - AUTOENCODER_GRAPHS
SMALL_WEIGHTS = f"{SMALL_AUTOENCODER}/{WEIGHTS}"
# The networks take turns, so that a busy machine slows both alike.
TURNS, ROWS = 20, 4


def add_backbone(folder: Path, name: str, source: Path) -> BackboneSpec:
    """Add the network of the bundle `source` to the bundle in `folder`.

    It takes the place of an earlier one of its name, whose rungs leave the ladder. A small autoencoder that
    is not the bundle's comes along: its decoder draws what the network finishes. Return what the manifest
    says of it.

    Raises:
        ExportError: the two do not share their latents, conditions and noise, or one lacks its graphs.
        BundleError, OutputError, OSError: a bundle that cannot be read, or written.
    """
    bundle, other = Bundle.open(folder), Bundle.open(source)
    check_apart(folder, source)
    if other.shared_weights:
        raise ExportError(f"{source} shares weights with {other.whole}: name the bundle that it was made of")
    _check_alike(bundle.manifest, other.manifest, source)
    manifest = other.manifest
    spec = BackboneSpec(
        config=manifest.config,
        embedding_size=manifest.embedding_size,
        state=manifest.state,
        row_cost=relative_cost(bundle, other),
        guidance="classifier-free" if _takes_guidance(manifest) else "none",
        step_counts=manifest.diffusion.step_counts,
        defaults=manifest.defaults,
        provenance=manifest.provenance,
        metrics=manifest.metrics,
    )
    with revision(folder) as scratch:
        place = scratch / BACKBONES / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for file in COPIED & manifest.files.keys():
            shutil.copy2(other.file(file), place / file)
        spec = spec.model_copy(update={"shared_weights": leave_out_shared(place, scratch)})
        if _has_own_decoder(bundle.manifest, manifest):
            shutil.copy2(other.file(DECODER), place)
            copy_small_autoencoder(other.file(SMALL_WEIGHTS).parent, place / SMALL_AUTOENCODER)
        backbones = {**bundle.manifest.backbones, name: spec}
        write_manifest(scratch, bundle.manifest.with_backbones(backbones))
    return spec


def _has_own_decoder(own: Manifest, other: Manifest) -> bool:
    """Return whether the small autoencoder of `other` is not that of `own`."""
    weights = other.files.get(SMALL_WEIGHTS)
    return weights is not None and own.files.get(SMALL_WEIGHTS) != weights


def relative_cost(bundle: Bundle, other: Bundle) -> float:
    """Return the seconds of a row of `other` for each second of one of `bundle`, in ONNX Runtime here.

    Both take their fastest of `TURNS` passes of `ROWS` rows, on one core.
    """
    passes = [(open_session(each.file(BACKBONE)), blank_inputs(each.manifest)) for each in (other, bundle)]
    theirs, own = fastest_seconds(passes)
    return round(theirs / own, 4)


def fastest_seconds(passes: Sequence[tuple[ort.InferenceSession, Arrays]]) -> list[float]:
    """Return the seconds of the fastest of `TURNS` runs of each session with its inputs; they take turns."""
    fastest = [inf] * len(passes)
    for _ in range(TURNS):
        for k, (session, inputs) in enumerate(passes):
            began = time.perf_counter()
            run(session, inputs)
            fastest[k] = min(fastest[k], time.perf_counter() - began)
    return fastest


def blank_inputs(manifest: Manifest) -> dict[str, np.ndarray]:
    """Return `ROWS` rows of random inputs of a backbone, by name."""
    config, random = manifest.config, np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"x": (config.in_channels, *config.image_size)}
    shapes |= {tensor.name: tensor.shape for tensor in manifest.state}
    return {name: random.standard_normal((ROWS, *shape), np.float32) for name, shape in shapes.items()}


def _check_alike(own: Manifest, other: Manifest, source: Path) -> None:
    """Refuse a network of other latents, conditions or noise. Raises `ExportError`."""
    # The steps that a student was distilled for are its own.
    noise = [each.diffusion.model_copy(update={"step_counts": ()}) for each in (own, other)]
    alike = {
        "diffusion": noise[0] == noise[1],
        "latents": own.latents == other.latents and _maker(own) == _maker(other),
        "decoder": own.decoder == other.decoder,
        "factors": same_classes(own.factors, other.factors),
        "config.image_size": own.config.image_size == other.config.image_size,
        "config.text_width": own.config.text_width == other.config.text_width,
        "text encoder": _text_encoder(own) == _text_encoder(other),
    }
    for field, same in alike.items():
        if not same:
            raise ExportError(
                f"{source} is of another {field} than {own.name}: a further backbone must share its latents, "
                "its conditions and its noise"
            )
    if other.backbones:
        raise ExportError(f"{source} has further backbones itself: name the bundle of one network")


def _maker(manifest: Manifest) -> object:
    """Return the autoencoder that made the latents of a network's training, if that is known."""
    return manifest.provenance.get(AUTOENCODER)


def _text_encoder(manifest: Manifest) -> object:
    return manifest.provenance.get("training", {}).get("data", {}).get("text")


def _takes_guidance(manifest: Manifest) -> bool:
    """Return False for a network that knows no unconditional prediction, or has its guidance built in."""
    distillation = manifest.provenance.get("training", {}).get("distillation") or {}
    return manifest.guidance == "classifier-free" and distillation.get("guidance_scale") in (None, 1.0)


def _name(text: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(
            f"must be of letters, digits, '.', '_' and '-', not {text!r}"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=command_line("export.backbone"), description="Add the network of another bundle to a bundle."
    )
    parser.add_argument("bundle", type=named_path)
    parser.add_argument("name", type=_name, help="of the backbone in the bundle, such as student")
    parser.add_argument("source", type=named_path, help="a bundle of the same latents, conditions and noise")
    options = parser.parse_args(arguments)

    def work() -> None:
        spec = add_backbone(options.bundle, options.name, options.source)
        guided = "guided" if spec.guidance == "classifier-free" else "never guided"
        print(
            f"{options.bundle}: has the backbone {options.name}, {guided}; "
            f"a row takes {spec.row_cost:.2f} of the time of its own"
        )
        print(f"{command_line('bench.ladder')} {options.bundle} --write measures where it pays")

    return guarded("export.backbone", work)


if __name__ == "__main__":
    sys.exit(main())
