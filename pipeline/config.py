"""vidpipe.yaml as typed settings.

Every error names the file, the line, the key, the value and what is allowed: a typo in a
configuration costs a second, never a night. Stage sections are typed by the stages themselves, so
a new stage needs no line here.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manifests.redact import has_credentials
from manifests.schema import did_you_mean
from manifests.sources import SourceSettings, resolve_root
from stages import builtin
from stages.base import Context, Stage, StageSettings
from stages.media.sampling import Sampling

DEFAULT_FILE = "vidpipe.yaml"
# Stages that write captions, and their columns: the first that is there is what is trained on.
CAPTIONED = {"recaption": "recaption", "describe": "description"}
MOST_VALUES = 100_000  # of a configuration

AnyStage = Stage[Any, Any]


class ConfigError(Exception):
    """The configuration can't be used; the message is what a user needs to mend it."""


class RunSettings(BaseModel):
    """How work is spread. None of it changes a result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runner: Literal["ray", "local"] = Field("ray", description="local: a loop in one process")
    mode: Literal["auto", "pipelined", "staged"] = Field(
        "auto", description="stages chained, or one after the other; auto: by the GPUs at hand"
    )
    address: str | None = Field(
        None, description="of a running Ray cluster; default: a private one"
    )
    gpus: int | None = Field(None, ge=0, description="GPUs to use; default: all")
    wait: int = Field(
        900, ge=0, description="seconds for nodes that an autoscaled cluster has to bring first"
    )
    unit_size: int | None = Field(None, ge=1, le=65536, description="clips of a new unit")
    isolate: bool = Field(
        True,
        description="a process of its own for each worker, so that a clip that kills it costs only "
        "itself; false: easier to debug",
    )


class _Top(BaseModel):
    """The keys of vidpipe.yaml that are no stage sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workdir: str = "./work"
    source: SourceSettings
    sampling: Sampling = Field(default_factory=Sampling)
    run: RunSettings = Field(default_factory=RunSettings)
    train: dict[str, Any] = Field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """One vidpipe.yaml, checked. Relative paths in it are relative to its folder."""

    file: str
    workdir: str
    source: SourceSettings
    sampling: Sampling
    run: RunSettings
    train: Mapping[str, Any]
    stages: Mapping[str, AnyStage]  # enabled ones, by name, in no particular order
    written: SourceSettings  # `source` with its paths as they stand in the file

    @property
    def base(self) -> Path:
        return Path(self.file).resolve().parent


def load(file: str = DEFAULT_FILE, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a configuration; `overrides` are `a.b=value` strings, values in YAML.

    Raises ConfigError.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file}: no such file. `vidpipe init` writes one, or name yours with -c."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} can't be read: {error}") from error
    return parse(text, file, overrides)


