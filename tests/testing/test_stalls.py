"""`watch_loop` measures how long the loop was blocked."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from asyncembed.testing import watch_loop
from tests.conftest import VirtualLoop


@pytest.mark.virtual_time
async def test_the_longest_block_of_the_loop_is_measured() -> None:
    loop = cast(VirtualLoop, asyncio.get_running_loop())
    async with watch_loop() as stalls:
        for blocked_s in (2.0, 5.0, 3.0):
            await asyncio.sleep(1)
            loop.advance(blocked_s)  # as if this task had blocked the loop for that time
        await asyncio.sleep(1)
    assert stalls.longest_s == pytest.approx(5, abs=0.002)


@pytest.mark.virtual_time
async def test_a_loop_that_is_free_has_no_stall() -> None:
    async with watch_loop() as stalls:
        await asyncio.sleep(10)
    assert stalls.longest_s < 0.001
