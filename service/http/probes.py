"""Probes and metrics: is this process alive, may it be given work, has it started."""

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from service import metrics
from service.errors import QueueUnavailable
from service.http.context import Api, Context
from service.http.openapi import Responses
from service.http.schemas import Health
from service.jobs import LoadSnapshot
from service.planning.load import hung

router = APIRouter(tags=["operations"])
metrics_router = APIRouter(tags=["operations"])

_FAILING: Responses = {503: {"model": Health, "description": "At least one check fails."}}


@router.get("/livez", summary="Alive", response_model=Health, responses=_FAILING)
async def livez(api: Api) -> Response:
    """Fails when samples are running and no worker has taken a step for `hang_s` seconds: something hangs."""
    load = await _load(api)
    return _health(engine_steps=load is None or not hung(load, api.settings.hang_s))


@router.get("/readyz", summary="Ready for work", response_model=Health, responses=_FAILING)
async def readyz(api: Api) -> Response:
    """Fails while this process drains, Redis does not answer, or fewer workers than `ready_workers` are alive."""
    load = await _load(api)
    api.started = api.started or _staffed(api, load)
    return _health(accepting=not api.draining.is_set(), queue=load is not None, workers=_staffed(api, load))


@router.get("/startupz", summary="Started", response_model=Health, responses=_FAILING)
async def startupz(api: Api) -> Response:
    """Fails until enough workers were once seen; from then on it holds."""
    if not api.started:
        api.started = _staffed(api, await _load(api))
    return _health(started=api.started)


@metrics_router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}},
)
async def get_metrics(api: Api) -> Response:
    """Of all processes that share this one's metrics folder, and of the queue."""
    metrics.observe_memory("api")
    load = await _load(api)
    shared = api.settings.prometheus_multiproc_dir
    content = await run_in_threadpool(metrics.exposition, load, shared=shared)
    return Response(content, headers={"content-type": metrics.CONTENT_TYPE})


async def _load(api: Context) -> LoadSnapshot | None:
    try:
        return await api.intake.load()
    except QueueUnavailable:
        return None


def _staffed(api: Context, load: LoadSnapshot | None) -> bool:
    model = api.intake.manifest.name
    serving = [worker for worker in load.workers if model in worker.models] if load else []
    return load is not None and len(serving) >= api.settings.ready_workers


def _health(**checks: bool) -> Response:
    ok = all(checks.values())
    content = {"status": "ok" if ok else "failing", "checks": checks}
    return JSONResponse(content, 200 if ok else 503, {"cache-control": "no-store"})
