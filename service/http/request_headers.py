"""The headers that the routes which draw read themselves.

FastAPI takes a tenth of the time of a refused request to find the arguments of a route, these among them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ditserve.service.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """A header whose value, if it is sent, matches `pattern`; `rule` says the same to people."""

    name: str
    pattern: str
    rule: str

    def of(self, request: Request) -> str | None:
        """Return its value in a request, None without one. Raises `InvalidRequest`."""
        value = request.headers.get(self.name)
        if value is not None and not re.fullmatch(self.pattern, value):
            place = f"header: {self.name}"
            raise InvalidRequest(
                f"{place}: {self.rule}", extra={"errors": [{"pointer": place, "detail": self.rule}]}
            )
        return value


IDEMPOTENCY_KEY = RequestHeader(
    "idempotency-key", r"[\x21-\x7e]{1,255}", "Send 1 to 255 visible ASCII characters."
)
PREFER = RequestHeader("prefer", ".{0,200}", "Send at most 200 characters.")


def header_parameters(*headers: RequestHeader) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that reads these headers itself."""
    parameters = [
        {
            "name": header.name,
            "in": "header",
            "required": False,
            "schema": {"type": "string", "pattern": f"^{header.pattern}$"},
        }
        for header in headers
    ]
    return {"parameters": parameters}
