"""The backend that a worker's settings choose, and the options that they set for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ditserve.model.spec.bundle import BACKBONE, PIPELINE
from ditserve.model.spec.manifest import Manifest
from ditserve.service.backends import BackendUnavailable
from ditserve.service.settings import Settings

# Backend → the settings it takes, besides threads.
OPTIONS: Final = {
    "onnx": ("precision", "providers"),
    "torch": ("device", "compile", "precision"),
    "tensorrt": ("precision", "engines"),
}

# Setting → the backend option that it gives.
READ: Final[dict[str, Callable[[Any, Manifest], Any]]] = {
    "providers": lambda value, _: tuple(value.split(",")),
    "engines": lambda value, manifest: value / manifest.name,
}


def with_backend(settings: Settings, manifest: Manifest) -> Settings:
    """Return the settings with the backend that "auto" stands for.

    It is torch for an imported pipeline without graphs: its network, or its autoencoder, runs there.
    """
    if settings.backend != "auto":
        return settings
    imported = any(name.startswith(f"{PIPELINE}/") for name in manifest.files)
    torch = imported and BACKBONE not in manifest.files
    return settings.model_copy(update={"backend": "torch" if torch else "onnx"})


def backend_options(settings: Settings, manifest: Manifest) -> dict[str, Any]:
    """Return the options of the chosen backend: the settings that were set. It chooses the others itself.

    Raises:
        BackendUnavailable: one is set that this backend does not take.
    """
    settings = with_backend(settings, manifest)
    options: dict[str, Any] = {"threads": settings.threads}
    for name in dict.fromkeys(option for names in OPTIONS.values() for option in names):
        value = getattr(settings, name)
        if value == Settings.model_fields[name].default:
            continue
        if name == "engines" and settings.backend == "torch" and settings.compile:
            # Torch itself keeps what it compiles there: see `Settings.load`.
            continue
        if name not in OPTIONS[settings.backend]:
            takers = " and ".join(backend for backend, names in OPTIONS.items() if name in names)
            raise BackendUnavailable(
                f"--{name} is for the {takers} backend, not for {settings.backend}: leave it out"
            )
        options[name] = READ[name](value, manifest) if name in READ else value
    if settings.export_on_start and settings.backend != "tensorrt":
        raise BackendUnavailable(
            f"--export-on-start is for the tensorrt backend, not for {settings.backend}: leave it out"
        )
    return options
