"""Ray Serve with `@serve.batch` and one replica; `max_queued_requests` is its own cap."""

# mypy: disable-error-code="attr-defined, import-not-found, misc, untyped-decorator"
from __future__ import annotations

import asyncio
import signal

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from ditserve.bench.peers.graph import open_pipeline
from ditserve.bench.peers.options import PeerOptions
from ditserve.bench.peers.requests import CONTENT_TYPE, PeerRequest

options = PeerOptions.read()


@serve.deployment(
    max_ongoing_requests=2 * options.batch,
    max_queued_requests=options.cap,
    ray_actor_options={"num_cpus": options.threads},
)
class RayServePeer:
    def __init__(self, options: PeerOptions) -> None:
        self.pipeline = open_pipeline(options)

    @serve.batch(max_batch_size=options.batch, batch_wait_timeout_s=options.wait_s)
    async def draw(self, requests: list[PeerRequest]) -> list[bytes]:
        return await asyncio.to_thread(self.pipeline, requests)

    async def __call__(self, request: Request) -> Response:
        file = await self.draw(PeerRequest.read(await request.json()))
        return Response(file, media_type=CONTENT_TYPE)


def main() -> None:
    ray.init(num_cpus=options.threads, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(RayServePeer.bind(options), route_prefix="/generate")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()


if __name__ == "__main__":
    main()
