"""Five stages that copy a column: all that is left of a stage when it does nothing."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from stages.base import Outcome, Row, Stage, StageSettings


class _Copy(Stage[StageSettings, None]):
    default_batch = 1 << 16

    def process(self, rows: list[Row], model: None = None) -> list[Outcome]:
        return [{self.adds.names[0]: row[self.reads[0]]} for row in rows]

    def process_table(self, table: pa.Table, model: None) -> pa.Table:
        return pa.table({self.adds.names[0]: table.column(self.reads[0])})


def _copy(number: int) -> type[_Copy]:
    values: dict[str, Any] = {
        "name": f"copy{number}",
        "reads": ("caption" if number == 1 else f"c{number - 1}",),
        "adds": pa.schema([pa.field(f"c{number}", pa.string())]),
        "__module__": __name__,
    }
    return type(f"Copy{number}", (_Copy,), values)


Copy1, Copy2, Copy3, Copy4, Copy5 = (_copy(number) for number in range(1, 6))
