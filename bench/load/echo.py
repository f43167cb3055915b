"""The plain ASGI application: it reads a request's body and answers with as many bytes as an image has.

    uvicorn ditserve.bench.load.echo:app

`bench.overhead_http` compares the service with it, to leave out what the server and the interpreter cost by
themselves.
"""

from __future__ import annotations

from typing import Any

ANSWER = bytes(512)
HEADERS = [(b"content-type", b"image/png"), (b"content-length", str(len(ANSWER)).encode())]


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})
