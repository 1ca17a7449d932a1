"""What an engine is: prompts in, with or without pictures, answers out, one for one. Knows nothing
of clips."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.base import StageError


class Prepared(Protocol):
    """Pictures as an engine takes them."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """What goes with a prompt: `frames` uint8 RGB [n, height, width, 3], `fps` of them a second;
    each by itself, or all as one `video`."""

    frames: NDArray[np.uint8]
    fps: float
    video: bool = False

    @property
    def nbytes(self) -> int:
        return self.frames.nbytes


@dataclass(frozen=True, slots=True)
class Request:
    prompt: str
    seed: int  # of this request alone, so that neighbours and order change nothing
    temperature: float | None = None  # None: as the sampling settings have it
    seen: Prepared | None = None  # what the engine's own `prepared` made


@dataclass(frozen=True)
class SamplingSettings:
    max_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    schema: Mapping[str, Any] | None = None  # JSON schema that answers must keep to, where it can

    def temperature_of(self, request: Request) -> float:
        return self.temperature if request.temperature is None else request.temperature


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    tokens: int | None  # written, the end included; None where the server does not say
    truncated: bool  # stopped by max_tokens, not by the model
    prompt_tokens: int | None = None  # read; None where the server does not say
    cached_tokens: int | None = None  # of these, how many another prompt's work was used for


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """No answer to one prompt. `error` is a class to count by, `message` a sentence."""

    error: str
    message: str


Result = Answer | EngineFailure
# Requests by number. None: none at this moment, but one may come of an answer that is still out.
Requests = Iterator[tuple[int, Request] | None]


class Engine(Protocol):
    label: str  # which model exactly, for the rows

    def stream(
        self, requests: Requests, sampling: SamplingSettings
    ) -> Generator[tuple[int, Result]]:
        """One result per request, with its number, in the order in which they are had.

        `requests` is asked in the thread that this runs in, whenever there is room, so that what
        was taken and not answered is what the engine holds. Closing this gives them up. Raises
        StageError where no request can be answered; what was answered before stands.
        """
        ...

    def prepared(self, pictures: Pictures) -> Prepared:
        """Pictures made ready for requests. Called in threads ahead of the engine, many at once."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds."""
        ...


def ask(engine: Engine, requests: Sequence[Request], sampling: SamplingSettings) -> list[Result]:
    """One result per request, in order."""
    with closing(engine.stream(iter(enumerate(requests)), sampling)) as answers:
        results = dict(answers)
    return [results[number] for number in range(len(requests))]


def taken(requests: Requests, most: int) -> list[tuple[int, Request]]:
    """The next ones, at most so many; fewer where there are none at this moment."""
    now: list[tuple[int, Request]] = []
    while len(now) < most and (one := next(requests, None)) is not None:
        now.append(one)
    return now


def encode(tokenizer: Any, prompt: str, template_args: Mapping[str, Any]) -> list[int]:
    """The prompt as token ids: through the model's chat template, or bare where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt).input_ids)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        **template_args,
    )
    # The template has written the special tokens already.
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def shown(processor: Any, prompt: str, seen: Pictures, template_args: Mapping[str, Any]) -> str:
    """The prompt through the chat template of a model's processor, with a place for each picture.
    Pictures come first, so that several questions about them have a beginning in common."""
    kinds = ["video"] if seen.video else ["image"] * len(seen.frames)
    template = processor.chat_template  # some tokenizers have none, or one that knows no pictures
    text = processor.tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": prompt}],
            }
        ],
        chat_template=template["default"] if isinstance(template, dict) else template,
        tokenize=False,
        add_generation_prompt=True,
        **template_args,
    )
    return str(text)


def read_processor(folder: str) -> Any:
    """What turns text and pictures into a model's inputs. Raises StageError."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except ImportError as error:  # those of many models need torchvision
        first = next((line for line in str(error).splitlines() if line.strip()), "an import failed")
        raise StageError(
            f"{folder}: its processor needs a package that is not here: {first.strip()} Install it "
            "(`pip install torchvision`), or ask a server (`engine: openai`)."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(f"{folder} has no processor of text and pictures: {first}") from error
    if not hasattr(processor, "tokenizer"):
        raise StageError(f"{folder} is no model that sees: its processor takes text alone")
    if not getattr(processor, "chat_template", None):
        raise StageError(f"{folder} has no chat template, which says where pictures go")
    return processor


def video_facts(seen: Pictures) -> dict[str, Any]:
    """What vLLM and transformers want to know of a video."""
    count = len(seen.frames)
    return {
        "fps": seen.fps,
        "duration": count / seen.fps,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "height": seen.frames.shape[1],
        "width": seen.frames.shape[2],
        "video_backend": "vidpipe",
    }


def too_long(tokens: int, max_tokens: int, room: int | None) -> EngineFailure | None:
    """A failure where prompt and answer don't fit the model's context."""
    if room is None or tokens + max_tokens <= room:
        return None
    return EngineFailure(
        "prompt_too_long",
        f"the prompt has {tokens} tokens; with max_tokens = {max_tokens} that is more than the "
        f"{room} that the model takes",
    )
