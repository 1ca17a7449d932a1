"""Secrets planted everywhere, and everything that was written or said searched for them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest

from stages.demo.shapes import scene, write_clip

sys.path.insert(0, str(Path(__file__).parent / "stages"))

from web import Request, Web

ENVIRONMENT = {
    "HF_TOKEN": "hf_PLANTEDabcdefghijklmnopqrstuv",
    "WANDB_API_KEY": "planteda0123456789abcdef0123456789abcdef",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED000000000",
    "AWS_SECRET_ACCESS_KEY": "planted/Secret+Access/Key0000000",
    "CAPTIONS_KEY": "sk-planted-caption-key-0123456789",
    "MY_PASSWORD": "planted correct horse",
}
USER, PASSWORD = "planteduser", "planted:pass/word"
SIGNATURE, TOKEN, SAS = "plantedsignature0123", "plantedtoken", "planted%2Bsas%3D"
CREDENTIAL = "PLANTEDCREDENTIAL%2F20261121"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SECRETS = [
    *ENVIRONMENT.values(),
    *(quote(value, safe="") for value in ENVIRONMENT.values()),
    *(USER, PASSWORD, quote(PASSWORD, safe=""), SIGNATURE, TOKEN, SAS, "planted+sas=", CREDENTIAL),
    *(BASIC, "plantedroot", "plantedcell"),
]
AMZ = f"X-Amz-Credential={CREDENTIAL}&X-Amz-Date=20261121&X-Amz-Signature={SIGNATURE}"

STAGES = """
import os
import pyarrow as pa
from stages.base import Failed, Stage, StageSettings


class Leaky(Stage[StageSettings, None]):
    name = "leaky"
    Settings = StageSettings
    reads = ("content",)
    adds = pa.schema([pa.field("odd", pa.string())])
    default_batch = 1

    def process(self, rows, model):
        import logging, sys
        words = " ".join(f"{k}={v}" for k, v in os.environ.items() if "LANTED" in v.upper())
        logging.getLogger("leaky").error("I know %s", words)
        if os.environ.get("RAISE"):
            raise RuntimeError(f"the secret is {words}")
        return [Failed("leaked", f"{words} Authorization: Bearer {os.environ['MY_PASSWORD']}")]