def parse(text: str, file: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `text`; `file` is where it stands. Raises ConfigError."""
    data, lines = _read_yaml(text, file)
    for override in overrides:
        _override(data, lines, override)
    base = Path(file).resolve().parent
    shipped = builtin()
    sections = {name: data.pop(name) for name in list(data) if name in shipped}
    known = [*_Top.model_fields, *shipped]
    top = _validate(_Top, data, (), file, lines, known)
    if has_credentials(top.workdir):
        raise ConfigError(
            f"{_at(file, lines, ('workdir',))}`workdir` holds credentials in its URL, which would "
            "be written wherever the workdir is named: set them in the environment "
            "(AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...)"
        )
    source = _absolute_source(top.source, base)
    chosen: dict[str, tuple[type[AnyStage], StageSettings]] = {}
    for name, cls in shipped.items():
        if name in sections or not cls.on_request:
            chosen |= _chosen(cls, sections.get(name), (name,), file, lines)
    for name, section in top.stages.items():
        cls = _user_stage(name, section, file, lines, base)
        if name in chosen:
            raise ConfigError(_at(file, lines, ("stages", name)) + f"stage {name} exists already")
        rest = {key: value for key, value in section.items() if key != "use"}
        chosen |= _chosen(cls, rest, ("stages", name), file, lines)
    context = Context(
        workdir=_absolute(top.workdir, base),
        root=resolve_root(source),
        sampling=top.sampling,
        captions=next((c for stage, c in CAPTIONED.items() if stage in chosen), "caption"),
    )
    stages = {name: cls(settings, context) for name, (cls, settings) in chosen.items()}
    run, train = top.run, top.train
    return Config(file, context.workdir, source, top.sampling, run, train, stages, top.source)


def _chosen(
    cls: type[AnyStage],
    section: Any,
    where: tuple[str, ...],
    file: str,
    lines: Mapping[tuple[Any, ...], str],
) -> dict[str, tuple[type[AnyStage], StageSettings]]:
    """The class and its settings by its name; nothing where it is switched off."""
    section = {} if section is None else section
    if isinstance(section, dict):
        base = Path(file).resolve().parent
        section = {key: from_file(value, base) for key, value in section.items()}
    settings = _validate(cls.Settings, section, where, file, lines)
    return {cls.name: (cls, settings)} if settings.enabled else {}


def _user_stage(
    name: str, section: dict[str, Any], file: str, lines: Mapping[tuple[Any, ...], str], base: Path
) -> type[AnyStage]:
    at = _at(file, lines, ("stages", name))
    use = section.get("use")
    if not isinstance(use, str) or not re.fullmatch(r"\w+(\.\w+)*:\w+", use):
        raise ConfigError(f'{at}stages.{name} needs `use: "module:Class"`, not {use!r}')
    module_name, class_name = use.split(":")
    if str(base) not in sys.path:
        sys.path.insert(0, str(base))
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ConfigError(
            f"{at}{use}: {error}. Modules are looked for beside {Path(file).name} and among the "
            "installed packages."
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{at}module {module_name} has no class {class_name}") from error
    except Exception as error:
        raise ConfigError(
            f"{at}{use}: importing it raised {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Stage)):
        raise ConfigError(f"{at}{use} is no stage: derive it from stages.base.Stage")
    if getattr(cls, "name", None) != name:
        raise ConfigError(f"{at}{use} calls itself {getattr(cls, 'name', None)!r}: use that key")
    return cls


def from_file(value: Any, base: Path) -> Any:
    """Models and files in a stage's section are relative to vidpipe.yaml: workers run elsewhere.
    Only what begins with ./ or ../ is taken for a path, since hub ids have slashes too."""
    if isinstance(value, str) and value.startswith(("./", "../", "~/")):
        return str((base / Path(value).expanduser()).resolve())
    return value


def _absolute(path: str, base: Path) -> str:
    return path if "://" in path else str((base / Path(path).expanduser()).resolve())


def _absolute_source(source: SourceSettings, base: Path) -> SourceSettings:
    changes = {
        name: _absolute(value, base)
        for name in ("path", "root", "videos")
        if isinstance(value := getattr(source, name, None), str)
    }
    return source.model_copy(update=changes)


def _validate(
    model: type[Any],
    data: Any,
    where: tuple[str, ...],
    file: str,
    lines: Mapping[tuple[Any, ...], str],
    known: Sequence[str] | None = None,
) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        loc = (*where, *(part for part in first["loc"]))
        key = ".".join(str(part) for part in loc if not _is_branch(part))
        at = _at(file, lines, loc)
        if first["type"] == "extra_forbidden":
            nested = len(first["loc"]) > 1 or known is None
            names = _fields_at(model, first["loc"]) if nested else list(known or ())
            raise ConfigError(
                f"{at}unknown key `{key}`.{did_you_mean(str(loc[-1]), names)} "
                f"Allowed here: {', '.join(sorted(names))}."
            ) from error
        if first["type"] == "missing":
            raise ConfigError(f"{at}`{key}` is missing: {_example(key)}") from error
        if first["type"] == "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{at}`{key}`: {reason}") from error
        raise ConfigError(
            f"{at}`{key}` is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        ) from error


def _is_branch(part: Any) -> bool:
    """pydantic names the members of a union in an error's place; they are no keys of the file."""
    return isinstance(part, str) and (part in ("int", "str", "float") or "[" in part)


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)


def _example(key: str) -> str:
    examples = {
        "source": "for example `source: {kind: folder, path: ./videos}`",
        "source.kind": "one of folder, csv, jsonl, parquet, openvid, prompts",
        "source.path": "the file or folder that the clips come from",
    }
    return examples.get(key, "give it a value")


def _read_yaml(text: str, file: str) -> tuple[dict[str, Any], dict[tuple[Any, ...], str]]:
    """The mapping in `text`, and where each key path stands in it. Tags that build objects are
    refused: the safe loader knows none."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines: dict[tuple[Any, ...], str] = {}
        if node is not None:
            _positions(node, (), lines, loader, file)
        data = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{file}:{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{file}: not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: values are nested too deeply, or hold themselves") from error
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: a mapping of settings is expected, not a {type(data).__name__}")
    return data, lines


def _positions(
    node: yaml.Node,
    where: tuple[Any, ...],
    lines: dict[tuple[Any, ...], str],
    loader: yaml.SafeLoader,
    file: str,
) -> None:
    lines.setdefault(where, str(node.start_mark.line + 1))
    if len(lines) > MOST_VALUES:  # a few aliases of aliases make billions
        raise ConfigError(f"{file}: its aliases stand for over {MOST_VALUES} values")
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            key = (*where, key_node.value)
            if key in lines:
                raise ConfigError(
                    f"{file}:{key_node.start_mark.line + 1}: `{'.'.join(map(str, key))}` stands "
                    f"twice; the first is on line {lines[key]}"
                )
            lines[key] = str(key_node.start_mark.line + 1)
            _positions(value, key, lines, loader, file)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _positions(value, (*where, i), lines, loader, file)


def _override(data: dict[str, Any], lines: dict[tuple[Any, ...], str], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected key.of.setting=value")
    target = data
    for part in parts[:-1]:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: `{part}` holds a value, not a section")
        target = inner
    try:
        target[parts[-1]] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error
    lines[parts] = "--set"


def _at(file: str, lines: Mapping[tuple[Any, ...], str], loc: tuple[Any, ...]) -> str:
    """`file:line: ` of the deepest part of `loc` that stands in the file."""
    while loc and loc not in lines:
        loc = loc[:-1]
    line = lines.get(loc, "1")
    return f"--set: {'.'.join(map(str, loc))}: " if line == "--set" else f"{file}:{line}: "
