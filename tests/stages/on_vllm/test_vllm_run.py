"""`vidpipe run` with vLLM's own engine in a worker on Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from serving import ENGINE_ARGS, LENGTH, clips, right

sys.path.insert(0, str(Path(__file__).parents[2] / "pipeline"))
from commands import Command, account, project, until

CONFIG = """
recaption:
  engine: vllm
  model: demo://captioner
  max_tokens: 96
  max_model_len: %d
  engine_args: %s
  workers: 1
run: {unit_size: 40}
"""


def test_every_clip_gets_its_caption(tmp_path: Path, small_machine: None) -> None:
    rows = clips(120)
    told = CONFIG % (LENGTH, json.dumps(ENGINE_ARGS))
    made = project(tmp_path, [row["caption"] for row in rows], more=told, on=("recaption",))
    command = Command(made, "run", "recaption", "--runner", "ray")
    assert command.wait(700) == 0, command.said
    assert account(made, "recaption")["kept"] == len(rows)
    assert "tokens/s" in command.said
    show = Command(made, "show", "recaption", "--format", "jsonl")
    assert show.wait() == 0, show.said
    by_caption = {one["caption"]: one for one in map(json.loads, show.printed.splitlines())}
    assert right(rows, [by_caption[row["caption"]] for row in rows]) >= 114, "95%"
    audit = Command(made, "audit")
    assert audit.wait() == 0, audit.printed + audit.said
    until(lambda: not command.left(), 30)  # above all no engine, which would keep its GPU
