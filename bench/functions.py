"""How much code one call runs through: the package's functions and modules that a warm `embed_one` enters.

python -m bench.functions          # a line for each module
python -m bench.functions --json
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import asyncembed
from asyncembed import Embedder
from asyncembed.testing import EmbeddingServer

PACKAGE = Path(asyncembed.__file__).parent


def entered(base_url: str) -> dict[str, list[str]]:
    """Return the functions that a second call enters, by module, in the order of the first entry."""
    seen: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.setdefault(frame.f_code)

    async def call() -> None:
        async with Embedder("text-embedding-3-small", base_url=base_url, api_key="none") as embedder:
            await embedder.embed_one("the first call loads the SDK and connects")
            threading.setprofile(note)
            sys.setprofile(note)
            try:
                await embedder.embed_one("a query")
            finally:
                sys.setprofile(None)
                threading.setprofile(None)  # type: ignore[arg-type]

    asyncio.run(call())
    modules: dict[str, list[str]] = {}
    for code in seen:
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE) and path.parent.name != "testing":
            modules.setdefault(path.relative_to(PACKAGE).as_posix(), []).append(code.co_qualname)
    return modules


def main() -> None:
    with EmbeddingServer().in_thread() as server:
        modules = entered(server.base_url)
    count = sum(map(len, modules.values()))
    if "--json" in sys.argv:
        print(json.dumps({"functions": count, "modules": len(modules)}))
        return
    for module, functions in modules.items():
        print(f"{len(functions):4}  {module}: {', '.join(functions)}")
    print(f"{count} functions in {len(modules)} modules")


if __name__ == "__main__":
    main()
