"""One POST over a socket: it goes where it may, once, and reads no more of the answer than its head."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Any

import pytest
import trustme

from ditserve.service.addresses import is_public, parsed_network
from ditserve.service.callback_url import CallbackUrl
from ditserve.service.callbacks import post as posting
from ditserve.service.callbacks.post import PostError, post
from tests.conftest import wait_until
from tests.service.callbacks.conftest import ENDLESS, HANG, Receiver

pytestmark = pytest.mark.anyio
HERE = [parsed_network("127.0.0.0/8")]


async def send(url: str, networks: Sequence[Any] = HERE) -> int:
    return await post(CallbackUrl.parse(url), [("x-a", "b")], b'{"a": 1}', networks=networks)


async def test_the_body_arrives_and_the_status_is_told(receiver: Receiver) -> None:
    receiver.answers = [b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 204 X\r\n\r\n", 500]
    assert [await send(receiver.url + "?q=1") for _ in range(2)] == [204, 500]
    assert [(got.path, got.body, got.headers["x-a"]) for got in receiver.posts] == [
        ("/hook?q=1", b'{"a": 1}', "b")
    ] * 2
    assert receiver.posts[0].headers["host"] == f"127.0.0.1:{receiver.port}"


async def test_a_redirect_is_an_answer(receiver: Receiver) -> None:
    receiver.answers = [b"HTTP/1.1 307 X\r\nlocation: %s\r\n\r\n" % receiver.url.encode()]
    assert await send(receiver.url) == 307
    assert len(receiver.posts) == 1


async def test_no_proxy_of_the_environment_is_asked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert await send(receiver.url) == 200


async def test_the_body_of_an_answer_is_not_read(receiver: Receiver) -> None:
    receiver.answers = [ENDLESS]
    assert await send(receiver.url) == 200
    await wait_until(lambda: receiver.cut)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (HANG, "no answer within"),
        (b"", "not HTTP"),
        (b"SSH-2.0\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 2**20, "not HTTP"),
    ],
)
async def test_whoever_answers_badly_is_left(
    receiver: Receiver, answer: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posting, "POST_S", 0.5)
    receiver.answers = [answer]
    with pytest.raises(PostError, match=fault):
        await send(receiver.url)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"]
)
async def test_this_machine_is_not_called(receiver: Receiver, host: str) -> None:
    with pytest.raises(PostError, match=r"not on the public internet|has no address"):
        await send(f"http://{host}:{receiver.port}/hook", networks=[])
    assert receiver.posts == []


async def test_a_name_is_looked_up_once(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server may answer differently when it is asked again: what was checked is connected to."""
    loop, asked = asyncio.get_running_loop(), []
    look_up = loop.getaddrinfo

    async def rebinding(host: Any, port: Any, **options: Any) -> Any:
        if host != "rebinding.example":
            return await look_up(host, port, **options)
        asked.append(host)
        addresses = ["10.0.0.1", "127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(loop, "getaddrinfo", rebinding)
    assert await send(f"http://rebinding.example:{receiver.port}/") == 200
    assert asked == ["rebinding.example"]
    assert receiver.posts[0].headers["host"] == f"rebinding.example:{receiver.port}"
    with pytest.raises(PostError, match="not on the public internet"):
        await send(f"http://rebinding.example:{receiver.port}/")


async def test_tls_is_for_the_name_that_was_asked_for(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    serving, trusting = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(serving)
    authority.configure_trust(trusting)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=serving)
    port = server.sockets[0].getsockname()[1]
    try:
        with pytest.raises(PostError, match="no TLS"):
            await send(f"https://localhost:{port}/")
        monkeypatch.setattr(posting, "_tls", lambda: trusting)
        with pytest.raises(PostError, match="no TLS"):
            await send(f"https://127.0.0.1:{port}/")
        assert await send(f"https://localhost:{port}/") == 200
    finally:
        server.close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        *(
            (address, False)
            for address in (
                "127.0.0.1",
                "10.1.2.3",
                "172.16.0.1",
                "192.168.0.1",
                "169.254.169.254",
                "100.64.0.1",
                "0.0.0.0",
                "224.0.0.1",
                "255.255.255.255",
                "::1",
                "::",
                "::127.0.0.1",
                "::ffff:10.0.0.1",
                "64:ff9b::7f00:1",
                "2002:7f00:1::",
                "2001:0:1::1",
                "fe80::1%eth0",
                "fec0::1",
                "fd00:ec2::254",
                "ff02::1",
                "localhost",
            )
        ),
    ],
)
def test_public_is_what_the_internet_can_reach(address: str, public: bool) -> None:
    assert is_public(address) is public
