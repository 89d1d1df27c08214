"""Files that the command reads, and the rows that it has stored."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from click.testing import Result

Run: TypeAlias = Callable[..., Result]

DOCS = "# Cats\n\nCats purr and sleep.\n\n# Rockets\n\nRockets fly to the moon.\n"


def write(name: str, content: str) -> str:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return name


def records(count: int, name: str = "records.jsonl") -> str:
    lines = (json.dumps({"id": number, "text": f"text {number}"}) for number in range(count))
    return write(name, "\n".join(lines))


def stored(path: str = "v.db") -> dict[str, str]:
    connection = sqlite3.connect(path)
    try:
        return dict(connection.execute("SELECT id, text FROM embeddings"))
    finally:
        connection.close()
