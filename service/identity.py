"""What a bundle is and what its class numbers mean, each as a few letters that travel with jobs and reports. Pure."""

from __future__ import annotations

import hashlib

from ditserve.model.spec.bundle import Manifest


def bundle_digest(manifest: Manifest) -> str:
    """Equal for equal bundles: the manifest holds the hash of every file."""
    return _digest(manifest.model_dump_json())


def vocabulary_digest(manifest: Manifest) -> str:
    """Equal where a job's class indices and text mean the same: the factors' class names in order, and the size of its text."""
    factors = "\0".join(factor.model_dump_json() for factor in manifest.factors)
    return _digest(f"{manifest.config.text_size}\0{factors}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
