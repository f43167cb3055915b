"""The HTTP application: routes, middleware, error responses and lifespan, put together from settings.

It starts with neither torch nor onnxruntime: of a bundle it reads only the manifest.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ditserve.service.api_keys import open_keyring
from ditserve.service.errors import ServiceError
from ditserve.service.http.access import Access
from ditserve.service.http.context import Context
from ditserve.service.http.middleware import Body, RequestContext
from ditserve.service.http.models import VERSION, Model, reloaded
from ditserve.service.http.openapi import openapi_document
from ditserve.service.http.problems import error_response
from ditserve.service.http.routes import generate, jobs, models, openai, pages, probes
from ditserve.service.queue.queue_client import QueueClient, open_queue_client
from ditserve.service.served_models import open_served_models
from ditserve.service.settings import Settings
from ditserve.service.telemetry.faults import kept_running
from ditserve.service.telemetry.tracing import open_tracing

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
        ValueError: traces are to be sent, and the extra that sends them is not installed.
    """
    served_models = open_served_models(settings, verify=False)
    keyring = open_keyring(settings)
    tracing = open_tracing(settings.otlp_endpoint, "dit-api")
    draining, reload = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            by_name = {}
            for served in served_models:
                queue_client = await stack.enter_async_context(opener(served.settings(settings)))
                by_name[served.name] = Model.of(served, settings, queue_client)
            context = app.state.context = Context(settings, by_name, draining)
            canaries = [partial(_watch, context, name) for name in by_name] if settings.canary_s else []
            await stack.enter_async_context(_background(partial(_reload, context, reload), *canaries))
            yield
        tracing.close()

    app = _fastapi(lifespan)
    app.state.draining, app.state.reload, app.state.keyring = draining, reload, keyring
    app.openapi = lambda: openapi_document(app, keyed=keyring is not None)  # type: ignore[method-assign]
    routers = _routers(settings)
    for router in routers:
        app.include_router(router)
    for kind in (ServiceError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _error_response)
    app.add_middleware(Body, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Access, keyring=keyring, quota=lambda: app.state.context.default.queue_client.quota)
    routes = [route for router in routers for route in router.routes]
    app.add_middleware(RequestContext, tracing=tracing, routes=routes)
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
    )


def _routers(settings: Settings) -> list[APIRouter]:
    routers = [module.router for module in (generate, models, jobs, openai, probes, pages)]
    return [*routers, probes.metrics_router] if settings.metrics else routers


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


async def _watch(context: Context, name: str) -> None:
    """Have the golden image of a model drawn every `canary_s` seconds, if its bundle has one."""
    while True:
        await asyncio.sleep(context.settings.canary_s)
        canary = context.models[name].canary
        if canary is not None:
            await canary.watch()


async def _error_response(request: Request, error: Exception) -> Response:
    return error_response(error, request.scope)
