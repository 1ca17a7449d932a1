"""filter: SQL rules over any columns decide which clips go on.

    filter:
      rules:
        long_enough: duration >= 4
        wide: width >= 1.3 * height

A clip is rejected by the first rule that is not true of it; null is not true. Rules see one row at
a time, so a clip's fate never depends on its neighbours. Scores are stored by the stages that
measure them: changing a threshold here measures nothing again.
"""

from __future__ import annotations

import atexit
import functools
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pyarrow as pa
from pydantic import Field, field_validator

from manifests.schema import did_you_mean
from stages.base import Context, Failed, Outcome, Rejected, Row, Stage, StageError, StageSettings
from stages.remember import remembered

# Read no file and no variable of ours, load nothing, fill no memory, and let no rule change that.
LOCKED = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",
    "memory_limit": "1GB",
    "lock_configuration": "true",
}
_CONFIG = {**LOCKED, "threads": "1"}
_LIMIT = 120.0  # seconds for the rules over a batch, which take milliseconds
_LONGEST = 80  # characters of a value in a message


class FilterSettings(StageSettings):
    rules: dict[str, str] = Field(
        default_factory=dict, description="name: SQL condition; the first that is not true rejects"
    )

    @field_validator("rules")
    @classmethod
    def _parse(cls, rules: dict[str, str]) -> dict[str, str]:
        try:
            parse_rules(rules)
        except StageError as error:
            raise ValueError(str(error)) from error
        return rules


@dataclass(frozen=True)
class Rule:
    name: str
    sql: str
    columns: tuple[str, ...]  # in order of first use


def parse_rules(rules: Mapping[str, str]) -> list[Rule]:
    """The rules with the columns that they use.

    Raises StageError, naming the rule, for bad syntax and for what is no condition on one row:
    subqueries, aggregates, window functions, several statements, functions that change by the call.
    """
    return list(_parsed(tuple(rules.items()))) if rules else []


@functools.lru_cache(maxsize=64)
def _parsed(rules: tuple[tuple[str, str], ...]) -> list[Rule]:
    # DuckDB takes a quarter of a second to start, and every command needs to know the columns.
    def find() -> list[list[str]]:
        return [list(rule.columns) for rule in _parse(rules)]

    columns = remembered(["rules", version("duckdb"), *map(list, rules)], find)
    return [Rule(name, sql, tuple(c)) for (name, sql), c in zip(rules, columns, strict=True)]


def _parse(rules: tuple[tuple[str, str], ...]) -> list[Rule]:
    database = _connect()
    frame = _select(database, "true")
    parsed = []
    for name, sql in rules:
        try:
            node = _select(database, sql)
        except ValueError as error:
            raise StageError(f"rule {name}: {error}, in: {sql}") from error
        (condition, *more), outer = node.pop("select_list"), node
        if more or outer != {k: v for k, v in frame.items() if k != "select_list"}:
            raise StageError(f"rule {name} is more than one condition: {sql}")
        _refuse(database, name, condition)
        parsed.append(Rule(name, sql, tuple(dict.fromkeys(_columns(condition, frozenset())))))
    return parsed


def check_rules(rules: Mapping[str, str], columns: pa.Schema) -> list[Rule]:
    """The rules, checked against the columns there will be.

    Raises StageError, naming the rule, where one names another column or gives no boolean.
    """
    import duckdb

    parsed = parse_rules(rules)
    if not parsed:
        return []
    database = _connect()
    for rule in parsed:
        for column in rule.columns:
            if column not in columns.names:
                raise StageError(
                    f"rule {rule.name}: there is no column {column!r}."
                    f"{did_you_mean(column, columns.names)} Columns: {', '.join(columns.names)}."
                )
        # One row of nulls: what fails even on it (`len > 'many'`) fails on every row.
        database.register("clip", _typed([dict.fromkeys(rule.columns)], rule.columns, columns))
        query = f"SELECT ({rule.sql}\n) FROM clip"  # noqa: S608  parsed: one expression
        try:
            described = database.execute(f"DESCRIBE {query}").fetchall()
            database.execute(query).fetchall()
        except duckdb.Error as error:
            raise StageError(f"rule {rule.name}: {_first_line(error)}, in: {rule.sql}") from error
        if described[0][1] != "BOOLEAN":
            raise StageError(
                f"rule {rule.name} gives a {described[0][1]}, not true or false: {rule.sql}"
            )
    return parsed


