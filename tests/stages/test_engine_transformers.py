"""A tiny random Llama: what is tested is the engine around it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import stages
from stages.base import Context, StageError
from stages.captions.quality import QualitySettings
from stages.engines.base import EngineFailure, Request, SamplingSettings, ask
from stages.engines.transformers import GumbelChoice, TransformersEngine
from stages.models import DEMO
from stages.recaption import Recaption, RecaptionSettings

TEXT = "a the dog cat bird runs sits flies over under red blue green house tree road"
PROMPTS = [TEXT[i : 3 + i * 5] for i in range(12)]
GREEDY = SamplingSettings(max_tokens=12)
SAMPLED = SamplingSettings(max_tokens=12, temperature=1.0, top_p=0.9)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way on a model this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [TEXT] * 5,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # Defaults that ship with a model must not sample behind the settings' back.
    model.generation_config.update(do_sample=True, repetition_penalty=3.0, top_k=2)
    model.save_pretrained(path)
    return path


def engine(folder: Path, batch: int = 8, dtype: str = "float32") -> TransformersEngine:
    return TransformersEngine(str(folder), "tiny", dtype, "cpu", batch, {})


def requests(prompts: list[str] = PROMPTS) -> list[Request]:
    return [Request(prompt, 100 + PROMPTS.index(prompt)) for prompt in prompts]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_batch_and_the_order_change_no_answer(folder: Path, sampling: SamplingSettings) -> None:
    alone = ask(engine(folder, batch=1), requests(), sampling)
    together = ask(engine(folder, batch=8), requests(), sampling)
    backwards = ask(engine(folder, batch=5), requests(PROMPTS[::-1]), sampling)
    assert alone == together == backwards[::-1]
    assert len({a.text for a in alone}) > 6


def test_greedy_answers_are_the_argmax_of_the_bare_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(PROMPTS[4], return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.inference_mode():
        while ids.shape[1] - start < GREEDY.max_tokens:
            token = model(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            if token.item() == 0:
                break
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    (answer,) = ask(engine(folder), [Request(PROMPTS[4], 1)], GREEDY)
    assert answer.text == expected


def test_the_seed_decides_a_sample(folder: Path) -> None:
    tiny = engine(folder)
    texts = [ask(tiny, [Request("dog", s)], SAMPLED)[0].text for s in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_samples_follow_the_models_distribution() -> None:
    scores = torch.tensor([[1.0, 0.0, -1.0, -30.0]])
    n = 4000
    asked = [Request("", i) for i in range(n)]
    choice = GumbelChoice(asked, SamplingSettings(1, temperature=0.5))
    picked = choice(None, scores.expand(n, 4)).argmax(-1).bincount(minlength=4) / n
    assert torch.allclose(picked, (scores[0] / 0.5).softmax(-1), atol=0.03)
    cut = GumbelChoice(
        [Request("", i) for i in range(n)], SamplingSettings(1, temperature=0.5, top_p=0.5)
    )
    assert cut(None, scores.expand(n, 4)).argmax(-1).sum() == 0
    # A request may bring its own temperature, in a batch with greedy ones.
    mixed = [Request("", i, 0.5 if i % 2 else None) for i in range(n)]
    some = GumbelChoice(mixed, SamplingSettings(1))(None, scores.expand(n, 4)).argmax(-1)
    assert some[::2].unique().tolist() == [int(scores[0].argmax())]
    drawn = GumbelChoice(asked, SamplingSettings(1, temperature=0.5))
    assert torch.equal(some[1::2], drawn(None, scores.expand(n, 4)).argmax(-1)[1::2])


def test_an_answer_ends_at_the_models_end_token(folder: Path) -> None:
    tiny = engine(folder)
    (cut,) = ask(tiny, [Request("dog", 0)], GREEDY)
    assert cut.truncated
    assert cut.tokens == GREEDY.max_tokens
    # The third token of that very answer is made the end token.
    ids = tiny._tokenizer(cut.text).input_ids
    third = next(t for t in ids[2:] if t not in ids[:2])
    tiny._eos = [third]
    (ended,) = ask(tiny, [Request("dog", 0)], GREEDY)
    assert not ended.truncated
    assert ended.tokens < GREEDY.max_tokens
    assert cut.text.startswith(ended.text)


def test_a_prompt_that_is_too_long_fails_alone(folder: Path) -> None:
    long = Request("dog cat " * 200, 0)
    first, failed, last = ask(engine(folder), [*requests()[:1], long, *requests()[1:2]], GREEDY)
    assert isinstance(failed, EngineFailure)
    assert failed.error == "prompt_too_long"
    assert "128" in failed.message
    assert [first, last] == ask(engine(folder), requests()[:2], GREEDY)


def test_out_of_memory_halves_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = engine(folder)
    expected = ask(tiny, requests(), GREEDY)
    forward, sizes = tiny._forward, []

    def small_memory(prompts: list[list[int]], *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return forward(prompts, *rest)

    monkeypatch.setattr(tiny, "_forward", small_memory)
    assert ask(tiny, requests(), GREEDY) == expected
    assert sizes[:3] == [8, 4, 2]


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no language model"):
        engine(tmp_path)


def test_the_chat_template_is_used_where_there_is_one(folder: Path) -> None:
    tiny = engine(folder)
    bare = ask(tiny, [Request("dog", 0)], GREEDY)
    tiny._tokenizer.chat_template = "{{ messages[0]['content'] }}{% if loud %} runs{% endif %}"
    assert ask(tiny, [Request("dog", 0)], GREEDY) == bare
    tiny._template_args = {"loud": True}
    assert ask(tiny, [Request("dog", 0)], GREEDY) == ask(
        engine(folder), [Request("dog runs", 0)], GREEDY
    )


def test_the_stage_runs_on_a_folder(folder: Path) -> None:
    settings = RecaptionSettings(
        engine="transformers",
        model=str(folder),
        prompt="{caption}",
        max_tokens=8,
        device="cpu",
        quality={"retries": 0, "fallback": "keep"},  # nonsense is all that these weights write
    )
    stage = Recaption(settings, Context("/work"))
    stage.check()
    model = stage.setup()
    rows = [{"clip_id": str(i), "caption": p} for i, p in enumerate(PROMPTS)]
    outcomes = stage.process(rows, model)
    assert [o["recaption_tokens"] for o in outcomes] == [8] * len(rows)
    assert outcomes[0]["recaption_model"].startswith(f"{folder}@")
    small = Recaption(settings.model_copy(update={"batch_size": 1}), Context("/work"))
    assert small.process(rows, small.setup()) == outcomes
    # Refused, as nonsense is, they are asked again in the same stream, whatever the batch.
    quality = {"max_words": 1, "min_words": 30, "fallback": "original"}
    strict = settings.model_copy(update={"quality": QualitySettings(**quality)})
    again = Recaption(strict, Context("/work")).process(rows, model)
    assert {(o["recaption_attempts"], o["recaption_source"]) for o in again} == {(3, "original")}
    assert again[0]["recaption_raw"] != outcomes[0]["recaption_raw"], "the last one was drawn"
    few = Recaption(strict.model_copy(update={"batch_size": 1}), Context("/work"))
    assert few.process(rows, few.setup()) == again
    model.close()


@pytest.mark.skipif(
    not (Path(stages.__file__).parent / "demo" / "captioner").is_dir(),
    reason="the demo's captioner is not here",
)
def test_the_demos_captioner_rewrites_through_the_stage() -> None:
    from stages.demo.shapes import caption, named, scene

    settings = RecaptionSettings(
        engine="transformers", model=f"{DEMO}captioner", max_tokens=96, device="cpu"
    )
    stage = Recaption(settings, Context("/work"))
    stage.check()
    rows = [{"clip_id": str(s), "caption": caption(scene(s))} for s in range(16)]
    outcomes = stage.process(rows, stage.setup())
    written = [o["recaption"] for o in outcomes]
    assert not any(o["recaption_truncated"] for o in outcomes)
    facts = [(one.shape, one.colour, one.direction) for one in map(scene, range(16))]
    assert sum(named(w) == f for w, f in zip(written, facts)) >= 15
    assert not set(written) & {row["caption"] for row in rows}


def test_a_folder_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers, others in each worker."""
    lacking = shutil.copytree(folder, tmp_path / "model")
    weights = load_file(lacking / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=rf"lacks 1 weights of its LlamaForCausalLM \({name}\)"):
        TransformersEngine(str(lacking), "tiny", "float32", "cpu", 4, {})
