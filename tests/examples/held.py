"""A fault that holds back an answer until the test releases it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from asyncembed.testing import Fault


@dataclass(frozen=True)
class Held(Fault):
    """The correct answer, sent when the gate is opened."""

    gate: asyncio.Event

    async def send(self, wire: Any, answer: Any) -> None:
        await self.gate.wait()
        await wire.send(answer)
