"""The stored weights of a bundle's network, as they are on disk."""

from __future__ import annotations

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ditserve.model.spec.bundle import WEIGHTS, Bundle


def load_weights(bundle: Bundle) -> dict[str, Tensor]:
    """Return the weights by name, in the precision stored.

    Those that a further backbone shares are read from the bundle that it belongs to.

    Raises:
        BundleError: the bundle lists no weights.
        SafetensorError, OSError: a file is damaged, or cannot be read.
    """
    weights = load_file(bundle.file(WEIGHTS))
    if bundle.whole is not None and bundle.shared_weights:
        with safe_open(bundle.whole / WEIGHTS, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in bundle.shared_weights}
    return weights
