"""The structure: who may import whom, who owns which driver, and habits that have cost others dearly."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncembed

PACKAGE = Path(asyncembed.__file__).parent

# Read from top to bottom, this is the way of the data; a module imports only from rows above its own.
ROWS = [
    "errors",
    "types",
    "models",
    "loops",
    "threads",
    "sqlite_steps",
    "tokens",
    "packing",
    "weighing",
    "batches",
    "decoding",
    "answers",
    "retry",
    "queueing",
    "pacing",
    "metrics",
    "watching",
    "workers",
    "storable",
    "records",
    "report",
    "run",
    "arguments",
    "pruning",
    "postgres.dsn",
    "postgres.errors",
    "postgres.driver",
    "postgres",
    "providers",
    "providers.safety",
    "providers.connecting",
    "providers.http",
    "providers.openai",
    "providers.local",
    "engine",
    "caches.memory",
    "caches.sqlite_file",
    "caches.sqlite",
    "caches",
    "caches.lookup",
    "caches.cached",
    "gathering",
    "planning",
    "coalescing",
    "dispatch",
    "embedder",
    "pipeline",
    "sources.sections",
    "sources.formats",
    "sources.files",
    "sources.postgres",
    "sources",
    "sinks.schema",
    "sinks.search",
    "sinks.sqlite.table",
    "sinks.sqlite.connection",
    "sinks.sqlite.sink",
    "sinks.sqlite",
    "sinks.postgres.extension",
    "sinks.postgres.layout",
    "sinks.postgres.sizes",
    "sinks.postgres.target",
    "sinks.postgres.storing",
    "sinks.postgres.searching",
    "sinks.postgres.pool",
    "sinks.postgres.transactions",
    "sinks.postgres.sink",
    "sinks.postgres",
    "sinks",
    "",
    "otel",
    "testing",
    "cli.display",
    "cli.interrupts",
    "cli.reading",
    "cli.commands",
    "cli",
    "__main__",
]

OWNERS = {
    "openai": "providers.openai",
    "httpx2": "providers.http",
    "h11": "providers.http",
    "pydantic_core": "providers.http",
    "wordllama": "providers.local",
    "opentelemetry": "otel",
    "tiktoken": "tokens",
    "toktok": "tokens",
    "aiosqlite": "sinks.sqlite.connection",
    "asyncpg": "postgres.driver",
    "semantic_text_splitter": "sources.sections",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").removesuffix(".")
        yield name, ast.parse(path.read_text())


MODULES = dict(modules())


def row(name: str) -> int:
    return ROWS.index("testing" if name.split(".")[0] == "testing" else name)


def package_of(name: str) -> list[str]:
    is_package = (PACKAGE / Path(*name.split("."))).is_dir() if name else True
    parts = name.split(".") if name else []
    return parts if is_package else parts[:-1]


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from runtime_nodes(child)


def own_imports(name: str) -> Iterator[str]:
    for node in runtime_nodes(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("asyncembed")):
            base = package_of(name)[: len(package_of(name)) - node.level + 1] if node.level else []
            module = (node.module or "").removeprefix("asyncembed").removeprefix(".")
            target = ".".join([*base, module] if module else base)
            for alias in node.names:
                inner = f"{target}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES else target


def foreign_imports(name: str) -> Iterator[str]:
    for node in runtime_nodes(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield ast.literal_eval(node.args[0]).split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_those_above_it(name: str) -> None:
    for other in own_imports(name):
        if not (name.startswith("testing") and other.startswith("testing")):
            assert row(other) < row(name), f"{name or 'asyncembed'} imports {other}"


@pytest.mark.parametrize("name", MODULES)
def test_each_driver_has_one_owner(name: str) -> None:
    for driver in foreign_imports(name):
        assert OWNERS.get(driver, name) == name, f"{name} imports {driver}"


@pytest.mark.parametrize("name", MODULES)
def test_no_update_waits_between_reading_and_writing(name: str) -> None:
    # `x += await f()` reads x before it waits: of nine rows written so, six were not counted
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.AugAssign):
            assert not any(isinstance(inner, ast.Await) for inner in ast.walk(node.value)), f"line {node.lineno}"


@pytest.mark.parametrize("name", MODULES)
def test_no_bare_gather_and_no_wall_clock(name: str) -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call)}
    assert calls.isdisjoint({"asyncio.gather", "asyncio.get_event_loop", "time.time"})


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_done_row_by_row_in_sqlite(name: str) -> None:
    # see `sqlite_steps`; `Table.upsert` looks whether it matters, and asyncpg's method sends all rows in one go
    calls = {ast.unparse(node.func) for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call)}
    row_by_row = [call for call in calls if call.endswith((".executemany", ".fetchall"))]
    assert name in ("sinks.sqlite.table", "sinks.postgres.storing") or not row_by_row
