"""Whole processes, with warnings as errors: forks, missing `aclose`, few file descriptors, cancellation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from textwrap import dedent

import pytest

from asyncembed.testing import EmbeddingServer

HEAD = """
import asyncio, gc, logging, multiprocessing, os, resource, sys
from asyncembed import Embedder, SQLiteSink, ingest
logging.getLogger("asyncio").setLevel(logging.ERROR)  # dev mode reports slow imports
URL, FOLDER = sys.argv[1:]
TEXTS = [f"text {number}" for number in range(200)]
def make(**options):
    return Embedder("fake", base_url=URL, api_key="none", **options)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddingServer]:
    with EmbeddingServer(dimensions=8, latency_s=0.01).in_thread() as server:
        yield server


def run(server: EmbeddingServer, folder: object, script: str, *flags: str) -> None:
    """Run the script in dev mode with warnings as errors; it must exit with 0 and write nothing to standard error.

    The warning that an embedder was not closed is ignored; tests/embedder/test_lifetime.py checks it.
    """
    warnings = ["-W", "error", "-W", "ignore:<OpenAIProvider:ResourceWarning"]
    command = [sys.executable, "-X", "dev", *warnings, *flags, "-c", HEAD + dedent(script)]
    done = subprocess.run([*command, server.base_url, str(folder)], capture_output=True, text=True, timeout=50)
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_process_ends_with_an_embedder_that_was_not_closed(server: EmbeddingServer, tmp_path: object) -> None:
    script = """
    async def main():
        await make().embed(TEXTS)
        await make().embed_one("a")
    asyncio.run(main())
    """
    run(server, tmp_path, script)


def test_a_process_ends_with_a_store_that_was_not_closed(server: EmbeddingServer, tmp_path: object) -> None:
    script = """
    async def main():
        sink = SQLiteSink(os.path.join(FOLDER, "vectors.db"))
        await ingest(enumerate(TEXTS), make(), sink)
    asyncio.run(main())
    """
    run(server, tmp_path, script, "-W", "ignore::ResourceWarning")  # the sink warns that it was not closed


def test_a_stream_that_was_left_without_closing_leaves_no_task(server: EmbeddingServer, tmp_path: object) -> None:
    script = """
    async def main():
        async with make(max_batch_size=5) as embedder:
            async for _ in embedder.stream(TEXTS):
                break
            gc.collect()
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0)
            await embedder.embed(TEXTS)
    asyncio.run(main())
    """
    run(server, tmp_path, script)


def test_a_program_that_is_cancelled_as_a_whole_ends_without_warnings(
    server: EmbeddingServer, tmp_path: object
) -> None:
    script = """
    async def main():
        embedder = make(max_batch_size=5)
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(embedder.embed(TEXTS))]
            calls += [group.create_task(embedder.embed_one(text)) for text in TEXTS]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        pass
    else:
        raise AssertionError
    """
    run(server, tmp_path, script)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is missing")
def test_parent_and_child_of_a_fork_can_both_use_one_embedder(server: EmbeddingServer, tmp_path: object) -> None:
    script = """
    embedder = make(max_batch_size=5)
    async def main():
        assert not (await embedder.embed(TEXTS)).failures
        await embedder.embed_one("a")
    asyncio.run(main())
    child = os.fork()
    asyncio.run(main())
    if child:
        assert os.waitpid(child, 0)[1] == 0
    """
    run(server, tmp_path, script)


def test_an_embedder_passed_to_a_spawned_process_is_an_error_with_advice(
    server: EmbeddingServer, tmp_path: object
) -> None:
    script = """
    embedder = make()
    try:
        multiprocessing.get_context("spawn").Process(target=print, args=(embedder,)).start()
    except TypeError as error:
        assert "make one in each process" in str(error)
    else:
        raise AssertionError
    """
    run(server, tmp_path, script)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_job_with_few_file_descriptors_goes_on_with_fewer_connections(
    server: EmbeddingServer, tmp_path: object
) -> None:
    script = """
    logging.getLogger("asyncembed").setLevel(logging.ERROR)  # it reports requests without an answer
    async def main():
        async with make(max_batch_size=1, concurrency=100) as embedder:
            await embedder.embed(["imports"])
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            result = await embedder.embed(TEXTS)
            assert not result.failures
            assert 0 < result.retries < 9 * 100, result.retries
    asyncio.run(main())
    """
    run(server, tmp_path, script)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_job_without_any_file_descriptor_ends_with_an_error_and_does_not_spin(
    server: EmbeddingServer, tmp_path: object
) -> None:
    script = """
    from asyncembed import FatalProviderError
    logging.disable()  # it reports why the run is stopped
    async def main():
        embedder = make(max_retries=2)
        await embedder.embed(["imports"])
        await embedder.aclose()
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        try:
            await embedder.embed(TEXTS)
        except FatalProviderError as error:
            assert error.result.requests <= 5
        else:
            raise AssertionError
        finally:
            for number in taken:
                os.close(number)
    asyncio.run(main())
    """
    run(server, tmp_path, script)
