"""Probes and metrics: is this process alive, may it be given work, has it started.

None waits for Redis longer than `load_cache.PATIENCE_S`. `/livez` asks nobody and judges nobody else: neither
a Redis nor a worker that hangs is mended by another API process.
"""

import asyncio

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from ditserve.service.fleet import LoadSnapshot
from ditserve.service.http.answer_schemas import Health, Startup
from ditserve.service.http.context import Api, Context
from ditserve.service.http.openapi import Responses
from ditserve.service.planning.load import hung
from ditserve.service.telemetry import metrics

router = APIRouter(tags=["operations"])
metrics_router = APIRouter(tags=["operations"])

_FAILING: Responses = {503: {"model": Health, "description": "At least one check fails."}}
_NOT_STARTED: Responses = {503: {"model": Startup, "description": "Not enough workers were seen yet."}}


@router.get("/livez", summary="Alive", response_model=Health)
async def livez() -> Response:
    """Answers as long as this process does."""
    return _health({})


@router.get("/readyz", summary="Ready for work", response_model=Health, responses=_FAILING)
async def readyz(api: Api) -> Response:
    """Fails while this process drains, Redis does not answer, or a model lacks workers (`ready_workers`).

    Workers that run samples and have taken no step for `hang_s` seconds are as good as none. The reasons are
    told by the name of the check.
    """
    faults = {
        "accepting": "This process is told to stop." if api.draining.is_set() else "",
        "queue": await _refreshed(api),
        "workers": _lacking(api),
    }
    api.started = api.started or not faults["workers"]
    return _health(faults)


@router.get("/startupz", summary="Started", response_model=Startup, responses=_NOT_STARTED)
async def startupz(api: Api) -> Response:
    """Fails until every model once had enough workers; from then on it holds.

    Lists what starting workers are doing.
    """
    fault = ""
    if not api.started:
        away = await _refreshed(api)
        lacking = _lacking(api)
        api.started, fault = not lacking, lacking and (away or lacking)
    workers = (worker for load in _last_loads(api).values() for worker in load.starting)
    return _health({"started": fault}, starting=[f"{worker.model}: {worker.doing}" for worker in workers])


@metrics_router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}},
)
async def get_metrics(api: Api) -> Response:
    """Metrics of all processes that share this one's metrics folder, and of the queue of each model.

    While Redis is away (`dit_redis_up` is 0), those of the queue are what was read of it last.
    """
    metrics.observe_memory("api")
    answered = not await _refreshed(api)
    loads, shared = _last_loads(api), api.settings.prometheus_multiproc_dir
    content = await run_in_threadpool(metrics.exposition, loads, redis_up=answered, shared=shared)
    return Response(content, headers={"content-type": metrics.CONTENT_TYPE})


async def _refreshed(api: Context) -> str:
    """Read the load of every model. Return "", or why Redis does not tell that of one soon."""
    models = api.models.values()
    reasons = await asyncio.gather(*(model.submissions.load.refresh() for model in models))
    return next(filter(None, reasons), "")


def _last_loads(api: Context) -> dict[str, LoadSnapshot]:
    """Return the load by model as it was read last, without the models of which it is not known."""
    loads = {name: model.submissions.load.last() for name, model in api.models.items()}
    return {name: load for name, load in loads.items() if load is not None}


def _lacking(api: Context) -> str:
    """Return "", or what a model lacks: `ready_workers` workers, of which not all that work hang."""
    loads, needed = _last_loads(api), api.settings.ready_workers
    for name in api.models:
        if name not in loads:
            return f"The workers of {name} are not known."
        if (there := len(loads[name].workers)) < needed:
            return f"{name} has {there} of {needed} workers."
        if needed and hung(loads[name], api.settings.hang_s):
            return f"No worker of {name} takes steps."
    return ""


def _health(faults: dict[str, str], **more: list[str]) -> Response:
    """Return the answer of checks, each of which fails if there is a fault."""
    reasons = {check: fault for check, fault in faults.items() if fault}
    content: dict[str, object] = {
        "status": "failing" if reasons else "ok",
        "checks": {check: not fault for check, fault in faults.items()},
        **({"reasons": reasons} if reasons else {}),
        **more,
    }
    return JSONResponse(content, 503 if reasons else 200, {"cache-control": "no-store"})
