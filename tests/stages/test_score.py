from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numbered import make
from safetensors.torch import load_file, save_file

from stages.aesthetics import Aesthetics, head_of, load, predicted
from stages.base import Context, Failed, StageError
from stages.media.few import Few, sample_few
from stages.score import Score, ScoreSettings, luma, measured, sharpness

torch = pytest.importorskip("torch")

LINEAR_MSE = "sac+logos+ava1-l14-linearMSE.pth"


def stage(**settings: Any) -> Score:
    return Score(ScoreSettings(**settings), Context("/nowhere"))


def rows(*paths: Path) -> list[dict[str, Any]]:
    return [{"path": str(path), "start": None, "end": None} for path in paths]


def grey(*levels: int) -> np.ndarray:
    """Frames of one grey each: [n, 8, 8, 3]."""
    return np.stack([np.full((8, 8, 3), level, np.uint8) for level in levels])


def test_luma_weighs_the_colours() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    assert luma(colours) == pytest.approx([76.245, 149.685, 29.07, 255])


def test_measures_of_flat_frames() -> None:
    scores = measured(Few(grey(10, 100), grey(61, 100)))
    assert scores == pytest.approx({"sharpness": 0, "luminance": 55, "motion": 0.1})


def test_sharpness_is_the_laplacians_variance() -> None:
    spot = np.zeros((1, 5, 5), np.float32)
    spot[0, 2, 2] = 9
    # Inside the border: -36 in the middle, 9 at its four neighbours, 0 at the corners.
    assert sharpness(spot) == pytest.approx(np.var([-36, 9, 9, 9, 9, 0, 0, 0, 0]))


def test_blur_lowers_sharpness() -> None:
    noise = np.random.default_rng(0).uniform(0, 255, (2, 64, 64)).astype(np.float32)
    blurred = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2) + np.roll(noise, 2, 2)) / 4
    assert sharpness(blurred) < sharpness(noise) / 2


def test_scores_of_files(tmp_path: Path) -> None:
    moving = make(tmp_path / "moving.mp4", 50, 25)
    missing = tmp_path / "none.mp4"
    outcomes = stage(side=64, frames=3).process(rows(moving, missing), None)
    scores: Any = outcomes[0]
    assert list(scores) == ["sharpness", "luminance", "motion"]
    assert 0 < scores["motion"] < 1
    few = sample_few(str(moving), 3, 64)
    assert scores == measured(few)
    assert outcomes[1] == Failed("missing_file", "the file is not there")
    still = make(tmp_path / "still.mp4", 2, 1)
    assert stage(side=64, frames=1).process(rows(still), None)[0]["motion"] == 0


def test_real_black_video_scores_nothing(shared_data: Path) -> None:
    black, flower, slow = (
        shared_data / "videos" / name
        for name in ("silent-black-10s.mp4", "flower.mp4", "trim_optimization_failure.mp4")
    )
    scores: Any = stage(side=128).process(rows(black, flower, slow), None)
    assert scores[0] == {"sharpness": 0, "luminance": 0, "motion": 0}
    assert 80 < scores[1]["luminance"] < 120
    assert scores[1]["sharpness"] > scores[2]["sharpness"]


