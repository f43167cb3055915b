"""A bundle: a model on disk. `export` writes it and `service` loads it; nothing here imports torch.

    <bundle>/manifest.json        the description of the model, with the sha256 of every other file
             weights.safetensors
             embedder.onnx        labels and text → condition embedding
             conditioner.onnx     timestep and condition embedding → condition state
             backbone.onnx        x and condition state → output; also backbone.int8.onnx and others
             trunk.onnx           x and condition state → what the first blocks change of the tokens
             tail.onnx            x, condition state and that change → output
             decoder.onnx         latent → image, of a model on latents
             encoder.onnx         image → latent, which edits of pictures need
             pipeline/            an imported diffusers pipeline, whose transformer is the network
             backbones/<name>/    another network of the same latents: its weights and graphs, and the
                                  decoder of what it finishes, if that is another

Nothing is ever unpickled. A file that is missing, altered or named with a path is refused with one sentence
that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from pydantic import (
    ValidationError,
)
from pydantic_core import PydanticSerializationError

from ditserve.commands import command_line
from ditserve.model.spec.errors import BundleError, wrong_field
from ditserve.model.spec.manifest import FileEntry, Manifest

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
GOLDEN = "golden.png"
WEIGHTS = "weights.safetensors"
EMBEDDER, CONDITIONER, BACKBONE = "embedder.onnx", "conditioner.onnx", "backbone.onnx"
DECODER, ENCODER = "decoder.onnx", "encoder.onnx"
# The rows that a bundle is verified and calibrated on.
CALIBRATION = "calibration.safetensors"
# The backbone in two parts, for a block cache.
TRUNK, TAIL = "trunk.onnx", "tail.onnx"
_GRAPHS = [EMBEDDER, CONDITIONER, BACKBONE, TRUNK, TAIL, DECODER, ENCODER]
_GRAPHS += [f"backbone.{precision}.onnx" for precision in ("fp16", "bf16", "int8", "int8.fp16")]
# The files that a manifest lists, where a bundle has them. No command touches others.
PIPELINE = "pipeline"
BACKBONES = "backbones"
# The graphs that compute conditions, and the files of those that decode and encode latents.
CONDITION_GRAPHS = (EMBEDDER, CONDITIONER)
# What a network with a block cache is of, in the bundle itself.
CACHED_FILES = frozenset([WEIGHTS, TRUNK, TAIL, *CONDITION_GRAPHS])
AUTOENCODER_GRAPHS = frozenset(file for graph in (DECODER, ENCODER) for file in (graph, f"{graph}.data"))
# The small autoencoder itself, beside the graphs of its halves.
SMALL_AUTOENCODER = "autoencoder"
PARTS = (PIPELINE, BACKBONES, SMALL_AUTOENCODER)  # folders in a bundle
BUNDLE_FILES = frozenset([WEIGHTS, CALIBRATION, GOLDEN, *_GRAPHS, *(f"{name}.data" for name in _GRAPHS)])

LARGEST_MANIFEST = 64 * 2**20  # bytes


class Bundle:
    """An opened bundle: a folder whose manifest is valid and whose files are those that it lists.

    Args:
        whole: the folder of the bundle that this is a further backbone of; None: it is none.
        shared_weights: names of the tensors that `weights.safetensors` of the whole has for this one.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        whole: Path | None = None,
        shared_weights: tuple[str, ...] = (),
    ) -> None:
        self.path, self.manifest = path, manifest
        self.whole, self.shared_weights = whole, shared_weights

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Read and check the folder of a bundle.

        With `verify=False` the files must be there, of their size, but are not hashed: the API process needs
        only the manifest.

        Raises:
            BundleError: no such folder or manifest, invalid JSON, unknown fields or version, a missing or
                altered file.
        """
        root = Path(path)
        source = root / MANIFEST
        if (whole := whole_of(root)) is not None:
            return cls.open(whole, verify=verify).backbone(root.name, decoder=True)
        if not source.is_file():
            raise BundleError(
                f"{root} is not a bundle: {MANIFEST} is missing; "
                f"pass a folder written by {command_line('export.onnx')}"
            )
        manifest = _read_manifest(source)
        if manifest.golden is not None and GOLDEN not in manifest.files:
            raise BundleError(f"{source}: field files: {GOLDEN} is missing, though golden describes it")
        for name, entry in manifest.files.items():
            file = root / name
            if not file.is_file():
                raise BundleError(
                    f"{file} is missing, though {source} lists it: restore it or export the bundle again"
                )
            if file.stat().st_size != entry.bytes or (verify and digest(file) != entry.sha256):
                raise BundleError(
                    f"{file} differs from the hash in {source}: restore it or export the bundle again"
                )
        return cls(root, manifest)

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path / name} is not part of this bundle: "
                f"its manifest lists {', '.join(sorted(self.manifest.files))}; {self._command_for(name)}"
            )
        own = self.path / name
        return own if self.whole is None or own.is_file() else self.whole / name

    def graph_folder(self, name: str) -> Path | None:
        """Return the folder that a graph's references start from, where it is not the graph's own.

        What computes the conditions of a further backbone may refer to weights of the whole.
        """
        return self.whole if self.shared_weights and name in CONDITION_GRAPHS else None

    def backbone(self, name: str, *, decoder: bool = False) -> Bundle:
        """Return a further backbone as a bundle of its own.

        Without a decoder of its own it has none, or with `decoder` that of this bundle.

        Raises:
            BundleError: the bundle has none of this name.
        """
        if name not in self.manifest.backbones:
            known = ", ".join(self.manifest.backbones) or "none"
            raise BundleError(f"{self.path} has no backbone {name!r}: it has {known}")
        spec, folder = self.manifest.backbones[name], f"{BACKBONES}/{name}/"
        files = self.manifest.files.items()
        own_files = {file[len(folder) :]: entry for file, entry in files if file.startswith(folder)}
        if spec.block_cache:
            folder = ""
            own_files = {file: entry for file, entry in files if file in CACHED_FILES}
        decoding = (*AUTOENCODER_GRAPHS, f"{SMALL_AUTOENCODER}/") if decoder else ()
        decodes = decoder or DECODER in own_files
        autoencoder = {file: entry for file, entry in files if file.startswith(decoding)}
        own = {
            "name": f"{self.manifest.name}-{name}",
            "config": spec.config,
            "embedding_size": spec.embedding_size,
            "state": spec.state,
            "provenance": spec.provenance,
            "metrics": spec.metrics,
            "defaults": spec.defaults,
            "guidance": spec.guidance,
            "decoder": self.manifest.decoder if decodes else "identity",
            "backbones": {},
            "ladder": (),
            "golden": None,
            "files": {**autoencoder, **own_files},
        }
        manifest = self.manifest.model_copy(update=own)
        whole = self.path if folder else None
        return Bundle(self.path / folder, manifest, whole=whole, shared_weights=spec.shared_weights)

    def _command_for(self, name: str) -> str:
        if ".int8" in name:
            return f"{command_line('export.int8')} {self.path} adds it"
        if name.startswith("backbone.") and name != BACKBONE:
            return f"{command_line('export.half')} {self.path} adds it"
        if name in (TRUNK, TAIL):
            return f"{command_line('export.block_cache')} {self.path} adds it"
        return f"{command_line('export.onnx')} {self.path} --out {self.path} writes all graphs"


def whole_of(folder: Path) -> Path | None:
    """Return the bundle that a folder is a further backbone of; None for all other folders."""
    bundle = folder.parent.parent
    inside = folder.parent.name == BACKBONES and (bundle / MANIFEST).is_file()
    return bundle if inside and not (folder / MANIFEST).is_file() else None


def encodes_pictures(manifest: Manifest) -> bool:
    """Return whether a model can start from a picture: on latents it needs an encoder.

    An imported pipeline that has no graphs brings its autoencoder whole.
    """
    whole = manifest.decoder == "pipeline" and DECODER not in manifest.files
    return manifest.decoder == "identity" or whole or ENCODER in manifest.files


def bundle_name(folder: Path) -> str:
    """Return the name of the bundle of a folder: a legal one for any folder name, such as "über 2"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:100] or "model"


