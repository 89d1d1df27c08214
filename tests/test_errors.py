"""`errors`: the tree in the docstring is the tree, and every error survives a pickle."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest

import asyncembed
from asyncembed import errors
from asyncembed.errors import (
    AsyncEmbedError,
    InputError,
    OverloadedError,
    ProviderError,
    RateLimitedError,
    TooLargeError,
    TooLongError,
)

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
]


FIELDS: dict[type[AsyncEmbedError], dict[str, Any]] = {
    ProviderError: {"status": 429, "code": "slow_down", "request_id": "req_1", "retry_after_s": 2.5},
    OverloadedError: {"retry_after_s": 2.5},
    TooLargeError: {"max_inputs": 32, "max_tokens": 300_000, "requested_tokens": 416_735},
    TooLongError: {"tokens": 9_001, "limit": 8_192},
}


def make(cls: type[AsyncEmbedError]) -> AsyncEmbedError:
    """Return an error with a value in each of its fields."""
    values = {name: value for base in cls.__mro__ for name, value in FIELDS.get(base, {}).items()}
    error = cls("text 3 has 9,001 tokens", **values)
    assert values.items() <= vars(error).items()
    error.result = {"done": 5}
    if isinstance(error, InputError):
        error.record_id = "a"
    error.add_note("while doing this")
    return error


def printed_tree() -> dict[str, tuple[str, set[str]]]:
    """Return, for each class in the docstring, the name of its parent and the other bases in brackets."""
    found: dict[str, tuple[str, set[str]]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"((?:[│ ] {3})*(?:[├└]── )?)([A-Z]\w+Error)(?: \((\w+)\))?(?: {2,}|$)", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            found[match[2]] = (path[depth - 1] if depth else "Exception", {match[3]} - {None})
    return found


def test_the_printed_tree_is_the_tree_of_classes() -> None:
    actual = {
        cls.__name__: (cls.__bases__[0].__name__, {base.__name__ for base in cls.__bases__[1:]}) for cls in CLASSES
    }
    assert printed_tree() == actual


def test_every_error_is_exported() -> None:
    assert {cls.__name__ for cls in CLASSES} <= set(asyncembed.__all__)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["copy", "deep", "pickle"],
)
def test_copies_of_every_error_have_all_its_fields(cls: type[AsyncEmbedError], duplicate: Any) -> None:
    error = make(cls)
    again = duplicate(error)
    assert type(again) is cls
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    assert again.__notes__ == ["while doing this"]


@pytest.mark.parametrize("cls", CLASSES)
def test_changing_a_copy_does_not_change_the_original(cls: type[AsyncEmbedError]) -> None:
    error = make(cls)
    again = copy.copy(error)
    again.result = None
    assert error.result == {"done": 5}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_has_a_docstring(cls: type[AsyncEmbedError]) -> None:
    assert (cls.__doc__ or "").strip().endswith(".")


def test_fields_that_are_not_passed_are_none() -> None:
    limited, large = RateLimitedError("x"), TooLargeError("x", status=413)
    assert (limited.retry_after_s, limited.status, limited.code, limited.rates) == (None,) * 4
    assert (large.max_inputs, large.max_tokens, large.requested_tokens, large.status) == (None, None, None, 413)
