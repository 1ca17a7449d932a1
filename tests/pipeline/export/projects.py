"""Real small pipelines: generated videos, a tiny VAE of the right class, a tiny text encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from encoders import make as make_encoder
from numbered import make as make_video
from tiny import tiny

from manifests.shards import Index
from pipeline import dag, index, query
from pipeline.config import parse
from pipeline.dag import Pipeline
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from stages.media.frames import read_clip

CAPTIONS = ["a red circle moves left", "the small dog sits", "a bird", "the small dog sits"]
FRAMES, SIZE, LENGTH = 9, 64, 12


@dataclass
class Made:
    """A pipeline that was run, and what plain calls of its models give."""

    folder: Path
    vae: Any
    encoder: Path
    text: str

    def pipeline(self, *overrides: str) -> Pipeline:
        return dag.build(parse(self.text, str(self.folder / "vidpipe.yaml"), overrides))

    def run(self, *overrides: str) -> Pipeline:
        made = self.pipeline(*overrides)
        result = run(made, (), Retry(), Reporter())
        assert not result.faults, result.faults[0].trace
        return made

    def caption(self, captions: Sequence[str]) -> None:
        """The table anew, with these captions."""
        rows = [{"path": f"clip.{n}.mp4", "caption": c} for n, c in enumerate(captions)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "clips.jsonl").write_text(text)

    def index(self) -> Index:
        return Index.open(index.path(self.pipeline()))

    def ids(self) -> dict[str, str]:
        """Clip ids by the video's name."""
        rows = query.select(self.pipeline(), None, None, ["clip_id", "uri"]).to_pylist()
        return {Path(row["uri"]).name: row["clip_id"] for row in rows}

    def frames(self, video: str) -> torch.Tensor:
        """As VAEs want them: (1, 3, F, H, W) from -1 to 1."""
        sampling = self.pipeline().config.sampling
        clip = read_clip(str(self.folder / "videos" / video), sampling, None, None)
        return (torch.from_numpy(clip.frames).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]

    def posterior(self, video: str) -> Any:
        """The VAE's own distribution for a video, as diffusers' documentation gets it."""
        with torch.no_grad():
            return self.vae.encode(self.frames(video)).latent_dist

    def embedded(self, caption: str, padded: bool) -> torch.Tensor:
        """The encoder's own hidden states for a caption, (tokens, width)."""
        import transformers

        kind = json.loads((self.encoder / "config.json").read_text())["architectures"][0]
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.encoder)
        model = getattr(transformers, kind).from_pretrained(self.encoder).eval()
        more = {"padding": "max_length"} if padded else {}
        ids = tokenizer(caption, truncation=True, max_length=LENGTH, return_tensors="pt", **more)
        with torch.no_grad():
            return model(ids.input_ids).last_hidden_state[0]


def make(
    folder: Path, vae: str, encoder: str | None = None, padding: str = "none", encode: str = ""
) -> Made:
    """Runs a pipeline on four videos: `vae` is a kind of `tiny`, `encoder` t5 or umt5, `encode`
    more of that stage's settings."""
    (folder / "videos").mkdir(parents=True)
    for n in range(len(CAPTIONS)):
        make_video(folder / "videos" / f"clip.{n}.mp4", 60, 8 + 8 * n)
    module = tiny(vae)
    module.save_pretrained(folder / "vae")
    text = (
        "source: {kind: jsonl, path: ./clips.jsonl, root: ./videos}\n"
        f"sampling: {{fps: 8, frames: {FRAMES}, size: {SIZE}}}\n"
        "run: {runner: local, isolate: false}\n"
        "score: {enabled: false}\nrecaption: {enabled: false}\n"
        f"encode: {{vae: ./vae{encode}}}\n"
    )
    if encoder is not None:
        make_encoder(folder / "encoder", encoder)
        text += (
            f"embed: {{encoder: ./encoder, padding: {padding}, max_length: {LENGTH}, "
            "dtype: float32}\n"
        )
    made = Made(folder, module, folder / "encoder", text)
    made.caption(CAPTIONS)
    made.run()
    return made


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
