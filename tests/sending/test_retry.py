"""`retry`: an error and the history of its batch lead to one decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asyncembed import AuthenticationError, NotFoundError
from asyncembed.errors import (
    BadRequestError,
    CertificateError,
    FatalProviderError,
    PermissionDeniedError,
    ProtocolError,
    ProviderDownError,
    ProviderError,
    QuotaError,
    RateLimitedError,
    RedirectRefusedError,
    RequestError,
    ServerError,
    TooLargeError,
    TransportError,
)
from asyncembed.sending.retry import (
    BACKOFF_MAX_S,
    REJECT_AFTER,
    REJECTIONS_BEFORE_STOP,
    SUSPECT_AFTER,
    History,
    Probe,
    Reject,
    Retry,
    Split,
    Stop,
    backoff_s,
    decide,
    is_overload,
)

MAX_RETRIES = 8


FAULTS = [ServerError("x", status=500), TransportError("x"), ProtocolError("x")]


REFUSALS = [BadRequestError("x", status=400), TooLargeError("x", status=413)]


def make_history(
    inputs: int = 64, failures: int = 1, *, healthy: bool = False, probed: bool = False, rejections: int = 0
) -> History:
    """Return the history of a batch; no other request succeeded, unless the provider is healthy."""
    consecutive_failures = 0 if healthy else failures
    return History(
        inputs=inputs,
        failures=failures,
        consecutive_failures=consecutive_failures,
        healthy=healthy,
        probed=probed,
        rejections=rejections,
    )


@pytest.mark.parametrize(
    "cls",
    [
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        QuotaError,
        RedirectRefusedError,
        CertificateError,
        RequestError,
    ],
)
@pytest.mark.parametrize("history", [make_history(), make_history(1), make_history(healthy=True)])
def test_a_fatal_error_stops_the_call_at_once(cls: type[FatalProviderError], history: History) -> None:
    error = cls("x")
    assert decide(error, history, MAX_RETRIES) == Stop(error)


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
@pytest.mark.parametrize(
    ("history", "action"),
    [
        (make_history(2_048), Split()),
        (make_history(2, failures=20), Split()),
        (make_history(2, rejections=1_000), Split()),
        (make_history(1), Reject()),
        (make_history(1, healthy=True), Reject()),
        (make_history(1, rejections=REJECTIONS_BEFORE_STOP - 1), Reject()),
    ],
)
def test_a_refused_batch_is_split_and_a_refused_text_is_rejected(
    error: ProviderError, history: History, action: object
) -> None:
    assert decide(error, history, MAX_RETRIES) == action


def test_a_call_is_stopped_if_every_single_text_is_refused() -> None:
    error = BadRequestError("dimensions?", status=400, code="x", request_id="req_1")
    action = decide(error, make_history(1, rejections=REJECTIONS_BEFORE_STOP), MAX_RETRIES)
    assert isinstance(action, Stop)
    assert isinstance(action.error, RequestError)
    assert (action.error.status, action.error.code, action.error.request_id) == (400, "x", "req_1")
    assert action.error.__cause__ is error


@pytest.mark.parametrize("history", [make_history(), make_history(1), make_history(failures=MAX_RETRIES)])
def test_after_a_429_all_requests_pause_for_its_retry_after(history: History) -> None:
    assert decide(RateLimitedError("x", retry_after_s=41.7), history, MAX_RETRIES) == Retry(41.7, shared=True)


def test_after_a_429_without_retry_after_all_requests_back_off() -> None:
    for refusals in (1, 4, 8):
        action = decide(RateLimitedError("x"), replace(make_history(failures=5), refusals=refusals), MAX_RETRIES)
        assert isinstance(action, Retry)
        assert action.shared
        ceiling_s = min(30.0, 0.5 * 2 ** (refusals - 1))
        assert ceiling_s / 2 <= action.after_s <= ceiling_s


def test_repeated_429s_lengthen_the_pause_while_no_request_succeeds() -> None:
    error = RateLimitedError("x", retry_after_s=0.01)
    waits = [decide(error, make_history(failures=failures), MAX_RETRIES) for failures in range(1, MAX_RETRIES + 1)]
    assert waits[0] == Retry(0.01, shared=True)
    assert sum(wait.after_s for wait in waits if isinstance(wait, Retry)) > 10
    assert decide(error, make_history(failures=5, healthy=True), MAX_RETRIES) == Retry(0.01, shared=True)


def test_endless_429s_are_an_outage_unless_other_requests_succeed() -> None:
    error = RateLimitedError("x", retry_after_s=1.0)
    action = decide(error, make_history(failures=MAX_RETRIES + 1), MAX_RETRIES)
    assert isinstance(action, Stop)
    assert isinstance(action.error, ProviderDownError)
    assert decide(error, make_history(failures=100, healthy=True), MAX_RETRIES) == Retry(1.0, shared=True)


RETRY, SPLIT, PROBE, REJECT, DOWN = "retry", "split", "probe", "reject", "down"


def kind(error: ProviderError, history: History, max_retries: int = MAX_RETRIES) -> str:
    action = decide(error, history, max_retries)
    if isinstance(action, Stop):
        assert isinstance(action.error, ProviderDownError)
        assert action.error.__cause__ is error
        return DOWN
    return {Retry: RETRY, Probe: PROBE, Split: SPLIT, Reject: REJECT}[type(action)]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("history", "expected"),
    [
        # while other requests succeed, the batch is suspected after the third failure
        pytest.param(make_history(failures=1, healthy=True), RETRY, id="first failure"),
        pytest.param(make_history(failures=2, healthy=True), RETRY, id="second failure"),
        pytest.param(make_history(failures=SUSPECT_AFTER, healthy=True), SPLIT, id="third failure, others succeed"),
        pytest.param(make_history(1, SUSPECT_AFTER, healthy=True), RETRY, id="one text, third failure, others succeed"),
        pytest.param(make_history(1, REJECT_AFTER, healthy=True), REJECT, id="one text, fifth failure, others succeed"),
        pytest.param(make_history(1, 2, healthy=True), RETRY, id="second failure of one text"),
        # while no request succeeds, a probe tells an outage from a bad text
        pytest.param(make_history(failures=SUSPECT_AFTER), PROBE, id="third failure, no request succeeds"),
        pytest.param(make_history(1, 2), RETRY, id="second failure of one text, no request succeeds"),
        pytest.param(make_history(failures=MAX_RETRIES + 1, probed=True), DOWN, id="the last failure of an outage"),
        pytest.param(make_history(1, MAX_RETRIES + 1), DOWN, id="the last failure of one text"),
    ],
)
def test_a_transient_fault_is_retried_then_isolated_or_an_outage(
    error: ProviderError, history: History, expected: str
) -> None:
    assert kind(error, history) == expected


def test_an_outage_is_waited_for_but_malformed_replies_are_not() -> None:
    for failures in range(SUSPECT_AFTER, MAX_RETRIES + 1):
        history = make_history(failures=failures, probed=True)
        assert [kind(error, history) for error in FAULTS] == [RETRY, RETRY, DOWN]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("max_retries", [0, 1])
def test_a_low_max_retries_is_kept(error: ProviderError, max_retries: int) -> None:
    last = max_retries + 1
    assert [kind(error, make_history(failures=n), max_retries) for n in range(1, last)] == [RETRY] * max_retries
    assert kind(error, make_history(failures=last), max_retries) == (PROBE if max_retries else DOWN)
    assert kind(error, make_history(failures=last, probed=True), max_retries) == DOWN
    assert kind(error, make_history(failures=last, healthy=True), max_retries) == SPLIT
    assert kind(error, make_history(1, last, healthy=True), max_retries) == REJECT


def test_all_requests_pause_for_the_retry_after_of_an_overloaded_server() -> None:
    action = decide(ServerError("x", status=503, retry_after_s=20.0), make_history(), MAX_RETRIES)
    assert action == Retry(20.0, shared=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RateLimitedError("x", status=429), True),
        (ServerError("x", status=503), True),
        (ServerError("x", status=500, code="server_is_overloaded"), True),
        (ServerError("x", status=500, code="overloaded"), True),
        (ServerError("x", status=500), False),
        (TransportError("x"), False),
        (BadRequestError("x", status=400), False),
    ],
)
def test_an_overload_is_recognized_by_status_or_code(error: ProviderError, expected: bool) -> None:
    assert is_overload(error) is expected


def test_an_overload_is_not_blamed_on_a_text() -> None:
    error = ServerError("x", status=503)
    for inputs in (1, 64):
        assert {kind(error, make_history(inputs, n, healthy=True)) for n in range(1, MAX_RETRIES + 1)} == {RETRY}


def test_the_first_retry_after_a_lost_connection_is_immediate_and_the_next_backs_off() -> None:
    assert decide(TransportError("x"), make_history(), MAX_RETRIES) == Retry(0.0)
    action = decide(TransportError("x"), make_history(failures=2), MAX_RETRIES)
    assert isinstance(action, Retry)
    assert not action.shared
    assert 0.5 <= action.after_s <= 1.0


def test_the_first_retry_after_a_timeout_backs_off() -> None:
    action = decide(TransportError("x", timed_out=True), make_history(), MAX_RETRIES)
    assert isinstance(action, Retry)
    assert not action.shared
    assert 0.25 <= action.after_s <= 0.5


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_single_text_is_rejected_only_after_another_text_succeeds(error: ProviderError) -> None:
    history = History(
        inputs=1, failures=REJECT_AFTER, consecutive_failures=REJECT_AFTER, healthy=False, has_known_good=True
    )
    assert kind(error, history) == PROBE
    assert kind(error, replace(history, healthy=True)) == REJECT
    assert kind(error, replace(history, probed=True)) == (DOWN if isinstance(error, ProtocolError) else RETRY)


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_call_is_stopped_if_every_single_text_fails(error: ProviderError) -> None:
    action = decide(error, make_history(1, REJECT_AFTER, healthy=True, rejections=REJECTIONS_BEFORE_STOP), MAX_RETRIES)
    assert isinstance(action, Stop)
    assert isinstance(action.error, RequestError)


@pytest.mark.parametrize(
    ("failures", "ceiling_s"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 30), (8, 30), (10**6, 30)]
)
def test_backoff_doubles_up_to_half_a_minute_with_jitter(failures: int, ceiling_s: float) -> None:
    waits = [backoff_s(failures) for _ in range(200)]
    assert all(ceiling_s / 2 <= wait <= ceiling_s <= BACKOFF_MAX_S for wait in waits)
    assert max(waits) - min(waits) > ceiling_s / 4  # or all tasks would retry at the same time


@pytest.mark.parametrize("size", [2, 3, 64, 1_000, 2_048])
@pytest.mark.parametrize("error", [*REFUSALS, *FAULTS], ids=lambda error: type(error).__name__)
def test_one_bad_text_costs_few_requests(error: ProviderError, size: int) -> None:
    """Halves keep their failures: at most 2 log2(n) requests and a few attempts more than without a bad text."""
    extra = 0
    for bad_text in {0, 1, size // 2, size - 1}:
        sent, rejected = 0, []
        batches = [(range(size), 0)]
        while batches:
            texts, failures = batches.pop()
            sent += 1
            assert sent < 1_000
            if bad_text not in texts:
                continue
            failures += 1
            action = decide(error, make_history(len(texts), failures, healthy=sent > 1), MAX_RETRIES)
            if isinstance(action, Retry):
                batches.append((texts, failures))
            elif isinstance(action, Split):
                middle = (len(texts) + 1) // 2
                halves = (texts[:middle], texts[middle:])
                batches += [(half, failures if len(half) > 1 else 0) for half in halves]
            else:
                assert action == Reject()
                rejected += texts
        assert rejected == [bad_text]
        extra = max(extra, sent - 1)
    attempts = SUSPECT_AFTER + REJECT_AFTER
    assert extra <= 2 * (size - 1).bit_length() + attempts
    assert size < 2_048 or extra <= 30


def test_a_request_that_was_never_sent_is_not_blamed_on_a_text() -> None:
    error = TransportError("no file descriptor", connected=False)
    for inputs in (1, 64):
        for failures in range(1, 20):
            assert kind(error, make_history(inputs, failures, healthy=True)) == RETRY
        assert kind(error, make_history(inputs, MAX_RETRIES + 1)) == DOWN
