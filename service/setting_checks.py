"""Checks of settings, and the sentences on those that are wrong. Pure."""

import base64
import difflib
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import SettingsError

from ditserve.service.addresses import parsed_network
from ditserve.service.callback_url import AllowedCallbacks


def contradiction(sentence: str) -> PydanticCustomError:
    """Return the error of two settings that cannot be set together."""
    return PydanticCustomError("contradiction", "{sentence}: change one of them", {"sentence": sentence})


def checked_networks(text: str) -> str:
    """Return a list of networks as it is. Raises a validation error that names the one that is none."""
    for network in text.split(",") if text else ():
        try:
            parsed_network(network)
        except ValueError as error:
            raise PydanticCustomError("network", "{reason}", {"reason": str(error)}) from None
    return text


def checked_callbacks(text: str) -> str:
    """Return a list of addresses as it is. Raises a validation error that names the entry that is none."""
    try:
        AllowedCallbacks.parse(text)
    except ValueError as error:
        raise PydanticCustomError("callbacks", "{reason}", {"reason": str(error)}) from None
    return text


def is_callback_secret(secret: str) -> bool:
    """Return whether a text is a secret of the Standard Webhooks scheme."""
    prefix, _, encoded = secret.partition("_")
    try:
        return prefix == "whsec" and 24 <= len(base64.b64decode(encoded, validate=True)) <= 64
    except ValueError:
        return False


def _closest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" did you mean {matches[0]}?" if matches else ""


def refuse_unknown_flags(argv: Sequence[str], known: Sequence[str]) -> None:
    """Raise `SettingsError` for a flag that no setting has, with the closest one."""
    for token in argv:
        name = token.partition("=")[0]
        if name.startswith("-") and name not in known and not _is_number(name):
            raise SettingsError(f"unknown flag {name};{_closest(name, known) or ' --help lists them.'}")


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def refuse_unknown_variables(environment: Mapping[str, str], known: Sequence[str], *, prefix: str) -> None:
    """Raise `SettingsError` for a variable with this prefix that no setting has, with the closest one."""
    for name in environment:
        if name.upper().startswith(prefix) and name.upper() not in known:
            hint = _closest(name.upper(), known) or " --help lists them."
            raise SettingsError(f"unknown setting {name} in the environment;{hint}")


def sentence_about(error: ValidationError) -> str:
    """Return one sentence about the first error, without the value, which may be secret."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if not first["loc"]:
        return first["msg"]
    return f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg'][:1].lower()}{first['msg'][1:]}"
