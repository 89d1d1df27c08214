"""Stores some notes, changes one, runs again, and searches. Needs no API key and no network.

    python -m examples.script

The second run embeds only the changed note.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from asyncembed import Embedder, Record, SQLiteSink, ingest

NOTES = [
    Record("bread", "Mix flour, water and salt, let the dough rest overnight, bake it hot."),
    Record("bicycle", "The rear wheel loses air; buy a new inner tube.", {"done": False}),
    Record("garden", "Sow tomatoes indoors in March, plant them out after the last frost."),
]


async def main(file: Path) -> None:
    """Store the notes in an SQLite file and search for one of them."""
    async with Embedder("local") as embedder, SQLiteSink(file) as sink:
        print("to do:      ", await embedder.plan(NOTES))
        print("first run:  ", await ingest(NOTES, embedder, sink))

        changed = [*NOTES[:2], Record("garden", "The tomatoes are planted; water them twice a week.")]
        print("second run: ", await ingest(changed, embedder, sink))

        question = "how do I make a loaf?"
        for hit in await sink.search(await embedder.embed_one(question), k=2):
            print(f"{hit.score:.2f}  {hit.id}: {hit.text}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder) / "notes.db"))
