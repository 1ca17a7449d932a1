"""`vidpipe init`: a vidpipe.yaml that explains itself."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from pipeline.config import DEFAULT_FILE, ConfigError

_KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "prompts",
}


def init(folder: str, videos: str | None = None) -> Path:
    """Writes `folder`/vidpipe.yaml for `videos` (a folder or a table; default: ./videos).

    Raises ConfigError where there is one already.
    """
    path = Path(folder) / DEFAULT_FILE
    if path.exists():
        raise ConfigError(f"{path} is there already; init never overwrites one")
    source = videos or "./videos"
    if videos and "://" not in videos:
        # The path was typed relative to where the user stands, the file counts from its own folder.
        source = str(Path(videos).resolve())
    kind = _KINDS.get(Path(source).suffix.lower(), "folder")
    text = files("pipeline").joinpath("template.yaml").read_text(encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = text.replace("KIND", kind).replace("PATH", json.dumps(source, ensure_ascii=False))
    path.write_text(text, encoding="utf-8")
    return path
