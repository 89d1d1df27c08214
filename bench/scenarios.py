"""The scenarios: how many texts of which kind, which server, which clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.job import Measured

OURS = ("asyncembed", "asyncembed-tiktoken", "asyncembed-bytes")
PEERS = (
    "openai-raw",
    "baseten",
    "baseten-arrays",
    "openai",
    "openaivec",
    "llama-index",
    "langchain",
    "langchain-unchecked",
    "haystack",
    "litellm",
)
# These need minutes where others need seconds, so they are measured in the first scenario only.
_HOPELESS = ("haystack", "litellm")
_FAST_PEERS = tuple(name for name in PEERS if name not in _HOPELESS)
# The SDK needs 80 s for 20,000 vectors of 1,536 numbers; all of these use it.
_BY_SDK = ("openai", "openaivec", "llama-index", "langchain", "langchain-unchecked")
_SAME_IMPORT = ("openai-raw", "baseten-arrays", "langchain-unchecked")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One table.

    Attributes:
        title: What the table is about.
        clients: Names in `clients.CLIENTS`.
        floor, ours: The two clients with which the others are compared.
        server: Options of `server`; None if no server is needed.
        count: The number of texts; `quick_count` with --quick.
        characters: The average length of a text; lengths range from half to one and a half times this.
        lines: The number of different texts; further ones are made of these and a number.
        batch: Texts per request for all clients; None for each client's choice, or the API's limit.
        batches: The same for single clients whose best is not `clients.chunks.MAX_INPUTS`.
        most_texts: A limit of texts for clients that would take minutes.
        ideal_s: Computes the shortest possible time from a measurement; None to compare with the floor only.
        floats: Whether replies have numbers, for clients that make the replies themselves.
        imports_only: Whether only the import is measured.
        needs_postgres: Whether a PostgreSQL is started.
        is_slow: Whether one round is enough, because the scenario takes minutes and measures memory more than time.
    """

    title: str
    clients: tuple[str, ...]
    server: tuple[str, ...] | None = ()
    count: int = 20_000
    quick_count: int = 2_000
    characters: int = 550
    lines: int = 20_000
    model: str = "text-embedding-3-small"
    dimensions: int | None = None
    expected_dimensions: int = 1_536
    batch: int | None = None
    batches: Mapping[str, int] = field(default_factory=dict)
    most_texts: Mapping[str, int] = field(default_factory=dict)
    ideal_s: Callable[[Measured], float] | None = field(default=None, repr=False)
    floats: bool = False
    imports_only: bool = False
    needs_postgres: bool = False
    is_slow: bool = False
    floor: str = "floor"
    ours: str = "asyncembed"

    def count_of(self, client: str, *, quick: bool) -> int:
        count = self.quick_count if quick else self.count
        return min(count, self.most_texts.get(client, count))

    def batch_of(self, client: str) -> int | None:
        return self.batches.get(client, self.batch)


_LATENCY_S = 0.3
_CONCURRENCY = 8
_TOKENS_PER_MINUTE = 20_000_000
_BURST_S = 1.5
_ANSWER_S = 0.05


