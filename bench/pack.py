"""Measures packing: texts per second, and requests above the minimum, for several mixtures of lengths.

    python -m bench.pack [--quick]

Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable

from asyncembed.batching.packing import Packer
from asyncembed.models import MAX_INPUTS, MAX_TOKENS_PER_REQUEST

OPEN_BATCHES = (1, 2, 4, 8, 16)
# Weight of one text, of 1 to 8,192 tokens.
MIXTURES: dict[str, Callable[[random.Random], int]] = {
    "any length": lambda rng: rng.randint(1, 8_192),
    "log-uniform": lambda rng: int(8_192 ** rng.random()),
    "sections": lambda rng: min(8_192, int(rng.lognormvariate(5.0, 1.0)) + 1),
    "long ones among short": lambda rng: rng.randint(4_000, 8_192) if rng.random() < 0.1 else rng.randint(10, 200),
}
# The API's limit, and the limit of a smaller server, where a batch holds few texts and gaps cost more.
BUDGETS = (MAX_TOKENS_PER_REQUEST, 20_000)


def pack(weights: list[int], max_tokens: int, open_batches: int) -> tuple[int, float]:
    """Return the number of batches, and the seconds it took."""
    packer: Packer[int] = Packer(MAX_INPUTS, max_tokens, open_batches)
    started = time.perf_counter()
    full = sum(packer.add(weight, weight) is not None for weight in weights)
    return full + len(packer.flush()), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3,000 texts in place of 30,000")
    count = 3_000 if parser.parse_args().quick else 30_000
    rows = []
    print(
        f"{count:,} texts\n"
        f"{'mixture':24}{'tokens/batch':>13}{'open':>6}{'requests':>10}{'over least':>12}{'items/s':>12}"
    )
    for name, draw in MIXTURES.items():
        rng = random.Random(0)
        weights = [draw(rng) for _ in range(count)]
        for max_tokens in BUDGETS:
            least = max(-(-sum(weights) // max_tokens), -(-count // MAX_INPUTS))
            for open_batches in OPEN_BATCHES:
                requests, seconds = pack(weights, max_tokens, open_batches)
                over = requests / least - 1
                rows.append(
                    {
                        "mixture": name,
                        "max_tokens": max_tokens,
                        "open_batches": open_batches,
                        "requests": requests,
                        "over_least": round(over, 5),
                        "items_per_s": round(count / seconds),
                    }
                )
                print(f"{name:24}{max_tokens:13,}{open_batches:6}{requests:10,}{over:12.2%}{count / seconds:12,.0f}")
    print(json.dumps({"bench": "pack", "items": count, "rows": rows}))


if __name__ == "__main__":
    main()
