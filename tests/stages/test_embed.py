"""The embed stage on tiny encoders with random weights: what stands where, and as what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from encoders import KINDS, ROOM, WORDS, make
from safetensors.torch import load_file, save_file

from manifests.log import Counts, Log, line_of
from manifests.schema import digest
from manifests.shards import EMBEDDINGS
from manifests.store import Store
from manifests.stored import StoredEmbeddings
from stages.base import Context, Failed, StageError
from stages.embed import Embed, EmbedSettings
from stages.text_encoders import Text, TextEncoder, kind_of
from stages.texts import Texts

CAPTIONS = [
    "a red circle moves left",
    "the dog",
    "",
    "a small blue square sits right of the large green bird",
    "the dog",
    "bird bird bird bird bird bird bird bird bird bird bird bird",
]
LONG = "dog " * 40


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp(request.param) / "encoder", request.param)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("t5") / "encoder", "t5")


def loaded(folder: Path, **values: Any) -> TextEncoder:
    return TextEncoder(str(folder), str(folder), **{"max_length": ROOM, **values})


def tensor(text: Text | Failed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    assert isinstance(text, Text)
    return torch.frombuffer(bytearray(text.values), dtype=dtype).view(text.shape)


def stage(folder: Path, context: Context | None = None, **settings: Any) -> Embed:
    settings = {"encoder": str(folder), "max_length": ROOM, "dtype": "float32", **settings}
    return Embed(EmbedSettings(**settings), context or Context("/nowhere"))


def by_hand(folder: Path, caption: str, padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One caption through transformers, as its documentation and diffusers' pipelines do it."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    cls = getattr(transformers, kind_of(str(folder)).class_name)
    model = cls.from_pretrained(folder).eval()
    padding = {"padding": "max_length"} if padded else {}
    ids = tokenizer(caption, truncation=True, max_length=ROOM, return_tensors="pt", **padding)
    with torch.no_grad():
        output = model(ids.input_ids)
    pooled = getattr(output, "text_embeds", getattr(output, "pooler_output", None))
    return output.last_hidden_state[0], None if pooled is None else pooled[0]


@pytest.mark.parametrize("padding", ["none", "max_length"])
def test_embeddings_equal_transformers_own(folder: Path, padding: Any) -> None:
    for caption, text in zip(CAPTIONS, loaded(folder, padding=padding).encode(CAPTIONS)):
        wanted, pooled = by_hand(folder, caption, padding == "max_length")
        torch.testing.assert_close(tensor(text), wanted, atol=1e-5, rtol=0)
        assert isinstance(text, Text) and (text.pooled is None) == (pooled is None)
        if pooled is not None and text.pooled is not None:
            found = torch.frombuffer(bytearray(text.pooled), dtype=torch.float32)
            torch.testing.assert_close(found, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", ["none", "max_length"])
def test_neither_batch_nor_order_nor_neighbours_matter(folder: Path, padding: Any) -> None:
    together = loaded(folder, padding=padding, batch=8).encode([*CAPTIONS, LONG])
    alone = loaded(folder, padding=padding, batch=1).encode([LONG, *reversed(CAPTIONS)])
    for one, other in zip(together, reversed(alone), strict=True):
        torch.testing.assert_close(tensor(one), tensor(other), atol=1e-5, rtol=0)


def test_padding_without_a_mask_is_another_embedding(t5: Path) -> None:
    """Why there are two: in T5 every token sees the padding, if nothing hides it."""
    (own,) = loaded(t5).encode(["the dog"])
    (padded,) = loaded(t5, padding="max_length").encode(["the dog"])
    assert tensor(own).shape == (3, 16) and tensor(padded).shape == (ROOM, 16)
    assert (tensor(own) - tensor(padded)[:3]).abs().max() > 0.01
    assert isinstance(own, Text) and isinstance(padded, Text) and own.tokens == padded.tokens == 3


def test_a_tokenizer_that_makes_nothing_of_an_empty_caption_is_refused(
    t5: Path, tmp_path: Path
) -> None:
    import transformers
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"makes no token of an empty caption.*embed\.tokenizer"):
        TextEncoder(str(t5), str(tmp_path), max_length=ROOM)
    padded = TextEncoder(str(t5), str(tmp_path), max_length=ROOM, padding="max_length")
    (empty,) = padded.encode([""])
    assert tensor(empty).shape == (ROOM, 16) and padded.empty_tokens == 0


@pytest.mark.parametrize(
    ("pipeline", "padding"), [("CogVideoXPipeline", "max_length"), ("LTXPipeline", "max_length")]
)
def test_padded_as_the_pipelines_do_it(t5: Path, pipeline: str, padding: Any) -> None:
    import diffusers
    import transformers

    made = getattr(diffusers, pipeline)(
        tokenizer=transformers.AutoTokenizer.from_pretrained(t5),
        text_encoder=transformers.T5EncoderModel.from_pretrained(t5),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    with torch.no_grad():
        wanted = made._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=ROOM, device="cpu")
    wanted, mask = wanted if isinstance(wanted, tuple) else (wanted, None)
    for i, text in enumerate(loaded(t5, padding=padding).encode(CAPTIONS)):
        torch.testing.assert_close(tensor(text), wanted[i], atol=1e-5, rtol=0)
        if mask is not None:
            assert isinstance(text, Text) and int(mask[i].sum()) == text.tokens


def test_unpadded_is_what_wan_pads_with_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    import transformers
    from diffusers.pipelines.wan import pipeline_wan

    folder = make(tmp_path / "umt5", "umt5")
    # It cleans prompts with ftfy, which need not be installed; these are clean.
    monkeypatch.setattr(pipeline_wan, "prompt_clean", str.strip)
    made = diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(folder),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    with torch.no_grad():
        wanted = made._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=ROOM, device="cpu")
    for i, text in enumerate(loaded(folder).encode(CAPTIONS)):
        values = tensor(text)
        torch.testing.assert_close(values, wanted[i, : len(values)], atol=1e-5, rtol=0)
        assert not wanted[i, len(values) :].any()


def clip_words(source: Path, folder: Path) -> None:
    """OpenAI's own vocabulary of CLIP as transformers' files, as OpenAI's code builds it."""
    import gzip
    import json

    # The bytes that are printed as they are, then the others under names from 256 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    lines = gzip.decompress(source.read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def test_clips_real_vocabulary_as_stable_diffusion_uses_it(
    shared_data: Path, tmp_path: Path
) -> None:
    import diffusers
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.CLIPTextModel(config).eval()
    model.save_pretrained(tmp_path)
    words = shared_data / "weights" / "clip_tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
    clip_words(words, tmp_path)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    pipeline = diffusers.StableDiffusionPipeline(
        None, model, tokenizer, None, None, None, None, requires_safety_checker=False
    )
    prompts = ["a photo of a cat", "", "naïve café, 日本 " * 30]
    with torch.no_grad():
        wanted, _ = pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)
    encoder = loaded(tmp_path, max_length=77, padding="max_length")
    texts = encoder.encode(prompts)
    for text, own in zip(texts, wanted, strict=True):
        torch.testing.assert_close(tensor(text), own, atol=1e-5, rtol=0)
    assert [t.truncated for t in texts if isinstance(t, Text)] == [False, False, True]
    assert [t.tokens for t in texts if isinstance(t, Text)] == [7, 2, 77]


