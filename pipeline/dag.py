"""The DAG: which stage needs which, read off the columns that they read and add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from manifests.intake import source_layer
from manifests.schema import RESERVED, SOURCE_PREFIX, did_you_mean
from manifests.sources import extras_schema
from manifests.store import Store
from manifests.view import SOURCE_LAYER, Dag, Layer
from pipeline.config import Config, ConfigError
from stages import builtin
from stages.base import Stage, StageError


@dataclass(frozen=True)
class Pipeline:
    """A configuration made ready: the stages in topological order, their DAG and their store."""

    config: Config
    stages: Mapping[str, Stage[Any, Any]]
    dag: Dag
    store: Store

    def upstream(self, names: Sequence[str]) -> list[str]:
        """`names` and every stage that they need, in topological order; all stages for none.

        Raises ConfigError for a name that is no stage.
        """
        if not names:
            return list(self.stages)
        wanted: set[str] = set()
        for name in names:
            if name not in self.stages:
                raise ConfigError(
                    f"there is no stage {name!r}.{did_you_mean(name, self.stages)} "
                    f"Stages: {', '.join(self.stages)}."
                )
            wanted |= {name, *self.dag.ancestors[name]}
        return [name for name in self.stages if name in wanted]

    def bind(self, names: Sequence[str]) -> None:
        """Shows every stage of `names` the columns upstream of it and lets it check its files, so
        that a misspelt column or a missing model is an error before anything runs.

        Raises ConfigError or SourceError.
        """
        columns = self.columns()
        for name in names:
            stage = self.stages[name]
            below = {n for n in self.stages if name in self.dag.ancestors[n]} | {name}
            own = {f.name for n in below for f in self.stages[n].adds}
            try:
                stage.bind(pa.schema([f for f in columns if f.name not in own]))
                stage.check()
                if self.config.run.address is None:
                    stage.check_here()
            except StageError as error:
                raise ConfigError(f"{self.config.file}: {name}: {error}") from error

    def columns(self) -> pa.Schema:
        """Every column of the joined view: the source's own, then each stage's."""
        source = source_layer(extras_schema(self.config.source)).adds
        added = [f for stage in self.stages.values() for f in stage.adds]
        return pa.schema([*source, *(f for f in added if not pa.types.is_binary(f.type))])


def build(config: Config) -> Pipeline:
    """Raises ConfigError where the stages don't fit together."""
    stages = config.stages
    producer: dict[str, str] = dict.fromkeys(source_layer().adds.names, SOURCE_LAYER)
    for name, stage in stages.items():
        for column in stage.adds.names:
            if column in RESERVED or column.startswith(SOURCE_PREFIX):
                raise ConfigError(f"stage {name} adds a column {column!r}: that name is taken")
            if column in producer:
                raise ConfigError(
                    f"stages {producer[column]} and {name} both add a column {column!r}: "
                    "rename one, or leave a stage out with `enabled: false`"
                )
            producer[column] = name
    needs = {name: _needs(stage, producer, stages) for name, stage in stages.items()}
    layers = {SOURCE_LAYER: source_layer()}
    for name in _order(needs):
        stage = stages[name]
        try:
            fingerprint = stage.fingerprint
        except StageError as error:  # its model is not where the configuration says
            raise ConfigError(f"{config.file}: {name}: {error}") from error
        layers[name] = Layer(
            name,
            fingerprint,
            tuple(stage.reads),
            stage.adds,
            tuple(needs[name]) or (SOURCE_LAYER,),
            stage.splits,
        )
    ordered = {name: stages[name] for name in layers if name != SOURCE_LAYER}
    return Pipeline(config, ordered, Dag(layers), Store(config.workdir))


def _needs(
    stage: Stage[Any, Any], producer: Mapping[str, str], stages: Mapping[str, Stage[Any, Any]]
) -> list[str]:
    found: dict[str, None] = {}
    for column in (*stage.reads, *stage.carries):
        if column.startswith(SOURCE_PREFIX):
            continue
        if column not in producer:
            raise ConfigError(
                f"stage {stage.name} reads a column {column!r} that nobody adds."
                f"{did_you_mean(column, producer)}"
            )
        if producer[column] != SOURCE_LAYER:
            found[producer[column]] = None
    found |= dict.fromkeys(_gates(stage.after, stages))
    return list(found)


def _gates(after: Sequence[str], stages: Mapping[str, Stage[Any, Any]]) -> Iterator[str]:
    """The gates that are there; one that was switched off hands on its own."""
    for gate in after:
        if gate in stages:
            yield gate
        elif gate in builtin():
            yield from _gates(builtin()[gate].after, stages)


def _order(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Topological, shallow stages first, so that work on a clip ends as early as it can."""
    depth: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> int:
        if name in path:
            cycle = " → ".join((*path[path.index(name) :], name))
            raise ConfigError(f"stages need each other in a circle: {cycle}")
        if name not in depth:
            depth[name] = 1 + max((visit(n, (*path, name)) for n in needs[name]), default=0)
        return depth[name]

    for name in needs:
        visit(name, ())
    return sorted(needs, key=lambda name: (depth[name], name))
