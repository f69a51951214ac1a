"""Which addresses of the Internet are public, and so may be fetched from.

A job names any host it likes. Addresses of the machine itself, of its neighbours and of its cloud's
services must not be reached through the worker.
"""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

# https://www.iana.org/assignments/iana-ipv4-special-registry. Python's own list changes with its
# patch version, and 3.11 takes some of these for public.
NOT_PUBLIC_V4 = [
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind a provider's address translation
        "127.0.0.0/8",
        "168.63.129.16/32",  # a public number, but the host's own services on Azure
        "169.254.0.0/16",  # with the clouds' metadata services
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
    )
]
# https://www.iana.org/assignments/iana-ipv6-special-registry: what is public is in here ...
GLOBAL_UNICAST = ip_network("2000::/3")
NOT_PUBLIC_V6 = [
    ip_network(network)
    for network in (
        "2001::/23",  # protocols' own; Teredo, which carries IPv4 addresses, among them
        "2001:db8::/32",
        "2002::/16",  # 6to4: carries an IPv4 address
        "3fff::/20",
    )
]
# ... and in here, where a host has IPv6 alone: an IPv4 address in the last 32 bits (RFC 6052).
NAT64 = ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether a numeric address is a public one, whatever way it is written."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        elif parsed in NAT64:
            parsed = IPv4Address(parsed.packed[-4:])
    if isinstance(parsed, IPv4Address):
        return parsed.is_global and not any(parsed in network for network in NOT_PUBLIC_V4)
    return (
        parsed.is_global
        and parsed in GLOBAL_UNICAST
        and not any(parsed in network for network in NOT_PUBLIC_V6)
    )
