"""docs/defaults.md lists every option with its default, and no option that does not exist."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import asyncembed
from asyncembed import Embedder, MemoryCache, PostgresSink, SQLiteCache, SQLiteSink, ingest
from asyncembed.cli.commands import command
from asyncembed.sources import PostgresSource, Sources

PACKAGE = Path(asyncembed.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "defaults.md").read_text()
CALLABLES: dict[str, Callable[..., Any]] = {
    "Embedder": Embedder,
    "ingest": ingest,
    "SQLiteSink": SQLiteSink,
    "PostgresSink": PostgresSink,
    "MemoryCache": MemoryCache,
    "SQLiteCache": SQLiteCache,
    "PostgresSource": PostgresSource,
    "Sources": Sources,
}
METHODS: dict[str, list[Callable[..., Any]]] = {
    "Methods of Embedder": [Embedder.embed, Embedder.embed_one, Embedder.stream, Embedder.check, Embedder.aclose],
    "Search and indexes": [PostgresSink.search, PostgresSink.create_index],
}
REQUIRED = inspect.Parameter.empty


def section(heading: str) -> str:
    return re.split(r"^## ", PAGE.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def options_in(heading: str) -> dict[str, str]:
    """The first two columns of a section's table: option and default."""
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", section(heading), re.MULTILINE))


def shown(default: object) -> str:
    if default is REQUIRED:
        return "required"
    if isinstance(default, str):
        return f'`"{default}"`'
    return (
        f"`{default:,g}`"
        if isinstance(default, float)
        else f"`{default:,}`"
        if type(default) is int
        else f"`{default}`"
    )


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [parameter for name, parameter in inspect.signature(function).parameters.items() if name != "self"]


@pytest.mark.parametrize("heading", CALLABLES)
def test_every_option_is_in_the_page_with_its_default(heading: str) -> None:
    options = {parameter.name: shown(parameter.default) for parameter in parameters(CALLABLES[heading])}
    assert options_in(heading) == options


@pytest.mark.parametrize("heading", METHODS)
def test_every_optional_argument_of_a_method_is_in_the_page_with_its_default(heading: str) -> None:
    options = {
        f"{method.__name__}({parameter.name})": shown(parameter.default)
        for method in METHODS[heading]
        for parameter in parameters(method)
        if parameter.default is not REQUIRED
    }
    assert options_in(heading) == options


def test_every_option_of_the_command_is_in_the_page_with_its_default() -> None:
    assert isinstance(command, click.Group)
    table = options_in("The command")
    expected = {}
    for name, subcommand in command.commands.items():
        for option in (each for each in subcommand.params if isinstance(each, click.Option)):
            own_row = f"{name} {option.opts[0]}"  # where subcommands differ
            expected[own_row if own_row in table else option.opts[0]] = default_of(option)
    assert table == expected


def default_of(option: click.Option) -> str:
    if option.required:
        return "required"
    if option.is_flag:
        return "off"
    default = option.default if isinstance(option.default, str | int) else None
    if default is None and option.name in inspect.signature(Embedder).parameters:  # then the embedder's own holds
        default = inspect.signature(Embedder).parameters[option.name].default
    return shown(None if default is REQUIRED else default).replace('"', "")


def test_the_internal_limits_in_the_page_are_those_in_the_code() -> None:
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    limits = re.findall(r"^\| `([A-Z_]+)` \| `([\d.,]+)`", section("Internal limits"), re.MULTILINE)
    assert len(limits) > 5
    for name, value in limits:
        assert [
            f"{float(each):,g}" for each in re.findall(rf"^{name}(?:: Final)? = ([\d._]+)$", code, re.MULTILINE)
        ] == [value], name
