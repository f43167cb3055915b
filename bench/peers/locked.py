"""A web server around the pipeline and one lock, as in diffusers' own server example, with a cap.

    uvicorn ditserve.bench.peers.locked:app

It is Starlette, on which FastAPI is built, without FastAPI's validation.
"""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ditserve.bench.peers.cap import Cap
from ditserve.bench.peers.graph import open_pipeline
from ditserve.bench.peers.options import PeerOptions
from ditserve.bench.peers.requests import CONTENT_TYPE, PeerRequest

options = PeerOptions.read()
pipeline = open_pipeline(options)
lock = asyncio.Lock()


async def generate(request: Request) -> Response:
    wanted = PeerRequest.read(await request.json())
    async with lock:
        (file,) = await run_in_threadpool(pipeline, [wanted])
    return Response(file, media_type=CONTENT_TYPE)


async def health(request: Request) -> Response:
    return PlainTextResponse("ok")


app = Starlette(
    routes=[Route("/generate", generate, methods=["POST"]), Route("/health", health)],
    middleware=[Middleware(Cap, cap=options.cap)],
)
