"""The structure: which module may import which, one owner for each driver, and patterns that are forbidden."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import asyncembed

PACKAGE = Path(asyncembed.__file__).parent

# A module imports from its own package and from rows above its own, never from another package of its own row.
LAYERS = [
    "errors metrics models concurrency",
    "types options",
    "report databases",
    "sources batching providers caches sinks",
    "sending",
    "embedder",
    "pipeline",
    "asyncembed",
    "otel testing cli",
    "__main__",
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names.split()}

OWNERS = {
    "openai": "providers.openai",
    "httpx2": "providers.http",
    "aiohttp": "providers.http",
    "pydantic_core": "providers.http",
    "wordllama": "providers.local",
    "opentelemetry": "otel",
    "tiktoken": "batching.tokens",
    "toktok": "batching.tokens",
    "asyncpg": "databases.postgres",
    "semantic_text_splitter": "sources.chunking",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").removesuffix(".")
        yield name, ast.parse(path.read_text())


MODULES = dict(modules())


def part_of(name: str) -> str:
    """Return the package or flat module that a module belongs to; the root is "asyncembed"."""
    return name.split(".")[0] or "asyncembed"


def package_of(name: str) -> list[str]:
    is_package = (PACKAGE / Path(*name.split("."))).is_dir() if name else True
    parts = name.split(".") if name else []
    return parts if is_package else parts[:-1]


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those under `if TYPE_CHECKING`."""
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


def test_every_package_and_flat_module_has_a_layer_and_they_are_few() -> None:
    parts = {part_of(name) for name in MODULES}
    assert parts == set(LEVELS)
    packages = {part for part in parts if (PACKAGE / part).is_dir()}
    assert len(packages) <= 12
    assert len(parts - packages - {"asyncembed", "__main__"}) <= 10


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_package_and_from_layers_above(name: str) -> None:
    for other in own_imports(name):
        if part_of(other) != part_of(name):
            assert LEVELS[part_of(other)] < LEVELS[part_of(name)], f"{name or 'asyncembed'} imports {other}"


def test_no_module_imports_itself_through_others() -> None:
    try:
        tuple(TopologicalSorter({name: set(own_imports(name)) - {name} for name in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle: {' -> '.join(map(str, error.args[1]))}")


@pytest.mark.parametrize("name", MODULES)
def test_each_driver_has_one_owner(name: str) -> None:
    for driver in foreign_imports(name):
        assert OWNERS.get(driver, name) == name, f"{name} imports {driver}"


@pytest.mark.parametrize("name", MODULES)
def test_no_update_waits_between_reading_and_writing(name: str) -> None:
    # `x += await f()` reads x before it awaits, so concurrent updates are lost
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.AugAssign):
            assert not any(isinstance(inner, ast.Await) for inner in ast.walk(node.value)), f"line {node.lineno}"


@pytest.mark.parametrize("name", MODULES)
def test_no_bare_gather_and_no_wall_clock(name: str) -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call)}
    assert calls.isdisjoint({"asyncio.gather", "asyncio.get_event_loop", "time.time"})


@pytest.mark.parametrize("name", MODULES)
def test_no_sqlite_statement_works_row_by_row(name: str) -> None:
    # see `databases.sqlite`; asyncpg's method sends all rows at once
    calls = {ast.unparse(node.func) for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call)}
    row_by_row = [call for call in calls if call.endswith((".executemany", ".fetchall"))]
    assert name == "sinks.postgres.writing" or not row_by_row