def _read_manifest(source: Path) -> Manifest:
    try:
        if source.stat().st_size > LARGEST_MANIFEST:
            raise BundleError(f"{source} is larger than {LARGEST_MANIFEST} bytes: it is no manifest")
        return parse_manifest(source.read_bytes(), source)
    except OSError as error:
        raise BundleError(f"{source} cannot be read: {error.strerror}") from None


def parse_manifest(raw: bytes, source: Path) -> Manifest:
    """Return the manifest in `raw`; error messages name `source`.

    Raises:
        BundleError: not JSON, not an object, or a field is wrong.
    """
    try:
        data = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{source} must hold a JSON object")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{source} has schema_version {_short(repr(version))}; this release reads {SCHEMA_VERSION}"
        )
    try:
        manifest = Manifest.model_validate(data)
        # Its digest is that of its JSON.
        manifest.model_dump_json()
    except ValidationError as error:
        field, message = wrong_field(error)
        # A sentence about several fields names them.
        raise BundleError(f"{source}: {_short(f'field {field}: {message}' if field else message)}") from None
    except (PydanticSerializationError, RecursionError) as error:
        raise BundleError(f"{source}: field provenance: cannot be written as JSON: {error}") from None
    return manifest


def _short(text: str) -> str:
    """Return text from a manifest as a message holds it: on one line, and cut."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}…"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write manifest.json in the folder `path` atomically, with `files` taken from its contents now.

    Further backbones that are not there are left out.
    """
    there = {
        name: spec
        for name, spec in manifest.backbones.items()
        if (path / (TRUNK if spec.block_cache else f"{BACKBONES}/{name}")).exists()
    }
    manifest = manifest.with_backbones(there)
    names = sorted(name for name in BUNDLE_FILES if (path / name).is_file())
    inner = [file for folder in PARTS for file in (path / folder).rglob("*")]
    names += sorted(str(file.relative_to(path)) for file in inner if file.is_file())
    files = {
        name: FileEntry(sha256=digest(path / name), bytes=(path / name).stat().st_size) for name in names
    }
    data = manifest.model_copy(update={"files": files}).model_dump(mode="json")
    write_atomic(path / MANIFEST, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def write_atomic(target: Path, data: bytes) -> None:
    """Replace `target` by `data`; a crash leaves the old or the new file, never a part of it."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(target)


def digest(file: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
