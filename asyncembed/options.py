"""Checks of options, before anything is sent."""

from __future__ import annotations

from . import models
from .errors import ConfigError


def check_model(model: object, dimensions: int | None, too_long: object) -> None:
    """Raise ConfigError unless model, dimensions and `too_long` are valid and fit together."""
    if not isinstance(model, str) or not model:
        raise ConfigError("model must be a str, the name of a model")
    if dimensions is not None:
        check_range("dimensions", dimensions, 1)
        if not models.lookup(model).shortens:
            raise ConfigError(f"dimensions={dimensions}; {model} does not shorten its vectors")
    if too_long not in ("error", "truncate", "mean"):
        raise ConfigError(f'too_long={too_long!r}; it must be "error", "truncate" or "mean"')


def check_range(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise ConfigError unless the option `name` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r}; it must be a whole number")
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"{least:,} to {most:,}"
        raise ConfigError(f"{name}={value:,}; it must be {allowed}")


def check_amount(name: str, amount: object) -> None:
    """Raise ConfigError unless the option `name` is a number above 0, or None."""
    if amount is None:
        return
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not amount > 0:
        raise ConfigError(f"{name}={amount!r}; it must be a number above 0")