@functools.cache
def _database() -> Any:
    import duckdb

    # Held until the interpreter is torn down, it would be reported as leaked, on stderr.
    atexit.register(_database.cache_clear)
    return duckdb.connect(":memory:", config=_CONFIG)


def _connect() -> Any:
    """A connection with tables of its own; opening a database takes 0.1 s, this nothing."""
    return _database().cursor()


@contextmanager
def _limited(database: Any, rules: Sequence[Rule]) -> Iterator[None]:
    """Raises StageError where the rules take longer than any sensible one."""
    import duckdb

    timer = threading.Timer(_LIMIT, database.interrupt)
    timer.start()
    try:
        yield
    except duckdb.InterruptException as error:
        raise StageError(
            f"filter: the rules {', '.join(rule.name for rule in rules)} took over {_LIMIT:g} s "
            "for a batch of rows: one of them does far more than compare a row's columns"
        ) from error
    finally:
        timer.cancel()


def _select(database: Any, sql: str) -> dict[str, Any]:
    """The parse tree of `SELECT (sql)`. Raises ValueError with the parser's message."""
    if not sql.strip():
        raise ValueError("it is empty")
    # The line break ends a comment that the rule may end with.
    (text,) = database.execute("SELECT json_serialize_sql(?)", [f"SELECT ({sql}\n)"]).fetchone()
    tree = json.loads(text)
    if tree["error"]:
        message = str(tree["error_message"]).splitlines()[0]
        if int(tree.get("position", 0)) >= len("SELECT (") + len(sql):
            message = "syntax error: it ends too early"
        word = re.search(r'near "(\w+)"', message)
        if word and word[1].lower() in _reserved(database):
            message += f' (a column of that name is written "{word[1]}", in double quotes)'
        raise ValueError(message)
    if len(tree["statements"]) != 1 or tree["statements"][0]["node"]["type"] != "SELECT_NODE":
        raise ValueError("a single condition is expected")
    return dict(tree["statements"][0]["node"])


def _reserved(database: Any) -> set[str]:
    found = database.execute(
        "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category = 'reserved'"
    )
    return {name for (name,) in found.fetchall()}


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        for value in tree.values():
            yield from _nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _nodes(value)


def _refuse(database: Any, name: str, condition: dict[str, Any]) -> None:
    """Raises StageError where the condition depends on more than the row."""
    nodes = list(_nodes(condition))
    words = {
        "SUBQUERY": "a subquery",
        "WINDOW": "a window function",
        "STAR": "*",
        "PARAMETER": "a parameter",
        "POSITIONAL_REFERENCE": "a column by number",
    }
    for node in nodes:
        if node["class"] in words:
            raise StageError(
                f"rule {name} uses {words[node['class']]}: a rule is a condition on one row"
            )
    called = {str(node["function_name"]) for node in nodes if node["class"] == "FUNCTION"}
    known = database.execute(
        "SELECT DISTINCT function_name, function_type, stability FROM duckdb_functions() "
        "WHERE function_name IN (SELECT unnest(?))",
        [sorted(called)],
    ).fetchall()
    for function, kind, stability in known:
        kinds = {k for f, k, _ in known if f == function}
        if not kinds & {"scalar", "macro"}:
            raise StageError(
                f"rule {name} uses {function}(), of the kind {kind}: a rule is a condition on one "
                f"row (of the values in a list, say list_{function}())"
            )
        if kind == "scalar" and stability != "CONSISTENT":
            raise StageError(
                f"rule {name} uses {function}(), which gives another value each time: "
                "a clip's fate must not depend on the run"
            )


def _columns(tree: Any, bound: frozenset[str]) -> Iterator[str]:
    """The columns that a condition refers to, without the parameters of its lambdas (`bound`)."""
    if isinstance(tree, list):
        for value in tree:
            yield from _columns(value, bound)
    elif isinstance(tree, dict):
        if tree.get("class") == "COLUMN_REF":
            name = tree["column_names"][0]
            if name not in bound:
                yield name
        elif tree.get("class") == "LAMBDA":
            yield from _columns(tree["expr"], bound | set(_columns(tree["lhs"], frozenset())))
        else:
            for value in tree.values():
                yield from _columns(value, bound)


