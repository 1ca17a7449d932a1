"""Models of a hub: a server of our own answers for it, well or not."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, validate_repo_id

from manifests import hub
from manifests.hub import HubError, fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tf_model.h5": b"weights, once more",
}

# What it says of a path: status, headers, body; None breaks off.
Answer = tuple[int, dict[str, str], bytes] | None


@pytest.fixture
def answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[str], Answer]], None]]:
    """Makes a function of paths what the hub answers."""
    said: list[Callable[[str], Answer]] = [lambda path: None]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if (answer := said[-1](self.path)) is None:
                self.close_connection = True
                return
            status, headers, body = answer
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", place)
        files = f"{place}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield said.append
        server.shutdown()


def sound(path: str) -> Answer:
    """As the hub answers of `owner/name`."""
    if "/tree/" in path:
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": name}
            for name, data in FILES.items()
        ]
        return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
    if path.startswith("/api/models/owner/name/revision/"):
        body = {"_id": "1", "id": "owner/name", "sha": COMMIT, "siblings": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
    name = path.split("?")[0].rsplit("/", 1)[-1]
    if name not in FILES:
        return 404, {}, b""
    return 200, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}, FILES[name]


def refusing(status: int, code: str = "") -> Callable[[str], Answer]:
    headers = {"X-Error-Code": code} if code else {}
    return lambda path: (status, headers, b"{}")


def test_what_is_wanted_is_fetched_and_found_again(
    answers: Callable[[Callable[[str], Answer]], None],
) -> None:
    answers(sound)
    folder = fetch("owner/name", wanted=["*.json", "*.h5"], unwanted=["*.h5"])
    assert folder.name == COMMIT and [file.name for file in folder.iterdir()] == ["config.json"]
    assert fetch("owner/name", "v2") == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    answers(refusing(500))
    assert fetch("owner/name", "v2") == folder
    with pytest.raises(HubError, match=r"^revision v3 of owner/name can't .* and the hub fails \("):
        fetch("owner/name", "v3")


@pytest.mark.parametrize(
    ("answer", "why", "remedy"),
    [
        (refusing(403, "GatedRepo"), "its owner grants access", "then set HF_TOKEN"),
        (refusing(404, "RepoNotFound"), "there is no such folder, and the hub has", "correct it"),
        (refusing(404, "RevisionNotFound"), "there is no such revision", "correct it"),
        (refusing(401), r"the hub refuses it \(Client error '401", "set HF_TOKEN to a token"),
        (refusing(429), r"the hub fails \(429 Too Many", "name its folder"),
        (lambda path: None, r"breaks off, .*\(RemoteProtocolError", "HF_ENDPOINT and the proxy"),
        (lambda path: (200, {}, b"<html>"), r"what answers is no hub \(JSON", "HF_ENDPOINT and"),
        (lambda path: (200, {}, b"{}"), r"what answers is no hub \(KeyError", "HF_ENDPOINT and"),
    ],
)
def test_what_the_hub_does_wrong_is_told(
    answers: Callable[[Callable[[str], Answer]], None],
    answer: Callable[[str], Answer],
    why: str,
    remedy: str,
) -> None:
    answers(answer)
    with pytest.raises(HubError, match=rf"^owner/name can't be fetched: .*{why}.*; .*{remedy}"):
        fetch("owner/name")


def test_a_hub_that_accepts_and_says_nothing_is_not_waited_for(
    answers: Callable[[Callable[[str], Answer]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    over = threading.Event()

    def silent(path: str) -> Answer:
        over.wait(30)
        return None

    answers(silent)
    with pytest.raises(HubError, match=r"and the hub can't be reached \(.*timed out"):
        fetch("owner/name")
    over.set()


def test_files_that_are_refused_are_told(
    answers: Callable[[Callable[[str], Answer]], None],
) -> None:
    answers(lambda path: sound(path) if path.startswith("/api/") else (403, {}, b""))
    with pytest.raises(HubError, match=r"^owner/name can't be fetched: the hub refuses it \(403 "):
        fetch("owner/name")


def test_a_cache_that_cannot_be_written_is_told(
    answers: Callable[[Callable[[str], Answer]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    answers(sound)
    with pytest.raises(HubError, match=r"the hub's cache can't be written \(.*; make room, or set"):
        fetch("owner/name")


@pytest.mark.parametrize(
    "name",
    [
        *("owner/name", "o/n", "Owner_1/na-me.v2", "owner/name.gitx", f"{'o' * 96}/{'n' * 96}"),
        *("owner/t 5", "owner/t--5", "owner/a..b", "owner/t5.", "-owner/t5", "owner/t5.git"),
        *("owner/naïve", "owner/", "./name", "~/name", "owner/n\n", f"owner/{'n' * 97}"),
    ],
)
def test_ids_are_those_of_the_hub(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not hub.is_id(name)
        with pytest.raises(HubError, match="no id on the hub reads so"):
            fetch(name)
    else:
        assert hub.is_id(name)


@pytest.mark.parametrize("name", ["name", "a/b/c", "", "/a/b"])
def test_an_id_has_an_owner(name: str) -> None:
    assert not hub.is_id(name)


def test_it_costs_nothing_to_import() -> None:
    import subprocess

    code = "import sys, manifests.hub; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
