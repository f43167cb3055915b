"""The caller and the host of a request: only trusted proxies are believed about them."""

from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from ditserve.service.http.app import create_app
from ditserve.service.http.origin import Origin
from ditserve.service.settings import Settings
from tests.service.http.conftest import OpenStage

pytestmark = pytest.mark.anyio

PROXY, INNER, CLIENT = "10.0.0.1", "10.0.0.2", "192.0.2.7"


async def seen(
    peer: str,
    *headers: tuple[str, str],
    path: str = "/generate",
    root_path: str = "",
    trusted: str = "10.0.0.0/8,::1/128",
) -> Scope:
    """The scope that the application sees of a request of `peer`."""
    scopes: list[Scope] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        raise AssertionError("nothing is sent")

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "path": path, "scheme": "http", "client": (peer, 4711), "headers": raw}
    origin = Origin(application, trusted_proxies=trusted, root_path=root_path)
    await origin(scope, receive, send)
    return scopes[0]


FORWARDED_FOR = "X-Forwarded-For"


@pytest.mark.parametrize(
    ("peer", "headers", "caller"),
    [
        (CLIENT, [(FORWARDED_FOR, "1.2.3.4")], CLIENT),
        ("127.0.0.1", [(FORWARDED_FOR, "1.2.3.4")], "127.0.0.1"),
        (CLIENT, [("Forwarded", "for=1.2.3.4")], CLIENT),
        (PROXY, [], PROXY),
        (PROXY, [(FORWARDED_FOR, CLIENT)], CLIENT),
        ("::ffff:10.0.0.1", [(FORWARDED_FOR, CLIENT)], CLIENT),
        ("::1", [(FORWARDED_FOR, CLIENT)], CLIENT),
        (PROXY, [(FORWARDED_FOR, f"1.2.3.4, {CLIENT}, {INNER}")], CLIENT),
        (PROXY, [(FORWARDED_FOR, "1.2.3.4"), (FORWARDED_FOR, CLIENT)], CLIENT),
        (PROXY, [(FORWARDED_FOR, f"{CLIENT}, unknown, {INNER}")], INNER),
        (PROXY, [(FORWARDED_FOR, ",,")], PROXY),
        (PROXY, [(FORWARDED_FOR, "x" * 30_000)], PROXY),
        (PROXY, [("Forwarded", f"for=1.2.3.4;proto=http, for={CLIENT};by={INNER}")], CLIENT),
        (PROXY, [("Forwarded", 'For="[2001:db8::1]:4711"')], "2001:db8::1"),
        (PROXY, [("Forwarded", 'for=1.2.3.4;by=", for="[2001:db8::1]"')], PROXY),
        (PROXY, [(FORWARDED_FOR, CLIENT), ("Forwarded", f"for={CLIENT}")], CLIENT),
        (PROXY, [(FORWARDED_FOR, CLIENT), ("Forwarded", "for=1.2.3.4")], PROXY),
    ],
)
async def test_the_caller_is_the_last_hop_that_no_trusted_proxy_vouches_for(
    peer: str, headers: list[tuple[str, str]], caller: str
) -> None:
    assert (await seen(peer, *headers))["client"][0] == caller


@pytest.mark.parametrize("trusted", ["10.0.0.1", "::ffff:10.0.0.1", "::ffff:10.0.0.0/104", "::ffff:0:0/96"])
@pytest.mark.parametrize("peer", ["10.0.0.1", "::ffff:10.0.0.1", "::ffff:a00:1"])
async def test_an_ipv4_address_in_the_notation_of_ipv6_is_the_ipv4_address(peer: str, trusted: str) -> None:
    passed_on = (FORWARDED_FOR, f"{CLIENT}, ::ffff:10.0.0.1")
    assert (await seen(peer, passed_on, trusted=trusted))["client"][0] == CLIENT
    other = await seen("::ffff:203.0.113.1", passed_on, trusted="::ffff:10.0.0.1")
    assert other["client"][0] == "::ffff:203.0.113.1", "it is not trusted"


async def test_the_scheme_is_that_of_the_client(open_stage: OpenStage) -> None:
    proto = ("X-Forwarded-Proto", "https")
    assert (await seen(PROXY, proto))["scheme"] == "https"
    assert (await seen(PROXY, ("Forwarded", f"for={CLIENT};proto=https")))["scheme"] == "https"
    assert (await seen(CLIENT, proto))["scheme"] == "http"
    assert (await seen(PROXY, ("X-Forwarded-Proto", "javascript")))["scheme"] == "http"


