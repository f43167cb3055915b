"""Several models in one service: each has a lane of its own, which is its bundle and its part of Redis.

Queue, admission, planning, workers and recovery know one model each; between lanes nothing is shared but the API and the server.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ditserve.model.spec.bundle import Bundle, BundleError
from ditserve.service.identity import bundle_digest
from ditserve.service.settings import Settings

_LONGEST = 32  # letters of a namespace


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`folder` is where the bundle was looked for; the bundle itself lies where that led when it was opened."""

    folder: Path
    bundle: Bundle
    namespace: str

    @property
    def name(self) -> str:
        """The model's."""
        return self.bundle.manifest.name

    @property
    def digest(self) -> str:
        """Equal for equal bundles."""
        return bundle_digest(self.bundle.manifest)

    def settings(self, settings: Settings) -> Settings:
        """The settings of who works in this lane alone."""
        return settings.model_copy(update={"bundle": str(self.bundle.path), "namespace": self.namespace})

    def reopened(self, *, verify: bool) -> ServedModel:
        """What lies in the folder now. Raises `BundleError`, also when it is another model."""
        bundle = _open(self.folder, verify=verify)
        if bundle.manifest.name != self.name:
            raise BundleError(
                f"{self.folder} holds {bundle.manifest.name} where {self.name} is served: restart to serve another model"
            )
        return replace(self, bundle=bundle)


def open_served_models(settings: Settings, *, verify: bool) -> tuple[ServedModel, ...]:
    """A lane for each bundle of the settings, the default model's first.

    Raises:
        BundleError: a bundle cannot be used, or two are of the same name.
    """
    lanes: dict[str, ServedModel] = {}
    for folder in map(Path, settings.bundle.split(",")):
        bundle = _open(folder, verify=verify)
        name = bundle.manifest.name
        if name in lanes:
            raise BundleError(
                f"{lanes[name].folder} and {folder} both hold {name}: models served together need different names"
            )
        namespace = namespace_of(settings.namespace, name) if lanes else settings.namespace
        lanes[name] = ServedModel(folder, bundle, namespace)
    return tuple(lanes.values())


def namespace_of(first: str, name: str) -> str:
    """The namespace of a further model: readable where it can be, and another for every name."""
    plain = f"{first}-{name}"
    fit = re.sub(r"[^a-z0-9_-]", "-", plain.lower())
    if fit == plain and len(fit) <= _LONGEST:
        return fit
    digest = hashlib.blake2b(plain.encode(), digest_size=4).hexdigest()
    return f"{fit[: _LONGEST - len(digest) - 1]}-{digest}"


def _open(folder: Path, *, verify: bool) -> Bundle:
    """The bundle where a link leads now, so that what starts later finds the same one, wherever the link leads by then."""
    return Bundle.open(folder.resolve(), verify=verify)
