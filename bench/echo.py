"""The least an ASGI application can do for a request: read its body and answer with as many bytes as an image has.

    uvicorn bench.echo:app

What a service costs beyond the server and the interpreter it runs on is told against this.
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
