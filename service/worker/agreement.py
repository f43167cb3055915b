"""One precision for all workers of a bundle, so that a seed is one image whichever of them draws it.

Where the precision is the backend's choice, the first worker's choice holds for those that come later with
the same backend, also after all have left. The queue remembers it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.errors import BundleError
from ditserve.service.backends import Backend, BackendUnavailable, load_backend
from ditserve.service.identity import bundle_digest
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.patience import until_answered

log = structlog.get_logger()

Load = Callable[..., Backend]


async def load_agreed(
    name: str, bundle: Bundle, options: Mapping[str, Any], broker: Broker, *, load: Load = load_backend
) -> Backend:
    """Open a bundle on the backend `name`, in the precision of the other workers unless `options` name one.

    A worker that cannot compute in that precision works in its own; the fleet is mixed then, which
    `dit_networks` tells.

    Raises:
        BackendUnavailable, BundleError: see `load_backend`.
    """

    def opened(**more: Any) -> Backend:
        return load(name, bundle, **options, **more)

    if "precision" in options:
        return await asyncio.to_thread(opened)
    choice = " ".join([bundle_digest(bundle.manifest), name, *options.get("providers", ())])

    async def agreed(proposal: str) -> str:
        return await until_answered(lambda: broker.agree(choice, proposal))

    precision = await agreed("")
    if not precision:
        own = await asyncio.to_thread(opened)
        precision = await agreed(own.precision)
        if precision == own.precision:
            return own
        # Another worker chose meanwhile.
        own.close()
    backend = await asyncio.to_thread(_opened_in, precision, opened)
    return backend if backend is not None else await asyncio.to_thread(opened)


def _opened_in(precision: str, opened: Callable[..., Backend]) -> Backend | None:
    """Open a backend in the precision of the other workers; None where that is not possible here."""
    try:
        backend = opened(precision=precision)
    except (BackendUnavailable, BundleError) as error:
        log.warning(
            "not in the precision of the other workers: the same seed gives other images here",
            theirs=precision,
            reason=str(error),
        )
        return None
    log.info("precision of the other workers", precision=precision)
    return backend
