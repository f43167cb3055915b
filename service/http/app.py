"""The HTTP application: routes, middleware, error responses and lifespan, put together from settings.

It starts with neither torch nor onnxruntime: of a bundle it reads only the manifest.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing
from functools import partial

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ditserve.service.addresses import is_loopback
from ditserve.service.api_keys import open_keyring
from ditserve.service.callbacks.delivery import CallbackMessage, Deliveries
from ditserve.service.errors import ServiceError
from ditserve.service.http.access import Access
from ditserve.service.http.canary import golden_image, next_tick
from ditserve.service.http.context import Context
from ditserve.service.http.middleware import Body, BodyLimits, Crashes, Head, RequestContext
from ditserve.service.http.models import VERSION, Model, reloaded
from ditserve.service.http.openapi import openapi_document
from ditserve.service.http.origin import ANY_HOST, Hosts, Origin
from ditserve.service.http.picture_reader import PictureReader
from ditserve.service.http.problems import error_response
from ditserve.service.http.routes import generate, jobs, models, openai, pages, probes
from ditserve.service.http.routing import methods
from ditserve.service.http.streams import Streams
from ditserve.service.queue.queue_client import QueueClient, open_queue_client
from ditserve.service.served_models import open_served_models
from ditserve.service.settings import Settings
from ditserve.service.telemetry.faults import kept_running
from ditserve.service.telemetry.tracing import Tracing, open_tracing

EVICTION_EVERY_S = 10.0  # between two looks at the `maxmemory-policy` of Redis

Opener = Callable[[Settings], AbstractAsyncContextManager[QueueClient]]

_DESCRIPTION = """Images from a Diffusion Transformer, scheduled step by step.

