"""A provider that keeps its answer until the test says so."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from asyncembed.testing import Fault


@dataclass(frozen=True)
class Held(Fault):
    """The right answer, once it is let go."""

    gate: asyncio.Event

    async def send(self, wire: Any, answer: Any) -> None:
        await self.gate.wait()
        await wire.send(answer)
