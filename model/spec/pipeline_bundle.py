"""A diffusers pipeline as a bundle: its files linked or copied, with the manifest that was read of them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from ditserve.model.spec.bundle import MANIFEST, PIPELINE, Bundle, Manifest, bundle_name, write_manifest
from ditserve.model.spec.output_folder import BUNDLE, replacement
from ditserve.model.spec.pipeline_config import INDEX, TOKENIZER, PipelineConfig
from ditserve.model.spec.pipeline_folder import FoundPipeline, read_pipeline, stated_licence
from ditserve.model.spec.pipeline_parts import PipelineFolderError, check_part, read_json

# The files of a part that are taken along: configurations, vocabularies, weights.
TAKEN = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja"})
# What stands in a file's name for weights of another kind than the full ones.
VARIANT = re.compile(r"\.(fp16|bf16|fp8|non_ema)(?=[.-])")


def write_pipeline_bundle(found: FoundPipeline, target: Path) -> Manifest:
    """Write the bundle of a pipeline: its files are linked where that is possible, else copied.

    Return its manifest, with the files.

    Raises:
        OutputError, OSError: the target cannot be written.
        PipelineFolderError: its tokenizer cannot count.
    """
    with replacement(target, BUNDLE, apart=(found.folder,)) as scratch:
        inner = scratch / PIPELINE
        inner.mkdir()
        _take(found.folder / INDEX, inner / INDEX)
        for part in found.parts:
            take_part(found.folder / part, inner / part)
        config = found.manifest.config
        assert isinstance(config, PipelineConfig)
        _complete_tokenizer(inner, found.folder, config.tokenizer)
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
    parts = (part for part in real.iterdir() if part.is_dir())
    files = [real / INDEX, *(file for part in parts for file, _ in _files(part))]
    stats = [(str(file.relative_to(real)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.blake2b(repr((str(real), stats)).encode(), digest_size=6).hexdigest()
    target = Path.home() / ".cache" / "ditserve" / f"{bundle_name(real)[:80]}-{digest}"
    if not (target / MANIFEST).is_file():
        found = read_pipeline(real, name=bundle_name(real), licence=stated_licence(real))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_pipeline_bundle(found, target)
    return target


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files of a part that a bundle takes along, and their names there.

    Weights of a variant, such as in half precision, are not taken beside full ones. Alone they are, as if
    they were these: `model.fp16.safetensors` becomes `model.safetensors`. Shards keep the names that their
    index has.
    """
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in TAKEN]
    names = {file.name for file in files}
    variants = {file.name: match[1] for file in files if (match := VARIANT.search(file.name))}
    for file in files:
        stem = file.name.partition(".")[0]
        full = not names.isdisjoint({f"{stem}.safetensors", f"{stem}.safetensors.index.json"})
        variant = variants.get(file.name)
        if file.name.startswith(".") or (variant and (full or variant != min(variants.values()))):
            continue
        shard = re.search(r"-\d+-of-\d+\.", file.name)
        yield file, file.name if shard else VARIANT.sub("", file.name)


def take_part(folder: Path, target: Path) -> None:
    """Link the files of a part of a pipeline into a new folder, or copy them.

    Raises:
        PipelineFolderError: its weights are missing or pickled.
        OSError: they cannot be read or written.
    """
    check_part(folder)
    target.mkdir(parents=True)
    for file, name in _files(folder):
        _take(file, target / name)


def _complete_tokenizer(pipeline: Path, source: Path, part: str) -> None:
    """Write the tokenizer.json of a tokenizer that has only the files of an earlier release of transformers.

    `pipeline` is the folder that it is written to, and `source` the one that errors name.

    Raises:
        PipelineFolderError: it cannot be made of these.
    """
    folder = pipeline / part
    if (folder / TOKENIZER).is_file():
        return
    try:
        # Only here: most tokenizers have it.
        transformers: Any = import_module("transformers")
        _, name = read_json(pipeline / INDEX)[part]
        made = getattr(transformers, name).from_pretrained(str(folder), local_files_only=True)
        made.backend_tokenizer.save(str(folder / TOKENIZER))
    # It raises what the packages that it calls raise.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise PipelineFolderError(
            f"{source / part / TOKENIZER} is missing, and could not be made of the other files there: "
            f"{reason}; save it with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from None


def _take(source: Path, target: Path) -> None:
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
