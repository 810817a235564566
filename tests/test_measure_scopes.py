"""The one decision: whose number it is. Every line of the table, and their order."""

from __future__ import annotations

from typing import Any

import pytest

from dask_memusage_exporter.measure.scopes import REASONS, judge

MIB = 2**20

#: A task of 100 MiB that was alone on a cold heap.
ALONE: dict[str, Any] = {
    "start_bytes": 50 * MIB,
    "peak_bytes": 150 * MIB,
    "overlapped": False,
    "foreign_bytes": 0,
    "offloaded": False,
    "reusable_bytes": 0,
    "mapped_bytes": 0,
    "own_thread": True,
    "exact": True,
    "children_changed": False,
}

#: What each reason comes from.
EVIDENCE: list[tuple[str, dict[str, Any]]] = [
    ("overlap", {"overlapped": True}),
    ("transfer", {"foreign_bytes": 6 * MIB}),
    ("transfer", {"offloaded": True}),
    ("warm_heap", {"reusable_bytes": 6 * MIB}),
    ("warm_heap", {"reusable_bytes": None}),
    ("executor", {"own_thread": False, "reusable_bytes": None}),
    ("mapped", {"mapped_bytes": 6 * MIB}),
    ("polling", {"exact": False, "reusable_bytes": None}),
    ("polling", {"children_changed": True}),
]


def test_own() -> None:
    """Nothing against it: the growth is the task's own."""
    assert judge(**ALONE) == (100 * MIB, "process", None)


@pytest.mark.parametrize(("reason", "evidence"), EVIDENCE)
def test_each_reason(reason: str, evidence: dict[str, Any]) -> None:
    """Each piece of evidence alone makes it shared, with its reason and no growth."""
    assert judge(**{**ALONE, **evidence}) == (None, "shared", reason)


def test_first_reason_that_applies() -> None:
    """With all evidence, then all but the first, and so on, the first in order is given."""
    strongest = dict(EVIDENCE)
    order = [reason for reason in REASONS if reason in strongest]
    assert order == ["overlap", "transfer", "warm_heap", "executor", "mapped", "polling"]
    for first, reason in enumerate(order):
        evidence = {**ALONE}
        for later in reversed(order[first:]):
            # For what has no thread of its own the heap was not asked, and is not the reason.
            if reason != "warm_heap" or later != "executor":
                evidence |= strongest[later]
        assert judge(**evidence)[2] == reason


@pytest.mark.parametrize("what", ["foreign_bytes", "reusable_bytes", "mapped_bytes"])
@pytest.mark.parametrize(("growth", "limit"), [(0, MIB), (10 * MIB, MIB), (100 * MIB, 5 * MIB)])
def test_limit(what: str, growth: int, limit: int) -> None:
    """Up to the larger of 1 MiB and 5 % of the growth does no harm."""
    of = {**ALONE, "peak_bytes": ALONE["start_bytes"] + growth}
    assert judge(**{**of, what: limit}) == (growth, "process", None)
    assert judge(**{**of, what: limit + 1})[1] == "shared"


def test_never_negative() -> None:
    """A process that has shrunk has not grown."""
    assert judge(**{**ALONE, "peak_bytes": 0})[0] == 0


def test_brief() -> None:
    """In microseconds nobody fills a megabyte of what the heap had free, asked or not."""
    brief = {**ALONE, "peak_bytes": ALONE["start_bytes"], "brief": True}
    for reusable in (None, 100 * MIB):
        assert judge(**{**brief, "reusable_bytes": reusable}) == (0, "process", None)
    assert judge(**{**brief, "foreign_bytes": 6 * MIB})[2] == "transfer"
