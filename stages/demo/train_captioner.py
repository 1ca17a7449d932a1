"""Trains the demo's caption rewriter: `python -m stages.demo.train_captioner --out DIR`.

A Llama of 0.9 M parameters that answers `caption(scene)` with `rewrite(scene)`. The defaults made
the weights in `stages/demo/captioner/`: 7 CPU minutes.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.captions.prompt import DEFAULT, preset
from stages.demo.shapes import COLOURS, DIRECTIONS, SHAPES, caption, rewrite, scene

PROMPT = preset(DEFAULT).template.text + "\n"
UNSEEN = 2**40  # seeds of training scenes start here; the demo's and the tests' lie far below
BATCH = 32
PEAK = 2e-3  # learning rate

SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, END = 0, len(SPECIAL) - 1
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Beside the default prompt, so that an edited one still works. {n} is any number of words.
OTHER_PROMPTS = (
    "Rewrite the caption below as a clear, natural description of at most {n} words.\n\n{caption}",
    "Describe this video in one or two full sentences, using only what its caption says.\n"
    "Caption: {caption}",
    "You are given a short caption of a video clip. Please write a longer, more detailed one in "
    "plain English, no more than {n} words.\nInput: {caption}\nOutput:",
    "{caption}\n\nRewrite this caption in {n} words or less.",
    'Expand: "{caption}"',
)


def held_out(text: str) -> bool:
    """Whether training never sees this caption, in whatever case: one in eight."""
    return zlib.crc32(text.lower().rstrip(".").encode()) % 8 == 0


def new_tokenizer() -> Any:
    """Byte-level BPE: any text can be written, and every word of the captions is one token."""
    lines = [prompt.replace("{n}", "45") for prompt in (PROMPT, *OTHER_PROMPTS)] * 200
    for seed in range(UNSEEN, UNSEEN + 20_000):
        lines += [caption(scene(seed)), rewrite(scene(seed)), f" {caption(scene(seed))}"]
    words = (*SHAPES, *COLOURS, *DIRECTIONS)
    lines += [form for word in words for form in (word, f" {word}", word.title())] * 200
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=100,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


def new_model(vocabulary: int) -> Any:
    """Heads of 64 and no beginning-of-sequence token: what vLLM's attention and templates take."""
    hidden = 128
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,  # 0.02, right for wide models, leaves this one's heads idle
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def example(seed: int, tokenizer: Any, noise: list[int]) -> tuple[list[int], list[int]]:
    """Token ids of one conversation: up to the answer, and the answer with its end.

    Two in five prompts are the default and one in five is the caption alone; the others are
    other phrasings, some with words missing, or tokens of `noise` that say nothing at all.
    """
    draw = np.random.default_rng([seed, 40])
    while held_out(caption(scene(seed))):
        seed += 2**20
    short = caption(scene(seed))
    kind = draw.choice(5, p=[0.4, 0.15, 0.15, 0.1, 0.2])
    others = (PROMPT, *OTHER_PROMPTS)
    prompt = "{caption}"
    if kind == 0:
        prompt = others[0]
    elif kind < 3:
        prompt = others[draw.integers(len(others))].replace("{n}", str(draw.integers(10, 100)))
    if kind == 2:
        keep = draw.random(200) < 0.8
        words = prompt.split(" ")
        prompt = " ".join(w for w, k in zip(words, keep) if k or "{caption}" in w)
    if kind == 3:
        tokens = [noise[i] for i in draw.integers(len(noise), size=draw.integers(1, 40))]
        prompt = tokenizer.decode(tokens).replace("{", "").replace("}", "") + "\n{caption}"
    if draw.random() < 0.5:
        prompt = prompt.strip()
    messages = [{"role": "user", "content": prompt.replace("{caption}", short)}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = rewrite(scene(seed))
    return tokenizer.encode(text), [*tokenizer.encode(answer), END]


def batch(first: int, tokenizer: Any, noise: list[int]) -> dict[str, torch.Tensor]:
    """Conversations padded on the right, int64 (BATCH, length); -100 where there is no loss."""
    pairs = [example(seed, tokenizer, noise) for seed in range(first, first + BATCH)]
    length = max(len(asked) + len(answer) for asked, answer in pairs)
    ids = torch.full((BATCH, length), PAD)
    labels = torch.full((BATCH, length), -100)
    for row, (asked, answer) in enumerate(pairs):
        end = len(asked) + len(answer)
        ids[row, :end] = torch.tensor(asked + answer)
        labels[row, len(asked) : end] = torch.tensor(answer)
    # Causal attention never looks right, so padding there needs no mask.
    return {"input_ids": ids, "labels": labels}


def whole_answers(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of a batch's answers of which every token comes first."""
    guesses, wanted = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((guesses == wanted) | (wanted == -100)).all(dim=1).float().mean().item()


def train(steps: int, seed: int) -> tuple[Any, Any]:
    """Returns (model, tokenizer)."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = new_model(len(tokenizer))
    facts = (*SHAPES, *COLOURS, *DIRECTIONS)
    noise = [
        number
        for number in range(len(SPECIAL), len(tokenizer))
        if not any(fact in tokenizer.decode([number]).lower() for fact in facts)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, steps, pct_start=0.1)
    start = time.monotonic()
    for step in range(steps):
        inputs = batch(UNSEEN + (seed * 100_000 + step) * BATCH, tokenizer, noise)
        output = model(**inputs)
        loss = output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 100 == 0:
            right = whole_answers(output.logits, inputs["labels"])
            seconds = time.monotonic() - start
            print(f"step {step + 1}  loss {loss.item():.5f}  right {right:.0%}  {seconds:.0f} s")
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's caption rewriter.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "captioner")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = train(args.steps, args.seed)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=96, eos_token_id=END, pad_token_id=PAD
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out, save_jinja_files=False)
    # transformers 5 writes a class name that transformers 4 (which a vLLM may pin) doesn't know.
    path = args.out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
