"""`python -m asyncembed.testing`: runs the test server as a separate process, for programs in any language."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

from .dialects import DIALECTS
from .schedules import mixed
from .server import EmbeddingServer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m asyncembed.testing",
        description="A local server that answers like OpenAI's embeddings API. Prints its base URL when it is ready. "
        "Ctrl-C or SIGTERM stops it.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="default: any free port")
    parser.add_argument("--dialect", choices=sorted(DIALECTS), default="openai", help="which server to imitate")
    parser.add_argument("--dimensions", type=int, help="size of all vectors; default: the model's own")
    parser.add_argument("--latency", type=float, default=0.0, metavar="S", help="seconds before each answer")
    parser.add_argument(
        "--latency-per-token", type=float, default=0.0, metavar="S", help="further seconds for each token"
    )
    parser.add_argument("--max-inputs", type=int, metavar="N", help="limit of inputs per request")
    parser.add_argument("--requests-per-minute", type=float, metavar="N")
    parser.add_argument("--tokens-per-minute", type=float, metavar="N")
    parser.add_argument(
        "--burst", type=float, default=60.0, metavar="S", help="seconds of these rates that a burst may use"
    )
    parser.add_argument("--filled", type=float, default=1.0, metavar="P", help="how full the rate limits start, 0 to 1")
    parser.add_argument(
        "--fault-rate", type=float, default=0.0, metavar="P", help="share of requests that fail, 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses which requests fail, and how")
    return parser


async def _run(options: argparse.Namespace) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # not loop.add_signal_handler, which Windows does not support
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(ended.set))
    server = EmbeddingServer(
        host=options.host,
        port=options.port,
        dialect=DIALECTS[options.dialect],
        dimensions=options.dimensions,
        latency_s=options.latency,
        latency_per_token_s=options.latency_per_token,
        max_inputs=options.max_inputs,
        requests_per_minute=options.requests_per_minute,
        tokens_per_minute=options.tokens_per_minute,
        burst_s=options.burst,
        filled=options.filled,
        faults=mixed(rate=options.fault_rate, seed=options.seed),
        keep_texts=False,
    )
    async with server:
        print(server.base_url, flush=True)
        await ended.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the server until SIGINT or SIGTERM."""
    options = _parser().parse_args(argv)
    try:
        asyncio.run(_run(options))
    except (OSError, OverflowError) as error:
        sys.exit(f"cannot listen at {options.host}, port {options.port}: {getattr(error, 'strerror', None) or error}")


if __name__ == "__main__":
    main()
