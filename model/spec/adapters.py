"""The low-rank adapters (LoRA) that lie beside a bundle: one file, or one folder of PEFT's, a name.

    <bundle>/adapters/pixel-art.safetensors
                      noir/adapter_model.safetensors       and adapter_config.json, as PEFT saves them
                      sketch/pytorch_lora_weights.safetensors     as diffusers saves it

Files of other kinds, and hidden ones, are left alone. What is in a file is read by `model.weights.lora`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from ditserve.model.spec.bundle import digest
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Name

ADAPTERS: Final = "adapters"
SUFFIX: Final = ".safetensors"
# What the weights of an adapter are called in a folder of its own.
WEIGHT_FILES: Final = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
PEFT_CONFIG: Final = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter on disk. Adapters of equal `version` hold the same bytes; `config` is PEFT's, if any."""

    name: str
    path: Path
    version: str
    config: Path | None = None

    def read(self) -> tuple[bytes, bytes]:
        """Return the bytes of the weights and of the configuration, empty if there is none.

        Raises:
            BundleError: they cannot be read, or are others than when the folder was looked through.
        """
        if _version(self.path, self.config) != self.version:
            raise BundleError(f"{self.path} was changed while the service started: start it again")
        return self.path.read_bytes(), b"" if self.config is None else self.config.read_bytes()


def adapter_files(folder: Path) -> tuple[AdapterFile, ...]:
    """Return the adapters in a folder by name; none if there is no such folder.

    Raises:
        BundleError: one of them cannot be read, has no legal name, or has the name of another.
    """
    found: dict[str, AdapterFile] = {}
    try:
        for path, config, name in _weights(folder):
            if name in found:
                raise BundleError(f"{path} and {found[name].path} are both the adapter {name}: remove one")
            found[name] = AdapterFile(_checked(name, path), path, _version(path, config), config)
    except OSError as error:
        raise BundleError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    return tuple(found[name] for name in sorted(found))


def _weights(folder: Path) -> Iterator[tuple[Path, Path | None, str]]:
    """Yield the weights of each adapter, its configuration if it has one, and its name."""
    if not folder.exists():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            inner = [path / name for name in WEIGHT_FILES if (path / name).exists()]
            if not inner:
                raise BundleError(f"{path} holds no adapter: it has neither {' nor '.join(WEIGHT_FILES)}")
            config = path / PEFT_CONFIG
            yield inner[0], config if config.exists() else None, path.name
        elif path.suffix == SUFFIX:
            yield path, None, path.stem


def _checked(name: str, path: Path) -> str:
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise BundleError(
            f"{path} names an adapter {name!r}: take letters from a to z, digits, '.', '_' and '-', and a "
            "letter or a digit first"
        ) from None


def _version(weights: Path, config: Path | None) -> str:
    """Return the version of an adapter. A pipe, which would be waited for, is no file."""
    hashes: list[str] = []
    for path in filter(None, (weights, config)):
        if not path.is_file():
            raise BundleError(f"{path} is no file that can be read: remove it")
        hashes.append(digest(path))
    return hashlib.blake2b(" ".join(hashes).encode(), digest_size=8).hexdigest()
