"""Measures an import in a process that has imported nothing yet.

    python -m bench.importing asyncembed asyncembed:Embedder asyncembed

The arguments are the client's name, its `imports`, and the distribution whose version is reported.
"""

from __future__ import annotations

import sys
import time


def load(imports: str) -> float:
    """Import `module:name,module` and return the seconds. Names are resolved, too: many packages load them lazily."""
    began = time.perf_counter()
    for one in imports.split(","):
        module, _, name = one.partition(":")
        __import__(module)
        if name:
            getattr(sys.modules[module], name)
    return time.perf_counter() - began


def main() -> None:
    client, imports, distribution = sys.argv[1:]
    cpu_began = time.process_time()
    seconds = load(imports)
    cpu_s = time.process_time() - cpu_began

    from importlib.metadata import version

    from bench.job import Measured

    print(Measured(client, version(distribution), 1, seconds, cpu_s, seconds).to_json())


if __name__ == "__main__":
    main()
