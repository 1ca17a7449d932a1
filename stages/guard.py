"""Which servers a URL of a table may lead to.

A table, and a server that redirects, are not trusted: they could have this machine fetch from its
own services, from its network's, or from a cloud's metadata server, which hands out credentials.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stages.transfer import TransferError


@dataclass(frozen=True)
class Guard:
    """`root` is what the table's URIs are relative to: a local table is the user's own, and may
    name servers on this machine; one from elsewhere only the server that it came from."""

    root: str
    schemes: tuple[str, ...]
    anywhere: bool  # `download.allow_outside`

    def trace(self) -> Any:
        """What makes aiohttp's session check every request and every redirect."""
        import aiohttp
        import yarl

        trace = aiohttp.TraceConfig()

        async def start(session: Any, context: Any, params: Any) -> None:
            context.named = params.url.host
            await self.check(params.url, own=self._may_be_own(params.url.host))

        async def redirect(session: Any, context: Any, params: Any) -> None:
            before, headers = params.response.url, params.response.headers
            target = before.join(yarl.URL(headers.get("Location") or headers.get("URI", "")))
            try:
                if before.scheme == "https" and target.scheme == "http":
                    raise TransferError("bad_redirect", "a redirect from https:// to http://")
                if target.scheme not in ("http", "https") or target.scheme not in self.schemes:
                    raise TransferError("bad_redirect", f"a redirect to {target.scheme}://")
                same = target.host == context.named
                await self.check(target, own=same and self._may_be_own(target.host))
            except TransferError:
                params.response.close()
                raise

        trace.on_request_start.append(start)
        trace.on_request_redirect.append(redirect)
        return trace

    def _may_be_own(self, host: str | None) -> bool:
        return "://" not in self.root or urlsplit(self.root).hostname == host

    async def check(self, url: Any, own: bool) -> None:
        """Raises TransferError where the host's address is none that a table may name; `own`:
        this machine's may be."""
        if self.anywhere:
            return
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
        except OSError:
            return  # the request itself will tell; behind a proxy, this machine may know no names
        for *_, place in found:
            if not allowed(str(place[0]), own):
                raise TransferError(
                    "bad_address",
                    f"{url.host} is {place[0]}, which is this machine or a service of its network: "
                    "set download.allow_outside if that is meant",
                )


def allowed(address: str, own: bool) -> bool:
    """Whether a table may lead to an IP address; `own`: to this machine's own as well."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_link_local or ip.is_multicast or str(ip) in METADATA:
        return False
    return own or not (ip.is_loopback or ip.is_unspecified)


# Cloud metadata servers outside of the link-local range: AWS over IPv6, Alibaba, Azure's wire.
METADATA = frozenset({"fd00:ec2::254", "100.100.100.200", "168.63.129.16"})