def _typed(rows: Sequence[Row], names: Sequence[str], types: pa.Schema | None) -> pa.Table:
    """The rows as a table; `_row` counts them, for rules that name no column. Without known types
    Arrow guesses, and a column of nulls has none."""
    columns: dict[str, pa.Array] = {"_row": pa.array(range(len(rows)), pa.int64())}
    for name in names:
        kind = types.field(name).type if types is not None else None
        # SQL holds NaN for larger than any number: `score > 0` would be true of it.
        values = [None if row[name] != row[name] else row[name] for row in rows]
        columns[name] = pa.array(values, kind)
    return pa.table(columns)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def explain(rule: Rule, row: Row) -> str:
    """Why a row was rejected: `len = 48, rule: len == 64`."""
    values = ", ".join(f"{name} {_shown(row[name])}" for name in rule.columns)
    return f"{values}, rule: {rule.sql}" if values else f"rule: {rule.sql}"


def _shown(value: Any) -> str:
    if value is None:
        return "is null"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f"= {text if len(text) <= _LONGEST else text[: _LONGEST - 1] + '…'}"


class Filter(Stage[FilterSettings, None]):
    """Keeps or rejects; adds nothing. Without rules it keeps all."""

    name = "filter"
    Settings = FilterSettings
    after = ("probe",)
    default_batch = 4096

    def __init__(self, settings: FilterSettings, context: Context) -> None:
        super().__init__(settings, context)
        self._types: pa.Schema | None = None

    @functools.cached_property
    def rules(self) -> list[Rule]:
        return parse_rules(self.settings.rules)

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(c for rule in self.rules for c in rule.columns))

    def bind(self, columns: pa.Schema) -> None:
        check_rules(self.settings.rules, columns)
        self._types = pa.schema([columns.field(name) for name in self.reads])

    def identity(self) -> dict[str, Any]:
        # A mapping's order is lost in a fingerprint, and the first rule gives the reason.
        return {**super().identity(), "order": list(self.settings.rules)}

    def process(self, rows: list[Row], model: None = None) -> Sequence[Outcome]:
        import duckdb

        if not self.rules:
            return [{} for _ in rows]
        database = _connect()
        try:
            return self._judge(database, rows)
        except duckdb.Error:
            # A value that a rule can't digest (a failed cast, an overflow) fails its row alone.
            return [outcome for row in rows for outcome in self._judge_one(database, row)]

    def passing(self, column: str, most: int) -> list[int] | None:
        """Of the values 0..`most` of a whole-numbered column the smallest and the largest that
        pass the rules on it alone; empty where none does, None where there are no such rules."""
        rules = [rule for rule in self.rules if rule.columns == (column,)]
        if not rules:
            return None

        def find() -> list[int]:
            import duckdb

            database = _connect()
            values = pa.table({column: pa.array(range(most + 1), pa.int32())})
            database.register("clip", values)
            both = " AND ".join(f"coalesce(({rule.sql}\n), false)" for rule in rules)
            query = f'SELECT min("{column}"), max("{column}") FROM clip WHERE {both}'  # noqa: S608
            try:
                with _limited(database, rules):
                    found = database.execute(query).fetchone()
            except duckdb.Error:
                return [0, most]  # of some value a rule makes nothing: no telling of the others
            return [] if found[0] is None else list(found)

        key = ["passing", version("duckdb"), column, most, *(rule.sql for rule in rules)]
        return list(remembered(key, find))

    def _judge_one(self, database: Any, row: Row) -> Sequence[Outcome]:
        import duckdb

        try:
            return self._judge(database, [row])
        except duckdb.Error as error:
            return [Failed("rule_error", _first_line(error))]

    def _judge(self, database: Any, rows: Sequence[Row]) -> Sequence[Outcome]:
        database.register("clip", _typed(rows, self.reads, self._types))
        cases = " ".join(
            f"WHEN NOT coalesce(({rule.sql}\n), false) THEN {i}"
            for i, rule in enumerate(self.rules)
        )
        query = f"SELECT CASE {cases} END FROM clip ORDER BY _row"  # noqa: S608  parsed rules
        with _limited(database, self.rules):
            found = database.execute(query).fetchall()
        outcomes: list[Outcome] = []
        for row, (first,) in zip(rows, found, strict=True):
            if first is None:
                outcomes.append({})
            else:
                rule = self.rules[first]
                outcomes.append(Rejected(rule.name, explain(rule, row)))
        return outcomes
