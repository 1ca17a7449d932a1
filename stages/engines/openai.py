"""Answers by servers that speak OpenAI's chat completions: vLLM, SGLang, a hosted model.

A fault is one request's: it is tried again, on another endpoint where there is one, as long as that
may help, and then told as an EngineFailure. Where nobody answers, because no server is there or the
key or the model's name is refused, it is the run's: a StageError, and those rows stay pending.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from manifests.redact import conceal, redact
from stages.backoff import pause, retry_after
from stages.base import StageError, tell
from stages.engines.base import (
    Answer,
    EngineFailure,
    Pictures,
    Request,
    Requests,
    Result,
    SamplingSettings,
)
from stages.engines.data_urls import DataUrls, data_urls
from stages.engines.endpoints import ABSENT, REFUSED, Endpoint, Endpoints, Nobody

CONNECT_SECONDS = 10.0
KEEP_SECONDS = 4.0  # a connection without a request: servers often hang up after five
MOST_BYTES = 4 << 20  # of an answer
AHEAD = 1.5  # requests taken, over those that the endpoints get at once: others wait to try again
CLOSE_SECONDS = 5.0
# A search for a server that took this long is not made again for ten times as long.
LONG_SEARCH = 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class _Fault:
    """Why one try gave no answer."""

    error: str
    message: str
    retry: bool = True
    wait: float | None = None


@dataclass(frozen=True)
class _Refusal:
    """No endpoint takes it: the request's fault if others are answered, else the run's."""

    failure: EngineFailure


def chat_url(endpoint: str) -> str:
    """`http://host:8000`, with or without `/v1`, as the address to post to."""
    base = endpoint.rstrip("/")
    return f"{base if base.endswith('/v1') else base + '/v1'}/chat/completions"


def read_answer(body: bytes) -> Answer:
    """The answer in a chat completion. Raises ValueError where it is none."""
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        text = choice["message"]["content"] or ""
        usage = data.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        tokens = (usage.get("completion_tokens"), usage.get("prompt_tokens"), cached)
        if not isinstance(text, str) or not all(isinstance(n, int | None) for n in tokens):
            raise TypeError("content must be text, and counts of tokens numbers")
        return Answer(text, tokens[0], choice.get("finish_reason") == "length", *tokens[1:])
    except (UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion: {error!r}") from error


class OpenAIEngine:
    """Spreads requests over `endpoints`, at most `concurrency` at once to each. A request is asked
    at most 1 + `retries` times; connections that can't be made don't count."""

    def __init__(
        self,
        endpoints: Sequence[str],
        model: str,
        label: str,
        key: str | None,
        concurrency: int,
        timeout: float,
        retries: int,
        backoff: float,
        template_args: Mapping[str, Any],
        stage: str = "recaption",  # whose settings a message names
    ) -> None:
        self.label = label
        self._stage = stage
        self._model = model
        conceal(key)  # servers quote it in their errors
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff
        self._extra = {"chat_template_kwargs": dict(template_args)} if template_args else {}
        urls = [chat_url(endpoint) for endpoint in endpoints]
        self._endpoints = Endpoints(
            [Endpoint(u, concurrency, backoff, retries, partial(_told, stage, u)) for u in urls]
        )
        self._down: str | None = None  # why nobody answered last time
        self._again = 0.0  # nobody is asked before
        self._session: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def stream(
        self, requests: Requests, sampling: SamplingSettings
    ) -> Generator[tuple[int, Result]]:
        began = time.monotonic()
        if self._down and began < self._again:
            raise StageError(self._down)
        if self._down:
            for endpoint in self._endpoints.all:
                endpoint.once_more()
        results: queue.SimpleQueue[tuple[int, Result | _Refusal | Exception]] = queue.SimpleQueue()
        flying: dict[int, Future[None]] = {}
        refused: list[tuple[int, EngineFailure]] = []
        answered = False
        try:
            while True:
                while len(flying) < max(1, AHEAD * self._endpoints.room):
                    one = next(requests, None)
                    if one is None:
                        break
                    asking = self._into(results, *one, sampling)
                    flying[one[0]] = asyncio.run_coroutine_threadsafe(asking, self._loop)
                if not flying:
                    break
                number, result = results.get()
                del flying[number]
                match result:
                    case Nobody():
                        faults = [e.fault for e in self._endpoints.all if e.fault is not None]
                        raise self._nobody(began, faults[0])
                    case Exception():
                        raise result
                    case _Refusal(failure):
                        refused.append((number, failure))
                    case _:
                        answered, self._down, began = True, None, time.monotonic()
                        yield number, result
                        yield from refused
                        refused.clear()
            if refused and not answered:
                raise self._nobody(began, refused[0][1])
            yield from refused
        finally:
            for asking_ in flying.values():
                asking_.cancel()

    def prepared(self, pictures: Pictures) -> DataUrls:
        return data_urls(pictures)

    def close(self) -> None:
        """Hangs up. Who is amid `stream` closes that first."""
        if self._loop.is_closed():
            return
        if self._session is not None:
            closing = asyncio.run_coroutine_threadsafe(self._session.close(), self._loop)
            with suppress(TimeoutError):
                closing.result(CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        self._loop.close()

    def _nobody(self, began: float, why: EngineFailure) -> StageError:
        now = time.monotonic()
        self._down = (
            f"no caption was had from the server ({why.error}): {why.message}. No row is settled "
            "by that: start it, or mend "
            f"{self._stage}'s endpoints, model or api_key_env, and run again."
        )
        self._again = now + 10 * (now - began) if now - began > LONG_SEARCH else 0.0
        return StageError(self._down)

    async def _into(
        self,
        results: queue.SimpleQueue[tuple[int, Result | _Refusal | Exception]],
        number: int,
        request: Request,
        sampling: SamplingSettings,
    ) -> None:
        try:
            results.put((number, await self._answer(request, sampling)))
        except Exception as error:  # noqa: BLE001  it is raised again in the caller's thread
            results.put((number, error))

    async def _answer(self, request: Request, sampling: SamplingSettings) -> Result | _Refusal:
        """Asks until there is an answer, or nothing more to be hoped. Raises Nobody."""
        most = 1 if self._down else 1 + self._retries
        tried: set[Endpoint] = set()
        barred: dict[Endpoint, EngineFailure] = {}
        tries = 0
        while True:
            try:
                place = await self._endpoints.place(tried, barred)
            except Nobody:
                if barred and not self._endpoints.given_up:
                    return _Refusal(next(reversed(barred.values())))
                raise
            endpoint = place.endpoint
            try:
                got = await self._ask(endpoint.url, request, sampling)
                if isinstance(got, Answer):
                    endpoint.answered(place)
                    return got
                failure = EngineFailure(got.error, redact(f"{endpoint.url}: {got.message}"))
                if got.retry or got.error in REFUSED:
                    endpoint.failed(place, failure, got.wait, time.monotonic())
                else:
                    endpoint.answered(place)  # the fault is the request's
            finally:
                self._endpoints.leave(place)
            tried.add(endpoint)
            if got.error in REFUSED:
                barred[endpoint] = failure
                continue
            tries += got.error != ABSENT
            if not got.retry or tries >= most:
                return failure
            if got.error != ABSENT and not self._endpoints.another(tried):
                await asyncio.sleep(pause(self._backoff, tries))

    async def _connected(self) -> Any:
        """The session of the engine's life."""
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS),
                timeout=aiohttp.ClientTimeout(
                    total=self._timeout, sock_connect=min(CONNECT_SECONDS, self._timeout)
                ),
                headers=self._headers,
                trust_env=True,
            )
        return self._session

    async def _ask(self, url: str, request: Request, sampling: SamplingSettings) -> Answer | _Fault:
        import aiohttp

        question = {
            "model": self._model,
            "messages": [{"role": "user", "content": message(request)}],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature_of(request),
            "top_p": sampling.top_p,
            "seed": request.seed,
            **response_format(sampling.schema),
            **self._extra,
            **(request.seen.beside if isinstance(request.seen, DataUrls) else {}),
        }
        try:
            session = await self._connected()
            async with session.post(url, json=question) as response:
                body = await read(response)
        except aiohttp.ConnectionTimeoutError:
            return _Fault("engine_unreachable", "no connection could be made in time")
        except TimeoutError:
            return _Fault("timeout", f"no answer within {self._timeout:g} s")
        except aiohttp.ClientConnectorError as error:
            return _Fault("engine_unreachable", str(error))
        except (aiohttp.ClientError, OSError) as error:
            return _Fault("network", f"{type(error).__name__}: {error}")
        except ValueError as error:
            return _Fault("bad_url", str(error), retry=False)
        if response.status == 200:
            try:
                return read_answer(body)
            except ValueError as error:
                return _Fault("bad_answer", str(error))
        return _Fault(
            f"http_{response.status}",
            said(body) or str(response.reason),
            retry=response.status in (408, 409, 425, 429) or response.status >= 500,
            wait=wait_asked(response.headers),
        )


