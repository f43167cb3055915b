"""The HTTP application: routes, middleware, error answers and lifespan, put together from settings.

Starts with neither torch nor onnxruntime: of the bundle only the manifest is read.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from model.bundle import Bundle
from service import metrics
from service.errors import ServiceError
from service.http import job_routes, openai, pages, probes, routes
from service.http.access import Access
from service.http.canary import Canary
from service.http.context import Context
from service.http.intake import Intake
from service.http.middleware import Body, RequestContext
from service.http.openapi import document
from service.http.problems import answer
from service.keyring import admit
from service.queue.backplane import Backplane, open_backplane
from service.settings import Settings
from service.tracing import open_tracing

VERSION = "0.1.0"

Opener = Callable[[Settings], AbstractAsyncContextManager[Backplane]]

_DESCRIPTION = """Images from a Diffusion Transformer, scheduled step by step.

Every answer tells how its images were made: steps asked for and used, the operating point, and where the time went.
Under load, requests that allow it are run in fewer or cheaper steps, never silently. Errors are RFC 9457 problems with a
stable `code`; 503 means the service is full and 429 that your quota is, both with `Retry-After`.
"""


def create_app(settings: Settings, *, opener: Opener = open_backplane) -> FastAPI:
    """The application. `opener` connects to the queue when the app starts.

    Raises:
        BundleError: the bundle of the settings cannot be used.
        KeyringError: their key file cannot, or nobody said that everybody may come in.
        ValueError: traces without the extra they need.
    """
    bundle = Bundle.open(settings.bundle, verify=False)
    keyring = admit(settings)
    tracing = open_tracing(settings.otlp_endpoint, "dit-api")
    draining = asyncio.Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opener(settings) as backplane:
            intake = Intake(bundle.manifest, settings, backplane.queue)
            app.state.context = Context(settings, backplane, intake, draining)
            async with _watched(settings, bundle, intake, backplane):
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
    app.state.draining, app.state.keyring = draining, keyring
    app.openapi = lambda: document(app, keyed=keyring is not None)  # type: ignore[method-assign]
    for module in (routes, job_routes, openai, probes, pages):
        app.include_router(module.router)
    if settings.metrics:
        app.include_router(probes.metrics_router)
    for kind in (ServiceError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answered)
    app.add_middleware(Body, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Access, keyring=keyring, quota=lambda: app.state.context.backplane.quota)
    app.add_middleware(RequestContext, tracing=tracing)
    metrics.BUILD_INFO.labels(VERSION, bundle.manifest.name, bundle.manifest.version).set(1)
    return app


@asynccontextmanager
async def _watched(
    settings: Settings, bundle: Bundle, intake: Intake, backplane: Backplane
) -> AsyncIterator[None]:
    """With the canary at work, where the bundle has a golden image and `canary_s` is not 0."""
    golden = bundle.manifest.golden
    if golden is None or not settings.canary_s:
        yield
        return
    canary = Canary(bundle.path, golden, intake, backplane.listener)
    task = asyncio.create_task(canary.run(settings.canary_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _answered(request: Request, error: Exception) -> Response:
    return answer(error, request.scope)
