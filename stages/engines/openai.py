"""Answers by servers that speak OpenAI's chat completions: vLLM, SGLang, a hosted model.

A fault is one request's: it is tried again, on the next endpoint, as long as that may help, and
then told as an EngineFailure. Where not one request of a batch is answered, because nobody is there
or the key or the model's name is refused, it is the run's: a StageError, and no row is settled.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manifests.redact import conceal, redact
from stages.base import StageError
from stages.engines.base import (
    Answer,
    EngineFailure,
    Request,
    Requests,
    Result,
    SamplingSettings,
    taken,
)
from stages.openers import retry_after
from stages.transfer import LONGEST_WAIT

# What all requests meet alike: a server that is not there, a key or a model that it does not know.
OF_THE_RUN = ("engine_unreachable", "bad_url", "http_401", "http_403", "http_404")


@dataclass(frozen=True)
class _Fault:
    """Why one try gave no answer."""

    error: str
    message: str
    retry: bool = True
    wait: float | None = None


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
        tokens = (data.get("usage") or {}).get("completion_tokens")
        if not isinstance(text, str) or not isinstance(tokens, int | None):
            raise TypeError("content must be text and completion_tokens a number")
        return Answer(text, tokens, choice.get("finish_reason") == "length")
    except (UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion: {error!r}") from error


class OpenAIEngine:
    """Spreads requests over `endpoints` in turn, `concurrency` at once."""

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
    ) -> None:
        self.label = label
        self._urls = [chat_url(endpoint) for endpoint in endpoints]
        self._model = model
        conceal(key)  # servers quote it in their errors
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._down = False  # nobody answered last time: the next batch is no reason to wait long
        self._backoff = backoff
        self._extra = {"chat_template_kwargs": dict(template_args)} if template_args else {}

    def stream(
        self, requests: Requests, sampling: SamplingSettings
    ) -> Generator[tuple[int, Result]]:
        while chunk := taken(requests, 8 * self._concurrency):
            results = self._generate([request for _, request in chunk], sampling)
            yield from ((number, result) for (number, _), result in zip(chunk, results))

    def _generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Result]:
        """Raises StageError where nobody answers any of them."""
        results = asyncio.run(self._all(requests, sampling))
        faults = [r for r in results if isinstance(r, EngineFailure) and r.error in OF_THE_RUN]
        self._down = bool(results) and len(faults) == len(results)
        if self._down:
            raise StageError(
                f"no caption was had from the server ({faults[0].error}): {faults[0].message}. No "
                "row is settled: start it, or mend recaption's endpoints, model or api_key_env, "
                "and run again."
            )
        return results

    def close(self) -> None:
        """Connections last for one `generate`: there is nothing to give back."""

    async def _all(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Result]:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=self._concurrency)
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        gate = asyncio.Semaphore(self._concurrency)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self._headers, trust_env=True
        ) as session:
            tries = (self._one(session, gate, i, r, sampling) for i, r in enumerate(requests))
            return list(await asyncio.gather(*tries))

    async def _one(
        self,
        session: Any,
        gate: asyncio.Semaphore,
        number: int,
        request: Request,
        sampling: SamplingSettings,
    ) -> Result:
        async with gate:
            retries = 0 if self._down else self._retries
            for attempt in range(retries + 1):
                url = self._urls[(number + attempt) % len(self._urls)]
                got = await self._ask(session, url, request, sampling)
                if isinstance(got, Answer):
                    return got
                if not got.retry or attempt == retries:
                    return EngineFailure(got.error, redact(f"{url}: {got.message}"))
                wait = self._backoff * 2**attempt * random.uniform(0.5, 1.5)
                await asyncio.sleep(min(LONGEST_WAIT, max(wait, got.wait or 0.0)))
        raise AssertionError("the last try returns")

    async def _ask(
        self, session: Any, url: str, request: Request, sampling: SamplingSettings
    ) -> Answer | _Fault:
        import aiohttp

        question = {
            "model": self._model,
            "messages": [{"role": "user", "content": request.prompt}],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature_of(request),
            "top_p": sampling.top_p,
            "seed": request.seed,
            **response_format(sampling.schema),
            **self._extra,
        }
        try:
            async with session.post(url, json=question) as response:
                body = await response.read()
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
            wait=retry_after(response.headers.get("Retry-After")),
        )


def response_format(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """Has the server keep to a JSON schema, as OpenAI, vLLM and SGLang understand it."""
    if schema is None:
        return {}
    known = {"name": "caption", "strict": True, "schema": dict(schema)}
    return {"response_format": {"type": "json_schema", "json_schema": known}}


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
