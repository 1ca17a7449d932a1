"""Answers by transformers' own generate: for small models, on a CPU or one GPU.

Sampling is Gumbel-max with a generator per request: an exact sample of the model's distribution
that depends on the request's seed alone, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pickle import UnpicklingError
from typing import Any

from stages.base import Failed, StageError
from stages.devices import usable
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
    taken,
    too_long,
)
from stages.models import check_weights
from stages.vae.halving import Halving


class GumbelChoice:
    """A logits processor after which the argmax is a sample (Maddison et al. 2014, A* sampling);
    of rows whose temperature is 0, the likeliest token still."""

    def __init__(self, requests: Sequence[Request], sampling: SamplingSettings) -> None:
        import torch
        from transformers import TopPLogitsWarper

        # On the CPU whatever the device: there is one stream of numbers for a seed.
        self._generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        heat = torch.tensor([[sampling.temperature_of(r)] for r in requests])
        self._greedy = heat == 0
        self._temperature = heat.masked_fill(self._greedy, 1.0)
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        scores = scores.float() / self._temperature.to(scores.device)
        if self._top_p is not None:
            scores = self._top_p(input_ids, scores)
        size = scores.shape[-1]
        noise = torch.stack([torch.empty(size).exponential_(generator=g) for g in self._generators])
        gumbel = -noise.log().masked_fill(self._greedy, 0.0)
        return scores + gumbel.to(scores.device)


CHUNK = 8  # batches whose prompts are sorted by length, so that a batch has little padding


class TransformersEngine:
    """A causal language model from a local folder. `batch`: prompts of one forward pass."""

    kind = "language model"

    def __init__(
        self,
        folder: str,
        label: str,
        dtype: str,
        device: str,
        batch: int,
        template_args: Mapping[str, Any],
    ) -> None:
        import torch
        from transformers import GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of loading weights, amid the run's own lines
        self.label = label
        self._batch = batch
        self._halving = Halving()
        self._template_args = template_args
        place = usable(device)
        try:
            self._tokenizer = self._read_tokenizer(folder)
            model, loading = self._model_class().from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,  # never: not even where the folder asks for it
                output_loading_info=True,
            )
            check_weights(model, loading, folder)
        except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
            first = str(error).strip().splitlines()[0]
            raise StageError(f"{folder} is no {self.kind} for transformers: {first}") from error
        self._model = model.to(place).eval()
        eos = model.generation_config.eos_token_id
        eos = self._tokenizer.eos_token_id if eos is None else eos
        self._eos: list[int] = eos if isinstance(eos, list) else [] if eos is None else [eos]
        pad = self._tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else self._eos[0] if self._eos else 0
        # The folder's own defaults (top_k, penalties) would sample behind our back.
        model.generation_config = GenerationConfig()
        self._room = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def _model_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def _read_tokenizer(self, folder: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def stream(
        self, requests: Requests, sampling: SamplingSettings
    ) -> Generator[tuple[int, Result]]:
        while chunk := taken(requests, CHUNK * self._batch):
            yield from self._answered(chunk, sampling)

    def _answered(
        self, chunk: Sequence[tuple[int, Request]], sampling: SamplingSettings
    ) -> Generator[tuple[int, Result]]:
        prompts = [self._encoded(request) for _, request in chunk]
        # Prompts of a length together: less padding.
        order = sorted(range(len(chunk)), key=lambda i: (self._length(prompts[i]), i))

        def answers(chosen: list[int]) -> list[Result]:
            return self._forward(
                [prompts[i] for i in chosen], [chunk[i][1] for i in chosen], sampling
            )

        for i, answer in zip(order, self._halving(answers, order, self._batch)):
            if isinstance(answer, Failed):
                answer = EngineFailure(answer.error, answer.message)
            yield chunk[i][0], answer

    def _encoded(self, request: Request) -> Any:
        return encode(self._tokenizer, request.prompt, self._template_args)

    def _length(self, prompt: Any) -> int:
        """What prompts are sorted by."""
        return len(prompt)

    def _inputs(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What the model is given for a batch, padded on the left."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        return {"input_ids": ids, "attention_mask": mask}

    def _forward(
        self, prompts: Sequence[Any], requests: Sequence[Request], sampling: SamplingSettings
    ) -> list[Result]:
        import torch
        from transformers import GenerationConfig

        inputs = self._inputs(prompts)
        lengths = inputs["attention_mask"].sum(1).tolist()
        failures = [too_long(n, sampling.max_tokens, self._room) for n in lengths]
        if any(failures):
            fits = [i for i, failure in enumerate(failures) if failure is None]
            rest = [prompts[i] for i in fits], [requests[i] for i in fits]
            answers = iter(self._forward(*rest, sampling) if fits else ())
            return [next(answers) if failure is None else failure for failure in failures]
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            eos_token_id=self._eos or None,
            pad_token_id=self._pad,
        )
        drawn = any(sampling.temperature_of(r) > 0 for r in requests)
        choice = [GumbelChoice(requests, sampling)] if drawn else []
        with torch.inference_mode():
            output = self._model.generate(
                **{name: value.to(self._model.device) for name, value in inputs.items()},
                generation_config=config,
                logits_processor=choice,
            )
        written = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._result(row, n) for row, n in zip(written, lengths)]

    def _result(self, tokens: list[int], prompt_tokens: int) -> Result:
        ends = [i for i, token in enumerate(tokens) if token in self._eos]
        written = tokens[: ends[0]] if ends else tokens
        text = self._tokenizer.decode(written, skip_special_tokens=True)
        return Answer(text, len(written) + bool(ends), not ends, prompt_tokens)

    def prepared(self, pictures: Pictures) -> Prepared:
        return pictures

    def close(self) -> None:
        import torch

        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
