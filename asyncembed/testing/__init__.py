"""A local server that answers like OpenAI's embeddings API, with real limits, rate limits and faults, for tests.

`__all__` has the names that most tests need. All other names of docs/testing.md can be imported from here as well:
`X as X` marks a re-export for type checkers.
"""

from __future__ import annotations

from .bad_responses import (
    Beside as Beside,
    BrokenGzip as BrokenGzip,
    CutBody as CutBody,
    Disconnect,
    Drip as Drip,
    DuplicateIndex as DuplicateIndex,
    Float64 as Float64,
    Flood as Flood,
    ForeignVector as ForeignVector,
    GzipBomb as GzipBomb,
    Hang,
    HugeHeader as HugeHeader,
    Interim as Interim,
    Late as Late,
    MissingIndex as MissingIndex,
    NaNVector as NaNVector,
    NotHTTP as NotHTTP,
    OtherEncoding as OtherEncoding,
    Reset as Reset,
    Shuffled as Shuffled,
    TruncatedJSON as TruncatedJSON,
    WrongCount as WrongCount,
    WrongDimensions as WrongDimensions,
)
from .dialects import (
    AZURE as AZURE,
    AZURE_INFERENCE as AZURE_INFERENCE,
    DASHSCOPE as DASHSCOPE,
    DIALECTS as DIALECTS,
    FASTAPI as FASTAPI,
    LM_STUDIO as LM_STUDIO,
    OLD_VLLM as OLD_VLLM,
    OPENAI,
    OPENAI_2026 as OPENAI_2026,
    TEI,
    Dialect,
    Wording as Wording,
)
from .faults import (
    ErrorBody200 as ErrorBody200,
    Fault,
    Forbidden as Forbidden,
    Garbage as Garbage,
    HTMLError as HTMLError,
    InvalidInput,
    InvalidKey,
    Overloaded as Overloaded,
    QuotaExceeded,
    RateLimited,
    Redirect as Redirect,
    ServerFault,
    SlowDown as SlowDown,
    Status as Status,
    TooManyTokens as TooManyTokens,
    UnsupportedValue as UnsupportedValue,
)
from .request_log import LoggedRequest
from .schedules import (
    PASSING as PASSING,
    Schedule,
    every,
    first_of,
    mixed,
    outage,
    poison,
    script,
)
from .server import EmbeddingServer
from .stalls import Stalls as Stalls, watch_loop as watch_loop
from .vectors import embedding_of

# The earlier name. A client raises `asyncembed.ServerError`, so the fault has a name that differs.
ServerError = ServerFault

__all__ = [
    "OPENAI",
    "TEI",
    "Dialect",
    "Disconnect",
    "EmbeddingServer",
    "Fault",
    "Hang",
    "InvalidInput",
    "InvalidKey",
    "LoggedRequest",
    "QuotaExceeded",
    "RateLimited",
    "Schedule",
    "ServerFault",
    "embedding_of",
    "every",
    "first_of",
    "mixed",
    "outage",
    "poison",
    "script",
]
