"""Several models in one service: each has its own bundle and its own namespace in Redis.

Queue, admission, planning, workers and recovery know one model each; the models share nothing but the API and
the Redis server.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ditserve.model.spec.adapters import ADAPTERS, AdapterFile, adapter_files
from ditserve.model.spec.bundle import MANIFEST, Bundle
from ditserve.model.spec.errors import BundleError, ModelError
from ditserve.model.spec.pipeline_bundle import cached_bundle
from ditserve.model.spec.pipeline_folder import is_pipeline
from ditserve.service.identity import bundle_digest
from ditserve.service.settings import Settings

_LONGEST = 32  # letters of a namespace


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is served: its bundle with the adapters beside it, and its namespace in Redis.

    `folder` is the path of the settings. The path of the bundle is where the folder's links led when it was
    opened. `adapters` are those that lay in `adapters_folder` then, which is `given_adapters` if that is set.
    """

    folder: Path
    bundle: Bundle
    namespace: str
    adapters: tuple[AdapterFile, ...] = ()
    adapters_folder: Path | None = None
    given_adapters: Path | None = None

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def digest(self) -> str:
        """Return a digest that is equal for equal bundles with equal adapters."""
        versions = {adapter.name: adapter.version for adapter in self.adapters}
        return bundle_digest(self.bundle.manifest, versions)

    def settings(self, settings: Settings) -> Settings:
        """Return the settings of a process that serves this model alone."""
        beside = self.adapters_folder if self.adapters else None
        own = {"bundle": str(self.bundle.path), "namespace": self.namespace, "adapters": beside}
        return settings.model_copy(update=own)

    def reopened(self, *, verify: bool) -> ServedModel:
        """Return the model that lies in the folder now.

        Raise `BundleError`, also when it has another name.
        """
        bundle = _open(self.folder, verify=verify)
        if bundle.manifest.name != self.name:
            raise BundleError(
                f"{self.folder} holds {bundle.manifest.name} where {self.name} is served: "
                "restart to serve another model"
            )
        beside = _adapters_folder(self.folder, self.given_adapters)
        return replace(self, bundle=bundle, adapters=adapter_files(beside), adapters_folder=beside)


def open_served_models(settings: Settings, *, verify: bool) -> tuple[ServedModel, ...]:
    """Open each bundle of the settings, the default model's first.

    Raises:
        BundleError: a bundle or an adapter cannot be used, or two are of the same name.
    """
    models: dict[str, ServedModel] = {}
    folders = _folders(settings.bundle)
    for folder in folders:
        bundle = _open(folder, verify=verify)
        name = bundle.manifest.name
        if name in models:
            raise BundleError(
                f"{models[name].folder} and {folder} both hold {name}: "
                "models served together need different names"
            )
        namespace = namespace_of(settings.namespace, name) if models else settings.namespace
        given = settings.adapters
        if given is not None and len(folders) > 1:
            given /= name
        beside = _adapters_folder(folder, given)
        models[name] = ServedModel(folder, bundle, namespace, adapter_files(beside), beside, given)
    return tuple(models.values())


def namespace_of(first: str, name: str) -> str:
    """Return the namespace of a further model: readable where it can be, and different for every name."""
    plain = f"{first}-{name}"
    allowed = re.sub(r"[^a-z0-9_-]", "-", plain.lower())
    if allowed == plain and len(allowed) <= _LONGEST:
        return allowed
    digest = hashlib.blake2b(plain.encode(), digest_size=4).hexdigest()
    return f"{allowed[: _LONGEST - len(digest) - 1]}-{digest}"


def _folders(text: str) -> list[Path]:
    """Return the folders of a list with commas. A folder that has a comma in its path is one itself."""
    return [Path(text)] if Path(text).is_dir() else [Path(part) for part in text.split(",")]


def _adapters_folder(folder: Path, given: Path | None) -> Path:
    """Return the folder of a model's adapters: the one given, or that in the folder that was named.

    A pipeline's bundle lies elsewhere, in the user's cache.
    """
    return (folder / ADAPTERS if given is None else given).resolve()


def _open(folder: Path, *, verify: bool) -> Bundle:
    """Open a bundle at the path where the folder's links lead now; that of a pipeline's folder is made.

    A process started later with that path finds the same bundle, even if a link leads elsewhere by then.
    """
    if is_pipeline(folder) and not (folder / MANIFEST).is_file():
        try:
            folder = cached_bundle(folder)
        except (ModelError, OSError) as error:
            raise BundleError(f"{folder} cannot be served: {error}") from error
    return Bundle.open(folder.resolve(), verify=verify)