"""


def video() -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        write_clip(Path(file.name), scene(0), 8, 1.0, (64, 64))
        return Path(file.name).read_bytes()


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    """Serves only those who bring the secret, and tells it to everybody."""
    data = video()

    def answer(request: Request) -> None:
        path, _, query = request.path.partition("?")
        allowed = {
            "/basic.mp4": request.headers.get("Authorization") == f"Basic {BASIC}",
            "/signed.mp4": query == AMZ,
            "/token.mp4": query == f"token={TOKEN}&part=1",
            "/sas.mp4": f"sig={SAS}" in query and "se=2027" in query,
            "/root/relative.mp4": request.headers.get("Authorization") is not None,
        }
        if "chat/completions" in path:
            said = f"Incorrect key {request.headers['Authorization']}, {ENVIRONMENT['HF_TOKEN']}"
            request.reply(401, json.dumps({"error": {"message": said}}).encode())
        elif allowed.get(path):
            tag = f'"{SIGNATURE}{TOKEN}"'
            request.reply(200, data + path.encode(), ETag=tag)
        else:
            secrets = f"{query} {TOKEN} {ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}"
            request.send_response(403, f"no, not with {secrets}")
            request.send_header("Content-Length", "0")
            request.end_headers()

    with Web(answer) as made:
        yield made


@pytest.fixture
def project(tmp_path: Path, web: Web) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    host = web.url.removeprefix("http://")
    login = f"http://{USER}:{quote(PASSWORD, safe='')}@{host}"
    uris = [
        f"{login}/basic.mp4",
        f"{web.url}/signed.mp4?{AMZ}",
        f"{web.url}/token.mp4?token={TOKEN}&part=1",
        f"{web.url}/sas.mp4?sv=1&se=2027&sig={SAS}",
        f"{web.url}/refused.mp4?token={TOKEN}",
        f"zip://a.mp4::{login}/none.zip?sig={SIGNATURE}",
        "relative.mp4",
    ]
    rows = [
        {
            "uri": uri,
            "caption": f"see https://{USER}:plantedcell@h/ a circle",
            "thumbnail": f"{web.url}/t.jpg?{AMZ}",
            "note": f"token={TOKEN}",
        }
        for uri in uris
    ]
    table = folder / "clips.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "leaky_stages.py").write_text(STAGES)
    (folder / "vidpipe.yaml").write_text(
        "workdir: ./work\n"
        "source:\n"
        "  kind: jsonl\n"
        "  path: ./clips.jsonl\n"
        f"  root: http://{USER}:plantedroot@{host}/root\n"
        "sampling: {fps: 8, frames: 8, size: 64}\n"
        "download: {retries: 1, backoff: 0}\n"
        "filter: {rules: {length: len == 8}}\n"
        "encode: {vae: 'demo://vae'}\n"
        "recaption:\n"
        "  engine: openai\n"
        "  model: some/model\n"
        "  retries: 0\n"
        "  api_key_env: CAPTIONS_KEY\n"
        f"  endpoints: ['{web.url}/v1']\n"
        f"  template_args: {{hf_token: {ENVIRONMENT['HF_TOKEN']}}}\n"
        "stages: {leaky: {use: 'leaky_stages:Leaky'}}\n"
    )
    return folder


def found(text: bytes, where: str) -> list[str]:
    return [f"{secret} in {where}" for secret in SECRETS if secret.encode() in text]


def leaks(*folders: Path) -> list[str]:
    """Every secret in a name or in the bytes of a file; of Parquet files also in their values."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert files
    seen = []
    for file in files:
        seen += found(str(file).encode(), "a name") + found(file.read_bytes(), file.name)
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            said = repr(table.to_pylist()) + repr(table.schema.metadata)
            seen += found(said.encode("utf-8", "replace"), file.name)
    return seen


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_no_planted_secret_is_ever_written_or_said(
    project: Path, tmp_path: Path, runner: str
) -> None:
    cache, state = tmp_path / "cache", tmp_path / "state"
    # Ray makes sockets there, and their names have to be short.
    ray = Path(tempfile.mkdtemp(prefix="vp", dir="/tmp"))
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "XDG_CACHE_HOME": str(cache),
        "XDG_STATE_HOME": str(state),
        "RAY_TMPDIR": str(ray),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }

    said = b""

    def vidpipe(*words: str, **more: str) -> subprocess.CompletedProcess[bytes]:
        nonlocal said
        command = [sys.executable, "-m", "pipeline.cli", *words]
        done = subprocess.run(
            command, cwd=project, capture_output=True, timeout=240, env={**environment, **more}
        )
        said += done.stdout + done.stderr
        return done

    try:
        done = vidpipe("run", "--runner", runner, RAISE="yes")
        assert done.returncode == 1, "the stage raised"
        assert b"RuntimeError: the secret is" in done.stderr
        assert b"(http_401)" in done.stderr, "the server refuses the key"
        done = vidpipe("run", "leaky", "encode", "--runner", runner, "--explain")
        assert done.returncode == 0, done.stderr
        rows = vidpipe("show", "encode", "--format", "jsonl")
        assert rows.returncode == 0, rows.stderr
        if runner == "local":  # the rest runs in the same process either way
            done = vidpipe("run", "recaption", "--runner", "local")
            assert done.returncode == 1 and b"(http_401)" in done.stderr
            vidpipe("show", "download", "--format", "table")
            vidpipe("manifest", "--out", "all.parquet")
            vidpipe("manifest", "--out", "all.jsonl")
            vidpipe("status", "--json")
            vidpipe("doctor")
            vidpipe("train", "--steps", "1", "--set", "recaption.enabled=false")
            done = vidpipe(
                *("export", "out", "--to", "diffusion-pipe", "--set", "recaption.enabled=false")
            )
            assert done.returncode == 0, done.stderr
            assert b"a circle" in (project / "out" / "clips" / "captions.json").read_bytes()
            vidpipe("run", "--set", f"encode.vae={ENVIRONMENT['HF_TOKEN']}")
            vidpipe("run", "--set", f"recaption.api_key_env={ENVIRONMENT['WANDB_API_KEY']}")
            vidpipe("run", "--set", f"workdir=s3://{USER}:{quote(PASSWORD, safe='')}@bucket/work")
            vidpipe("show", "encode", "--where", f"uri = '{ENVIRONMENT['MY_PASSWORD']}' and")
            vidpipe("run", f"--{ENVIRONMENT['MY_PASSWORD']}")
        (project / "vidpipe.yaml").rename(tmp_path / "vidpipe.yaml")
        (project / "clips.jsonl").unlink()
        logs = list(ray.rglob("worker-*"))
        assert bool(logs) == (runner == "ray")
        assert not leaks(project, cache, *([ray] if runner == "ray" else []))
        assert not found(said, "what was said")
    finally:
        shutil.rmtree(ray, ignore_errors=True)
    outcomes = {
        row["uri"].rpartition("/")[2]: (row["outcome"], row["stage"], row["reason"])
        for row in map(json.loads, rows.stdout.splitlines())
    }
    kept = [name for name, (outcome, _, _) in outcomes.items() if outcome == "kept"]
    assert sorted(name.partition("?")[0] for name in kept) == [
        "basic.mp4", "relative.mp4", "sas.mp4", "signed.mp4", "token.mp4",
    ]  # fmt: skip
    (private,) = state.rglob("*.sqlite")
    assert private.stat().st_mode & 0o777 == 0o600
    assert SIGNATURE.encode() in private.read_bytes()


