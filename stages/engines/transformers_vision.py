"""Answers about pictures by transformers' own generate: any of its image-text-to-text models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.engines.base import Pictures, Request, read_processor, shown, video_facts
from stages.engines.transformers import TransformersEngine


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A prompt as its chat template has it, with a place for each picture."""

    text: str
    seen: Pictures


class VisionEngine(TransformersEngine):
    """A model that sees, from a local folder. Every request has pictures."""

    kind = "model of images and text"
    _processor: Any

    def _model_class(self) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    def _read_tokenizer(self, folder: str) -> Any:
        self._processor = read_processor(folder)
        return self._processor.tokenizer

    def _encoded(self, request: Request) -> _Encoded:
        assert isinstance(request.seen, Pictures)
        text = shown(self._processor, request.prompt, request.seen, self._template_args)
        return _Encoded(text, request.seen)

    def _length(self, prompt: _Encoded) -> int:
        return prompt.seen.nbytes + len(prompt.text)  # pictures are most of the tokens

    def _inputs(self, prompts: Sequence[_Encoded]) -> dict[str, Any]:
        from PIL import Image

        frames = [prompt.seen.frames for prompt in prompts]
        if prompts[0].seen.video:
            facts = [[video_facts(prompt.seen)] for prompt in prompts]
            media = {
                "videos": [[each] for each in frames],
                "video_metadata": facts,
                "do_sample_frames": False,
            }
        else:
            media = {"images": [[Image.fromarray(one) for one in each] for each in frames]}
        inputs = self._processor(
            text=[prompt.text for prompt in prompts],
            **media,
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the template has written them
            return_tensors="pt",
        )
        return dict(inputs.to(dtype=self._model.dtype))
