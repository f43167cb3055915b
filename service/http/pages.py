"""The pages for people: the playground at `/` and the API reference at `/docs`. Self-contained files, nothing from elsewhere."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter(include_in_schema=False)


def _page(name: str) -> tuple[bytes, dict[str, str]]:
    """A page of `web/` and its headers: only its own inline script and style may run, and only this server may be asked."""
    source = (files("service.http") / "web" / name).read_text("utf-8")
    scripts, styles = (_hashes(source, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; script-src {scripts}; style-src {styles}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "content-type": "text/html; charset=utf-8",
    }
    return source.encode(), headers


def _hashes(source: str, tag: str) -> str:
    """CSP hash sources of the inline elements `tag`."""
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
