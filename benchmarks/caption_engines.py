"""Greedy captions of the same prompts by the demo's captioner, through `transformers` and through
`vllm`, in float32 and as the weights are (bfloat16): how many are equal, and where others part, how
near to each other the two tokens were (their logits by transformers in float32). On a CPU: as
`make test-vllm` installs it, with HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1
VLLM_CPU_OMP_THREADS_BIND=nobind."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import stages
from benchmarks.figures import report
from stages.base import Context
from stages.demo.shapes import caption, scene
from stages.engines.base import Answer, Engine, Request, SamplingSettings, ask, encode
from stages.engines.transformers import TransformersEngine
from stages.engines.vllm import VllmEngine
from stages.recaption import Recaption, RecaptionSettings

FOLDER = str(Path(stages.__file__).parent / "demo" / "captioner")
SAMPLING = SamplingSettings(max_tokens=96)
ARGS = {"enforce_eager": True, "max_num_seqs": 16, "gpu_memory_utilization": 0.3}
EXACT = "transformers, float32"


def engine(name: str, dtype: str) -> Engine:
    if name == "vllm":
        return VllmEngine(FOLDER, "captioner", dtype, 512, ARGS, {})
    return TransformersEngine(FOLDER, "captioner", dtype, "cpu", 16, {})


def texts(name: str, dtype: str, requests: Sequence[Request]) -> list[str]:
    made = engine(name, dtype)
    try:
        answers = ask(made, requests, SAMPLING)
    finally:
        made.close()
    return [answer.text if isinstance(answer, Answer) else "" for answer in answers]


class Margins:
    """How sure the model was of its word, in float32."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
        self._model = AutoModelForCausalLM.from_pretrained(
            FOLDER, dtype=torch.float32, local_files_only=True
        )

    def at(self, prompt: str, one: str, other: str) -> tuple[str, float]:
        """What both begin with, and by how much the next token's logit of `one` is over that of
        `other`."""
        import torch

        ids: list[list[int]] = [
            [*self._tokenizer(text, add_special_tokens=False).input_ids, self._end]
            for text in (one, other)
        ]
        same = next(i for i, (a, b) in enumerate(zip(*ids)) if a != b)
        before = encode(self._tokenizer, prompt, {}) + ids[0][:same]
        with torch.inference_mode():
            logits = self._model(torch.tensor([before])).logits[0, -1]
        begin = self._tokenizer.decode(ids[0][:same])
        return begin, float(logits[ids[0][same]] - logits[ids[1][same]])

    @property
    def _end(self) -> int:
        end: int = self._tokenizer.eos_token_id
        return end


def compared(
    made: Mapping[str, list[str]], requests: Sequence[Request], show: int
) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    exact, margins = made[EXACT], Margins()
    for name, captions in made.items():
        if name == EXACT:
            continue
        parted = [i for i, (a, b) in enumerate(zip(exact, captions)) if a != b]
        told: list[Any] = [margins.at(requests[i].prompt, exact[i], captions[i]) for i in parted]
        widest = max((margin for _, margin in told), default=0.0)
        rows.append(
            (
                f"{name}: equal to those of {EXACT}",
                f"{len(exact) - len(parted)} of {len(exact)}"
                + (f"; where they part, logits at most {widest:.3f} apart" if parted else ""),
            )
        )
        for number, (begin, margin) in list(zip(parted, told))[:show]:
            rows.append((f"  {exact[number]}", f"{captions[number]}"))
            rows.append(("", f'after "{begin}", {margin:.3f} apart'))
    return rows


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    settings = RecaptionSettings(engine="vllm", model="demo://captioner")
    template = Recaption(settings, Context("/")).template
    requests = [
        Request(str(template.render({"caption": caption(scene(s))})), s)
        for s in range(args.first, args.first + args.captions)
    ]
    made = {
        f"{name}, {dtype}": texts(name, dtype, requests)
        for name in ("transformers", "vllm")
        for dtype in ("float32", "bfloat16")
    }
    rows = [("captions", f"{len(requests)}, of which {len(set(made[EXACT]))} differ")]
    return rows + compared(made, requests, args.show)


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--captions": {"type": int, "default": 500},
            "--first": {"type": int, "default": 0, "help": "number of the first scene"},
            "--show": {"type": int, "default": 5, "help": "pairs that differ, of each"},
        },
    )
