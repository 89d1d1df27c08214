"""Helpers for the tests of the providers."""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncembed.providers.openai import OpenAIProvider
from asyncembed.testing import embedding_of

from .raw_server import DIMENSIONS

MODEL = "text-embedding-3-small"


def provider_at(base_url: str, **options: Any) -> OpenAIProvider:
    return OpenAIProvider(MODEL, base_url=base_url, **{"api_key": "sk-test-0123456789", "timeout": 20.0, **options})


def plain(*texts: str) -> np.ndarray[Any, Any]:
    return np.stack([embedding_of(text, dimensions=DIMENSIONS) for text in texts])