def texts(folder: Path, workdir: str = "/nowhere", **values: Any) -> Texts:
    stored = StoredEmbeddings(workdir, "embed", "f")
    return Texts(loaded(folder), lambda caption: digest([caption], 32), stored, **values)


def test_each_distinct_caption_goes_through_once(t5: Path) -> None:
    model = texts(t5, remember=1 << 20)
    first = model.encode(CAPTIONS)
    assert model.encoder.encoded == len(set(CAPTIONS)) and first[1] == first[4]
    assert model.encode(list(reversed(CAPTIONS))) == list(reversed(first))
    assert isinstance(model.empty(), bytes)
    assert model.encoder.encoded == len(set(CAPTIONS))


def test_what_is_kept_for_later_is_bounded(t5: Path) -> None:
    size = 16 * 4
    model = texts(t5, remember=5 * size, uncommitted=size)  # two captions of two words and the end
    model.encode(["a dog"])
    model.encode(["a cat"])
    model.encode(["a dog"])
    model.encode(["a bird"])  # the cat goes: the dog was used since
    assert model.encoder.encoded == 3
    model.encode(["a dog"])
    assert model.encoder.encoded == 3
    model.encode(["a cat"])
    assert model.encoder.encoded == 4


def test_what_is_not_committed_yet_is_kept_beyond_that(
    t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.texts.LOOK_SECONDS", 0)
    monkeypatch.setattr("stages.texts.LOOK_SHARE", float("inf"))
    model = texts(t5, str(tmp_path), remember=0)
    first = model.encode(CAPTIONS)
    assert model.encode(CAPTIONS) == first and model.encoder.encoded == len(set(CAPTIONS))
    keys = [digest([caption], 32) for caption in CAPTIONS]
    commit(tmp_path, "u", keys, first)
    assert model.encode(["a cat"]) and model.encoder.encoded == len(set(CAPTIONS)) + 1
    assert list(model._kept) == ["a cat"], "the others are committed by now"
    assert model.encode(CAPTIONS) == first, "copied, to the bit"
    assert model.encoder.encoded == len(set(CAPTIONS)) + 1


def commit(
    workdir: Path, unit: str, keys: list[str], texts: list[Text | Failed], voids: Any = ()
) -> str:
    """A data file of the stage, as it packs it; returns its path."""
    rows: list[dict[str, Any]] = []
    for key, text in zip(keys, texts, strict=True):
        assert isinstance(text, Text)
        before = next((i for i, row in enumerate(rows) if row["embedding_key"] == key), None)
        row = dict.fromkeys(EMBEDDINGS.names) | {
            "embedding_shape": list(text.shape),
            "embedding_key": key,
            "embedding_row": len(rows) if before is None else before,
            "embedding_tokens": text.tokens,
            "embedding_truncated": text.truncated,
        }
        if before is None:
            row |= {"embedding": text.values, "embedding_pooled": text.pooled}
        rows.append(row)
    rows[0]["embedding_empty"] = b"empty"
    log = Log(Store(str(workdir)), "embed", "f")
    table = pa.Table.from_pylist(rows, EMBEDDINGS)
    made = log.append(unit, len(log.commits(unit)), "", Counts(), table, voids=voids)
    assert made is not None
    return str(workdir / log.data_name(unit, made))


def test_what_is_committed_is_found_as_long_as_it_is_sound(t5: Path, tmp_path: Path) -> None:
    made = loaded(t5).encode(CAPTIONS)
    keys = [digest([caption], 32) for caption in CAPTIONS]
    stored = StoredEmbeddings(str(tmp_path), "embed", "f")
    stored.look()
    assert not len(stored) and stored.empty() is None
    first = commit(tmp_path, "a", keys[:2], made[:2])
    second = commit(tmp_path, "b", keys[1:], made[1:])
    assert not stored.find(keys), "not yet looked for"
    stored.look()
    assert len(stored) == len(set(keys)) and stored.empty() == b"empty"
    found = stored.find([*keys, digest(["another"], 32)])
    assert found.keys() == set(keys)
    assert all(found[k]["embedding"] == t.values for k, t in zip(keys, made) if isinstance(t, Text))

    data = bytearray(Path(first).read_bytes())
    at = data.index(made[0].values if isinstance(made[0], Text) else b"")
    data[at + 5] ^= 1
    Path(first).write_bytes(data)
    assert keys[0] not in stored.find(keys), "a page that is not what was written"
    Path(second).unlink()
    assert not stored.find(keys) and stored.empty() is None
    commit(tmp_path, "a", keys, made)
    stored.look()
    assert stored.find(keys).keys() == set(keys), "in a file that is there"


def test_what_was_made_void_is_not_copied(t5: Path, tmp_path: Path) -> None:
    made = loaded(t5).encode(["a dog", "a cat"])
    dog, cat = ("d" * 32, "c" * 32)
    stored = StoredEmbeddings(str(tmp_path), "embed", "f")
    void = Path(commit(tmp_path, "a", [dog], made[:1])).stem
    stored.look()
    assert stored.has(dog)
    commit(tmp_path, "a", [cat], made[1:], voids=[void])
    for again in (stored, StoredEmbeddings(str(tmp_path), "embed", "f")):
        again.look()
        assert again.has(cat) and not again.has(dog) and not again.find([dog])
    other = "d" * 16 + "e" * 16
    commit(tmp_path, "b", [other], made[:1])
    stored.look()
    assert not stored.find([dog]), "another key that begins with the same digits"
    assert stored.find([other])


def test_what_a_snapshot_holds_is_found(t5: Path, tmp_path: Path) -> None:
    made = loaded(t5).encode(["a dog", "a cat"])
    log = Log(Store(str(tmp_path)), "embed", "f")
    for n in range(3):
        commit(tmp_path, f"u{n}", [f"{n}" * 32], made[:1])
    lines = [line_of(f"u{n}", log.commits(f"u{n}")) for n in range(3)]
    log.store.create(log.next_snapshot(), "\n".join(lines).encode())
    (tmp_path / log.prefix / "u0" / "000000.json").unlink()
    commit(tmp_path, "u0", ["f" * 32], made[1:])
    stored = StoredEmbeddings(str(tmp_path), "embed", "f")
    stored.look()
    assert len(stored) == 4 and stored.has("f" * 32) and stored.has("0" * 32)


def test_a_long_caption_is_cut_and_counted(t5: Path) -> None:
    long, short = loaded(t5, max_length=5).encode([LONG, "the dog"])
    assert isinstance(long, Text) and isinstance(short, Text)
    assert (long.tokens, long.truncated, long.shape) == (5, True, (5, 16))
    assert (short.tokens, short.truncated) == (3, False)


def test_bfloat16_is_float32_rounded(t5: Path) -> None:
    (half,) = loaded(t5, dtype="bfloat16").encode(CAPTIONS[:1])
    (full,) = loaded(t5).encode(CAPTIONS[:1])
    difference = (tensor(half, torch.bfloat16).float() - tensor(full)).abs().max()
    assert 0 < difference < 0.1 * tensor(full).abs().max()


def test_a_batch_that_does_not_fit_is_halved(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, asked = loaded(t5, batch=4), []
    forward = encoder._forward

    def short(tokens: list[list[int]]) -> Any:
        asked.append(len(tokens))
        if len(tokens) > 2 or max(map(len, tokens)) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(tokens)

    monkeypatch.setattr(encoder, "_forward", short)
    *texts, lost = encoder.encode([*CAPTIONS, LONG])
    assert asked[:2] == [4, 2]
    wanted = loaded(t5).encode(CAPTIONS)
    for text, other in zip(texts, wanted, strict=True):
        torch.testing.assert_close(tensor(text), tensor(other), atol=1e-5, rtol=0)
    assert isinstance(lost, Failed) and lost.error == "out_of_memory"


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers, others in each worker."""
    folder = make(tmp_path / "encoder", "umt5")
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = "encoder.block.1.layer.0.SelfAttention.o.weight"
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(StageError, match=rf"lacks 1 weights of its UMT5EncoderModel \({name}\)"):
        loaded(folder)


def test_what_is_not_finite_is_told(t5: Path) -> None:
    encoder = loaded(t5)
    encoder._module.get_input_embeddings().weight[WORDS.split().index("dog") + 4] = torch.inf
    sound, lost = encoder.encode(["the bird", "the dog"])
    assert isinstance(sound, Text)
    assert isinstance(lost, Failed) and lost.error == "not_finite"


# ----------------------------------------------------------------------------- the stage


def table(made: Embed, rows: list[Any]) -> pa.Table:
    """Outcomes as the pipeline would write them."""
    schema = pa.schema([pa.field("n", pa.int32()), *made.adds])
    given = [row if isinstance(row, dict) else {} for row in rows]
    return pa.Table.from_pylist([{"n": i, **row} for i, row in enumerate(given)], schema)


def test_a_file_holds_each_embedding_once(t5: Path) -> None:
    made = stage(t5)
    model = made.setup()
    captions = [*CAPTIONS, None]
    outcomes = made.process([{"caption": c} for c in captions], model)
    again = made.process([{"caption": c} for c in captions[:2]], model)
    rows = table(made, [*outcomes, Failed("out_of_memory"), *again])
    packed = made.packed(rows, rows)
    assert packed.schema == rows.schema
    found = packed.to_pylist()
    assert [row["embedding_row"] for row in found] == [0, 1, 2, 3, 1, 5, 2, None, 0, 1]
    assert [row["embedding"] is not None for row in found] == [
        True, True, True, True, False, True, False, False, False, False,
    ]  # fmt: skip
    assert [row["embedding_empty"] is not None for row in found] == [True] + [False] * 9
    assert found[0]["embedding_empty"] == found[2]["embedding"]
    for caption, row in zip(captions, found):
        (text,) = model.encode([caption or ""])
        bearer = found[row["embedding_row"]]
        assert (
            bearer["embedding"] == text.values and bearer["embedding_key"] == row["embedding_key"]
        )
        assert row["embedding_shape"] == list(text.shape)


def test_rows_that_somebody_else_committed_leave_their_payload(t5: Path) -> None:
    made = stage(t5)
    rows = table(made, made.process([{"caption": c} for c in CAPTIONS], made.setup()))
    rest = made.packed(rows.slice(3), rows).to_pylist()
    assert [row["embedding_row"] for row in rest] == [0, 1, 2]
    assert rest[1]["embedding"] == rows["embedding"][1].as_py(), "the dog of the rows that went"
    assert rest[0]["embedding_empty"] == rows["embedding_empty"][0].as_py() is not None
    nothing = made.packed(rows.slice(0, 0), rows)
    assert len(nothing) == 0 and nothing.schema == rows.schema


def test_without_the_empty_captions_no_row_is_made(
    t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(t5)
    model = made.setup()
    full = Failed("out_of_memory", "full")
    monkeypatch.setattr(model.encoder, "encode", lambda captions: [full] * len(captions))
    assert made.process([{"caption": c} for c in CAPTIONS], model) == [full] * len(CAPTIONS)


def test_the_file_is_told_about_without_the_tokenizer(
    t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread commits, and a tokenizer that cuts for one thread does so for all."""
    made = stage(t5)
    model = made.setup()
    monkeypatch.setattr(model.encoder, "_tokenizer", None)
    assert made.metadata(model)["spec"]["empty_tokens"] == 1


def test_pooled_vectors_go_with_their_embedding(tmp_path: Path) -> None:
    made = stage(make(tmp_path / "clip", "clip_projection"))
    rows = table(made, made.process([{"caption": c} for c in ("a dog", "a dog")], made.setup()))
    first, second = made.packed(rows, rows).to_pylist()
    assert len(first["embedding_pooled"]) == 8 * 4 and second["embedding_pooled"] is None


def test_the_caption_to_train_on_is_read(t5: Path) -> None:
    assert stage(t5).reads == ("caption",)
    recaptioned = Context("/nowhere", captions="recaption")
    assert stage(t5, recaptioned).reads == ("recaption",)
    assert stage(t5, recaptioned, column="source_text").reads == ("source_text",)
    named = stage(t5, column="caption")
    assert named.fingerprint == stage(t5).fingerprint, "named or by default: the same column"
    columns = pa.schema([pa.field("caption", pa.string()), pa.field("len", pa.int64())])
    stage(t5).bind(columns)
    with pytest.raises(StageError, match=r"no such column. Did you mean caption\?"):
        stage(t5, column="captoin").bind(columns)
    with pytest.raises(StageError, match="holds no text"):
        stage(t5, column="len").bind(columns)


def test_keys_name_caption_encoder_and_length(t5: Path, tmp_path: Path) -> None:
    def key(made: Embed, caption: str = "a dog") -> str:
        (row,) = made.process([{made.column: caption}], made.setup())
        return str(row["embedding_key"])

    usual = key(stage(t5))
    assert usual == key(stage(t5, Context("/elsewhere", captions="recaption")))
    assert usual == key(stage(t5, device="cpu", batch_size=3))
    other = make(tmp_path / "other", "t5", width=8)
    changed = [
        key(stage(t5), "a cat"),
        key(stage(t5, max_length=12)),
        key(stage(t5, padding="max_length")),
        key(stage(t5, dtype="bfloat16")),
        key(stage(other)),
    ]
    assert len({usual, *changed}) == 6
    prints = [stage(t5, **s).fingerprint for s in ({}, {"max_length": 12}, {"dtype": "float16"})]
    assert len({*prints, stage(other).fingerprint}) == 4


def test_a_pipelines_folder_has_both_in_their_places(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    make(tmp_path / "text_encoder", "umt5", tokenizer=tmp_path / "tokenizer")
    made = stage(tmp_path)
    made.check()
    spec = made.metadata(made.setup())["spec"]
    assert spec["encoder_class"] == "UMT5EncoderModel" and spec["width"] == 16
    assert (spec["max_length"], spec["padding"], spec["empty_tokens"]) == (ROOM, "none", 1)
    before = made.fingerprint
    (tmp_path / "tokenizer" / "added.json").write_text("{}")
    assert stage(tmp_path).fingerprint != before, "another vocabulary is another encoder"


def test_what_can_not_be_used_is_told_before(tmp_path: Path, t5: Path) -> None:
    clip = make(tmp_path / "clip", "clip")
    with pytest.raises(StageError, match=rf"takes {ROOM} tokens at most: set embed.max_length"):
        stage(clip, max_length=77).check()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(StageError, match="a model of type bert, which embed does not know"):
        stage(tmp_path).check()
    with pytest.raises(StageError, match="there is no folder"):
        stage(tmp_path / "none").check()
    with pytest.raises(StageError, match=r"embed.tokenizer: there is no folder .*words"):
        _ = stage(clip, tokenizer="words").fingerprint
    (clip / "model.safetensors").write_bytes(b"")
    with pytest.raises(StageError, match="can't be loaded"):
        stage(clip).setup()


def test_memory_bounds_the_rows_at_once(t5: Path) -> None:
    assert stage(t5, max_length=64, dtype="bfloat16").batch_size == 256
    assert stage(t5, max_length=512, dtype="bfloat16").batch_size == 64
    assert stage(t5, max_length=8192, batch_size=20).batch_size == 20
    assert np.prod([64, 512, 4096, 2]) == 256 << 20
