"""Sockets that listen for clients, opened before anything depends on them."""

from __future__ import annotations

import errno
import socket

_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # the machine has no such address, such as one of IPv6


def listen(host: str, port: int) -> list[socket.socket]:
    """Return a listening socket for each address of `host` on this machine; port 0 picks a free one for all.

    Raise `ValueError` with the remedy.
    """
    sockets: list[socket.socket] = []
    try:
        infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(infos):
            try:
                sockets.append(_listener(family, kind, protocol, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in _ABSENT or len(infos) == 1:
                    raise
            port = sockets[0].getsockname()[1] if sockets else port
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, "no address of this machine")
    except (OSError, UnicodeError) as error:
        for listener in sockets:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"cannot listen on {host}:{port} ({reason}); choose another with --host or --port"
        ) from None
    return sockets


def _listener(family: int, kind: int, protocol: int, address: tuple[str | int, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # The addresses of IPv4 have a socket of their own.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
