"""Addresses that a job's sender is called back at: how they are written, and which of them are allowed. Pure.

An address is matched as it is written, without decoding anything: what a receiver might read otherwise (a
user, an encoded or doubled dot, a backslash, a fragment, letters beyond ASCII) is refused. The parts of the
match are what is connected to, so no other parser can see another host in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

MAX_URL: Final = 2000
HOST_PATTERN: Final = r"(\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\])"
_PORTS: Final = {"http": 80, "https": 443}
_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[!$-;=@-Z_a-z~]*)?(?P<query>\?[!$-;=?-Z_a-z~]*)?",
    re.ASCII | re.IGNORECASE,
)
# A part of a path that a receiver may take for another path: a dot segment, or an encoded dot or slash.
_ELUSIVE: Final = re.compile(r"(^|/)\.{1,2}(/|$)|%2e|%2f|%5c", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CallbackUrl:
    """An address to send to: `target` is what a request line says, its path and query."""

    scheme: str
    host: str
    port: int
    path: str
    query: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the address that is written. Raises `ValueError` for any other text, with a sentence."""
        match = _URL.fullmatch(text) if len(text) <= MAX_URL else None
        if match is None or _ELUSIVE.search(match["path"] or ""):
            raise ValueError(
                "Write it as https://host/path in ASCII, without a user, a fragment, or dots between slashes."
            )
        scheme, host = match["scheme"].lower(), match["host"].lower()
        port = int(match["port"] or _PORTS[scheme])
        if not 1 <= port <= 65535:
            raise ValueError("Its port is none: choose one of 1 to 65535.")
        return cls(scheme, host.strip("[]"), port, match["path"] or "/", match["query"] or "")

    @property
    def target(self) -> str:
        return self.path + self.query

    @property
    def authority(self) -> str:
        """The host as a request names it, with its port where that is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class AllowedCallbacks:
    """The addresses that may be called back: `hosts` by https at its own port, and those below `prefixes`."""

    hosts: tuple[str, ...]
    prefixes: tuple[CallbackUrl, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the list in "hooks.example.org,*.example.com,http://inside:8080/dit".

        Raises `ValueError`, which names the entry that is none.
        """
        hosts, prefixes = [], []
        for entry in text.split(",") if text else ():
            if re.fullmatch(HOST_PATTERN, entry):
                hosts.append(entry.lower().strip("[]"))
                continue
            try:
                prefix = CallbackUrl.parse(entry)
            except ValueError:
                raise ValueError(
                    f"{entry!r} is neither a host, such as hooks.example.org or *.example.org, nor a URL"
                ) from None
            if prefix.query:
                raise ValueError(f"{entry!r} has a query: name the URL up to its path")
            prefixes.append(prefix)
        return cls(tuple(hosts), tuple(prefixes))

    def __bool__(self) -> bool:
        return bool(self.hosts or self.prefixes)

    def allow(self, url: CallbackUrl) -> bool:
        """Return whether an address may be called back, as far as its text tells."""
        plain = url.scheme == "https" and url.port == _PORTS["https"]
        return (plain and any(_names(pattern, url.host) for pattern in self.hosts)) or any(
            _begins(prefix, url) for prefix in self.prefixes
        )


def _names(pattern: str, host: str) -> bool:
    """Return whether a pattern names a host: itself, "*" any, "*.parent" all below a parent."""
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return pattern in ("*", host)


def _begins(prefix: CallbackUrl, url: CallbackUrl) -> bool:
    """Return whether an address is a prefix, or lies below it: /dit is above /dit/x and not above /ditto."""
    if (prefix.scheme, prefix.host, prefix.port) != (url.scheme, url.host, url.port):
        return False
    return url.path == prefix.path or url.path.startswith(prefix.path.rstrip("/") + "/")
