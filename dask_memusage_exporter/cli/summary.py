"""From records to what is shown of them: quantiles by prefix, the worst tasks, the finding.

A growth that is not known is never guessed, and never taken as zero. What can be said of some of
them is a bound (:func:`growth_of`), and quantiles of bounds are bounds of the quantiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import ceil, inf
from typing import NamedTuple

from dask_memusage_exporter.config import MIB
from dask_memusage_exporter.records import TaskMemory

#: A task stands out if it needs this many times the median, and this many bytes.
STANDS_OUT, STANDS_OUT_BYTES = 10, 32 * MIB


class Growth(NamedTuple):
    """What is known of a task's own growth, in bytes: exact where both are the same."""

    at_least: float
    #: Infinite: not known.
    at_most: float

    @property
    def exact(self) -> int | None:
        """The growth in bytes; None where it is not known."""
        return int(self.at_least) if self.at_least == self.at_most else None

    @property
    def bound(self) -> int | None:
        """The most that it can be in bytes; None where that is not known."""
        return None if self.at_most == inf else int(self.at_most)


class Quantiles(NamedTuple):
    """Three quantiles, each a value that occurs (nearest rank)."""

    p50: float
    p95: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles:
        """Return the quantiles of one value or more."""
        ordered = sorted(values)
        return cls(*(ordered[ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 1)))


class PrefixSummary(NamedTuple):
    """All tasks of one prefix."""

    prefix: str
    tasks: int
    #: In bytes.
    peak: Quantiles
    #: p50, p95 and maximum.
    growth: tuple[Growth, Growth, Growth]
    #: See :func:`worst_first`.
    worst: TaskMemory
    #: Tasks by scope, and by reason where the scope is ``shared``.
    scopes: dict[str, int]
    reasons: dict[str, int]


class Finding(NamedTuple):
    """One task that stands out, in a way that the records bear out."""

    worst: TaskMemory
    growth_bytes: int
    #: Whether no other task can have needed more: else it is the worst of those that are known.
    certain: bool
    #: Of all tasks; perhaps only its bound is known.
    median: Growth


def growth_of(record: TaskMemory) -> Growth:
    """Return what is known of a task's own growth.

    A task alone in its process whose heap held free memory can have used that, what RSS rose by,
    and room that the worker freed meanwhile, but no more.
    """
    if record.growth_bytes is not None:
        return Growth(record.growth_bytes, record.growth_bytes)
    if record.reason == "warm_heap" and record.reusable_bytes is not None:
        return Growth(0, _rise(record) + record.reusable_bytes + record.foreign_bytes)
    return Growth(0, inf)


def _rise(record: TaskMemory) -> int:
    return max(0, record.peak_bytes - record.start_bytes)


def worst_first(records: Iterable[TaskMemory]) -> list[TaskMemory]:
    """Return the records by the task's own growth, most first.

    Where it is not known by how much the process grew in the task's window: the best that there is
    to go by.
    """

    def order(record: TaskMemory) -> tuple[int, int]:
        own = record.growth_bytes
        return _rise(record) if own is None else own, record.peak_bytes

    return sorted(records, key=order, reverse=True)


def by_prefix(records: Iterable[TaskMemory]) -> list[PrefixSummary]:
    """Return one summary a prefix, in the order of their names."""
    ordered = sorted(records, key=lambda record: record.task_prefix)
    return [
        _summary(prefix, list(group))
        for prefix, group in groupby(ordered, key=lambda record: record.task_prefix)
    ]


def _summary(prefix: str, records: Sequence[TaskMemory]) -> PrefixSummary:
    low, p95, high = _growth_quantiles(records)
    return PrefixSummary(
        prefix=prefix,
        tasks=len(records),
        peak=Quantiles.of(record.peak_bytes for record in records),
        growth=(low, p95, high),
        worst=worst_first(records)[0],
        scopes=dict(Counter(record.scope for record in records).most_common()),
        reasons=dict(Counter(r.reason for r in records if r.reason is not None).most_common()),
    )


def _growth_quantiles(records: Iterable[TaskMemory]) -> list[Growth]:
    growths = [growth_of(record) for record in records]
    lows = Quantiles.of(growth.at_least for growth in growths)
    highs = Quantiles.of(growth.at_most for growth in growths)
    return [Growth(*pair) for pair in zip(lows, highs, strict=True)]


def find(records: Sequence[TaskMemory]) -> Finding | None:
    """Return the task that needs far more than most; None where there is none to be sure of."""
    known = [record for record in records if record.growth_bytes is not None]
    if len(records) < 2 or not known:
        return None
    worst = max(known, key=lambda record: growth_of(record).at_least)
    growth = int(growth_of(worst).at_least)
    median = _growth_quantiles(records)[0]
    if growth < max(STANDS_OUT * median.at_most, STANDS_OUT_BYTES):
        return None
    certain = all(growth_of(record).at_most <= growth for record in records)
    return Finding(worst, growth, certain, median)