def test_the_collapsed_head_is_the_mlp(shared_data: Path) -> None:
    folder = shared_data / "weights" / "aesthetic"
    state = load(str(folder / LINEAR_MSE))
    weight, bias = head_of(state, LINEAR_MSE)
    assert float(weight.norm()) == pytest.approx(17.9956, abs=1e-4)
    assert float(bias) == pytest.approx(5.2366, abs=1e-4)
    layers = [
        torch.nn.Linear(*reversed(state[f"layers.{i}.weight"].shape)) for i in (0, 2, 4, 6, 7)
    ]
    mlp = torch.nn.Sequential(*layers).eval()
    mlp.load_state_dict(
        {
            f"{i}.{part}": state[f"layers.{n}.{part}"]
            for i, n in enumerate((0, 2, 4, 6, 7))
            for part in ("weight", "bias")
        }
    )
    features = torch.randn(100, 768, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = mlp(torch.nn.functional.normalize(features, dim=-1))[:, 0]
    assert torch.allclose(predicted(features, weight, bias), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("clip", "head"),
    [
        ("l_14", LINEAR_MSE),
        ("l_14", "sa_0_4_vit_l_14_linear.pth"),
        ("b_32", "sa_0_4_vit_b_32_linear.pth"),
    ],
)
def test_real_heads_rate_real_features_in_their_order(
    shared_data: Path, clip: str, head: str
) -> None:
    folder = shared_data / "weights" / "aesthetic"
    weight, bias = head_of(load(str(folder / head)), head)
    features = [np.load(folder / f"vit_{clip}_embeddings" / f"rating{i}.npy") for i in range(10)]
    scores = predicted(torch.from_numpy(np.concatenate(features)), weight, bias).tolist()
    assert scores == sorted(scores)
    assert scores[-1] - scores[0] > 3


def test_heads_that_are_not_linear_are_refused(shared_data: Path, tmp_path: Path) -> None:
    relu = str(shared_data / "weights" / "aesthetic" / "ava+logos-l14-reluMSE.pth")
    with pytest.raises(StageError, match="neither LAION's linear head"):
        head_of(load(relu), relu)
    text = tmp_path / "head.pth"
    text.write_text("not weights")
    with pytest.raises(StageError, match="holds no weights"):
        load(str(text))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small["num_attention_heads"] = 2
    config = CLIPConfig(
        text_config={**small, "vocab_size": 64, "max_position_embeddings": 8},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def head(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    save_file({"weight": weight, "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def test_aesthetics_of_files(tmp_path: Path, clip_folder: Path, head: Path) -> None:
    from transformers import CLIPModel

    first, second = make(tmp_path / "a.mp4", 50, 25), make(tmp_path / "b.mp4", 90, 25)
    settings = {"clip": str(clip_folder), "aesthetic_head": str(head), "side": 64, "frames": 3}
    score = stage(**settings)
    score.check()
    assert score.adds.names == ["sharpness", "luminance", "motion", "aesthetic"]
    model = score.setup()
    together: Any = score.process(rows(first, tmp_path / "none.mp4", second), model)
    assert isinstance(together[1], Failed)

    # By hand, on CLIP's own pixels: mean over the frames of w . f / |f| + b.
    assert model is not None
    pixels = model.prepared(sample_few(str(second), 3, 64).frames)
    assert pixels.shape == (3, 3, 32, 32)
    with torch.inference_mode():
        clip = CLIPModel.from_pretrained(clip_folder).eval()
        features = clip.get_image_features(pixel_values=pixels).pooler_output
    state = load(str(head))
    expected = ((features / features.norm(dim=1, keepdim=True)) @ state["weight"][0] + 5).mean()
    assert together[2]["aesthetic"] == pytest.approx(float(expected), abs=1e-5)

    # How many pictures go through at once is speed: neither results nor fingerprint change.
    other = stage(**settings, pictures=2)
    again: Any = other.process(rows(first), other.setup())
    assert again[0]["aesthetic"] == pytest.approx(together[0]["aesthetic"], abs=1e-5)
    assert other.fingerprint == score.fingerprint != stage().fingerprint


def test_clip_pixels_are_those_of_its_processor(clip_folder: Path, head: Path) -> None:
    from transformers import CLIPImageProcessor

    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), np.uint8)
    frames = frames // 4 + np.linspace(0, 190, 80, dtype=np.uint8)[:, None]
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    expected = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    pixels = Aesthetics(str(clip_folder), str(head), "cpu").prepared(frames)
    assert (pixels - expected).abs().mean() < 0.02


def test_settings_that_do_not_fit_are_told(
    tmp_path: Path, clip_folder: Path, head: Path, shared_data: Path
) -> None:
    with pytest.raises(StageError, match="set both or neither"):
        stage(clip=str(clip_folder)).check()
    with pytest.raises(StageError, match="there is no file"):
        stage(clip=str(clip_folder), aesthetic_head=str(tmp_path / "none.pth")).check()
    wide = shared_data / "weights" / "aesthetic" / LINEAR_MSE
    with pytest.raises(StageError, match="features of 768 numbers and the CLIP model gives 16"):
        stage(clip=str(clip_folder), aesthetic_head=str(wide)).setup()


def test_another_head_is_another_fingerprint(clip_folder: Path, head: Path) -> None:
    score = stage(clip=str(clip_folder), aesthetic_head=str(head))
    before = score.fingerprint
    state = load(str(head))
    buffer = io.BytesIO()
    torch.save({name: value + 1 for name, value in state.items()}, buffer)
    head.write_bytes(buffer.getvalue())
    assert score.fingerprint != before


def test_a_clip_folder_that_lacks_weights_is_refused(
    tmp_path: Path, clip_folder: Path, head: Path
) -> None:
    lacking = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(lacking / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"lacks 1 weights of its CLIPModel \(visual_projection"):
        Aesthetics(str(lacking), str(head), "cpu")
