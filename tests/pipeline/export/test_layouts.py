"""Each layout read back the way its trainer's own reader does it, and compared with plain calls of
diffusers and transformers. The readers' behaviour stands in the tests: which files, which keys."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from projects import CAPTIONS, FRAMES, LENGTH, SIZE, Made, close

from manifests.shards import LatentSpec
from pipeline.export.base import COGVIDEOX, WAN, Options, pixels
from pipeline.export.exporting import export

Make = Callable[..., Made]


def loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def by_clip(made: Made) -> dict[str, tuple[str, str]]:
    """The video and the caption of each clip."""
    ids = made.ids()
    return {ids[f"clip.{n}.mp4"]: (f"clip.{n}.mp4", c) for n, c in enumerate(CAPTIONS)}


def keyed(clip: str, posterior: Any) -> torch.Tensor:
    """A sample of the posterior with the noise that is the clip's own."""
    key = hashlib.blake2b(f"export/{clip}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    return posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)


def test_pixels_of_latents() -> None:
    def spec(vae: str, temporal: int) -> LatentSpec:
        return LatentSpec("v", vae, "", "", True, 4, temporal, 8, [], [])

    assert pixels((8, 21, 60, 104), spec(WAN, 4)) == (81, 480, 832)
    # cogvideox-factory's own rule: odd -> 4 (T - 1) + 1, even -> 4 T.
    assert [pixels((8, t, 60, 90), spec(COGVIDEOX, 4))[0] for t in (13, 12, 1)] == [49, 48, 1]
    assert pixels((4, 16, 32, 32), spec("AutoencoderKL", 1)) == (16, 256, 256)


# ----------------------------------------------------------------------------- finetrainers


def precomputed(out: Path, kind: str, world: int = 1) -> list[Any]:
    """finetrainers' PrecomputedOnceDataIterable, one round of each rank."""
    folder = out / "finetrainers-precomputed-data"
    per_rank = max(1, len(list(folder.glob(f"{kind}-*.pt"))) // world)
    numbers = [rank * per_rank + i for rank in range(world) for i in range(per_rank)]
    return [loaded(folder / f"{kind}-{number}.pt") for number in numbers]


def collated(items: list[dict[str, Any]]) -> dict[str, Any]:
    """ModelSpecification.collate_latents: tensors are joined along the batch, but for some."""
    first = {"height", "width", "num_frames", "latents_mean", "latents_std"}
    return {
        key: items[0][key] if key in first else torch.cat([item[key] for item in items])
        for key in items[0]
    }


@pytest.mark.parametrize("padding", ["none", "max_length"])
def test_finetrainers_wan(make: Make, tmp_path: Path, padding: str) -> None:
    made = make("wan", "umt5", padding)
    out = tmp_path / "out"
    summary = export(made.pipeline(), "finetrainers", str(out))
    assert (summary.clips, summary.written) == (4, 8)
    latents, conditions = collated(precomputed(out, "latent")), precomputed(out, "condition", 2)
    assert latents["latents"].shape == (4, 8, 3, SIZE // 8, SIZE // 8)
    assert all(set(item) == {"encoder_hidden_states"} for item in conditions)
    hidden = torch.cat([item["encoder_hidden_states"] for item in conditions])
    order = made.index().table.column("clip_id").to_pylist()
    for n, (clip, (video, caption)) in enumerate((c, by_clip(made)[c]) for c in order):
        posterior = made.posterior(video)
        close(latents["latents"][n], posterior.parameters[0])
        # As WanModelSpecification.forward normalises: what is called std multiplies.
        mu = latents["latents"].chunk(2, dim=1)[0][n]
        mean, std = (latents[k].view(-1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
        config = made.vae.config
        wanted = (
            posterior.mean[0] - torch.tensor(config.latents_mean).view(-1, 1, 1, 1)
        ) / torch.tensor(config.latents_std).view(-1, 1, 1, 1)
        close((mu.float() - mean) * std, wanted)
        own = made.embedded(caption, padding == "max_length")
        close(hidden[n, : len(own)], own)
        assert hidden.shape[1:] == (LENGTH, 16) and not hidden[n, len(own) :].any()
        assert clip


def test_finetrainers_cogvideox(make: Make, tmp_path: Path) -> None:
    made = make("cogvideox", "t5", "max_length")
    export(made.pipeline(), "finetrainers", str(tmp_path / "out"))
    order = made.index().table.column("clip_id").to_pylist()
    latents = precomputed(tmp_path / "out", "latent")
    for n, clip in enumerate(order):
        posterior = made.posterior(by_clip(made)[clip][0])
        assert set(latents[n]) == {"latents"}
        close(latents[n]["latents"], posterior.parameters.transpose(1, 2))  # frames before channels


def test_finetrainers_ltx(make: Make, tmp_path: Path) -> None:
    made = make("ltx", "t5", "max_length")
    export(made.pipeline(), "finetrainers", str(tmp_path / "out"))
    order = made.index().table.column("clip_id").to_pylist()
    latents = collated(precomputed(tmp_path / "out", "latent"))
    conditions = collated(precomputed(tmp_path / "out", "condition"))
    assert [latents[k] for k in ("num_frames", "height", "width")] == [2, SIZE // 32, SIZE // 32]
    close(latents["latents_mean"], made.vae.latents_mean)
    close(latents["latents_std"], made.vae.latents_std)
    assert conditions["encoder_attention_mask"].dtype == torch.bool
    for n, clip in enumerate(order):
        video, caption = by_clip(made)[clip]
        close(latents["latents"][n], made.posterior(video).parameters[0])
        close(conditions["encoder_hidden_states"][n], made.embedded(caption, True))
        tokens = len(caption.split()) + 1
        wanted = [i < tokens for i in range(LENGTH)]
        assert conditions["encoder_attention_mask"][n].tolist() == wanted


# ----------------------------------------------------------------------------- FastVideo


def test_fastvideo(make: Make, tmp_path: Path) -> None:
    made = make("wan", "umt5")
    export(made.pipeline(), "fastvideo", str(tmp_path / "out"))
    files = sorted((tmp_path / "out" / "combined_parquet_dataset").rglob("*.parquet"))
    rows = []
    for file in files:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):  # read_row_from_parquet_file reads whole ones
            values = parquet.read_row_group(group).to_pydict()
            assert len(values["id"]) == 1
            rows.append({key: value[0] for key, value in values.items()})
    assert {row["id"] for row in rows} == set(by_clip(made))
    for row in rows:
        video, caption = by_clip(made)[row["id"]]
        # get_torch_tensors_from_row_dict: float32, whatever the row says.
        latent, text = (
            torch.from_numpy(
                np.frombuffer(row[f"{k}_bytes"], np.float32).reshape(row[f"{k}_shape"]).copy()
            )
            for k in ("vae_latent", "text_embedding")
        )
        close(latent, made.posterior(video).mean[0])
        close(text, made.embedded(caption, False))
        assert (row["caption"], row["media_type"]) == (caption, "video")
        assert (row["height"], row["width"], row["num_frames"]) == (SIZE, SIZE, 3)
        assert row["fps"] == 8.0 and row["duration_sec"] == FRAMES / 8


# ----------------------------------------------------------------------------- musubi


def test_musubi_wan(make: Make, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    made = make("wan", "umt5")
    export(made.pipeline(), "musubi", str(tmp_path / "out"))
    dataset = tomllib.loads((tmp_path / "out" / "dataset.toml").read_text())
    (one,) = dataset["datasets"]
    assert one["resolution"] == [SIZE, SIZE] and one["target_frames"] == [FRAMES]
    told = [json.loads(line) for line in Path(one["video_jsonl_file"]).read_text().splitlines()]
    captions = {Path(row["video_path"]).stem: row["caption"] for row in told}
    cache = Path(one["cache_directory"])
    found = set()
    for file in cache.glob("*_wan.safetensors"):
        # VideoDataset.prepare_for_training: the name is the only key.
        tokens = file.name.split("_")
        width, height = map(int, tokens[-2].split("x"))
        position, frames = map(int, tokens[-3].split("-")[:2])
        clip = "_".join(tokens[:-3])
        text_file = cache / f"{clip}_wan_te.safetensors"
        assert (width, height, position, frames) == (SIZE, SIZE, 0, FRAMES)
        batch: dict[str, torch.Tensor] = {}
        for key, value in {**load_file(file), **load_file(text_file)}.items():
            content = key.replace("varlen_", "").rsplit("_", 1)[0]
            if content.startswith("latents_"):
                content = content.rsplit("_", 1)[0]
            batch[content] = value
        assert set(batch) == {"latents", "t5"}
        video, caption = by_clip(made)[clip]
        mean, std = (
            torch.tensor(getattr(made.vae.config, n)).view(-1, 1, 1, 1)
            for n in ("latents_mean", "latents_std")
        )
        close(batch["latents"], (made.posterior(video).mean[0] - mean) / std)
        close(batch["t5"], made.embedded(caption, False))
        with safe_open(file, "pt") as opened, safe_open(text_file, "pt") as other:
            known = {"format_version": "1.0.1", "architecture": "wan"}
            size = {"width": str(SIZE), "height": str(SIZE), "frame_count": str(FRAMES)}
            assert opened.metadata() == known | size
            assert other.metadata() == {**known, "caption1": caption}
        assert captions[clip] == caption
        found.add(clip)
    assert found == set(by_clip(made))


def test_musubi_hunyuan(make: Make, tmp_path: Path) -> None:
    """Latents alone: its text encoder is a Llama, which musubi's own script runs on the list."""
    from safetensors.torch import load_file

    made = make("hunyuan")
    export(made.pipeline(), "musubi", str(tmp_path / "out"))
    found = list((tmp_path / "out" / "cache").rglob("*.safetensors"))
    assert len(found) == 4
    for file in found:
        clip, place, size, end = file.name.split("_")
        assert (place, size, end) == ("00000-009", "0064x0064", "hv.safetensors")
        ((key, value),) = load_file(file).items()
        assert key == "latents_3x8x8_float32"
        close(value, keyed(clip, made.posterior(by_clip(made)[clip][0]))[0])  # unscaled
    told = (tmp_path / "out" / "videos.jsonl").read_text().splitlines()
    wanted = {clip: caption for clip, (_, caption) in by_clip(made).items()}
    rows = map(json.loads, told)
    assert {Path(row["video_path"]).stem: row["caption"] for row in rows} == wanted


def test_tensors_in_the_dtype_asked_for(make: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = make("wan", "umt5")
    export(made.pipeline(), "musubi", str(tmp_path / "out"), Options(dtype="bfloat16"))
    for file in (tmp_path / "out" / "cache").rglob("*.safetensors"):
        ((key, value),) = load_file(file).items()
        assert value.dtype == torch.bfloat16 and key.endswith("_bfloat16")


# ----------------------------------------------------------------------------- CogVideoX


def test_cogvideox_factory(make: Make, tmp_path: Path) -> None:
    made = make("cogvideox", "t5", "max_length")
    out = tmp_path / "out"
    export(made.pipeline(), "cogvideox-factory", str(out))
    # VideoDataset with --load_tensors --caption_column prompts.txt --video_column videos.txt.
    prompts = [line.strip() for line in (out / "prompts.txt").read_text().splitlines()]
    videos = [out / line.strip() for line in (out / "videos.txt").read_text().splitlines()]
    assert len(prompts) == len(videos) == 4
    for prompt, path in zip(prompts, videos, strict=True):
        stem = path.name.split(".")[0]
        latents = loaded(path.parent.parent / "video_latents" / f"{stem}.pt")
        embeds = loaded(path.parent.parent / "prompt_embeds" / f"{stem}.pt")
        video, caption = by_clip(made)[stem]
        assert prompt == caption == (out / "prompts" / f"{stem}.txt").read_text().strip()
        frames = latents.size(1)
        frames = frames * 4 if frames % 2 == 0 else (frames - 1) * 4 + 1
        size = latents.size(2) * 8, latents.size(3) * 8
        assert (frames, *size) == (FRAMES, SIZE, SIZE), "the bucket that it falls into"
        close(latents, made.posterior(video).parameters[0])
        close(embeds, made.embedded(caption, True))
        assert path.read_bytes() == (made.folder / "videos" / video).read_bytes()
        file = (out / "video_latents" / f"{stem}.pt").stat().st_size
        assert file < latents.nbytes + 4096, "a slice, and not the whole of what it was cut from"
    rows = [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts


def test_cogvideox_factory_for_image_to_video(make: Make, tmp_path: Path) -> None:
    made = make("cogvideox", "t5", "max_length", encode=", first_frame: true")
    out = tmp_path / "out"
    export(made.pipeline(), "cogvideox-factory", str(out))
    for line in (out / "videos.txt").read_text().splitlines():
        stem = Path(line).stem
        image = loaded(out / "image_latents" / f"{stem}.pt")
        frame = made.frames(by_clip(made)[stem][0])[:, :, :1]
        with torch.no_grad():
            close(image, made.vae.encode(frame).latent_dist.parameters[0])


def test_cogvideo_finetune(make: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = make("cogvideox", "t5", "max_length")
    out = tmp_path / "out"
    export(made.pipeline(), "cogvideo", str(out), Options(model="cogvideox-i2v"))
    # BaseT2VDataset: data_root=out, caption_column=prompts.txt, video_column=videos.txt.
    prompts = [line.strip() for line in (out / "prompts.txt").read_text().splitlines()]
    videos = [out / line.strip() for line in (out / "videos.txt").read_text().splitlines()]
    latents = out / "cache" / "video_latent" / "cogvideox-i2v" / f"{FRAMES}x{SIZE}x{SIZE}"
    for prompt, path in zip(prompts, videos, strict=True):
        assert path.is_file()
        name = hashlib.sha256(prompt.encode()).hexdigest()
        text = load_file(out / "cache" / "prompt_embeddings" / f"{name}.safetensors")
        encoded = load_file(latents / f"{path.stem}.safetensors")["encoded_video"]
        video, caption = by_clip(made)[path.stem]
        wanted = keyed(path.stem, made.posterior(video))[0] * made.vae.config.scaling_factor
        close(encoded, wanted)
        close(text["prompt_embedding"], made.embedded(caption, True))
    assert len(list((out / "cache" / "prompt_embeddings").iterdir())) == len(set(CAPTIONS))


# ----------------------------------------------------------------------------- LTX


def test_ltx(make: Make, tmp_path: Path) -> None:
    made = make("ltx", "t5", "max_length")
    out = tmp_path / "out"
    export(made.pipeline(), "ltx", str(out))
    latents = out / ".precomputed" / "latents"
    files = sorted(latents.glob("**/*.pt"))
    assert {file.stem for file in files} == set(by_clip(made))
    for file in files:  # PrecomputedDataset: the same relative path in both folders
        data = loaded(file)
        condition = loaded(out / ".precomputed" / "conditions" / file.relative_to(latents))
        video, caption = by_clip(made)[file.stem]
        frames, height, width = (data[k] for k in ("num_frames", "height", "width"))
        assert data["fps"] == 8.0
        wanted = keyed(file.stem, made.posterior(video))[0]
        mean, std = (v.view(-1, 1, 1, 1) for v in (made.vae.latents_mean, made.vae.latents_std))
        wanted = (wanted - mean) / std
        # As encode_video packs them, with patches of one.
        close(data["latents"], wanted.permute(1, 2, 3, 0).flatten(0, 2))
        # As the reader of LTX-2 unpacks them.
        unpacked = data["latents"].view(frames, height, width, -1).permute(3, 0, 1, 2)
        close(unpacked, wanted)
        close(condition["prompt_embeds"], made.embedded(caption, True))
        mask = condition["prompt_attention_mask"]
        assert mask.dtype == torch.bool and int(mask.sum()) == len(caption.split()) + 1 and mask[0]


# ----------------------------------------------------------------------------- diffusion-pipe


@pytest.mark.parametrize("copy", [False, True])
def test_diffusion_pipe(make: Make, tmp_path: Path, copy: bool) -> None:
    made = make("sd")
    out = tmp_path / "out"
    export(made.pipeline(), "diffusion-pipe", str(out), Options(copy=copy))
    # DirectoryDataset: every file of the folder but for some suffixes, and captions by name.
    ignored = (".txt", ".npz", ".json", ".parquet", ".bak", ".db")
    files = [f for f in sorted((out / "clips").glob("*")) if f.suffix not in ignored]
    captions = json.loads((out / "clips" / "captions.json").read_text())
    assert len(files) == 4
    for file in files:
        video, caption = by_clip(made)[file.stem]
        assert captions[file.name] == [caption]
        source = made.folder / "videos" / video
        assert file.read_bytes() == source.read_bytes()
        assert file.samefile(source) != copy
