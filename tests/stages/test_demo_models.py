"""The weights that ship with the demo, as files and at their work on what they never saw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import stages
from stages.captions.prompt import DEFAULT, preset
from stages.demo.shapes import RATES, Scene, caption, named, rewrite, scene, write_clip
from stages.demo.train_captioner import held_out
from stages.demo.train_vae import psnr

HOME = Path(stages.__file__).parent
VAE = HOME / "demo" / "vae"
CAPTIONER = HOME / "demo" / "captioner"
PROMPT = preset(DEFAULT).template.text + "\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and on busy cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(("folder", "most"), [(VAE, 1_000_000), (CAPTIONER, 4_000_000)])
def test_the_models_are_small_and_hold_no_path(folder: Path, most: int) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= most
    for path in folder.glob("*.json"):
        assert "_name_or_path" not in path.read_text()


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(VAE, local_files_only=True).float().eval()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Four frames of each of ten unseen files of the demo's kind, (40, 3, 64, 64) in [-1, 1]."""
    folder = tmp_path_factory.mktemp("clips")
    pictures = []
    for number in range(10):
        path = folder / f"{number}.mp4"
        size = (96, 96 + 16 * (number % 5))
        write_clip(path, scene(50_000 + number), RATES[number % 5], 4.2, size)
        with av.open(str(path)) as container:
            shown = [frame.to_image() for frame in container.decode(video=0)]
        for picture in shown[:: len(shown) // 4][:4]:
            left = (picture.width - 96) // 2
            square = picture.crop((left, 0, left + 96, 96))
            pictures.append(np.asarray(square.resize((64, 64), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_the_vae_rebuilds_unseen_clips(vae: Any, clips: torch.Tensor) -> None:
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mode()
        made = vae.decode(latents).sample
    assert latents.shape == (40, 4, 8, 8)
    each = [psnr(clips[k : k + 4], made[k : k + 4]) for k in range(0, 40, 4)]
    assert psnr(clips, made) >= 26
    assert min(each) >= 24


def test_the_latents_are_at_the_scale_of_the_noise(vae: Any, clips: torch.Tensor) -> None:
    with torch.no_grad():
        posterior = vae.encode(clips).latent_dist
    torch.manual_seed(0)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    scaled = (posterior.sample() - mean) * vae.config.scaling_factor / std
    assert scaled.std().item() == pytest.approx(1, abs=0.1)
    assert scaled.mean(dim=(0, 2, 3)).abs().max() < 0.5
    assert scaled.std(dim=(0, 2, 3)).min() > 0.7
    assert scaled.std(dim=(0, 2, 3)).max() < 1.3


@pytest.fixture(scope="module")
def captioner() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(CAPTIONER, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(CAPTIONER, local_files_only=True)


def answers(captioner: tuple[Any, Any], prompt: str, scenes: list[Scene]) -> list[str]:
    """Greedy answers, 50 at a time, padded on the left."""
    model, tokenizer = captioner
    done: list[str] = []
    for first in range(0, len(scenes), 50):
        chats = [
            [{"role": "user", "content": prompt.replace("{caption}", caption(one))}]
            for one in scenes[first : first + 50]
        ]
        asked = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**asked)
        new = ids[:, asked["input_ids"].shape[1] :]
        assert (new == tokenizer.eos_token_id).any(dim=1).all()  # each ended by itself
        done += tokenizer.batch_decode(new, skip_special_tokens=True)
    return done


def unseen(count: int) -> list[Scene]:
    """Scenes whose captions training left out, each caption once."""
    found = {caption(one): one for one in map(scene, range(60_000, 65_000))}
    return [one for text, one in found.items() if held_out(text)][:count]


def share_right(texts: list[str], scenes: list[Scene]) -> float:
    facts = [(one.shape, one.colour, one.direction) for one in scenes]
    return sum(named(t) == f for t, f in zip(texts, facts, strict=True)) / len(scenes)


def test_the_captioner_keeps_the_facts_of_unseen_captions(captioner: tuple[Any, Any]) -> None:
    scenes = unseen(200)
    assert len(scenes) == 200
    texts = answers(captioner, PROMPT, scenes)
    assert share_right(texts, scenes) >= 0.95
    assert max(len(text.split()) for text in texts) <= 45
    # It writes what it was taught, not only the three facts.
    assert sum(t == rewrite(s) for t, s in zip(texts, scenes, strict=True)) >= 0.9 * len(scenes)


@pytest.mark.parametrize(
    "prompt",
    [
        "{caption}",
        "Please turn this caption into one fluent English sentence, 30 words at most: {caption}",
    ],
)
def test_the_captioner_stands_an_edited_prompt(captioner: tuple[Any, Any], prompt: str) -> None:
    scenes = unseen(50)
    assert share_right(answers(captioner, prompt, scenes), scenes) >= 0.9


def test_each_word_that_matters_is_one_token(captioner: tuple[Any, Any]) -> None:
    _, tokenizer = captioner
    for word in ("red", "Red", " orange", " Purple", " circle", "Square", " left", " up"):
        assert len(tokenizer.encode(word)) == 1
    assert tokenizer.decode(tokenizer.encode("naïve 日本 ok")) == "naïve 日本 ok"


def test_every_latent_channel_says_something(vae: Any, clips: torch.Tensor) -> None:
    """A channel that collapsed to the prior (posterior std 1, mean 0) is noise to train on."""
    with torch.no_grad():
        posterior = vae.encode(clips).latent_dist
    assert (posterior.std.mean((0, 2, 3)) < 0.5).all()
    assert (posterior.mean.std((0, 2, 3)) > 0.5).all()
