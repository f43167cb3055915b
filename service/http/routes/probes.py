"""Probes and metrics: is this process alive, may it be given work, has it started."""

import asyncio
from collections.abc import Mapping

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from ditserve.service.errors import QueueUnavailable
from ditserve.service.http.context import Api, Context
from ditserve.service.http.openapi import Responses
from ditserve.service.http.schemas import Health, Startup
from ditserve.service.jobs import LoadSnapshot
from ditserve.service.planning.load import hung
from ditserve.service.telemetry import metrics

router = APIRouter(tags=["operations"])
metrics_router = APIRouter(tags=["operations"])

_FAILING: Responses = {503: {"model": Health, "description": "At least one check fails."}}
_NOT_STARTED: Responses = {503: {"model": Startup, "description": "Not enough workers were seen yet."}}


@router.get("/livez", summary="Alive", response_model=Health, responses=_FAILING)
async def livez(api: Api) -> Response:
    """Fails when samples are running and no worker has taken a step for `hang_s` seconds: something hangs."""
    loads = await _loads(api) or {}
    return _health({"engine_steps": not any(hung(load, api.settings.hang_s) for load in loads.values())})


@router.get("/readyz", summary="Ready for work", response_model=Health, responses=_FAILING)
async def readyz(api: Api) -> Response:
    """Fails while this process drains, Redis does not answer, or a model lacks workers (`ready_workers`)."""
    loads = await _loads(api)
    staffed = _staffed(api, loads)
    api.started = api.started or staffed
    return _health({"accepting": not api.draining.is_set(), "queue": loads is not None, "workers": staffed})


@router.get("/startupz", summary="Started", response_model=Startup, responses=_NOT_STARTED)
async def startupz(api: Api) -> Response:
    """Fails until every model once had enough workers; from then on it holds.

    Lists what starting workers are doing.
    """
    loads = await _loads(api)
    api.started = api.started or _staffed(api, loads)
    workers = (worker for load in (loads or {}).values() for worker in load.starting)
    return _health(
        {"started": api.started}, starting=[f"{worker.model}: {worker.doing}" for worker in workers]
    )


@metrics_router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}},
)
async def get_metrics(api: Api) -> Response:
    """Metrics of all processes that share this one's metrics folder, and of the queue of each model."""
    metrics.observe_memory("api")
    loads = await _loads(api)
    shared = api.settings.prometheus_multiproc_dir
    content = await run_in_threadpool(metrics.exposition, loads, shared=shared)
    return Response(content, headers={"content-type": metrics.CONTENT_TYPE})


async def _loads(api: Context) -> dict[str, LoadSnapshot] | None:
    """Return the load by model, None when Redis does not answer."""
    models = api.models
    try:
        loads = await asyncio.gather(*(model.submissions.load() for model in models.values()))
    except QueueUnavailable:
        return None
    return dict(zip(models, loads, strict=True))


def _staffed(api: Context, loads: Mapping[str, LoadSnapshot] | None) -> bool:
    """Return True if every model has at least `ready_workers` workers."""
    if loads is None:
        return False
    return min(len(load.workers) for load in loads.values()) >= api.settings.ready_workers


def _health(checks: dict[str, bool], **more: list[str]) -> Response:
    ok = all(checks.values())
    content = {"status": "ok" if ok else "failing", "checks": checks, **more}
    return JSONResponse(content, 200 if ok else 503, {"cache-control": "no-store"})
