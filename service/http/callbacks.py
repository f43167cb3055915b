"""Callbacks as requests ask for them: an address is checked when a job is submitted. Knows no HTTP."""

from ditserve.service.callback_url import AllowedCallbacks, CallbackUrl
from ditserve.service.errors import CallbackRefused


def check_callback(text: str | None, allowed: AllowedCallbacks) -> None:
    """Raise `CallbackRefused` for an address that is none, or that this service does not call."""
    if text is None:
        return
    if not allowed:
        raise _refused("This service calls nobody back: ask for the job, or follow its events.")
    try:
        url = CallbackUrl.parse(text)
    except ValueError as error:
        raise _refused(str(error)) from None
    if not allowed.allow(url):
        raise _refused(f"This service does not call {url.scheme}://{url.authority}{url.path} back.")


def _refused(detail: str) -> CallbackRefused:
    errors = [{"pointer": "#/callback_url", "detail": detail}]
    return CallbackRefused(f"callback_url: {detail}", extra={"errors": errors})
