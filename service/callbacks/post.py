"""One POST to an address that a stranger named: to a machine that may be reached, and no further.

The host is resolved here, the addresses are checked, and the connection goes to one of those that passed, so
that no second answer of a name server counts (DNS rebinding). Nothing else decides where it goes: no proxy of
the environment, no redirect, no pool of connections. Of the answer only its head is read, up to
`MAX_HEAD_BYTES`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from functools import cache

import h11

from ditserve.service.addresses import Network, is_public, parsed_address
from ditserve.service.callback_url import CallbackUrl

MAX_HEAD_BYTES = 16 * 1024
CONNECT_S = 3.0  # for each address of a host that has several
POST_S = 10.0  # for all of it

Headers = Sequence[tuple[str, str]]


class PostError(Exception):
    """A POST that got no answer; the message says why, without naming an address of this network."""


async def post(url: CallbackUrl, headers: Headers, body: bytes, *, networks: Sequence[Network]) -> int:
    """Send `body` and return the status of the answer.

    Args:
        networks: those that may be reached besides the public internet.

    Raises:
        PostError: there is no answer, or no address of the host may be reached.
    """
    try:
        async with asyncio.timeout(POST_S):
            reader, writer = await _connect(url, networks)
            try:
                status = await _exchange(url, headers, body, reader, writer)
            except BaseException:
                writer.transport.abort()
                raise
            writer.close()
            return status
    except TimeoutError:
        raise PostError(f"no answer within {POST_S:g} s") from None
    except h11.RemoteProtocolError:
        raise PostError("an answer that is not HTTP") from None
    except ssl.SSLError as error:
        raise PostError(f"no TLS: {error.reason or 'the connection ended'}") from None
    except OSError:
        raise PostError("the connection failed") from None


async def _connect(
    url: CallbackUrl, networks: Sequence[Network]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = _tls() if url.scheme == "https" else None
    fault: OSError | None = None
    for address in await _reachable(url, networks):
        try:
            async with asyncio.timeout(CONNECT_S):
                return await asyncio.open_connection(
                    address, url.port, ssl=context, server_hostname=url.host if context else None
                )
        except OSError as error:
            fault = error
    raise fault or PostError("the host has no address")


async def _reachable(url: CallbackUrl, networks: Sequence[Network]) -> list[str]:
    """Return the addresses of a host that may be connected to. Raises `PostError` where there is none."""
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise PostError("the host has no address") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    allowed = [address for address in addresses if is_public(address) or _is_in(address, networks)]
    if not allowed:
        raise PostError("the host is not on the public internet, nor in --callback-networks")
    return allowed


def _is_in(address: str, networks: Sequence[Network]) -> bool:
    parsed = parsed_address(address)
    return parsed is not None and any(parsed in network for network in networks)


async def _exchange(
    url: CallbackUrl,
    headers: Headers,
    body: bytes,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> int:
    """Send the request and return the status of the answer, whose body stays unread."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
    own = [("host", url.authority), ("content-length", str(len(body))), ("connection", "close")]
    request = h11.Request(method="POST", target=url.target, headers=[*own, *headers])
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()
    while True:
        answer = connection.next_event()
        if answer is h11.NEED_DATA:
            connection.receive_data(await reader.read(4096))
        elif isinstance(answer, h11.Response):
            return answer.status_code


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