def _latency_bound(measured: Measured) -> float:
    """Return the seconds of complete rounds of eight requests."""
    return -(-(measured.requests or 0) // _CONCURRENCY) * _LATENCY_S


def _rate_bound(measured: Measured) -> float:
    """Return the seconds in which the bucket refills all tokens beyond its burst, plus the last answer's latency."""
    return (measured.tokens or 0) / (_TOKENS_PER_MINUTE / 60) - _BURST_S + _ANSWER_S


_RATES = ("--tokens-per-minute", str(_TOKENS_PER_MINUTE), "--burst", str(_BURST_S), "--latency", str(_ANSWER_S))

SCENARIOS = {
    "bulk": Scenario(
        "bulk: texts of 550 characters, 1,536 dimensions",
        ("floor", *OURS, *PEERS),
        most_texts=dict.fromkeys(_HOPELESS, 4_096),
    ),
    "bulk-3072": Scenario(
        "bulk, 3,072 dimensions",
        ("floor", "asyncembed", *_FAST_PEERS),
        ("--dimensions", "3072"),
        model="text-embedding-3-large",
        expected_dimensions=3_072,
    ),
    "bulk-256": Scenario(
        "bulk, 256 dimensions",
        ("floor", *OURS, *_FAST_PEERS),
        ("--dimensions", "256"),
        dimensions=256,
        expected_dimensions=256,
    ),
    "floats": Scenario(
        "bulk, from a server that always answers in numbers",
        ("floor", "asyncembed", *_FAST_PEERS),
        ("--floats",),
        most_texts=dict.fromkeys(_BY_SDK, 2_048),
    ),
    "latency": Scenario(
        "latency-bound: 50 texts a request, 0.3 s each, 8 at once",
        ("floor", "asyncembed", *_FAST_PEERS),
        ("--latency", str(_LATENCY_S)),
        count=5_000,
        quick_count=800,
        batch=50,
        ideal_s=_latency_bound,
    ),
    "rates": Scenario(
        "rate-limited: 20 million tokens a minute",
        ("asyncembed", *_FAST_PEERS),
        _RATES,
        quick_count=6_000,
        # the best of 64, 256, 1,024 and 2,048 for each
        batches=dict.fromkeys(_FAST_PEERS, 256) | {"langchain": 1_024, "langchain-unchecked": 1_024},
        ideal_s=_rate_bound,
    ),
    "rates-small": Scenario(
        "rate-limited, 64 texts a request",
        ("asyncembed", *_FAST_PEERS),
        _RATES,
        quick_count=6_000,
        batch=64,
        ideal_s=_rate_bound,
    ),
    "long": Scenario(
        "long texts of 20,000 characters; peers send 40 a request, the most that surely fit",
        ("floor", *OURS, *_FAST_PEERS),
        count=1_000,
        quick_count=200,
        characters=20_000,
        lines=1_000,
        batches=dict.fromkeys(("floor", *_FAST_PEERS), 40),
    ),
    "stream": Scenario(
        "streaming, with bounded memory",
        ("stream", "ingest-sqlite", "ingest-postgres"),
        count=500_000,
        quick_count=20_000,
        needs_postgres=True,
        is_slow=True,
        ours="stream",
    ),
    "linear": Scenario(
        "ten times as many texts",
        ("asyncembed", "asyncembed-20k"),
        count=200_000,
        quick_count=60_000,
        most_texts={"asyncembed-20k": 20_000},
    ),
    "counting": Scenario(
        "counting tokens of texts of 550 characters, in one thread",
        ("count-fast", "count-tiktoken", "count-bytes"),
        None,
        ours="count-fast",
    ),
    "packing": Scenario(
        "packing texts whose tokens are counted",
        ("pack", "pack-greedy"),
        None,
        ours="pack",
    ),
    "decoding": Scenario(
        "decoding vectors in base64, in one thread",
        ("decode", "decode-jiter", "decode-json"),
        None,
        ours="decode",
    ),
    "decoding-floats": Scenario(
        "decoding vectors in numbers, in one thread",
        ("decode", "decode-jiter", "decode-json"),
        None,
        floats=True,
        ours="decode",
    ),
    "sinks": Scenario(
        "storing rows of 1,536 dimensions",
        ("sqlite", "sqlite-bare", "postgres", "postgres-bare"),
        None,
        count=10_000,
        needs_postgres=True,
        ours="sqlite",
    ),
    "import": Scenario(
        "importing what one needs, in a new process",
        ("import-numpy", "import-bare", "asyncembed", *(name for name in PEERS if name not in _SAME_IMPORT)),
        None,
        count=1,
        quick_count=1,
        floor="import-numpy",
        imports_only=True,
    ),
}