@pytest.mark.parametrize(
    ("path", "inner"),
    [
        ("/dit/generate", "/generate"),
        ("/generate", "/generate"),
        ("/dit", "/"),
        ("/dit/", "/"),
        ("/dither", "/dither"),
        ("/dit/dit/generate", "/dit/generate"),
    ],
)
async def test_the_prefix_of_a_proxy_is_removed_once(path: str, inner: str) -> None:
    assert (await seen(PROXY, path=path, root_path="/dit"))["path"] == inner


def client(stage: Any, host: str, *, peer: str = "127.0.0.1") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(stage.app, client=(peer, 4711))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers={"host": host})


@pytest.mark.parametrize(
    ("options", "host", "status"),
    [
        ({}, "localhost:8000", 200),
        ({}, "LOCALHOST.", 200),
        ({}, "dit.localhost", 200),
        ({}, "[::1]:8000", 200),
        ({}, "127.0.0.1", 200),
        ({}, "evil.example", 421),
        ({}, "localhost.evil.example", 421),
        ({}, "localhost:80@evil.example", 421),
        ({}, "192.0.2.7", 421),
        ({}, "", 421),
        ({"allowed_hosts": "example.org"}, "example.org:443", 200),
        ({"allowed_hosts": "example.org"}, "sub.example.org", 421),
        ({"allowed_hosts": "*.example.org"}, "a.b.example.org", 200),
        ({"allowed_hosts": "*.example.org"}, "example.org", 421),
        ({"allowed_hosts": "*.example.org"}, "localhost", 200),
        ({"allowed_hosts": "10.0.0.5"}, "[::ffff:10.0.0.5]:8000", 200),
        ({"allowed_hosts": "[::ffff:10.0.0.5]"}, "10.0.0.5", 200),
        ({"allowed_hosts": "[2001:DB8::5]"}, "[2001:db8:0::5]", 200),
        ({}, "[::ffff:127.0.0.1]:8000", 200),
        ({"allowed_hosts": "*"}, "evil.example", 200),
        ({"host": "0.0.0.0", "open": True}, "anything.example", 200),
        ({"host": "0.0.0.0", "open": True, "allowed_hosts": "example.org"}, "anything.example", 421),
    ],
)
async def test_an_open_service_of_this_machine_answers_for_this_machine_alone(
    open_stage: OpenStage, options: dict[str, Any], host: str, status: int
) -> None:
    stage = await open_stage(worker=False, **{"allowed_hosts": "", **options})
    async with client(stage, host) as asking:
        response = await asking.get("/models")
    assert response.status_code == status
    if status == 421:
        assert response.json()["code"] == "misdirected-request"
        assert "--allowed-hosts" in response.json()["detail"]
        assert response.headers["x-request-id"]


async def test_a_service_that_asks_for_keys_answers_for_any_host(
    open_stage: OpenStage, tmp_path: Any
) -> None:
    stage = await open_stage(worker=False, allowed_hosts="", keys_file=tmp_path / "keys.json")
    async with client(stage, "images.example") as asking:
        assert (await asking.get("/livez")).status_code == 200


async def test_a_host_that_a_trusted_proxy_passes_on_must_be_allowed_as_well(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False, allowed_hosts="", trusted_proxies="127.0.0.1")
    async with client(stage, "localhost") as asking:
        for header, status in (("x-forwarded-host", 421), ("x-unknown", 200)):
            assert (await asking.get("/models", headers={header: "evil.example"})).status_code == status


@pytest.mark.parametrize(
    ("trusted", "callers"), [("", ["127.0.0.1"] * 2), ("127.0.0.0/8", ["192.0.2.1", "192.0.2.2"])]
)
async def test_callers_are_told_apart_behind_a_trusted_proxy_only(
    open_stage: OpenStage, trusted: str, callers: list[str]
) -> None:
    stage = await open_stage(trusted_proxies=trusted)
    async with client(stage, "localhost") as asking:
        for address in ("192.0.2.1", "192.0.2.2"):
            await asking.post("/generate", json={}, headers={"x-forwarded-for": address})
    assert [claim.job.caller for claim in stage.worker.claimed] == callers


@pytest.mark.parametrize("root_path", ["/jobs", "/v1", "/generate"])
def test_a_prefix_that_the_api_uses_itself_is_refused(bundle_path: Any, root_path: str) -> None:
    options: dict[str, Any] = {"bundle": bundle_path, "root_path": root_path}
    with pytest.raises(ValueError, match="--root-path"):
        create_app(Settings(**options))
