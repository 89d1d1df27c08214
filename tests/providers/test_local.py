"""The local model, with the weights from the wheel of wordllama."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import tracemalloc
from random import Random
from typing import Any

import numpy as np
import pytest

from asyncembed.errors import ConfigError
from asyncembed.providers.local import DIMENSIONS, LocalCounter, LocalProvider
from asyncembed.types import Vectors

CAT, KITTEN, TAX = "The cat sleeps on the sofa.", "A kitten naps on the couch.", "Income tax is due in April."


async def vectors_of(texts: list[str], dimensions: int | None = None) -> Vectors:
    return (await LocalProvider(dimensions).embed(texts)).vectors


@pytest.mark.parametrize("dimensions", [None, *DIMENSIONS])
async def test_texts_of_similar_meaning_are_closer_than_others_in_every_size(dimensions: int | None) -> None:
    cat, kitten, tax = await vectors_of([CAT, KITTEN, TAX], dimensions)
    assert len(cat) == (dimensions or 256)
    assert cat @ kitten > cat @ tax + 0.2


async def test_a_question_finds_its_answer_among_others() -> None:
    answers = [
        "Set OPENAI_API_KEY to authenticate.",
        "Rows are written with an upsert.",
        "The moon orbits the earth in 27 days.",
        "Install the package with pip.",
    ]
    question, *found = await vectors_of(["How do I install it?", *answers])
    assert int(np.argmax(np.stack(found) @ question)) == 3


@pytest.mark.parametrize("dimensions", DIMENSIONS)
async def test_vectors_are_finite_float32_of_unit_length_whatever_the_text(dimensions: int) -> None:
    texts = ["a", " ", "\n", "\0", "\u0378", "\U0001f9ff", "漢字", "e\u0301", "<|endoftext|>", "x" * 10_000]
    vectors = await vectors_of(texts, dimensions)
    assert vectors.dtype == np.float32
    assert vectors.flags.c_contiguous
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


async def test_a_vector_does_not_depend_on_the_other_texts_of_its_batch() -> None:
    together = await vectors_of([CAT, "word " * 5_000, TAX])
    np.testing.assert_array_equal(together[0], (await vectors_of([CAT]))[0])
    np.testing.assert_array_equal(together[2], (await vectors_of([TAX]))[0])


async def test_the_reported_tokens_are_those_that_the_counter_counts() -> None:
    reply = await LocalProvider().embed([CAT, KITTEN, "word " * 8_000])
    assert reply.tokens == sum(LocalCounter().count([CAT, KITTEN, "word " * 8_000]))
    assert reply.tokens > 8_000


async def test_many_long_texts_need_no_more_memory_than_one() -> None:
    await vectors_of(["warm"])
    text = "word " * 8_000
    peaks = []
    for count in (1, 32):
        tracemalloc.start()
        await vectors_of([text] * count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # gathered rows of 8,000 tokens are 8 MB; what grows are ids, of 8 bytes a token
    assert peaks[1] < peaks[0] + 32 * 8_001 * 16


async def test_the_loop_is_not_blocked_while_thousands_of_texts_are_embedded() -> None:
    await vectors_of(["warm"])
    task = asyncio.create_task(vectors_of([f"{CAT} {number}" for number in range(5_000)]))
    ticks = 0
    while not task.done():
        await asyncio.sleep(0)
        ticks += 1
    assert len(task.result()) == 5_000
    assert ticks > 10


@pytest.mark.parametrize("dimensions", [1, 100, 512])
def test_another_size_is_refused(dimensions: int) -> None:
    with pytest.raises(ConfigError, match="64, 128, 256"):
        LocalProvider(dimensions)


def test_without_the_extra_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "asyncembed\[local\]"'):
        LocalProvider()


def test_loading_it_leaves_the_root_logger_and_the_output_alone() -> None:
    script = """
import asyncio, logging
from asyncembed.providers.local import LocalProvider
asyncio.run(LocalProvider().embed(["a"]))
assert logging.getLogger().handlers == [], logging.getLogger().handlers
assert logging.getLogger().level == logging.WARNING
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


# ---- the counter ----


def pieces_of(text: str, max_tokens: int) -> list[str]:
    counter = LocalCounter()
    pieces = []
    while text:
        pieces.append(counter.cut(text, max_tokens))
        assert text.startswith(pieces[-1])
        text = text[len(pieces[-1]) :]
    return pieces


@pytest.mark.parametrize("seed", range(20))
def test_pieces_fit_are_not_empty_and_add_up_to_the_text(seed: int) -> None:
    random = Random(seed)
    letters = "abc de fg.,\n\t  é漢字🧿👩\u200d\u0301\u0378x"
    for _ in range(50):
        text = "".join(random.choices(letters, k=random.randint(1, 60)))
        limit = random.randint(1, 12)
        pieces = pieces_of(text, limit)
        assert "".join(pieces) == text
        for piece, tokens in zip(pieces, LocalCounter().count(pieces), strict=True):
            assert tokens <= limit or len(piece) == 1


@pytest.mark.parametrize("text", ["a" * 50_000, "word " * 10_000, "漢" * 10_000], ids=["a", "words", "kanji"])
def test_pieces_of_a_long_text_are_nearly_full(text: str) -> None:
    tokens = LocalCounter().count(pieces_of(text, 512))
    assert max(tokens) <= 512
    assert min(tokens[:-1]) >= 500


def test_a_text_that_fits_is_not_cut() -> None:
    counter = LocalCounter()
    assert counter.cut(CAT, counter.count([CAT])[0]) == CAT


async def test_one_long_text_is_cut_while_other_threads_run() -> None:
    counter: Any = LocalCounter()
    counter.count(["warm"])
    task = asyncio.create_task(asyncio.to_thread(counter.cut, "word " * 100_000, 8_000))
    ticks = 0
    while not task.done():
        await asyncio.sleep(0)
        ticks += 1
    assert ticks > 100