def test_another_signature_tomorrow_is_the_same_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that is written again with fresh signatures downloads and computes nothing; rows
    that were refused are asked for with the fresh ones."""
    from manifests.intake import scan
    from manifests.sources import SourceSettings
    from manifests.store import Store
    from stages.base import Context
    from stages.download import Download, DownloadSettings

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    day = "1"

    def answer(request: Request) -> None:
        fine = request.path.endswith(f"X-Amz-Date={day}&X-Amz-Signature=s{day}")
        request.reply(200 if fine else 403, b"video" if fine else b"")

    with Web(answer) as web:
        table, store = tmp_path / "t.jsonl", Store(str(tmp_path / "work"))
        settings = SourceSettings(kind="jsonl", path=str(table))

        def write(signed: str) -> None:
            uri = f"{web.url}/a.mp4?X-Amz-Date={signed}&X-Amz-Signature=s{signed}"
            table.write_text(json.dumps({"uri": uri}) + "\n\n" * int(signed))

        def fetch() -> object:
            stage = Download(DownloadSettings(retries=0), Context(store.url, str(tmp_path)))
            return stage.process([{"clip_id": "a", "uri": f"{web.url}/a.mp4"}])[0]

        write("1")
        assert scan(store, settings).new == 1
        day = "2"
        assert fetch().error == "http_403"
        write("2")
        again = scan(store, settings)
        assert (again.new, again.changed, again.gone) == (0, 0, 0)
        assert fetch()["bytes"] == 5
        day = "3"
        write("3")
        scan(store, settings)
        asked = len(web.requests)
        assert fetch()["bytes"] == 5
        assert len(web.requests) == asked, "it is here already"
        # Who deletes the private file gets it back with the next scan, table unchanged or not.
        (private,) = (tmp_path / "state").rglob("*.sqlite")
        private.unlink()
        scan(store, settings)
        assert private.exists()
