"""Answers by vLLM's offline engine: batched continuously, a common prefix computed once.

The engine is a process of its own. It is stepped here, and gets a request whenever it has room, so
it is never drained between batches. When it dies it is started again, and gets what it held once
more: at first all together, as most deaths are no request's fault; what died twice, one by one.
"""

from __future__ import annotations

import gc
import itertools
import threading
from collections import Counter, deque
from collections.abc import Generator, Mapping
from contextlib import suppress
from typing import Any

from stages.base import StageError, tell
from stages.engines.base import (
    Answer,
    EngineFailure,
    Pictures,
    Prepared,
    Request,
    Requests,
    Result,
    SamplingSettings,
    encode,
    read_processor,
    shown,
    too_long,
    video_facts,
)

# Requests that wait in the engine, over those that it runs at once: the next are there in time.
WAITING = 0.25
AS_IT_IS = {"do_sample_frames": False}  # of a video: its frames are those that are meant
DEATHS = 3  # of the engine, the last with one request alone, after which this is not asked again
PULSE_SECONDS = 0.5
# Where JSON is asked for: blanks between its parts may go on for ever otherwise, and with small
# models do. Of vLLM's grammars two can rule that out.
COMPACT_JSON = {"backend": "xgrammar", "disable_any_whitespace": True}
RESTARTS = 3  # in a row, with no answer between


class VllmEngine:
    """`args` go to vllm.LLM as they are."""

    def __init__(
        self,
        folder: str,
        label: str,
        dtype: str,
        max_model_len: int,
        args: Mapping[str, Any],
        template_args: Mapping[str, Any],
        media: Mapping[str, int] | None = None,
    ) -> None:
        """`media`: of a model that sees, how many of what a prompt has at most: {"image": 8}."""
        self.label = label
        self._folder = folder
        self._template_args = template_args
        self._settings = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "enable_prefix_caching": True,
            "seed": 0,
            "structured_outputs_config": COMPACT_JSON,
            **(_seeing(media) if media else {}),
            **args,
        }
        self._room = max_model_len
        self._processor: Any = None
        self._ids = itertools.count()
        self._broken: str | None = None  # it died too often, or for good
        self._start()

    def _start(self) -> None:
        from vllm import LLM

        try:
            self._llm: Any = LLM(model=self._folder, **self._settings)
        except (TypeError, ValueError, RuntimeError) as error:
            first = " ".join(str(error).split())[:300] or type(error).__name__
            raise StageError(
                f"vLLM does not start with {self._folder} and {self._settings}: {first}. Change "
                "engine_args or max_model_len."
            ) from error
        self._tokenizer = self._llm.get_tokenizer()
        seats = int(self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs)
        self._most = seats + max(1, int(WAITING * seats))
        self._over = threading.Event()
        core = self._llm.llm_engine.engine_core
        if hasattr(core, "resources"):  # else it is in this process
            threading.Thread(target=_watch, args=(core, self._over), daemon=True).start()

    def stream(
        self, requests: Requests, sampling: SamplingSettings
    ) -> Generator[tuple[int, Result]]:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._broken:
            raise StageError(self._broken)
        held: dict[str, tuple[int, Request]] = {}
        again: deque[tuple[int, Request]] = deque()
        deaths: Counter[int] = Counter()
        in_a_row = 0
        try:
            while True:
                try:
                    yield from self._fill(held, again, deaths, requests, sampling)
                    if not held:
                        return
                    outputs = self._llm.llm_engine.step()
                except EngineDeadError as error:
                    in_a_row += 1
                    again.extendleft(reversed(held.values()))
                    deaths.update(number for number, _ in held.values())
                    alone = len(held) == 1
                    held.clear()
                    self._restart(error, in_a_row, len(again))
                    if alone and deaths[again[0][0]] >= DEATHS:
                        number, _ = again.popleft()
                        message = f"vLLM's engine died {DEATHS} times on it, the last time alone"
                        yield number, EngineFailure("killed_engine", message)
                    continue
                for output in outputs:
                    if output.finished and output.request_id in held:
                        in_a_row = 0
                        answer = self._settled(_answer(output), sampling)
                        yield held.pop(output.request_id)[0], answer
        finally:
            if held and self._llm is not None:
                with suppress(EngineDeadError):
                    self._llm.llm_engine.abort_request(list(held))

    def _fill(
        self,
        held: dict[str, tuple[int, Request]],
        again: deque[tuple[int, Request]],
        deaths: Counter[int],
        requests: Requests,
        sampling: SamplingSettings,
    ) -> Generator[tuple[int, Result]]:
        """Gives the engine what it has room for; answers what it could not take."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        structured: dict[str, Any] = {}
        if sampling.schema is not None:
            from vllm.sampling_params import StructuredOutputsParams

            structured["structured_outputs"] = StructuredOutputsParams(json=dict(sampling.schema))
        while True:
            suspected = any(deaths[number] >= DEATHS - 1 for number, _ in (*held.values(), *again))
            if len(held) >= (1 if suspected else self._most):
                return
            one = again.popleft() if again else next(requests, None)
            if one is None:
                return
            number, request = one
            prompt: dict[str, Any]
            if isinstance(request.seen, Pictures):
                prompt = self._shown(request.prompt, request.seen)
            else:
                tokens = encode(self._tokenizer, request.prompt, self._template_args)
                # One that is too long would raise.
                if failure := too_long(len(tokens), sampling.max_tokens, self._room):
                    yield number, failure
                    continue
                prompt = {"prompt_token_ids": tokens}
            how = SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature_of(request),
                top_p=sampling.top_p,
                seed=request.seed,
                **structured,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            name = str(next(self._ids))
            held[name] = one
            try:
                self._llm.llm_engine.add_request(name, prompt, how)
            except (ValueError, VLLMClientError) as error:
                # How many tokens pictures are it knows only now.
                if not isinstance(request.seen, Pictures):
                    raise
                del held[name]
                yield number, _not_taken(error)

    def _settled(self, answer: Answer, sampling: SamplingSettings) -> Result:
        """An answer that the context cut off is none: its prompt was too long."""
        failure = too_long(answer.prompt_tokens or 0, sampling.max_tokens, self._room)
        return failure if failure and answer.truncated else answer

    def _shown(self, prompt: str, seen: Pictures) -> dict[str, Any]:
        """A prompt with its pictures, as vLLM takes it."""
        if self._processor is None:
            self._processor = read_processor(self._folder)
        text = shown(self._processor, prompt, seen, self._template_args)
        # The template has written the special tokens already.
        tokens = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        if seen.video:
            return _prompt(tokens, "video", [(seen.frames, {**video_facts(seen), **AS_IT_IS})])
        from PIL import Image

        return _prompt(tokens, "image", [Image.fromarray(frame) for frame in seen.frames])

    def prepared(self, pictures: Pictures) -> Prepared:
        return pictures

    def _restart(self, error: Exception, in_a_row: int, held: int) -> None:
        self._shut()
        first = (str(error).strip().splitlines() or [""])[0]
        if in_a_row > RESTARTS:
            self._broken = (
                f"vLLM's engine died {in_a_row} times without an answer between: {first} What is "
                "answered is kept; see its own log above, change engine_args, and run "
                "again."
            )
            raise StageError(self._broken) from error
        tell(f"vLLM's engine died with {held} requests, and is started again: {first}")
        try:
            self._start()
        except StageError as fault:
            self._broken = str(fault)
            raise

    def _shut(self) -> None:
        """Ends the engine's processes, which live on while anything refers to the LLM."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        self._over.set()
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()

    def close(self) -> None:
        self._shut()


