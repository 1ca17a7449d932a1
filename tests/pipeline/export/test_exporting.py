"""What an export writes, leaves, removes and refuses, whatever the layout."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from projects import CAPTIONS, Made, close

from manifests.shards import ShardError
from pipeline import index, query
from pipeline.commands.export import NAMES
from pipeline.export import TARGETS
from pipeline.export import exporting as module
from pipeline.export.base import ExportError, Options
from pipeline.export.exporting import export
from pipeline.export.ledger import NAME, Ledger
from pipeline.upkeep.audit import audit

Make = Callable[..., Made]
ROOT = Path(__file__).parents[3]


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    """By name, with what tells one that was written anew."""
    found = {
        str(f.relative_to(out)): (f.lstat().st_mtime_ns, f.read_bytes())
        for f in out.rglob("*")
        if f.is_file() and f.name != NAME
    }
    assert not [name for name in found if ".part" in name]
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before | after if before.get(name) != after.get(name)}


@pytest.fixture
def ltx(make: Make) -> Made:
    return make("ltx", "t5", "max_length")


def test_the_command_knows_all_targets() -> None:
    assert tuple(TARGETS) == NAMES
    assert all(cls.about and cls.name == name for name, cls in TARGETS.items())


def test_again_it_writes_nothing(ltx: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = export(ltx.pipeline(), "ltx", str(out))
    before = files(out)
    assert (first.clips, first.written, first.kept, first.removed) == (4, 8, 0, 0)
    assert first.bytes == sum(len(data) for _, data in before.values())
    again = export(ltx.pipeline(), "ltx", str(out))
    assert (again.clips, again.written, again.kept, again.removed) == (4, 0, 8, 0)
    assert files(out) == before
    anew = export(ltx.pipeline(), "ltx", str(out), overwrite=True)
    assert (anew.written, anew.kept) == (8, 0)
    assert {n: d for n, (_, d) in files(out).items()} == {n: d for n, (_, d) in before.items()}


def test_another_caption_writes_its_text_and_nothing_else(ltx: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ltx.pipeline(), "ltx", str(out))
    before = files(out)
    ltx.caption(["a green square", *CAPTIONS[1:]])
    ltx.run()
    again = export(ltx.pipeline(), "ltx", str(out))
    assert (again.written, again.kept, again.removed) == (1, 7, 0)
    clip = ltx.ids()["clip.0.mp4"]
    assert changed(before, files(out)) == {f".precomputed/conditions/{clip}.pt"}
    condition = torch.load(out / ".precomputed/conditions" / f"{clip}.pt", weights_only=True)
    close(condition["prompt_embeds"], ltx.embedded("a green square", True))


def test_a_clip_that_left_is_removed(ltx: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ltx.pipeline(), "ltx", str(out))
    before, gone = files(out), ltx.ids()["clip.3.mp4"]
    ltx.caption(CAPTIONS[:3])
    ltx.run()
    again = export(ltx.pipeline(), "ltx", str(out))
    assert (again.clips, again.written, again.removed) == (3, 0, 2)
    assert changed(before, files(out)) == {
        f".precomputed/{k}/{gone}.pt" for k in ("latents", "conditions")
    }
    some = export(ltx.pipeline(), "ltx", str(out), limit=1)
    assert (some.clips, some.removed) == (1, 0), "a part of the clips says nothing of the others"
    assert len(files(out)) == 6


def test_numbers_are_without_a_gap_and_stay(make: Make, tmp_path: Path) -> None:
    made, out = make("wan", "umt5"), tmp_path / "out"
    folder = out / "finetrainers-precomputed-data"

    def hidden() -> dict[int, torch.Tensor]:
        """The text of each number, which must be that of its latents."""
        found = {}
        for n in range(len(list(folder.glob("latent-*.pt")))):
            condition = torch.load(folder / f"condition-{n}.pt", weights_only=True)
            latent = torch.load(folder / f"latent-{n}.pt", weights_only=True)["latents"][0]
            clip = next(
                i for i in range(4)
                if torch.allclose(latent, made.posterior(f"clip.{i}.mp4").parameters[0], atol=1e-5)
            )  # fmt: skip
            found[clip] = condition["encoder_hidden_states"][0]
            own = made.embedded(CAPTIONS[clip], False)
            close(found[clip][: len(own)], own)
        return found

    export(made.pipeline(), "finetrainers", str(out))
    assert sorted(hidden()) == [0, 1, 2, 3]
    before = files(out)
    rows = [json.loads(line) for line in (made.folder / "clips.jsonl").read_text().splitlines()]
    (made.folder / "clips.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[1:]))
    made.run()
    export(made.pipeline(), "finetrainers", str(out))
    assert sorted(hidden()) == [1, 2, 3]
    # One took the place of the one that went, at most, and the last number is no more.
    assert len(changed(before, files(out))) <= 4
    assert {int(f.stem.split("-")[1]) for f in folder.glob("*.pt")} == {0, 1, 2}


def test_an_export_that_broke_off_goes_on(
    ltx: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, target = tmp_path / "out", TARGETS["ltx"]
    write, asked = target.write, []

    def broken(self: Any, item: Any, clips: Any, path: Path) -> None:
        asked.append(item.name)
        if len(asked) == 4:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        write(self, item, clips, path)

    monkeypatch.setattr(target, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        export(ltx.pipeline(), "ltx", str(out))
    monkeypatch.setattr(target, "write", write)
    before = files(out)
    assert len(before) == 3
    again = export(ltx.pipeline(), "ltx", str(out))
    assert (again.written, again.kept) == (5, 3)
    assert not changed(before, {n: f for n, f in files(out).items() if n in before})
    lost, cut = list(before)[:2]
    (out / lost).unlink()
    (out / cut).write_bytes(b"")  # as a power failure leaves it
    assert export(ltx.pipeline(), "ltx", str(out)).written == 2
    assert {n: d for n, (_, d) in files(out).items() if n in before} == {
        name: data for name, (_, data) in before.items()
    }
    assert set(files(out)) >= set(before)


def test_a_crash_amid_files_of_the_same_length(
    ltx: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was overwritten before a crash counts no more as what it was before."""
    out, half, other = tmp_path / "out", Options("float16"), Options("bfloat16")
    export(ltx.pipeline(), "ltx", str(out), half)
    before = {name: data for name, (_, data) in files(out).items()}
    place, close, placed = module._Export._place, Ledger.close, []

    def crash(self: Any, *words: Any) -> int:
        if len(placed) == 3:
            raise KeyboardInterrupt
        placed.append(words)
        return place(self, *words)

    def killed(self: Ledger) -> None:
        self._database.rollback()  # noted and not kept yet
        close(self)

    with monkeypatch.context() as patched:
        patched.setattr(module._Export, "_place", crash)
        patched.setattr(Ledger, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            export(ltx.pipeline(), "ltx", str(out), other)
    export(ltx.pipeline(), "ltx", str(out), half)
    assert {name: data for name, (_, data) in files(out).items()} == before


@pytest.mark.parametrize(("vae", "target"), [("ltx", "ltx"), ("cogvideox", "cogvideo")])
def test_a_full_disk_is_told(make: Make, tmp_path: Path, vae: str, target: str) -> None:
    made = make(vae, "t5", "max_length")
    (made.folder / "vidpipe.yaml").write_text(made.text)
    code = (
        "import resource, sys\n"
        "from pipeline.export import exporting\n"
        "from pipeline.cli import main\n"
        "write = exporting._Export._write\n"
        "def full(*words):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
        "    write(*words)\n"
        "exporting._Export._write = full\n"
        f"sys.argv = ['vidpipe', 'export', '--to', '{target}', '{tmp_path / 'out'}']\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=made.folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "can't write" in done.stderr and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    made.run()
    assert export(made.pipeline(), target, str(tmp_path / "out")).clips == 4


def test_others_may_read_the_files(make: Make, tmp_path: Path) -> None:
    made = make("cogvideox", "t5", "max_length")
    export(made.pipeline(), "cogvideo", str(tmp_path / "out"))
    (tmp_path / "plain").write_bytes(b"")
    mode = (tmp_path / "plain").stat().st_mode
    assert {f.stat().st_mode for f in (tmp_path / "out").rglob("*.safetensors")} == {mode}


def test_videos_that_are_links(make: Make, tmp_path: Path) -> None:
    made = make("sd")
    (made.folder / "videos").rename(made.folder / "raw")
    (made.folder / "videos").mkdir()
    for n in range(len(CAPTIONS)):
        (made.folder / "videos" / f"clip.{n}.mp4").symlink_to(f"../raw/clip.{n}.mp4")
    made.run()
    export(made.pipeline(), "diffusion-pipe", str(tmp_path / "out"))
    for name, clip in made.ids().items():
        video = tmp_path / "out" / "clips" / f"{clip}.mp4"
        assert video.read_bytes() == (made.folder / "raw" / name).read_bytes()


def test_folders_of_others_are_left_alone(ltx: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(ExportError, match="is neither empty nor an export"):
        export(ltx.pipeline(), "ltx", str(out))
    assert [f.name for f in out.iterdir()] == ["precious.txt"]
    (out / "precious.txt").unlink()
    export(ltx.pipeline(), "ltx", str(out))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds an export for ltx, not for finetrainers"):
        export(ltx.pipeline(), "finetrainers", str(out))
    ltx.caption(CAPTIONS[:1])
    ltx.run()
    export(ltx.pipeline(), "ltx", str(out))
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ExportError, match="name a local folder"):
        export(ltx.pipeline(), "ltx", "s3://bucket/out")
    (out / NAME).write_bytes(b"no database" * 100)
    with pytest.raises(ExportError, match="can't be used"):
        export(ltx.pipeline(), "ltx", str(out))


@pytest.mark.parametrize(
    ("vae", "more", "target", "told"),
    [
        (("sd",), {}, "ltx", "AutoencoderKLLTXVideo, and these are of an AutoencoderKL"),
        (
            ("wan",),
            {},
            "musubi",
            "needs text embeddings of a UMT5EncoderModel, and no",
        ),
        (("wan", "t5"), {}, "fastvideo", "these are of a T5EncoderModel"),
        (("wan", "umt5", "max_length"), {}, "musubi", "embed.padding none, and these"),
        (("cogvideox", "t5"), {}, "cogvideo", r"set `embed: \{.* padding: max_length"),
        (
            ("wan", "umt5", "none"),
            {"encode": ", moments: false"},
            "finetrainers",
            "only its mean was kept: set encode.moments",
        ),
    ],
)
def test_what_does_not_suit_is_refused_before_anything_is_written(
    make: Make, tmp_path: Path, vae: tuple[str, ...], more: dict[str, str], target: str, told: str
) -> None:
    made = make(*vae, **more)
    with pytest.raises(ExportError, match=told):
        export(made.pipeline(), target, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_mean_alone_is_enough_for_some(make: Make, tmp_path: Path) -> None:
    made = make("wan", "umt5", "none", encode=", moments: false")
    assert export(made.pipeline(), "musubi", str(tmp_path / "musubi")).clips == 4
    assert export(made.pipeline(), "fastvideo", str(tmp_path / "fastvideo")).clips == 4
    with pytest.raises(ExportError, match="leave --dtype out"):
        export(made.pipeline(), "fastvideo", str(tmp_path / "o"), Options(dtype="bfloat16"))


def test_clips_without_a_caption(make: Make, tmp_path: Path) -> None:
    """Lists of lines can't hold them; a file a clip can: with the empty caption's embedding."""
    made = make("cogvideox", "t5", "max_length")
    made.caption(["", *CAPTIONS[1:]])
    made.run()
    listed = export(made.pipeline(), "cogvideox-factory", str(tmp_path / "listed"))
    assert (listed.clips, sum(listed.left_out.values())) == (3, 1)
    assert len((tmp_path / "listed" / "prompts.txt").read_text().splitlines()) == 3
    numbered = export(made.pipeline(), "finetrainers", str(tmp_path / "numbered"))
    assert numbered.clips == 4
    made.caption([""] * 4)
    made.run()
    with pytest.raises(ExportError, match=r"no clip can be exported: all are without a caption"):
        export(made.pipeline(), "cogvideox-factory", str(tmp_path / "none"))


def test_lines_stay_lines(make: Make, tmp_path: Path) -> None:
    made = make("cogvideox", "t5", "max_length")
    made.caption(["a red\ncircle  moves\r\n", *CAPTIONS[1:]])
    made.run()
    export(made.pipeline(), "cogvideo", str(tmp_path / "out"))
    lines = (tmp_path / "out" / "prompts.txt").read_text().splitlines()
    assert len(lines) == 4 and "a red circle moves" in lines


def test_windows_are_clips_of_their_own(make: Make, tmp_path: Path) -> None:
    """Each under its own id, with the caption of the clip that it is a part of."""
    made, all_of_them = make("ltx", "t5", "max_length"), "sampling.windows=all"
    one = made.run(all_of_them)
    assert not audit(one).findings
    out = tmp_path / "out"
    done = export(one, "ltx", str(out))
    rows = query.select(one, "encode", "outcome = 'kept'").to_pylist()
    assert len(rows) == done.clips > 4
    for row in rows:
        data, text = (
            torch.load(out / ".precomputed" / kind / f"{row['clip_id']}.pt", weights_only=True)
            for kind in ("latents", "conditions")
        )
        assert data["fps"] == row["latents_fps"] == 8.0
        close(text["prompt_embeds"], made.embedded(row["caption"], True))
    with pytest.raises(ExportError, match="a section of"):
        export(one, "diffusion-pipe", str(tmp_path / "videos"))


def test_two_exports_into_one_folder_are_one_too_many(ltx: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ledger = Ledger(out, "ltx")
    with pytest.raises(ExportError, match="can't be used: database is locked"):
        export(ltx.pipeline(), "ltx", str(out))
    ledger.close()
    assert export(ltx.pipeline(), "ltx", str(out)).written == 8


def test_a_section_is_no_video_of_its_own(make: Make, tmp_path: Path) -> None:
    made = make("cogvideox", "t5", "max_length")
    rows = [{"path": "clip.0.mp4", "caption": "a bird", "start": 1.0, "end": 4.0}]
    (made.folder / "clips.jsonl").write_text(json.dumps(rows[0]) + "\n")
    made.run()
    with pytest.raises(ExportError, match="a section of: cut the clips"):
        export(made.pipeline(), "diffusion-pipe", str(tmp_path / "one"))
    assert export(made.pipeline(), "cogvideox-factory", str(tmp_path / "other")).clips == 1


def test_what_stands_elsewhere_ends_it(ltx: Made, tmp_path: Path) -> None:
    made = ltx.pipeline()
    file = Path(made.store.path(index.INDEX_NAME))
    table = pq.read_table(file)
    rows = table.to_pylist()
    for column, told in (("row", "where the index says clip"), ("text_row", "the index says")):
        values = [row[column] for row in rows]
        wrong = [{**row, column: value} for row, value in zip(rows, [values[-1], *values[:-1]])]
        pq.write_table(table.from_pylist(wrong, table.schema), file)
        with pytest.raises(ShardError, match=told):
            export(made, "ltx", str(tmp_path / column))
        pq.write_table(table, file)
    export(made, "ltx", str(tmp_path / "right"))


def test_nothing_to_export_is_told(make: Make, tmp_path: Path) -> None:
    made = make("sd")
    none = "filter.rules={none: len > 999}"
    made.run(none)
    with pytest.raises(ExportError, match="no clip is ready to export"):
        export(made.pipeline(none), "diffusion-pipe", str(tmp_path / "out"))
    without = "encode.enabled=false"
    with pytest.raises(ExportError, match=r"there is no encode stage: `encode\.enabled`"):
        export(made.pipeline(without), "diffusion-pipe", str(tmp_path / "out"))


def test_a_few_embeddings_are_in_memory_at_once(
    ltx: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1)
    asked = []
    read = module.read_embeddings

    def counted(workdir: str, shard: str, rows: list[int]) -> Any:
        asked.append(len(rows))
        return read(workdir, shard, rows)

    monkeypatch.setattr(module, "read_embeddings", counted)
    export(ltx.pipeline(), "ltx", str(tmp_path / "one"))
    assert asked == [1, 1, 1, 1]
    monkeypatch.setattr(module, "AT_ONCE", 16)
    export(ltx.pipeline(), "ltx", str(tmp_path / "all"))
    one, whole = ({n: d for n, (_, d) in files(tmp_path / w).items()} for w in ("one", "all"))
    assert one == whole and asked[4:] == [3], "two clips have one caption"


def test_the_ledger_numbers_clips(tmp_path: Path) -> None:
    def numbers(clips: str, all_of_them: bool = True) -> dict[str, int]:
        ledger = Ledger(tmp_path / "out", "finetrainers")
        ledger.number(clips, all_of_them)
        found = {clip: ledger.number_of(clip) for clip in clips}
        ledger.close()
        return found

    assert numbers("abcd") == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert numbers("abcde") == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    assert numbers("abce") == {"a": 0, "b": 1, "c": 2, "e": 3}, "the last takes the free place"
    assert numbers("bce") == {"b": 1, "c": 2, "e": 0}
    assert numbers("fb", all_of_them=False) == {"f": 3, "b": 1}
    with sqlite3.connect(tmp_path / "out" / NAME) as database:
        assert database.execute("SELECT COUNT(*) FROM clip").fetchone() == (4,)


def test_the_command(ltx: Made, tmp_path: Path) -> None:
    (ltx.folder / "vidpipe.yaml").write_text(ltx.text)

    def vidpipe(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "export", *words],
            cwd=ltx.folder,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HOME": str(tmp_path)},
        )

    done = vidpipe("out", "--to", "ltx", "--dtype", "bfloat16", "--limit", "3")
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()
    assert head.split()[:2] == ["for", "clips"] and row.split()[:4] == ["ltx", "3", "0", "6"]
    (file, *_) = (ltx.folder / "out" / ".precomputed" / "latents").iterdir()
    assert torch.load(file, weights_only=True)["latents"].dtype == torch.bfloat16
    refused = vidpipe("other", "--to", "musubi")
    assert refused.returncode == 2 and "musubi trains on latents of" in refused.stderr
    assert "Traceback" not in refused.stderr
