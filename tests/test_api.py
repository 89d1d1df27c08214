"""The public face: its names, what importing it costs, and that nothing hides a module."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import asyncembed


def test_all_names_are_there_in_order_and_none_is_missing() -> None:
    assert asyncembed.__all__ == sorted(asyncembed.__all__)
    for name in asyncembed.__all__:
        assert getattr(asyncembed, name).__doc__, name
    ours = {name: value for name, value in vars(asyncembed).items() if isinstance(value, type)}
    public = {name for name, value in ours.items() if value.__module__.startswith("asyncembed")}
    assert public <= set(asyncembed.__all__)


def test_every_error_is_public() -> None:
    errors = importlib.import_module("asyncembed.errors")
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, asyncembed.AsyncEmbedError)
    }
    assert found <= set(asyncembed.__all__)


def test_no_export_hides_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(asyncembed.__path__)}
    assert modules.isdisjoint(asyncembed.__all__)


def test_importing_the_package_loads_nothing_else_and_tells_its_names_all_the_same() -> None:
    code = """
import sys, asyncembed
assert "numpy" not in sys.modules
assert set(asyncembed.__all__) <= set(dir(asyncembed))
from asyncembed import AsyncEmbedError, TransportError
assert issubclass(TransportError, AsyncEmbedError)
assert "numpy" not in sys.modules
from asyncembed import *
assert Embedder is asyncembed.Embedder is asyncembed.embedder.Embedder
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("driver", ["openai", "httpx2", "tiktoken", "toktok", "asyncpg", "wordllama", "click", "rich"])
def test_importing_the_package_loads_no_driver(driver: str) -> None:
    code = f"import sys, asyncembed; asyncembed.Embedder; sys.exit({driver!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Nothing"):
        asyncembed.Nothing  # noqa: B018  # the access is what is tested
