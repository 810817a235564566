"""Per-prefix histograms, counters and maxima of one process or cluster.

Covers: exact counts and sums, the cap on prefixes, maxima over a sliding window.
Does not cover: how they are shown; exporters read :meth:`Aggregate.snapshot`.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

from dask_memusage_exporter.measure.scopes import SCOPES
from dask_memusage_exporter.records import TaskMemory

logger = logging.getLogger("distributed.worker.memusage")

#: The label of all prefixes beyond the cap.
OVERFLOW = "__overflow__"

#: Longer prefixes are cut: a label of 10 kB helps nobody.
LABEL_LENGTH = 255

#: Slots in which a sliding maximum is kept.
_SLOTS = 10


class HistogramSnapshot(NamedTuple):
    """A histogram's state: cumulative counts, one a bound and one for infinity; sum in bytes."""

    cumulative: list[int]
    total: int


class PrefixSnapshot(NamedTuple):
    """All that is known of one label."""

    label: str
    peak: HistogramSnapshot
    growth: HistogramSnapshot
    tasks: dict[str, int]
    #: The largest in the window in bytes; None: none in it.
    peak_maximum: int | None
    growth_maximum: int | None


class Histogram:
    """Counts of values by bucket; a value equal to a bound is in that bound's bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def observe(self, value: int) -> None:
        """Add a value in bytes."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def snapshot(self) -> HistogramSnapshot:
        """Return the cumulative counts and the sum."""
        return HistogramSnapshot(list(accumulate(self.counts)), self.total)


class SlidingMaximum:
    """The largest value of the last ``window`` seconds, to a tenth. Reading changes nothing."""

    __slots__ = ("_slots", "_width")

    def __init__(self, window: float) -> None:
        self._width = window / _SLOTS
        self._slots: dict[int, int] = {}

    def observe(self, value: int, now: float) -> None:
        """Add a value seen at ``now`` (seconds, monotonic)."""
        slot = int(now / self._width)
        if value > self._slots.get(slot, -1):
            self._slots[slot] = value
            if len(self._slots) > _SLOTS:
                self._slots = {s: v for s, v in self._slots.items() if s > slot - _SLOTS}

    def value(self, now: float) -> int | None:
        """Return the maximum, or None where nothing was seen in the window."""
        oldest = int(now / self._width) - _SLOTS
        return max((v for s, v in self._slots.items() if s > oldest), default=None)


class _Prefix:
    __slots__ = ("growth", "growth_maximum", "peak", "peak_maximum", "tasks")

    def __init__(self, bounds: tuple[int, ...], window: float) -> None:
        self.peak, self.growth = Histogram(bounds), Histogram(bounds)
        self.peak_maximum, self.growth_maximum = SlidingMaximum(window), SlidingMaximum(window)
        # Every scope from the start at 0: a series that first appears at 1 has no increase.
        self.tasks = dict.fromkeys(SCOPES, 0)


class Aggregate:
    """Takes records in, thread-safe.

    Parameters
    ----------
    bounds
        Upper bounds of both histograms in bytes, rising.
    max_prefixes
        Prefixes with a label of their own; the rest count under :data:`OVERFLOW`.
    maximum_window
        Seconds that the maxima look back.
    clock
        Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        bounds: tuple[int, ...],
        max_prefixes: int,
        maximum_window: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bounds = bounds
        self._max_prefixes = max_prefixes
        self._window = maximum_window
        self._clock = clock
        self._lock = threading.Lock()
        self._prefixes: dict[str, _Prefix] = {}
        #: Tasks that counted under :data:`OVERFLOW`.
        self.overflow_tasks = 0

    @property
    def own_labels(self) -> int:
        """The number of prefixes that have a label of their own."""
        return len(self._prefixes) - (OVERFLOW in self._prefixes)

    def observe(self, record: TaskMemory) -> None:
        """Count one record."""
        now = self._clock()
        with self._lock:
            prefix = self._prefixes.get(record.task_prefix)
            if prefix is None or record.task_prefix == OVERFLOW:
                prefix = self._prefix(to_label(record.task_prefix))
            prefix.peak.observe(record.peak_bytes)
            prefix.peak_maximum.observe(record.peak_bytes, now)
            prefix.tasks[record.scope] += 1
            if record.growth_bytes is not None:
                prefix.growth.observe(record.growth_bytes)
                prefix.growth_maximum.observe(record.growth_bytes, now)

    def snapshot(self) -> list[PrefixSnapshot]:
        """Return everything, one entry a label, consistent in itself."""
        now = self._clock()
        with self._lock:
            return [
                PrefixSnapshot(
                    label,
                    prefix.peak.snapshot(),
                    prefix.growth.snapshot(),
                    dict(prefix.tasks),
                    prefix.peak_maximum.value(now),
                    prefix.growth_maximum.value(now),
                )
                for label, prefix in self._prefixes.items()
            ]

    def _prefix(self, label: str) -> _Prefix:
        prefix = self._prefixes.get(label)
        if prefix is not None and label != OVERFLOW:
            return prefix
        if self.own_labels < self._max_prefixes and label != OVERFLOW:
            self._prefixes[label] = prefix = _Prefix(self.bounds, self._window)
            return prefix
        if self.overflow_tasks == 0:
            logger.warning(
                "dask-memusage: more than %d task prefixes; %r and all others that are new count "
                "under %s. Raise memusage.max-prefixes to tell them apart",
                self._max_prefixes,
                label,
                OVERFLOW,
            )
        self.overflow_tasks += 1
        if OVERFLOW not in self._prefixes:
            self._prefixes[OVERFLOW] = _Prefix(self.bounds, self._window)
        return self._prefixes[OVERFLOW]


def to_label(prefix: str) -> str:
    """Return a prefix as a label: of bounded length, and such that the page can be encoded."""
    return prefix[:LABEL_LENGTH].encode("utf-8", "replace").decode()


def totals(
    snapshots: Iterable[PrefixSnapshot], bounds: tuple[int, ...]
) -> tuple[HistogramSnapshot, HistogramSnapshot, dict[str, int]]:
    """Add up peaks, growths and tasks by scope over all labels."""
    peak = growth = HistogramSnapshot([0] * (len(bounds) + 1), 0)
    tasks = dict.fromkeys(SCOPES, 0)
    for one in snapshots:
        peak, growth = _add(peak, one.peak), _add(growth, one.growth)
        for scope, count in one.tasks.items():
            tasks[scope] += count
    return peak, growth, tasks


def _add(one: HistogramSnapshot, other: HistogramSnapshot) -> HistogramSnapshot:
    cumulative = [a + b for a, b in zip(one.cumulative, other.cumulative, strict=True)]
    return HistogramSnapshot(cumulative, one.total + other.total)
