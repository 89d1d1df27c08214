"""Cancellation, event loops and processes: an `OpenAIProvider` leaves no task and no connection behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import types
from collections.abc import Awaitable, Generator
from typing import Any

import numpy as np
import pytest

from asyncembed.testing import EmbeddingServer

from .helpers import plain, provider_at
from .raw_server import DIMENSIONS


@types.coroutine
def cancelled_at(step: int, awaitable: Awaitable[Any]) -> Generator[Any, Any, bool]:
    """Run it, cancel the task that does at its `step`-th wait; return whether it got so far."""
    iterator = awaitable.__await__()
    waits = 0
    error: BaseException | None = None
    while True:
        try:
            future = iterator.throw(error) if error else iterator.send(None)
        except StopIteration:
            return False
        except asyncio.CancelledError:
            return True
        if waits == step:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        waits += 1
        error = None
        try:
            yield future
        except BaseException as raised:
            error = raised


@pytest.mark.parametrize("warm", [True, False], ids=["open connection", "first use"])
async def test_cancellation_at_any_await_leaves_no_task_and_a_working_pool(warm: bool) -> None:
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        before = asyncio.all_tasks()
        texts = ["long " * 1_000] * 20
        provider = provider_at(server.base_url, connections=1)
        for step in range(200):
            if not warm:
                await provider.aclose()
                provider = provider_at(server.base_url, connections=1)
            cancelled = await asyncio.create_task(_run(cancelled_at(step, provider.embed(texts))))
            assert asyncio.all_tasks() == before
            reply = await provider.embed(["a"])
            np.testing.assert_array_equal(reply.vectors, plain("a"))
            if not cancelled:
                break
        await provider.aclose()
    assert not cancelled
    assert step >= 1  # to read what comes at least


async def _run(awaitable: Awaitable[bool]) -> bool:
    return await awaitable


async def test_aclose_closes_the_connections_and_the_provider_can_be_used_again() -> None:
    async with EmbeddingServer(dimensions=DIMENSIONS) as server:
        provider = provider_at(server.base_url)
        await provider.embed(["a"])
        await provider.aclose()
        await provider.aclose()
        await provider.embed(["a"])
        assert server.connections == 2


def run_script(script: str, *args: str) -> None:
    # except the warning that it was not closed, which has its own test
    warnings = ["-W", "error", "-W", "ignore:<OpenAIProvider:ResourceWarning"]
    command = [sys.executable, "-X", "dev", *warnings, "-c", script, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.stderr, done.returncode) == ("", 0)


HEAD = """
import asyncio, gc, logging, os, sys
from asyncembed.errors import RequestError
from asyncembed.providers.openai import OpenAIProvider
logging.getLogger("asyncio").setLevel(logging.ERROR)  # dev mode reports slow imports
provider = OpenAIProvider("m", base_url=sys.argv[1], api_key="sk-test")
async def embed(closing=False):
    reply = await provider.embed(["a"])
    assert reply.vectors.shape == (1, 8)
    if closing:
        await provider.aclose()
"""


@pytest.mark.parametrize("closing", [True, False])
def test_one_provider_works_in_two_runs_of_asyncio_and_leaks_nothing(closing: bool) -> None:
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        run_script(
            HEAD + f"asyncio.run(embed({closing}))\ngc.collect()\nasyncio.run(embed({closing}))\ngc.collect()\n"
            "assert len(provider._clients) <= 1, 'clients of closed loops are forgotten'",
            server.base_url,
        )
        assert server.connections == 2


def test_a_loop_that_is_closed_by_hand_needs_only_an_aclose() -> None:
    script = """
for _ in range(2):
    loop = asyncio.new_event_loop()
    loop.run_until_complete(embed(closing=True))
    loop.close()
    gc.collect()
"""
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        run_script(HEAD + script, server.base_url)


def test_a_loop_that_was_closed_without_aclose_does_not_break_the_next_one() -> None:
    # asyncio and aiohttp themselves report the open connection, as they do for every one that its loop leaves behind
    script = """
import warnings
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.simplefilter("ignore", ResourceWarning)
for _ in range(3):
    loop = asyncio.new_event_loop()
    loop.run_until_complete(embed())
    loop.close()
    gc.collect()
assert len(provider._clients) == 1
"""
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        run_script(HEAD + script, server.base_url)


FORK = """
loop = asyncio.new_event_loop()
loop.run_until_complete(embed())
child = os.fork()
if child == 0:
    os._exit(asyncio.run(in_child()))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
loop.run_until_complete(embed(closing=True))
loop.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_parent_and_child_have_their_own_connections() -> None:
    in_child = "async def in_child():\n    await embed(closing=True)\n    return 0\n"
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        run_script(HEAD + in_child + FORK, server.base_url)
        assert server.connections == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_a_client_that_was_passed_in_is_refused() -> None:
    in_child = """
import httpx2
mine = httpx2.AsyncClient()
provider = OpenAIProvider("m", base_url=sys.argv[1], api_key="sk-test", http_client=mine)
async def in_child():
    try:
        await embed()
    except RequestError as error:
        return 0 if "fork" in str(error) else 2
    return 1
"""
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        fork = FORK.replace("loop.close()", "loop.run_until_complete(mine.aclose())\nloop.close()")
        run_script(HEAD + in_child + fork, server.base_url)
        assert server.connections == 1


def test_a_client_that_was_passed_in_survives_another_loop() -> None:
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        script = """
import httpx2, warnings
warnings.simplefilter("ignore", ResourceWarning)  # of the connection which the first loop left behind
from asyncembed.errors import TransportError
provider = OpenAIProvider("m", base_url=sys.argv[1], api_key="sk-test", http_client=httpx2.AsyncClient())
async def twice():
    for attempt in range(2):
        try:
            return await embed()
        except TransportError:
            assert attempt == 0
asyncio.run(twice())
asyncio.run(twice())
"""
        run_script(HEAD + script, server.base_url)


def test_importing_and_making_an_embedder_loads_no_driver() -> None:
    run_script("""
import sys, asyncembed
asyncembed.Embedder("text-embedding-3-small", api_key="sk-test")
asyncembed.Embedder("local")
drivers = {"openai", "httpx2", "httpx", "wordllama", "tiktoken", "asyncpg"} & set(sys.modules)
assert not drivers, drivers
""")


def test_the_loop_is_not_blocked_while_the_sdk_is_imported() -> None:
    script = """
async def main():
    ticks = 0
    assert "openai" not in sys.modules
    task = asyncio.create_task(provider._client())
    while not task.done():
        await asyncio.sleep(0)
        ticks += 1
    assert "openai" in sys.modules
    assert ticks > 10, ticks
    await provider.aclose()
asyncio.run(main())
"""
    run_script(HEAD + script, "http://127.0.0.1:9/v1")
