from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.base import StageError
from stages.models import check, folder_sha256, model_identity, model_label, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    for place in (folder, folder / "vae"):
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").write_bytes(b"weights" + place.name.encode())
    (folder / "README.md").write_text("not a part of the model")
    return folder


def test_a_local_folder_is_used_where_it_lies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(model)) == str(model)
    assert resolve(str(model), subfolder="vae") == str(model / "vae")
    monkeypatch.chdir(model.parent)
    assert resolve("./model") == resolve("model") == str(model)


def test_the_identity_is_the_contents_wherever_they_lie(model: Path, tmp_path: Path) -> None:
    before = model_identity(str(model))
    assert before != model_identity(str(model), subfolder="vae")
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "README.md").write_text("changed")
    assert model_identity(str(copy)) == before
    (copy / "model.safetensors").write_bytes(b"other")
    assert model_identity(str(copy)) != before
    (model / "config.json").rename(model / "model_index.json")
    assert model_identity(str(model)) != before
    assert model_label(str(model), None, str(model)) == f"{model}@{folder_sha256(model)[:12]}"


def test_the_hubs_cache_is_not_read_again(model: Path, tmp_path: Path) -> None:
    """A blob's name is its sha256: this one lies, and so shows that nobody looked."""
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(blob)
    config = hashlib.sha256(b"{}").hexdigest()
    expected = f"config.json\0{config}\nmodel.safetensors\0{'0' * 64}\n"
    assert folder_sha256(model) == hashlib.sha256(expected.encode()).hexdigest()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("./gone", "there is no folder"),
        ("/gone/for/good", "there is no folder"),
        ("gone", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("demo://nothing", "there is no folder"),
        ("owner/name with blanks", "a hub id reads owner/name"),
        ("models/t5--small", "a hub id reads owner/name"),
        ("models/vae.", "a hub id reads owner/name"),
    ],
)
def test_what_is_no_model_is_told(spec: str, why: str) -> None:
    for touch in (check, resolve):
        with pytest.raises(StageError, match=why) as caught:
            touch(spec)
        assert spec in str(caught.value)


def test_a_folder_without_a_config_is_no_model(model: Path) -> None:
    check(str(model))
    (model / "config.json").unlink()
    with pytest.raises(StageError, match=r"no config\.json.*There is one in vae"):
        check(str(model))
    check(str(model), "vae")


def test_a_hub_model_is_its_id_and_revision() -> None:
    check("owner/name")
    assert model_identity("owner/name") == model_identity("owner/name", "main")
    assert model_identity("owner/name") != model_identity("owner/name", COMMIT)
    assert model_identity("owner/name", None, "vae") != model_identity("owner/name")


def test_a_hub_model_comes_from_the_cache_or_a_remedy_is_told(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    script = """
from stages.base import StageError
from stages.models import model_label, resolve
folder = resolve("owner/name")
print(folder)
print(model_label("owner/name", None, folder))
try:
    resolve("owner/other", "v2")
except StageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    folder, label, error = done.stdout.splitlines()
    assert folder == str(snapshot)
    assert label == f"owner/name@{COMMIT[:12]}"
    assert error.startswith("model revision v2 of owner/other can't be fetched: ")
    assert error.endswith(
        "fetch it where there is a network and name its folder, or set HF_ENDPOINT"
    )
