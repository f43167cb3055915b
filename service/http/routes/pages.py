"""The pages for people: the playground at `/` and the API reference at `/docs`.

Self-contained files that load no others. Their links are relative, so that they work below any path.

A page can set no header on an event stream or a picture. Where keys are needed, the playground exchanges
one for a cookie.
"""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from ditserve.service.api_keys import Keyring
from ditserve.service.errors import NotFound, Unauthorized
from ditserve.service.http.access import COOKIE
from ditserve.service.http.context import Api

router = APIRouter(include_in_schema=False)


def _page(name: str) -> tuple[bytes, dict[str, str]]:
    """Return a page of `web/` and its headers.

    The content security policy lets only the page's own inline script and style run. The page may load data
    from this server alone.
    """
    source = (files("ditserve.service.http") / "web" / name).read_text("utf-8")
    scripts, styles = (_csp_hashes(source, tag) for tag in ("script", "style"))
    policy = (
        "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; media-src 'self'; "
        f"script-src {scripts}; style-src {styles}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "content-type": "text/html; charset=utf-8",
    }
    return source.encode(), headers


def _csp_hashes(source: str, tag: str) -> str:
    """Return the hash sources of the inline elements `tag`, as a content security policy lists them."""
    digests = (
        hashlib.sha256(text.encode()).digest()
        for text in re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
    )
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"


_PLAYGROUND = _page("playground.html")
_REFERENCE = _page("reference.html")


@router.get("/")
async def playground() -> Response:
    content, headers = _PLAYGROUND
    return Response(content, headers=headers)


@router.get("/docs")
async def reference() -> Response:
    content, headers = _REFERENCE
    return Response(content, headers=headers)


class SessionRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    key: str = Field(max_length=100)


@router.post("/session", status_code=204)
async def session(body: SessionRequest, request: Request, api: Api) -> Response:
    """Keep an API key in this browser until it is closed, out of reach of scripts and of other sites."""
    keyring: Keyring | None = request.app.state.keyring
    if keyring is None:
        raise NotFound("No key is asked here.")
    key = body.key.strip()
    if keyring.find(key) is None:
        raise Unauthorized("This API key is unknown or was revoked.")
    response = Response(status_code=204)
    secure = request.url.scheme == "https"
    path = api.address("/")
    response.set_cookie(COOKIE, key, path=path, httponly=True, samesite="strict", secure=secure)
    return response
