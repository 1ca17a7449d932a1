"""A real S3 server on loopback, and a proxy before it that misbehaves on command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict
from yarl import URL

BUCKET = "videos"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "planted-access-key",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "2",  # botocore's own tries; s3fs has further ones around them
}
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>as commanded</Message></Error>"
_HOP = {"transfer-encoding", "connection", "expect", "keep-alive", "content-length"}


@dataclass
class Fault:
    """What the proxy does with the next `times` requests of `method` whose URL has `part` in it.

    `kind`: "500" and "503" are answered in the server's place; "cut": the connection ends before
    the request reaches the server; "lost": the server gets it, the answer is dropped; "slow": half
    a second late; "unconditional": the condition of a put is left out.
    """

    kind: str
    method: str
    part: str = ""
    times: int = 1_000_000
    seen: int = 0


@dataclass
class Proxy:
    """`url` is the endpoint; `requests` are (method, path and query) as they came."""

    server: str
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def fault(self, kind: str, method: str, part: str = "", times: int = 1_000_000) -> Fault:
        self.faults.append(Fault(kind, method, part, times))
        return self.faults[-1]

    def reset(self) -> None:
        self.faults.clear()
        self.requests.clear()

    def count(self, method: str, part: str = "") -> int:
        return sum(m == method and part in path for m, path in self.requests)

    @contextlib.contextmanager
    def running(self) -> Iterator[Proxy]:
        ready = threading.Event()
        thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    async def _start(self) -> None:
        self._session = ClientSession(
            timeout=ClientTimeout(60), connector=TCPConnector(limit=64), auto_decompress=False
        )
        # moto looks whether a key is there and then writes it, in two steps; a real server does so
        # in one. Puts with a condition go to it one after the other.
        self._one_at_a_time = asyncio.Lock()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        place = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{place.getsockname()[1]}"
        await web.SockSite(runner, place).start()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        fault = self._fault_for(request)
        kind = fault.kind if fault else ""
        if kind == "cut":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if kind in ("500", "503"):
            code = "InternalError" if kind == "500" else "SlowDown"
            return web.Response(
                status=int(kind), text=_ERROR.format(code), content_type="application/xml"
            )
        if kind == "slow":
            await asyncio.sleep(0.5)
        headers = CIMultiDict((k, v) for k, v in request.headers.items() if k.lower() not in _HOP)
        if kind == "unconditional":
            headers.popall("If-None-Match", None)
        body = await request.read()
        url = URL(f"{self.server}{request.raw_path}", encoded=True)
        lock = self._one_at_a_time if "If-None-Match" in headers else contextlib.nullcontext()
        async with lock:
            answer = await self._session.request(request.method, url, headers=headers, data=body)
            data = await answer.read()
        if kind == "lost":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        kept = CIMultiDict((k, v) for k, v in answer.headers.items() if k.lower() not in _HOP)
        if request.method == "HEAD":
            kept["Content-Length"] = answer.headers.get("Content-Length", "0")
            return web.Response(status=answer.status, headers=kept)
        return web.Response(status=answer.status, headers=kept, body=data)

    def _fault_for(self, request: web.Request) -> Fault | None:
        for fault in self.faults:
            if (
                fault.method == request.method
                and fault.part in request.path_qs
                and fault.seen < fault.times
            ):
                fault.seen += 1
                return fault
        return None


@contextlib.contextmanager
def s3_server() -> Iterator[Proxy]:
    """moto's server as a process of its own with an empty bucket, and a proxy before it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, **ENVIRONMENT}
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        while True:
            try:
                make = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
                urllib.request.urlopen(make, timeout=10).close()
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, "moto does not start"
                time.sleep(0.1)
        with Proxy(address).running() as proxy:
            yield proxy
    finally:
        server.terminate()
        server.wait(10)
