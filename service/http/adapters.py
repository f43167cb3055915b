"""The low-rank adapters that a request names, as the workers have them. Pure.

Workers tell which they have loaded, so the API never reads an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ditserve.service.errors import Overloaded
from ditserve.service.fleet import LoadedAdapter, WorkerState
from ditserve.service.http.operating_point import field_error
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.jobs import AdapterUse

# A client that no worker can serve yet is asked to come back after so many seconds.
RETRY_S: Final = 5.0


def common_adapters(workers: Sequence[WorkerState]) -> tuple[LoadedAdapter, ...] | None:
    """Return the adapters that every worker has loaded in the same version, by name.

    None: there is no worker, or not every one takes adapters.
    """
    loaded = [worker.adapters for worker in workers if worker.adapters is not None]
    if not loaded or len(loaded) < len(workers):
        return None
    common = set(loaded[0]).intersection(*loaded[1:])
    return tuple(sorted(common, key=lambda adapter: adapter.name))


def requested_adapters(request: GenerateRequest, workers: Sequence[WorkerState]) -> tuple[AdapterUse, ...]:
    """Return the adapters that a request is drawn with, by name; those of scale 0 are left out.

    Raises:
        InvalidRequest: one is not loaded, or named twice, or the workers take none.
        Overloaded: no worker is there, or not every one has loaded it yet.
    """
    if not request.adapters:
        return ()
    if not workers:
        raise Overloaded("No worker is running to say which adapters are there.", retry_after=RETRY_S)
    names = [wish.name for wish in request.adapters]
    common = common_adapters(workers)
    if common is None:
        raise field_error(
            "adapters", "Adapters need workers of the torch backend, and this model is run by others."
        )
    loaded = {adapter.name: adapter for adapter in common}
    anywhere = {adapter.name for worker in workers for adapter in worker.adapters or ()}
    for name in names:
        if names.count(name) > 1:
            raise field_error("adapters", f"{name!r} is named twice: give it one scale.")
        if name not in anywhere:
            known = f"choose among {', '.join(loaded)}" if loaded else "none is loaded"
            raise field_error("adapters", f"There is no {name!r}; {known}.")
        if name not in loaded:
            raise Overloaded(f"Not every worker has loaded the adapter {name!r} yet.", retry_after=RETRY_S)
    wishes = sorted(request.adapters, key=lambda wish: wish.name)
    return tuple(
        AdapterUse(wish.name, wish.scale, loaded[wish.name].version) for wish in wishes if wish.scale
    )
