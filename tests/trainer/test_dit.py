from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer import models
from trainer.config import DiTSettings, ModelConfig, TextSettings


def config(**text: object) -> ModelConfig:
    return ModelConfig(
        model=DiTSettings(width=32, depth=2, heads=2, patch=(2, 2, 2)),
        text=TextSettings.model_validate({"length": 8, "layers": 1, "buckets": 256, **text}),
        objective="flow",
        schedule="cosine",
        shape=(4, 4, 4, 4),
        latents={"vae_sha256": "a", "channels": 4, "shift": [0.0] * 4, "scale": [1.0] * 4},
    )


@pytest.fixture
def model() -> models.VideoDiT:
    """A model whose output is not the 0 of a new one."""
    torch.manual_seed(0)
    made = models.build(config())
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def run(model: models.VideoDiT, captions: list[str], x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        time = torch.full((len(x),), 0.5)
        out: torch.Tensor = model(x, time, models.tokenise(captions, config().text))
        return out


@pytest.mark.parametrize("shape", [(4, 4, 4, 4), (4, 1, 3, 5), (4, 17, 8, 6)])
def test_any_shape_goes_through(model: models.VideoDiT, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, *shape)
    assert run(model, ["a", "b"], x).shape == x.shape


def test_a_new_model_says_zero_and_learns_all_the_same() -> None:
    model = models.build(config())
    x = torch.randn(2, 4, 4, 4, 4)
    out = model(x, torch.tensor([0.1, 0.9]), models.tokenise(["a", ""], config().text))
    assert not out.any()
    (out - x).square().mean().backward()
    assert model.unembed.weight.grad is not None and model.unembed.weight.grad.any()


def test_checkpointing_gives_the_same_gradients(model: models.VideoDiT) -> None:
    x, ids = torch.randn(2, 4, 4, 4, 4), models.tokenise(["a", "b"], config().text)
    gradients, calls = [], []
    model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        model.zero_grad()
        model(x, torch.tensor([0.1, 0.9]), ids).square().mean().backward()
        gradients.append(model.embed.weight.grad)
        model.checkpoint()
    assert len(calls) == 3
    torch.testing.assert_close(gradients[1], gradients[0])


def test_default_size() -> None:
    made = ModelConfig.model_validate(
        {**config().model_dump(), "model": DiTSettings(), "text": TextSettings()}
    )
    assert 1e6 < sum(p.numel() for p in models.build(made).parameters()) < 3e6


def test_patches_are_put_back_where_they_were(model: models.VideoDiT) -> None:
    x = torch.randn(2, 4, 6, 4, 8)
    tokens, grid = model.patchify(x)
    assert (tokens.shape, grid) == ((2, 3 * 2 * 4, 4 * 8), (3, 2, 4))
    assert torch.equal(model.unpatchify(tokens, grid), x)
    assert torch.equal(tokens[1, 0], x[1, :, :2, :2, :2].flatten())


def test_positions_tell_every_patch_from_the_others() -> None:
    found = models.positions((3, 4, 5), 32)
    assert found.shape == (60, 32)
    assert len(set(map(tuple, found.tolist()))) == 60


def test_time_and_text_matter(model: models.VideoDiT) -> None:
    x = torch.randn(1, 4, 4, 4, 4).expand(3, -1, -1, -1, -1)
    red, blue, none = run(model, ["red", "blue", ""], x)
    assert not torch.allclose(red, blue) and not torch.allclose(red, none)
    ids = models.tokenise([""] * 2, config().text)
    early, late = model(x[:2], torch.tensor([0.1, 0.9]), ids)
    assert not torch.allclose(early, late)


def test_padding_of_captions_changes_nothing(model: models.VideoDiT) -> None:
    x = torch.randn(2, 4, 4, 4, 4)
    alone = run(model, ["red"], x[:1])
    beside = run(model, ["red", "a much longer caption than that"], x)
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-4, atol=1e-5)


def test_tokens() -> None:
    words, letters = TextSettings(length=4), TextSettings(kind="bytes", length=4)
    ids = models.tokenise(["Red, red squares move on", ""], words)
    assert ids.shape == (2, 4)
    assert ids[0, 0] == ids[1, 0] == models.BEGIN and ids[0, 1] == ids[0, 2] != ids[0, 3]
    assert ids[1, 1:].tolist() == [models.PAD] * 3
    assert models.tokenise(["ab"], letters).tolist() == [[1, 2 + 97, 2 + 98]]
    assert models.tokenise(["", ""], words).tolist() == [[1], [1]]


def test_bytes_are_a_text_encoder_too() -> None:
    made = models.build(config(kind="bytes"))
    ids = models.tokenise(["日本"], config(kind="bytes").text)
    assert made(torch.randn(1, 4, 4, 4, 4), torch.rand(1), ids).shape == (1, 4, 4, 4, 4)


def test_a_saved_model_is_the_same(model: models.VideoDiT, tmp_path: Path) -> None:
    models.save(model, model.state_dict(), config(), tmp_path)
    loaded, found = models.load(tmp_path)
    assert found == config()
    x = torch.randn(1, 4, 4, 4, 4)
    assert torch.equal(run(loaded, ["red"], x), run(model, ["red"], x))
