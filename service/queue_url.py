"""The URL of Redis as text: whether it can be read, and the password that is put into it."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit


def is_readable_url(url: str) -> bool:
    """Return False for a URL of a server in which a sign of the password would be taken for another part.

    The `/` of `redis://dit:a/b@queue:6379/0` ends the host, `#` and `?` begin other parts, and `%` begins a
    number.
    """
    try:
        parts = urlsplit(url)
        several = "," in parts.netloc  # Sentinels
        port = None if several else parts.port
    except ValueError:
        return False
    encoded = re.search(r"%(?![0-9A-Fa-f]{2})", url) is None
    path = parts.scheme not in ("redis", "rediss") or re.fullmatch(r"(/[0-9]*)?", parts.path) is not None
    user = "@" in parts.netloc or "@" not in parts.query
    return encoded and path and user and not parts.fragment and port != 0


def with_password(url: str, password: str) -> str:
    """Return the URL of a server with the password of its user, encoded. Raise `ValueError` if it has one."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    if ":" in user:
        raise ValueError("it has a password")
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl()
