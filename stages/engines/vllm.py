"""Answers by vLLM's offline engine: batched continuously, a common prefix computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.base import StageError
from stages.engines.base import Answer, Request, Result, SamplingSettings, encode, too_long


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
    ) -> None:
        from vllm import LLM

        self.label = label
        self._template_args = template_args
        settings = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "enable_prefix_caching": True,
            "seed": 0,
            **args,
        }
        try:
            self._llm: Any = LLM(model=folder, **settings)
        except (TypeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise StageError(
                f"vLLM does not start with {folder} and {dict(settings)}: {first}. Change "
                "recaption.engine_args or recaption.max_model_len."
            ) from error
        self._tokenizer = self._llm.get_tokenizer()
        self._room = max_model_len

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Result]:
        from vllm import SamplingParams

        # A prompt that is too long would raise for the whole batch, so it is found here.
        prompts = [encode(self._tokenizer, r.prompt, self._template_args) for r in requests]
        results = {
            i: failure
            for i, prompt in enumerate(prompts)
            if (failure := too_long(len(prompt), sampling.max_tokens, self._room))
        }
        fits = [i for i in range(len(prompts)) if i not in results]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompts[i]} for i in fits],
            sampling_params=[
                SamplingParams(
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=requests[i].seed,
                )
                for i in fits
            ],
            use_tqdm=False,
        )
        answers: dict[int, Result] = {**results}
        for i, output in zip(fits, outputs, strict=True):
            (best,) = output.outputs
            truncated = best.finish_reason == "length"
            answers[i] = Answer(best.text, len(best.token_ids), truncated)
        return [answers[i] for i in range(len(prompts))]

    def close(self) -> None:
        # vLLM stops its engine process when the LLM is collected.
        del self._llm
