"""What tables, archives, servers, models and configurations may not do to us, each tried.

Download's own limits (sizes, schemes, `..`, redirects) are tried in tests/stages/test_download.py
and test_guard.py; files that change under us in tests/pipeline/test_changed_files.py.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.sources import SourceError, SourceSettings, extras_schema, read
from pipeline.config import ConfigError, parse
from pipeline.output import emit, json_text, text_table
from stages.base import Context, Failed, StageError
from stages.demo.shapes import scene, write_clip
from stages.download import Download, DownloadSettings
from stages.filter import Filter, FilterSettings
from stages.probe import Probe, ProbeSettings

sys.path.insert(0, str(Path(__file__).parent / "pipeline"))

ROOT = Path(__file__).parents[1]
PACKAGES = ("manifests", "stages", "pipeline", "trainer")


# ---------------------------------------------------------------------------- code from data


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def keyword(call: ast.Call, name: str) -> Any:
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == name), None)


def test_nothing_that_is_read_can_run() -> None:
    """No unpickling, no evaluation, no YAML with objects, no code from a model's repository."""
    wrong, seen = [], set()
    for file in (f for package in PACKAGES for f in (ROOT / package).rglob("*.py")):
        where = str(file.relative_to(ROOT))
        for name, call in calls(ast.parse(file.read_text(encoding="utf-8"))):
            last = name.rpartition(".")[2]
            bad = (
                name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
                or re.fullmatch(
                    r"(cloudpickle|pickle|dill|joblib|marshal|shelve)\.(loads?|open)", name
                )
                or name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all")
                or (name == "torch.load" and keyword(call, "weights_only") is not True)
                or (name in ("np.load", "numpy.load") and keyword(call, "allow_pickle"))
                or keyword_is_true(call, "trust_remote_code")
                or keyword_is_true(call, "shell")
            )
            if name in ("torch.load", "yaml.SafeLoader") or last == "from_pretrained":
                seen.add(last)
            if bad and where not in ALLOWED:
                wrong.append(f"{where}:{call.lineno}: {name}")
    assert not wrong
    assert seen >= {"load", "SafeLoader", "from_pretrained"}, "the check itself must see them"


# A supervised worker is told its work through a pipe that only its parent holds.
ALLOWED = {"pipeline/workers/process.py", "pipeline/workers/worker.py"}


def keyword_is_true(call: ast.Call, name: str) -> bool:
    return any(k.arg == name and ast.unparse(k.value) != "False" for k in call.keywords)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pickle-was-run"),))


@pytest.mark.parametrize("kind", ["vae", "language model", "clip head"])
def test_a_pickle_in_place_of_weights_is_not_run(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    if kind == "clip head":
        from stages.aesthetics import load

        torch.save(Evil(), tmp_path / "head.pth")
        with pytest.raises(StageError):
            load(str(tmp_path / "head.pth"))
    elif kind == "vae":
        from stages.vae.vae import Vae

        for name in ("config.json",):
            source = ROOT / "stages" / "demo" / "vae" / name
            (tmp_path / name).write_bytes(source.read_bytes())
        torch.save({"a": Evil()}, tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(StageError):
            Vae(str(tmp_path))
    else:
        from stages.engines.transformers import TransformersEngine

        for source in (ROOT / "stages" / "demo" / "captioner").iterdir():
            if source.suffix != ".safetensors":
                (tmp_path / source.name).write_bytes(source.read_bytes())
        torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(StageError):
            TransformersEngine(str(tmp_path), "m", "float32", "cpu", 1, {})
    assert not (tmp_path / "pickle-was-run").exists()


# ---------------------------------------------------------------------------- configurations


def test_a_few_lines_of_yaml_can_not_fill_the_memory() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    with pytest.raises(ConfigError, match="aliases stand for"):
        parse(bomb, "vidpipe.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 1500,
        "a: !!python/object/apply:os.system ['touch yaml-was-run']",
        "a: !!python/name:os.system",
        "a: 2026-99-99",
    ],
)
def test_yaml_that_is_no_configuration_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        parse(text, "vidpipe.yaml")
    with pytest.raises(ConfigError):
        parse("source: {kind: folder, path: .}", "vidpipe.yaml", [f"sampling.fps={text}"])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- rules


RULES = [
    "(select count(*) from read_csv('/etc/passwd')) > 0",
    "exists (from '/etc/passwd')",
    "len in (select 1 from glob('/*'))",
    "length(getenv('HOME')) > 0",
    "true); ATTACH '/tmp/x.db'; select (true",
    "true); COPY (select 1) TO '/tmp/x.csv'; select (true",
    "true); INSTALL httpfs; select (true",
    "true); PRAGMA database_list; select (true",
    "len in (select 1 from secret_table)",
    "len > random()",
]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_reaches_nothing_but_its_row(rule: str) -> None:
    columns = pa.schema([("len", pa.int64())])
    with pytest.raises((StageError, ValueError)):
        Filter(FilterSettings(rules={"r": rule}), Context("/work")).bind(columns)


@pytest.mark.parametrize(
    "where",
    [*(r for r in RULES[:8]), "uri in (select uri from secret_table)", "1) union select (2"],
)
def test_where_reaches_nothing_but_the_view(where: str, tmp_path: Path) -> None:
    from toys import pipeline

    from pipeline.query import select

    secret_table = pa.table({"uri": ["0.mp4"]})  # DuckDB would find it among our variables
    assert secret_table.num_rows == 1
    made = pipeline(tmp_path, ["a"])
    with pytest.raises(ConfigError, match="--where"):
        select(made, "length", where)


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ("list_sum(range(len * 100000000)) > 0", "rule_error"),
        ("cast(uri as integer) > 0", "rule_error"),
    ],
)
def test_a_heavy_rule_fails_its_row_and_not_the_process(rule: str, error: str) -> None:
    stage = Filter(FilterSettings(rules={"heavy": rule}), Context("/work"))
    stage.bind(pa.schema([("uri", pa.string()), ("len", pa.int64())]))
    (outcome,) = stage.process([{"uri": "x" * 100, "len": 50}])
    assert isinstance(outcome, Failed)
    assert outcome.error == error


