"""Network addresses: their notations, and what counts as one caller."""

import pytest

from ditserve.service.addresses import is_loopback, parsed_address, parsed_network, share


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:80", "192.0.2.1"),
        (" 2001:db8::1 ", "2001:db8::1"),
        ("[2001:db8::1]:80", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("unknown", None),
        ("_hidden", None),
        ("192.0.2.1, 192.0.2.2", None),
        ("", None),
        ("[", None),
    ],
)
def test_notations(text: str, address: str | None) -> None:
    parsed = parsed_address(text)
    assert (None if parsed is None else str(parsed)) == address


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("::ffff:127.0.0.1", "127.0.0.1/32"),
        ("::ffff:7f00:1/128", "127.0.0.1/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::/0", "::/0"),
        ("::fffe:0:0/96", "::fffe:0:0/96"),
    ],
)
def test_notations_of_networks(text: str, network: str) -> None:
    assert str(parsed_network(text)) == network


@pytest.mark.parametrize("text", ["", "nginx", "10.0.0.1/8", "::ffff:10.0.0.1/104", "::ffff:10.0.0.0/129"])
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parsed_network(text)


@pytest.mark.parametrize("host", ["localhost", "dit.localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]"])
def test_names_of_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["localhost.evil.example", "evil.example", "0.0.0.0", "127.0.0.1.evil.example"]
)
def test_names_of_others(host: str) -> None:
    assert not is_loopback(host)


def test_a_machine_with_many_addresses_is_one_caller() -> None:
    assert share("127.0.0.1") == share("127.9.9.9") == share("::1")
    assert share("2001:db8:1:2::3") == share("2001:db8:1:2:ffff::4") != share("2001:db8:1:3::3")
    assert share("192.0.2.1") != share("192.0.2.2")