def _seeing(media: Mapping[str, int]) -> dict[str, Any]:
    """Memory for what comes and nothing else. No cache of pictures: no clip comes twice."""
    limits = {"image": 0, "video": 0, **media}
    return {"limit_mm_per_prompt": limits, "mm_processor_cache_gb": 0}


def _prompt(tokens: list[int], kind: str, shown: list[Any]) -> dict[str, Any]:
    return {"prompt_token_ids": tokens, "multi_modal_data": {kind: shown}}


def _not_taken(error: Exception) -> EngineFailure:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if "maximum context length" in first or "maximum model length" in first:
        return EngineFailure("prompt_too_long", f"vLLM says: {first}")
    return EngineFailure("prompt_refused", f"vLLM does not take the prompt and its frames: {first}")


def _watch(core: Any, over: threading.Event) -> None:
    """Wakes who waits for an engine that was killed: vLLM's own synchronous client, which knows of
    it, does so only where the engine could still say that it dies (0.29.0)."""
    from vllm.v1.engine.exceptions import EngineDeadError

    while not over.wait(PULSE_SECONDS):
        if core.resources.engine_dead:
            core.outputs_queue.put_nowait(EngineDeadError())
            return


def _answer(output: Any) -> Answer:
    (best,) = output.outputs
    return Answer(
        best.text,
        len(best.token_ids),
        best.finish_reason == "length",
        len(output.prompt_token_ids),
        output.num_cached_tokens,
    )
