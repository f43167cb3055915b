"""The HTTP application: routes, middleware, error answers and lifespan, put together from settings.

Starts with neither torch nor onnxruntime: of a bundle only the manifest is read.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ditserve.service.api_keys import admit
from ditserve.service.errors import ServiceError
from ditserve.service.http import job_routes, openai, pages, probes, routes
from ditserve.service.http.access import Access
from ditserve.service.http.context import Context
from ditserve.service.http.middleware import Body, RequestContext
from ditserve.service.http.models import VERSION, Model, renewed
from ditserve.service.http.openapi import document
from ditserve.service.http.problems import answer
from ditserve.service.queue.queue_client import QueueClient, open_queue_client
from ditserve.service.served_models import open_served_models
from ditserve.service.settings import Settings
from ditserve.service.telemetry.tracing import open_tracing

Opener = Callable[[Settings], AbstractAsyncContextManager[QueueClient]]

_DESCRIPTION = """Images from a Diffusion Transformer, scheduled step by step.

Every answer tells how its images were made: steps asked for and used, the operating point, and where the time went.
Under load, requests that allow it are run in fewer or cheaper steps, never silently. Errors are RFC 9457 problems with a
stable `code`; 503 means the service is full and 429 that your quota is, both with `Retry-After`.
"""


def create_app(settings: Settings, *, opener: Opener = open_queue_client) -> FastAPI:
    """The application. `opener` connects to the queue when the app starts.

    Raises:
        BundleError: a bundle of the settings cannot be used.
        KeyringError: their key file cannot, or nobody said that everybody may come in.
        ValueError: traces without the extra they need.
    """
    lanes = open_served_models(settings, verify=False)
    keyring = admit(settings)
    tracing = open_tracing(settings.otlp_endpoint, "dit-api")
    draining, reload = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            models = {}
            for lane in lanes:
                backplane = await stack.enter_async_context(opener(lane.settings(settings)))
                models[lane.name] = Model.of(lane, settings, backplane)
            context = app.state.context = Context(settings, models, draining)
            canaries = [_watching(context, name) for name in models] if settings.canary_s else []
            await stack.enter_async_context(_beside(_reloading(context, reload), *canaries))
            yield
        tracing.close()

    app = FastAPI(
        title="DiT serving",
        summary="Images from a Diffusion Transformer",
        description=_DESCRIPTION,
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: (
            f"{route.tags[0]}-{route.name}" if route.tags else route.name
        ),
    )
    app.state.draining, app.state.reload, app.state.keyring = draining, reload, keyring
    app.openapi = lambda: document(app, keyed=keyring is not None)  # type: ignore[method-assign]
    routers = [module.router for module in (routes, job_routes, openai, probes, pages)]
    if settings.metrics:
        routers.append(probes.metrics_router)
    for router in routers:
        app.include_router(router)
    for kind in (ServiceError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answered)
    app.add_middleware(Body, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Access, keyring=keyring, quota=lambda: app.state.context.default.backplane.quota)
    known = [route for router in routers for route in router.routes]
    app.add_middleware(RequestContext, tracing=tracing, routes=known)
    return app


@asynccontextmanager
async def _beside(*endless: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """With these running until the block ends."""
    tasks = [asyncio.create_task(each) for each in endless]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _reloading(context: Context, reload: asyncio.Event) -> None:
    """At every event, put the new versions of the models in the place of the old, between two requests."""
    while True:
        await reload.wait()
        reload.clear()
        context.models = await renewed(context.models, context.settings)


async def _watching(context: Context, name: str) -> None:
    """Have the golden image of a model drawn every so often, where its bundle has one."""
    while True:
        await asyncio.sleep(context.settings.canary_s)
        canary = context.models[name].canary
        if canary is not None:
            await canary.watch()


async def _answered(request: Request, error: Exception) -> Response:
    return answer(error, request.scope)
