"""Addresses to call back: how they are written, and the list of those that are allowed."""

from __future__ import annotations

import pytest

from ditserve.service.callback_url import MAX_URL, AllowedCallbacks, CallbackUrl

ALLOWED = AllowedCallbacks.parse(
    "hooks.example.org,*.example.com,192.0.2.7,[2001:db8::7],http://inside.example:8080/dit,https://a.example/b/"
)


@pytest.mark.parametrize(
    ("text", "authority", "target"),
    [
        ("https://hooks.example.org", "hooks.example.org", "/"),
        ("HTTPS://Hooks.Example.ORG:443/A?b=c", "hooks.example.org", "/A?b=c"),
        ("http://inside.example:8080/dit/x", "inside.example:8080", "/dit/x"),
        ("https://[2001:DB8::7]:8443?x", "[2001:db8::7]:8443", "/?x"),
        ("https://a.example/a%20b/c.d/..e?q=/../", "a.example", "/a%20b/c.d/..e?q=/../"),
    ],
)
def test_an_address_is_read_in_its_parts(text: str, authority: str, target: str) -> None:
    url = CallbackUrl.parse(text)
    assert (url.authority, url.target) == (authority, target)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hooks.example.org",
        "ftp://hooks.example.org/",
        "https:/hooks.example.org/",
        "https://",
        "https://hooks.example.org@evil.example/",
        "https://user:word@hooks.example.org/",
        "https://hooks.example.org\\@evil.example/",
        "https://hooks.example.org./",
        "https://hooks..example.org/",
        "https://hooks.example.org:/",
        "https://hooks.example.org:0/",
        "https://hooks.example.org:65536/",
        "https://hooks.example.org:٤٤٣/",
        "https://hooks.example.org/#a",
        "https://hooks.example.org /",
        " https://hooks.example.org/",
        "https://hooks.example.org/\n",
        "https://hooks.exa\tmple.org/",
        "https://hooks.example.org/a\r\nX: y",
        "https://hookſ.example.org/",
        "https://hooks。example.org/",
        "https://хooks.example.org/",
        "https://hooks%2eexample.org/",
        "https://hooks.example.org/a/../b",
        "https://hooks.example.org/a/.",
        "https://hooks.example.org/a/%2E%2e/b",
        "https://hooks.example.org/a%2fb",
        "https://hooks.example.org/a%5cb",
        "https://[2001:db8::7/",
        "https://[::1%25eth0]/",
        "https://hooks.example.org/" + "a" * MAX_URL,
    ],
)
def test_whatever_might_be_read_in_two_ways_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"Write it as https://host/path|port"):
        CallbackUrl.parse(text)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("https://hooks.example.org/any?x", True),
        ("https://HOOKS.example.org:443/", True),
        ("https://hooks.example.org:8443/", False),
        ("http://hooks.example.org/", False),
        ("https://more.hooks.example.org/", False),
        ("https://hooks.example.org.evil.example/", False),
        ("https://a.example.com/", True),
        ("https://a.b.example.com/", True),
        ("https://example.com/", False),
        ("https://evilexample.com/", False),
        ("https://xn--hooks-example.org/", False),
        ("https://192.0.2.7/", True),
        ("https://3221225991/", False),
        ("https://0xc0.0.2.7/", False),
        ("https://192.0.519/", False),
        ("https://[2001:db8::7]/", True),
        ("https://[2001:db8:0::7]/", False),
        ("https://[::ffff:192.0.2.7]/", False),
        ("http://inside.example:8080/dit", True),
        ("http://inside.example:8080/dit/x?y", True),
        ("http://inside.example:8080/dit?y", True),
        ("http://inside.example:8080/ditto", False),
        ("http://inside.example:8080/Dit", False),
        ("http://inside.example:8080/", False),
        ("http://inside.example/dit", False),
        ("https://inside.example:8080/dit", False),
        ("https://a.example/b/c", True),
        ("https://a.example/b/", True),
        ("https://a.example/b", False),
        ("https://a.example/", False),
    ],
)
def test_an_address_is_allowed_as_it_is_written(text: str, allowed: bool) -> None:
    assert ALLOWED.allow(CallbackUrl.parse(text)) is allowed


def test_any_host_is_by_https_and_none_is_none() -> None:
    anywhere = AllowedCallbacks.parse("*")
    assert anywhere.allow(CallbackUrl.parse("https://x.example/"))
    assert not anywhere.allow(CallbackUrl.parse("http://x.example/"))
    assert not AllowedCallbacks.parse("")


@pytest.mark.parametrize(
    "text", ["a b", "hooks.example.org,", "https://a.example/?x", "ftp://a", "*.*", "a/b"]
)
def test_an_entry_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="'"):
        AllowedCallbacks.parse(text)
