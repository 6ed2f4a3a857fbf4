"""Whom a request may take this server for.

A web page can have its own name resolve to a reader's loopback address, and then reach a server there as its own
site (DNS rebinding). The `Host` header still says the page's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from reprise.api.errors import HttpError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
ANY = "*"
_PORT = re.compile(r":[0-9]{0,5}$")


def hosts_allowed(host: str, configured: Iterable[str], addresses: Collection[str]) -> frozenset[str] | None:
    """The names that a server for this host answers to, which listens at these addresses; None for any.

    Loopback names are always among them: a page cannot have them, and what watches over a container uses them.
    """
    names = list(configured)
    on_loopback = all(map(_is_loopback, addresses))
    if ANY in names or not (names or on_loopback):
        return None
    return frozenset(map(_name, (*LOOPBACK_NAMES, host, *(addresses if on_loopback else ()), *names)))


class AllowHosts:
    """Pure ASGI. Raises HttpError 421 for a name that is not this server's, whatever the port.

    A request without the header is let through: no browser sends one.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = {_name(value.decode("latin-1")) for name, value in scope["headers"] if name == b"host"}
            if not given <= self._hosts:
                raise HttpError(
                    421,
                    "This server does not answer to the name in the Host header. Names beyond its address's own"
                    " are added by --allowed-hosts.",
                    code="host_not_allowed",
                )
        await self._app(scope, receive, send)


def _name(host: str) -> str:
    """A host without its port and final dot; an IPv6 address in brackets."""
    host = host.strip().lower()
    if _is_address(host):
        return f"[{host}]" if ":" in host else host
    return _PORT.sub("", host).removesuffix(".")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    found: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_loopback