def test_a_rule_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import filter as module

    monkeypatch.setattr(module, "_LIMIT", 0.3)
    rule = "list_sum(list_transform(range(len), lambda x: list_sum(range(x % 9999)))) > 0"
    stage = Filter(FilterSettings(rules={"slow": rule}), Context("/work"))
    with pytest.raises(StageError, match="slow took over"):
        stage.process([{"len": 300_000}] * 4)
    assert stage.process([{"len": 10}]) == [{}]


# ---------------------------------------------------------------------------- tables


def rows(path: Path, kind: str) -> list[Any]:
    settings = SourceSettings(kind=kind, path=str(path))
    extras_schema(settings)
    return list(read(settings))


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manifests import tables

    monkeypatch.setattr(tables, "MAX_LINE", 1 << 20)
    for name, kind in (("t.csv.gz", "csv"), ("t.jsonl.gz", "jsonl")):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write("path,text\n" if kind == "csv" else '{"path": "')
            for _ in range(40):
                file.write("x" * (1 << 20))
        assert (tmp_path / name).stat().st_size < 100_000
        with pytest.raises(SourceError, match=r"t\.(csv|jsonl)\.gz"):
            rows(tmp_path / name, kind)


def test_json_nested_without_end_is_refused(tmp_path: Path) -> None:
    for text in ('{"path": ' + "[" * 200_000, '{"path": ' * 100_000, "[" * 200_000):
        (tmp_path / "t.jsonl").write_text(text)
        with pytest.raises(SourceError, match="not valid JSON"):
            rows(tmp_path / "t.jsonl", "jsonl")


def test_a_parquet_file_with_absurd_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"path": ["a.mp4"] * 3, "text": ["x"] * 3}), path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<I", whole[-8:-4])
    footer = len(whole) - 8 - length
    refused = 0
    for at in range(footer, len(whole) - 4):
        for value in (0x00, 0x7F, 0xFF):
            damaged = bytearray(whole)
            damaged[at] = value
            path.write_bytes(damaged)
            try:
                assert len(rows(path, "parquet")) <= 3
            except SourceError as error:
                assert "t.parquet" in str(error)
                refused += 1
    assert refused > length
    for claim in (0x7FFFFFFF, 0xFFFFFFFF):
        path.write_bytes(whole[:-8] + struct.pack("<I", claim) + b"PAR1")
        with pytest.raises(SourceError):
            rows(path, "parquet")


# ---------------------------------------------------------------------------- archives


def fetch(folder: Path, *uris: str, **settings: Any) -> list[Any]:
    context = Context(str(folder / "work"), str(folder))
    stage = Download(DownloadSettings(backoff=0, **settings), context)
    return list(stage.process([{"clip_id": u, "uri": u} for u in uris]))


