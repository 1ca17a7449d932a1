"""A small OpenAI-compatible server that misbehaves on command, on 127.0.0.1, in a thread.

It answers `re: <prompt>`, or what `reply` gives, after `delay` seconds. `mood(prompt, nth)` names
the fault that the nth try (from 1) of a prompt meets, or None: one of FAULTS. `close` and `open`
end it and bring it back at the same address.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any

from aiohttp import web

Mood = Callable[[str, int], str | None]
FAULTS = (
    "429",  # at once, without a word about when to come back
    "429 with Retry-After",
    "500",
    "cut",  # the connection, amid the answer
    "slow",  # no answer in `patience` seconds
    "wrong JSON",
    "empty",  # 200, and nothing
    "endless",  # blanks without end
)


def at_random(share: float, seed: int = 0) -> Mood:
    """That share of all tries meets a fault, each kind as waits as any other."""

    def mood(prompt: str, nth: int) -> str | None:
        draw = random.Random(f"{seed}:{prompt}:{nth}")
        return draw.choice(FAULTS) if draw.random() < share else None

    return mood


class Moody:
    """`asked` counts the tries of each prompt, `met` the faults; `most` were asked at once; `shown`
    has the pictures of each try, and its whole question."""

    def __init__(
        self,
        mood: Mood = lambda prompt, nth: None,
        delay: float = 0.0,
        patience: float = 60.0,
        retry_ms: int = 0,
        reply: Callable[[str, int], str] = lambda prompt, nth: f"re: {prompt}",
    ) -> None:
        self.reply = reply
        self.mood, self.delay, self.patience, self.retry_ms = mood, delay, patience, retry_ms
        self.asked: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.shown: defaultdict[str, list[tuple[list[Any], dict[str, Any]]]] = defaultdict(list)
        self.now = self.most = 0
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Moody:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
        asyncio.run_coroutine_threadsafe(self._rest(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self) -> None:
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def close(self) -> None:
        """Hangs up on everybody."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    async def _open(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _rest(self) -> None:
        """Ends what is still being answered, without a word about it."""
        self._loop.set_exception_handler(lambda loop, told: None)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        question = json.loads(await request.read())
        content = question["messages"][0]["content"]
        if not isinstance(content, str):  # what goes with the prompt comes before it
            *parts, text = content
            self.shown[text["text"]].append((parts, question))
            content = text["text"]
        prompt = content
        self.asked[prompt] += 1
        fault = self.mood(prompt, self.asked[prompt])
        self.met[fault or "none"] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self._fault(fault, request) if fault else await self._fine(prompt)
        except ConnectionError:  # who asks for an endless answer hangs up
            return web.Response()
        finally:
            self.now -= 1

    async def _fine(self, prompt: str) -> web.Response:
        text = self.reply(prompt, self.asked[prompt])
        await asyncio.sleep(self.delay)
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        usage = {
            "completion_tokens": 5,
            "prompt_tokens": 20,
            "prompt_tokens_details": {"cached_tokens": 12},
        }
        return web.json_response({"choices": [choice], "usage": usage})

    async def _fault(self, fault: str, request: web.Request) -> web.StreamResponse:
        if fault.startswith("429"):
            later = {"Retry-After": "1", "retry-after-ms": str(self.retry_ms)}
            headers = later if fault.endswith("Retry-After") else {}
            return web.json_response({"error": "slow down"}, status=429, headers=headers)
        if fault == "500":
            return web.Response(status=500, text="<html>")
        waits = {"slow": self.patience, "cut": self.delay / 2, "endless": 0.0}
        await asyncio.sleep(waits.get(fault, self.delay))
        if fault == "slow":
            return web.json_response({})
        if fault == "wrong JSON":
            return web.json_response({"choices": "none"})
        if fault == "empty":
            return web.Response()
        response = web.StreamResponse()
        response.content_length = None if fault == "endless" else 5000
        await response.prepare(request)
        while fault == "endless":
            await response.write(b" " * (1 << 16))
        await response.write(b'{"choices": [')
        if request.transport is not None:
            request.transport.abort()
        return response
