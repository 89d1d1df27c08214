"""`FAULTS.md` has a row for every fault we know of, and the tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROW = re.compile(r"^\| ([IWCDQ]\d\d) \|[^|]*\|([^|]*)\|$", re.MULTILINE)
ROWS = dict(ROW.findall((TESTS / "FAULTS.md").read_text()))

KNOWN = {
    *(f"I{number:02}" for number in (*range(1, 6), 8, 9, *range(11, 15), 16, 17, *range(20, 26))),
    *(f"W{number:02}" for number in (1, 2, 4, 5, 6, *range(9, 13), *range(14, 21), *range(22, 26), *range(27, 31))),
    *(f"W{number:02}" for number in (*range(32, 36), *range(38, 41), *range(42, 45), 46, 47)),
    *(f"C{number:02}" for number in (*range(1, 8), *range(9, 20))),
    *(f"D{number:02}" for number in (*range(1, 14), 15, 16, 17, 18, 20, 21, 22)),
    *(f"Q{number:02}" for number in range(1, 14)),
}


def test_every_fault_has_its_row() -> None:
    assert set(ROWS) == KNOWN


@pytest.mark.parametrize("fault", sorted(ROWS))
def test_the_tests_of_a_fault_exist(fault: str) -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", ROWS[fault])
    assert named, "a row without a test"
    for file, name in named:
        assert f"def {name}(" in (TESTS / file).read_text(), f"{file}::{name}"