def test_members_of_archives_stay_in_the_media_folder(tmp_path: Path) -> None:
    folder = tmp_path / "root"
    folder.mkdir()
    link = zipfile.ZipInfo("link.mp4")
    link.external_attr = 0o120777 << 16
    names = ["../../up.mp4", "/abs.mp4", "..\\..\\back.mp4", "a/../../b.mp4", "C:\\c.mp4"]
    with zipfile.ZipFile(folder / "z.zip", "w") as file:
        for name in names:
            file.writestr(name, name.encode())
        file.writestr(link, "/etc/passwd")
    before = set(tmp_path.rglob("*"))
    outcomes = fetch(folder, *(f"zip://{name}::z.zip" for name in names), "zip://link.mp4::z.zip")
    for outcome in outcomes[:-1]:
        assert isinstance(outcome, Failed) or re.fullmatch(
            r"media/[0-9a-f]{2}/[0-9a-f]{64}(\.mp4)?", outcome["path"]
        )
    assert outcomes[-1].error == "not_a_file"
    media = folder / "work" / "media"
    written = set(tmp_path.rglob("*")) - before
    assert all(p == folder / "work" or p.is_relative_to(media) for p in written)
    assert not any(p.is_symlink() for p in written)


def test_a_zip_bomb_is_cut_off_at_what_it_claims_and_at_what_it_gives(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb.mp4", b"\0" * (30 << 20))
    data = buffer.getvalue()
    assert len(data) < 100_000
    (tmp_path / "honest.zip").write_bytes(data)
    lying = data.replace(struct.pack("<I", 30 << 20), struct.pack("<I", 1000))
    (tmp_path / "lying.zip").write_bytes(lying)
    uris = ["zip://bomb.mp4::honest.zip", "zip://bomb.mp4::lying.zip"]
    honest, lied = fetch(tmp_path, *uris, max_bytes=1 << 20, retries=0)
    assert honest.error == "too_large"
    assert lied.error in ("bad_archive", "too_large", "network")
    kept = [p for p in (tmp_path / "work").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in kept) < 1 << 20


# ---------------------------------------------------------------------------- videos


def test_a_video_that_names_other_files_opens_none(tmp_path: Path) -> None:
    """Playlists: FFmpeg would read what they name, here or on the network."""
    for name in ("private.mp4", "private.ts"):
        write_clip(tmp_path / name, scene(0), 8, 1.0, (64, 64))
    playlists = {
        "concat.mp4": "ffconcat version 1.0\nfile private.mp4\n",
        "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nprivate.ts\n#EXT-X-ENDLIST\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nprivate.ts\n#EXT-X-ENDLIST\n",
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    }
    stage = Probe(ProbeSettings(), Context(str(tmp_path)))
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        row = {"path": str(tmp_path / name), "content": "", "start": None, "end": None}
        (outcome,) = stage.process([row], None)
        assert isinstance(outcome, Failed), name
        assert outcome.error == "not_a_video", name
    row = {"path": str(tmp_path / "private.ts"), "content": "", "start": None, "end": None}
    assert stage.process([row], None)[0]["num_frames"] == 8


# ---------------------------------------------------------------------------- the terminal


HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egpj.exe\x7f\nb"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv"])
def test_names_of_files_do_not_reach_the_terminal_raw(form: str) -> None:
    table = pa.table({"uri": [HOSTILE, "b"], "list": [[HOSTILE], None]})
    out = Terminal()
    emit(table, form, out)
    said = out.getvalue()
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", said)
    assert "\r" not in said.replace("\r\n", "")
    assert "\\x1b]0;owned" in said or "\\u001b]0;owned" in said
    if form == "jsonl":
        assert [json.loads(line)["uri"] for line in said.splitlines()] == [HOSTILE, "b"]
    if form == "json":
        assert json.loads(said)[0] == {"uri": HOSTILE, "list": [HOSTILE]}


def test_a_file_gets_csv_as_the_values_are() -> None:
    out = io.StringIO()
    emit(pa.table({"uri": [HOSTILE]}), "csv", out)
    assert HOSTILE in out.getvalue()


def test_half_a_surrogate_breaks_no_json() -> None:
    assert json.loads(json_text({"a\udc80": "\udc80"})) == {"a\udc80": "\udc80"}
    json_text({"a": "\udc80"}).encode()
    text_table(["a"], [["\udc80"]]).encode()
