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
    assert order == [*REASONS][:-1]  # all but what only a thread's own count can tell
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


#: The same, of whose thread 110 MiB are known.
THREAD: dict[str, Any] = {**ALONE, "thread_bytes": 110 * MIB}


def test_a_threads_own() -> None:
    """The thread's own peak counts whatever else there was, and the larger one where alone."""
    assert judge(**THREAD) == (110 * MIB, "thread", None)
    assert judge(**{**THREAD, "thread_bytes": 20 * MIB}) == (100 * MIB, "thread", None)
    for reason in ("overlap", "transfer", "mapped"):
        evidence = dict(EVIDENCE)[reason]
        assert judge(**{**THREAD, **evidence, "thread_bytes": 20 * MIB}) == (
            20 * MIB, "thread", None,
        )  # fmt: skip
    assert judge(**{**THREAD, "reusable_bytes": 50 * MIB}) == (110 * MIB, "thread", None)


@pytest.mark.parametrize(
    "incomplete",
    [
        {"children_changed": True},
        {"outside_bytes": None},
        {"outside_bytes": 50 * MIB},
        {"freed_bytes": 50 * MIB},
        {"thread_bytes": 250 * MIB},  # of a process of 150
    ],
)
def test_a_thread_that_is_not_all(incomplete: dict[str, Any]) -> None:
    """Where its count is not the whole, the process's evidence decides, and overlap shares."""
    shared = judge(**{**THREAD, "overlapped": True, **incomplete})
    assert shared == (None, "shared", "overlap")
    alone = judge(**{**THREAD, **incomplete})
    if "outside_bytes" in incomplete:
        assert alone == (100 * MIB, "process", None)
    elif "children_changed" in incomplete:
        assert alone == (None, "shared", "polling")
    else:
        assert alone == (None, "shared", "contradiction")


def test_helpers_in_a_warm_heap() -> None:
    """The process grew by more than the thread, and more may be hidden: no number is whole."""
    helped = {**THREAD, "thread_bytes": 10 * MIB, "reusable_bytes": 50 * MIB}
    assert judge(**helped) == (None, "shared", "warm_heap")


def test_no_thread_of_its_own() -> None:
    """A coroutine's window is no thread's."""
    assert judge(**{**THREAD, "own_thread": False})[2] == "executor"
