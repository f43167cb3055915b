"""The namespace of a queue belongs to one model: its jobs, rows and workers are counted as those of one."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from ditserve.service.fleet import LoadSnapshot

EVERY_S = 1.0  # between two looks whether workers of another model have left

log = structlog.get_logger()


async def refuse_other_models(
    load: Callable[[], Awaitable[LoadSnapshot]], *, namespace: str, model: str, patience_s: float
) -> None:
    """Raise `ValueError` where workers of another model are alive in this namespace.

    The reports of workers that were killed go stale within `patience_s` seconds, so they are given that time.
    Raises what `load` raises.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + patience_s + EVERY_S
    while True:
        snapshot = await load()
        models = {name for worker in snapshot.workers for name in worker.models}
        others = sorted({*models, *(worker.model for worker in snapshot.starting)} - {model})
        if not others:
            return
        if clock() > deadline:
            raise ValueError(
                f"--namespace: {namespace} is in use by workers of {', '.join(others)}; give {model} another"
            )
        log.warning("namespace in use", namespace=namespace, models=others, waiting_for=model)
        await asyncio.sleep(EVERY_S)
