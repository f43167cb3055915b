"""Network addresses as text: parsing them, and what they tell of the machine behind them. Pure."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
_MAPPED = IPv6Network("::ffff:0:0/96")  # the IPv4 addresses in IPv6 notation


def share(address: str) -> str:
    """Return the name of the share that an address has in the fair queue.

    A machine is one caller, although its loopback interface has as many addresses as it likes and its network
    usually a whole /64 of IPv6.
    """
    parsed = parsed_address(address)
    if parsed is None:
        return address
    if parsed.is_loopback:
        return "127.0.0.1"
    return str(parsed) if parsed.version == 4 else str(ip_network((int(parsed), 64), strict=False))


def is_loopback(host: str) -> bool:
    """Return True for the names and addresses of the machine's own loopback interface."""
    address = parsed_address(host)
    if address is None:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback


def is_public(address: str) -> bool:
    """Return True for the address of a machine that all of the internet can reach.

    Those of this machine, of private networks, of a cloud's metadata (link-local), and the forms of IPv6 that
    hold an IPv4 address (6to4, Teredo, NAT64) are not: who translates them may lead anywhere.
    """
    parsed = parsed_address(address)
    if parsed is None or not parsed.is_global or parsed.is_multicast or parsed.is_reserved:
        return False
    if isinstance(parsed, IPv4Address):
        return True
    return not (parsed.is_site_local or parsed.sixtofour or parsed.teredo)


def parsed_network(text: str) -> Network:
    """Return the network in "10.0.0.0/8", "10.0.0.1" or "2001:db8::/32". Raise `ValueError` for others.

    IPv4 addresses in IPv6 notation (::ffff:10.0.0.0/104) are the IPv4 network, as in `parsed_address`.
    """
    network = ip_network(text)
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        first = int(network.network_address) - int(_MAPPED.network_address)
        return IPv4Network((first, network.prefixlen - _MAPPED.prefixlen))
    return network


@lru_cache(1024)
def parsed_address(text: str) -> Address | None:
    """Return the address in "192.0.2.1", "192.0.2.1:80", "2001:db8::1" or "[2001:db8::1]:80", None in others.

    An IPv4 address in IPv6 notation (::ffff:192.0.2.1) is the IPv4 address.
    """
    host = text.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
