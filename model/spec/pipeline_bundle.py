"""A diffusers pipeline as a bundle: its files linked or copied, with the manifest that was read of them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ditserve.model.spec.bundle import MANIFEST, PIPELINE, Bundle, Manifest, bundle_name, write_manifest
from ditserve.model.spec.output_folder import BUNDLE, replacement
from ditserve.model.spec.pipeline_config import INDEX
from ditserve.model.spec.pipeline_folder import FoundPipeline, check_part, read_pipeline, stated_licence

# The files of a part that are taken along: configurations, vocabularies, weights.
TAKEN = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja"})


def write_pipeline_bundle(found: FoundPipeline, target: Path) -> Manifest:
    """Write the bundle of a pipeline: its files are linked where that is possible, else copied.

    Return its manifest, with the files.

    Raises:
        OutputError, OSError: the target cannot be written.
    """
    with replacement(target, BUNDLE, apart=(found.folder,)) as scratch:
        inner = scratch / PIPELINE
        inner.mkdir()
        _take(found.folder / INDEX, inner / INDEX)
        for part in found.parts:
            take_part(found.folder / part, inner / part)
        write_manifest(scratch, found.manifest)
    return Bundle.open(target, verify=False).manifest


def take_pipeline(bundle: Bundle, target: Path) -> None:
    """Take the files of the pipeline in a bundle along to the folder of another one."""
    for name in bundle.manifest.files:
        if name.startswith(f"{PIPELINE}/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _take(bundle.path / name, target / name)


def cached_bundle(folder: Path) -> Path:
    """Return the bundle of a pipeline's folder among those that this user has served; make it if need be.

    It lies in `~/.cache/ditserve`, and is made anew where a file of the pipeline has changed.

    Raises:
        PipelineFolderError, OutputError, OSError: as `read_pipeline` and `write_pipeline_bundle`.
    """
    real = folder.resolve()
    files = [real / INDEX, *(file for part in real.iterdir() if part.is_dir() for file in _files(part))]
    stats = [(str(file.relative_to(real)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.blake2b(repr((str(real), stats)).encode(), digest_size=6).hexdigest()
    target = Path.home() / ".cache" / "ditserve" / f"{bundle_name(real)[:80]}-{digest}"
    if not (target / MANIFEST).is_file():
        found = read_pipeline(real, name=bundle_name(real), licence=stated_licence(real))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_pipeline_bundle(found, target)
    return target


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a part that a bundle takes along; weights in half precision beside full are not."""
    names = {file.name for file in folder.iterdir()}
    for file in sorted(folder.iterdir()):
        full = re.sub(r"\.(fp16|bf16|non_ema)(?=[.-])", "", file.name)
        variant = full != file.name and full in names
        if file.is_file() and file.suffix in TAKEN and not file.name.startswith(".") and not variant:
            yield file


def take_part(folder: Path, target: Path) -> None:
    """Link the files of a part of a pipeline into a new folder, or copy them.

    Raises:
        PipelineFolderError: its weights are missing or pickled.
        OSError: they cannot be read or written.
    """
    check_part(folder)
    target.mkdir(parents=True)
    for file in _files(folder):
        _take(file, target / file.name)


def _take(source: Path, target: Path) -> None:
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