Every answer tells how its images were made: steps asked for and used, the operating point, and the time of
each phase. Under load, requests that allow it are run in fewer or cheaper steps, never silently. Errors are
RFC 9457 problems with a stable `code`; 503 means that the service is full, 429 that your quota is used up,
both with `Retry-After`.
"""


def create_app(settings: Settings, *, opener: Opener = open_queue_client) -> FastAPI:
    """Build the application. `opener` connects to the queue when the app starts.

    Raises:
        BundleError: a bundle of the settings cannot be used.
        KeyringError: the key file cannot be used, or the settings neither name one nor let everybody in.
        ValueError: the root path is one of the API's own, or the extra that sends traces is not installed.
    """
    served_models = open_served_models(settings, verify=False)
    for served in served_models:
        if served.bundle.manifest.golden is not None:
            # Here a damaged one is a sentence; when the application starts it would be a traceback.
            golden_image(served.bundle.path)
    keyring = open_keyring(settings)
    tracing = open_tracing(settings.otlp_endpoint, "dit-api")
    draining, reload = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            by_name = {}
            pictures = stack.enter_context(closing(PictureReader(settings.max_picture_bytes)))
            for served in served_models:
                queue_client = await stack.enter_async_context(opener(served.settings(settings)))
                by_name[served.name] = Model.of(served, settings, queue_client, pictures)
            streams = Streams(limit=settings.max_streams, keyring=keyring, draining=draining)
            context = app.state.context = Context(settings, by_name, draining, streams)
            stack.push_async_callback(context.aclose)
            canaries = [partial(_watch, context, name) for name in by_name] if settings.canary_s else []
            endless = [partial(_reload, context, reload), partial(streams.watch)]
            endless += [partial(_check_eviction, context), *canaries]
            if settings.callback_allow:
                endless += [partial(_call_back, context, name) for name in by_name]
            await stack.enter_async_context(_background(*endless))
            yield
        tracing.close()

    app = _fastapi(lifespan)
    app.state.draining, app.state.reload, app.state.keyring = draining, reload, keyring
    app.openapi = lambda: openapi_document(  # type: ignore[method-assign]
        app, keyed=keyring is not None, root_path=settings.root_path
    )
    routers = _routers(settings)
    # FastAPI's own routes (the document), and ours as they are before it wraps them.
    routes = [*app.routes, *(route for router in routers for route in router.routes)]
    app.state.routes = routes
    for router in routers:
        app.include_router(router)
    for kind in (ServiceError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _error_response)
    _check_root_path(settings.root_path, [getattr(route, "path", "") for route in routes])
    _add_layers(app, settings, tracing)
    return app


def _fastapi(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    return FastAPI(
        title="DiT serving",
        summary="Images from a Diffusion Transformer",
        description=_DESCRIPTION,
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: "-".join([*map(str, route.tags[:1]), route.name]),
        # The service has its own; to look at every request whether there are others is dear.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )


def _add_layers(app: FastAPI, settings: Settings, tracing: Tracing) -> None:
    """Add the middleware, innermost first."""
    app.add_middleware(Head)
    cors_origins = settings.cors_origins.split(",") if settings.cors_origins else []
    limits = BodyLimits(
        max_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        timeout_s=settings.body_timeout_s,
        cors_origins=cors_origins,
    )
    app.add_middleware(Body, routes=app.state.routes, limits=limits)
    app.add_middleware(
        Access, keyring=app.state.keyring, quota=lambda: app.state.context.default.queue_client.quota
    )
    app.add_middleware(Hosts, allowed=_allowed_hosts(settings))
    app.add_middleware(Crashes)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(RequestContext, tracing=tracing, routes=app.state.routes)
    app.add_middleware(Origin, trusted_proxies=settings.trusted_proxies, root_path=settings.root_path)


def _routers(settings: Settings) -> list[APIRouter]:
    routers = [module.router for module in (generate, models, jobs, openai, probes, pages)]
    return [*routers, probes.metrics_router] if settings.metrics else routers


def _check_root_path(root_path: str, paths: list[str]) -> None:
    """Raise `ValueError` where paths of the API lie below `root_path`: they could not be told from others."""
    if root_path and any(f"{path}/".startswith(f"{root_path}/") for path in paths):
        raise ValueError(f"--root-path: the API has paths below {root_path} itself; choose another")


def _allowed_hosts(settings: Settings) -> list[str]:
    """Return the hosts of the settings; unset, any where a key is asked or other machines can connect."""
    if settings.allowed_hosts:
        return settings.allowed_hosts.split(",")
    return [] if settings.keys_file is None and is_loopback(settings.host) else [ANY_HOST]


@asynccontextmanager
async def _background(*loops: partial[Coroutine[None, None, None]]) -> AsyncIterator[None]:
    """Run these loops until the block ends."""
    tasks = [asyncio.create_task(kept_running(loop.func.__name__.strip("_"), loop)) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _reload(context: Context, reload: asyncio.Event) -> None:
    """Replace the models by their new versions at every event, between two requests."""
    while True:
        await reload.wait()
        reload.clear()
        context.models = await reloaded(context.models, context.settings)


async def _check_eviction(context: Context) -> None:
    """Look again and again whether Redis keeps what it is given, because its policy may be changed."""
    while True:
        await asyncio.sleep(EVICTION_EVERY_S)
        await context.default.queue_client.queue.check_eviction()


async def _watch(context: Context, name: str) -> None:
    """Have the golden image of a model drawn about every `canary_s` seconds, if its bundle has one."""
    every_s, clock = context.settings.canary_s, context.models[name].queue_client.queue.clock
    while True:
        tick = await next_tick(clock, every_s)
        canary = context.models[name].canary
        if canary is not None:
            await canary.watch(tick, every_s)


async def _call_back(context: Context, name: str) -> None:
    """Call the senders of a model's jobs back when these have ended."""

    async def compose(job_id: str) -> CallbackMessage:
        lookup = await context.job(job_id)
        return CallbackMessage(lookup.status.job.callback_url, await jobs.described(lookup, context))

    queue = context.models[name].queue_client.queue
    await Deliveries(queue, compose, context.settings).run()


async def _error_response(request: Request, error: Exception) -> Response:
    response = error_response(error, request.scope)
    if response.status_code == 405:
        response.headers["allow"] = methods(request.app.state.routes, request.scope)
    return response