def message(request: Request) -> str | list[dict[str, Any]]:
    """The content of the message that asks: pictures first, as the prompt is about them."""
    if not isinstance(request.seen, DataUrls):
        return request.prompt
    return [*request.seen.parts, {"type": "text", "text": request.prompt}]


def response_format(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """Has the server keep to a JSON schema, as OpenAI, vLLM and SGLang understand it."""
    if schema is None:
        return {}
    known = {"name": "caption", "strict": True, "schema": dict(schema)}
    return {"response_format": {"type": "json_schema", "json_schema": known}}


async def read(response: Any) -> bytes:
    """The body, or as much of it as an answer may have: some never end."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MOST_BYTES:
            response.close()
            break
    return bytes(body[:MOST_BYTES])


def wait_asked(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server wants to be left alone: `retry-after-ms` is OpenAI's and Azure's."""
    exact = headers.get("retry-after-ms", "")
    return float(exact) / 1000 if exact.isdigit() else retry_after(headers.get("Retry-After"))


def said(body: bytes) -> str:
    """The server's own words for an error, where it has any: at most 300 characters."""
    text = body.decode("utf-8", "replace")
    try:
        data = json.loads(text)
        error = data.get("error", data)
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError):
        pass
    return " ".join(text.split())[:300]


def _told(stage: str, url: str, what: str) -> None:
    tell(f"{stage}: {redact(url)} {what}")
