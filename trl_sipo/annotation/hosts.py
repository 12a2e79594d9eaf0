# SPDX-License-Identifier: Apache-2.0
"""Under which names the server may be asked for, and from which pages: against DNS rebinding and forged requests."""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

_LOOPBACK_NAME = "localhost"


def is_loopback(address: str) -> bool:
    """Whether an address or name is this machine alone."""
    parsed = _address(address)
    return address == _LOOPBACK_NAME if parsed is None else parsed.is_loopback


def is_name(host: str) -> bool:
    """Whether it is a name, and not an address."""
    return _address(host) is None


def is_allowed_host(host: str, local_address: str, port: int, names: Collection[str]) -> bool:
    """Whether a request's `Host` is one that this server answers to.

    A page of another site can point its own name at this machine (DNS rebinding); its requests then carry that name.
    So a name counts only if it was given, or is that of the machine itself; an address only if it is the one that the
    connection came in by.

    Args:
        host: The header, `name`, `name:port` or `[v6]:port`.
        local_address: The connection's address on this side.
        port: The port that is listened on; a given name may come with any, as a proxy in front has its own.
        names: Those that were given, in lower case, without a port.
    """
    split = _split(host)
    if split is None:
        return False
    name, given_port = split
    if name in names:
        return True
    if given_port != port:
        return False
    local = _address(local_address)
    if local is not None and local.is_loopback and is_loopback(name):
        return True
    return local is not None and _address(name) == local


def is_same_origin(origin: str, host: str) -> bool:
    """Whether a request's `Origin` is a page of the `Host` that it asks."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    is_plain = not (parts.path or parts.query or parts.fragment or parts.username)
    return is_plain and parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _split(host: str) -> tuple[str, int | None] | None:
    """Name and port (80 if there is none) of a `Host` header; None if it is no such thing."""
    try:
        parts = urlsplit(f"//{host}")
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not name or parts.netloc != host or parts.username is not None:
        return None
    return name.rstrip("."), 80 if port is None else port


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed
