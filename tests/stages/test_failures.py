"""Every failure class in the code stands in the table of docs/stages.md, with the right verdict."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from numbered import make

from stages import builtin
from stages.base import TRANSIENT, Context, Failed, Stage
from stages.media.sampling import Sampling

ROOT = Path(__file__).parents[2]
# What is called with a failure class first.
MAKERS = {"Failed", "VideoError", "TransferError", "EngineFailure", "_Fault"}
ROW = re.compile(r"^\| (`[^|]*`) \| ([a-z, ]+) \| (transient|final) \| .{5,} \| .+ \|$", re.M)


def table() -> list[tuple[str, str, str]]:
    """(class, stages, verdict); `http_5xx` as a pattern."""
    page = (ROOT / "docs" / "stages.md").read_text()
    return [
        (name.replace("xx", "??"), where, verdict)
        for names, where, verdict in ROW.findall(page)
        for name in re.findall(r"`(\w+)`", names)
    ]


def literal(node: ast.expr) -> str | None:
    """A class as written; the open part of an f-string is a `*`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "*" for v in node.values)
    return None


def classes(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name in MAKERS and node.args and (found := literal(node.args[0])):
                yield found
        if isinstance(node, ast.FunctionDef) and node.name == "_verdict":
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and isinstance(inner.value, ast.Tuple):
                    yield literal(inner.value.elts[0]) or ""


def in_code() -> dict[str, str]:
    """Failure classes, and a file that has it."""
    files = [f for part in ("stages", "pipeline") for f in (ROOT / part).rglob("*.py")]
    return {name: file.name for file in files for name in classes(file)}


def test_every_class_in_the_code_is_in_the_table() -> None:
    known = [name for name, _, _ in table()]
    assert len(known) == len(set(known)), "a class stands twice"
    found = in_code()
    assert {"decode_error", "missing_file", "truncated", "http_*", "prompt_too_long"} <= set(found)
    missing = {
        name: file
        for name, file in found.items()
        if name not in known and not any(fnmatchcase(k, name) for k in known)
    }
    assert not missing


def test_every_class_in_the_table_is_in_the_code() -> None:
    found = {*in_code(), *TRANSIENT}
    assert not [n for n, _, _ in table() if not any(fnmatchcase(n, known) for known in found)]


@pytest.mark.parametrize(("name", "where", "verdict"), table())
def test_stages_agree_with_the_table(name: str, where: str, verdict: str, tmp_path: Path) -> None:
    names = list(builtin()) if where == "every stage" else where.split(", ")
    example = {"http_5??": "http_503", "http_4??": "http_404"}.get(name, name)
    for stage in names:
        cls: type[Stage] = builtin()[stage]
        made = cls(cls.Settings(), Context(str(tmp_path)))
        assert made.worth_retry(example) == (verdict == "transient"), stage
    assert (name in TRANSIENT) == (where == "every stage")


def test_every_transient_class_is_in_the_table_as_one() -> None:
    known = {(name, verdict) for name, _, verdict in table()}
    for cls in builtin().values():
        assert {(name, "transient") for name in cls.transient} <= known, cls.name


@pytest.mark.parametrize("name", ["probe", "score", "encode"])
def test_a_clip_beyond_the_limit_fails_and_names_the_setting(name: str, tmp_path: Path) -> None:
    """Within the stage, before whoever watches the worker loses patience with it."""
    row = {
        "clip_id": "a",
        "path": str(make(tmp_path / "a.mp4", 60, 25)),
        "start": None,
        "end": None,
    }
    cls: type[Stage] = builtin()[name]
    context = Context(str(tmp_path), sampling=Sampling(frames=4, size=64))
    settings = {"decode_seconds": 1e-9, "max_pixels": 64 * 64}
    model = cls(cls.Settings(), context).setup()
    (outcome,) = cls(cls.Settings(**settings), context).process([row], model)
    assert isinstance(outcome, Failed) and outcome.error == "decode_timeout"
    assert f"more than 1e-09 s ({name}.decode_seconds)" in outcome.message
    (outcome,) = cls(cls.Settings(max_pixels=9), context).process([row], model)
    assert isinstance(outcome, Failed) and outcome.error == "frame_too_large"
    usual = cls(cls.Settings(), context)
    assert usual.time_limit > usual.settings.decode_seconds
    one, other = cls(cls.Settings(**settings), context), usual
    assert one.fingerprint == other.fingerprint, "a limit changes no result"
