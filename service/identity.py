"""Digests of a bundle and of the meaning of its class numbers, which travel with jobs and reports. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from ditserve.model.spec.manifest import Manifest

NO_ADAPTERS: Mapping[str, str] = {}


def bundle_digest(manifest: Manifest, adapters: Mapping[str, str] = NO_ADAPTERS) -> str:
    """Return a digest that is equal for equal bundles, with the same versions of adapters beside them.

    The manifest holds the hash of every file of the bundle itself. What it leaves out is left out here too:
    the next release may have a default for it.
    """
    beside = "".join(f"\0{name} {version}" for name, version in sorted(adapters.items()))
    return _digest(manifest.model_dump_json(exclude_defaults=True) + beside)


def vocabulary_digest(manifest: Manifest) -> str:
    """Return a digest that is equal where class indices and text mean the same.

    It covers the class names of each factor, in order, and the size of the text encoding.
    """
    factors = "\0".join(factor.model_dump_json() for factor in manifest.factors)
    return _digest(f"{manifest.config.text_width}\0{factors}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
