"""Per-prefix histograms, counters and maxima of one process or cluster.

Records are counted into a :class:`Batch`, and batches are added to :class:`Aggregate`: the worker's
for its own page, the scheduler's for the cluster's, so that no message is owed for a single task.

Covers: exact counts and sums, the cap on prefixes, maxima over a sliding window.
Does not cover: how they are shown; exporters read :meth:`Aggregate.snapshot`.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from dask_memusage_exporter.measure.scopes import SCOPES
from dask_memusage_exporter.records import TaskMemory

logger = logging.getLogger("distributed.worker.memusage")

#: The label of all prefixes beyond the cap.
OVERFLOW = "__overflow__"

#: Longer prefixes are cut: a label of 10 kB helps nobody.
LABEL_LENGTH = 255

#: Slots in which a sliding maximum is kept.
_SLOTS = 10

#: No count or sum of one batch is as large, and the floats of a page can hold what adds up.
_BEYOND = 2**63


class HistogramSnapshot(NamedTuple):
    """A histogram's state: cumulative counts, one a bound and one for infinity; sum in bytes."""

    cumulative: list[int]
    total: int


class PrefixSnapshot(NamedTuple):
    """All that is known of one label."""

    label: str
    peak: HistogramSnapshot
    growth: HistogramSnapshot
    input: HistogramSnapshot
    tasks: dict[str, int]
    #: The largest in the window in bytes; None: none in it.
    peak_maximum: int | None
    growth_maximum: int | None


class Histogram:
    """Counts of values by bucket; a value equal to a bound is in that bound's bucket."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        #: Count by the bucket's number; most tasks of a kind are alike and fill few of them.
        self.counts: dict[int, int] = {}
        self.total = 0

    def observe(self, value: int, bounds: Sequence[int]) -> None:
        """Add a value in bytes."""
        bucket = bisect_left(bounds, value)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.total += value

    def add(self, counts: Iterable[tuple[int, int]], total: int) -> None:
        """Add another histogram's counts, as pairs of a bucket's number and a count."""
        for bucket, count in counts:
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.total += total

    def snapshot(self, buckets: int) -> HistogramSnapshot:
        """Return the cumulative counts of that many buckets and the sum."""
        get = self.counts.get
        return HistogramSnapshot(
            list(accumulate(get(bucket, 0) for bucket in range(buckets))), self.total
        )


class Tally:
    """What has been counted of one prefix: histograms, tasks by scope, the largest values."""

    __slots__ = ("growth", "growth_largest", "input", "peak", "peak_largest", "tasks")

    def __init__(self) -> None:
        self.peak, self.growth, self.input = Histogram(), Histogram(), Histogram()
        # Every scope from the start at 0: a series that first appears at 1 has no increase.
        self.tasks = dict.fromkeys(SCOPES, 0)
        #: The largest in bytes; -1: none.
        self.peak_largest = self.growth_largest = -1

    def observe(self, record: TaskMemory, bounds: Sequence[int]) -> None:
        """Count one record."""
        peak, growth = record.peak_bytes, record.growth_bytes
        self.peak.observe(peak, bounds)
        self.peak_largest = max(self.peak_largest, peak)
        if growth is not None:
            self.growth.observe(growth, bounds)
            self.growth_largest = max(self.growth_largest, growth)
        if record.input_bytes is not None:
            self.input.observe(record.input_bytes, bounds)
        self.tasks[record.scope] += 1

    def add(self, wire: Sequence[Any]) -> None:
        """Add a tally as it travels; see :meth:`to_wire`, and :func:`checked` for others'."""
        peak, growth, inputs, tasks, largest = wire
        for histogram, (counts, total) in (
            (self.peak, peak), (self.growth, growth), (self.input, inputs),
        ):  # fmt: skip
            histogram.add(counts, total)
        for scope, count in tasks:
            if scope in self.tasks:
                self.tasks[scope] += count
        self.peak_largest = max(self.peak_largest, largest[0])
        self.growth_largest = max(self.growth_largest, largest[1])

    def to_wire(self) -> tuple[Any, ...]:
        """Return the tally in plain types, small."""
        return (
            (tuple(self.peak.counts.items()), self.peak.total),
            (tuple(self.growth.counts.items()), self.growth.total),
            (tuple(self.input.counts.items()), self.input.total),
            tuple((scope, count) for scope, count in self.tasks.items() if count),
            (self.peak_largest, self.growth_largest),
        )


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


class Batch:
    """Tallies since they were last taken, thread-safe: what goes into aggregates at once.

    Parameters
    ----------
    bounds
        Upper bounds of the histograms in bytes, rising.
    """

    #: Prefixes between two takes; more go to :data:`OVERFLOW` (keys that are all prefixes).
    most_prefixes = 1_000

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.fingerprint = fingerprint(bounds)
        self._lock = threading.Lock()
        self._tallies: dict[str, Tally] = {}
        #: Records in the batch.
        self.records = 0

    def observe(self, record: TaskMemory) -> None:
        """Count one record."""
        prefix = record.task_prefix
        with self._lock:
            tally = self._tallies.get(prefix)
            if tally is None:
                label = to_label(prefix) if len(self._tallies) < self.most_prefixes else OVERFLOW
                tally = self._tallies.setdefault(label, Tally())
            tally.observe(record, self.bounds)
            self.records += 1

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Return what has come since the last take, a label and its tally each; begin anew."""
        with self._lock:
            tallies, self._tallies, self.records = self._tallies, {}, 0
        return [(label, tally.to_wire()) for label, tally in tallies.items()]


class _Prefix:
    __slots__ = ("growth_maximum", "peak_maximum", "tally")

    def __init__(self, window: float) -> None:
        self.tally = Tally()
        self.peak_maximum, self.growth_maximum = SlidingMaximum(window), SlidingMaximum(window)


class Aggregate:
    """Everything counted in a process or a cluster, thread-safe.

    Parameters
    ----------
    bounds
        Upper bounds of the histograms in bytes, rising.
    max_prefixes
        Prefixes with a label of their own; the rest count under :data:`OVERFLOW`.
    maximum_window
        Seconds that the maxima look back.
    wanted
        Which prefixes may have a label of their own; the others count under :data:`OVERFLOW`.
    clock
        Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        bounds: tuple[int, ...],
        max_prefixes: int,
        maximum_window: float,
        wanted: Callable[[str], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bounds = bounds
        self.fingerprint = fingerprint(bounds)
        self._max_prefixes = max_prefixes
        self._window = maximum_window
        self._wanted = wanted
        self._clock = clock
        self._lock = threading.Lock()
        self._prefixes: dict[str, _Prefix] = {OVERFLOW: _Prefix(maximum_window)}
        self._said_overflow = False
        #: Tasks that counted under :data:`OVERFLOW`.
        self.overflow_tasks = 0

    @property
    def own_labels(self) -> int:
        """The number of prefixes that have a label of their own."""
        return len(self._prefixes) - 1

    def add(self, batch: Iterable[tuple[str, Sequence[Any]]]) -> None:
        """Add a batch, as :meth:`Batch.take` or :func:`checked` returns it."""
        now = self._clock()
        with self._lock:
            for label, wire in batch:
                prefix = self._prefix(label)
                before = sum(prefix.tally.tasks.values())
                prefix.tally.add(wire)
                if prefix is self._prefixes[OVERFLOW]:
                    self.overflow_tasks += sum(prefix.tally.tasks.values()) - before
                for maximum, largest in zip(
                    (prefix.peak_maximum, prefix.growth_maximum), wire[4], strict=True
                ):
                    if largest >= 0:
                        maximum.observe(largest, now)

    def label_of(self, prefix: str) -> str:
        """Return the label under which a prefix counts, and give it one if there is room."""
        with self._lock:
            label = to_label(prefix)
            return label if self._prefix(label) is not self._prefixes[OVERFLOW] else OVERFLOW

    def counted_under(self, label: str) -> str:
        """Return the label under which a batch's label has counted. It gets none of its own."""
        with self._lock:
            return label if label in self._prefixes else OVERFLOW

    def snapshot(self) -> list[PrefixSnapshot]:
        """Return everything, one entry a label, consistent in itself."""
        now = self._clock()
        buckets = len(self.bounds) + 1
        with self._lock:
            return [
                PrefixSnapshot(
                    label,
                    prefix.tally.peak.snapshot(buckets),
                    prefix.tally.growth.snapshot(buckets),
                    prefix.tally.input.snapshot(buckets),
                    dict(prefix.tally.tasks),
                    prefix.peak_maximum.value(now),
                    prefix.growth_maximum.value(now),
                )
                for label, prefix in self._prefixes.items()
                if label != OVERFLOW or self.overflow_tasks
            ]

    def maxima(self) -> list[tuple[str, int | None, int | None]]:
        """Return label, largest peak and largest growth in the window; see :meth:`snapshot`."""
        now = self._clock()
        with self._lock:
            return [
                (label, prefix.peak_maximum.value(now), prefix.growth_maximum.value(now))
                for label, prefix in self._prefixes.items()
            ]

    def tasks(self) -> list[tuple[str, str, int]]:
        """Return label, scope and number of tasks; all scopes of a label that is known."""
        with self._lock:
            return [
                (label, scope, count)
                for label, prefix in self._prefixes.items()
                for scope, count in prefix.tally.tasks.items()
            ]

    def _prefix(self, label: str) -> _Prefix:
        prefix = self._prefixes.get(label)
        if prefix is not None:
            return prefix
        if self.own_labels < self._max_prefixes and self._wanted(label):
            self._prefixes[label] = prefix = _Prefix(self._window)
            return prefix
        if self.own_labels >= self._max_prefixes and not self._said_overflow:
            self._said_overflow = True
            logger.warning(
                "dask-memusage: more than %d task prefixes; %r and all others that are new count "
                "under %s. Raise memusage.max-prefixes to tell them apart",
                self._max_prefixes,
                label,
                OVERFLOW,
            )
        return self._prefixes[OVERFLOW]


def to_label(prefix: str) -> str:
    """Return a prefix as a label: of bounded length, and such that the page can be encoded."""
    return to_text(prefix[:LABEL_LENGTH])


def to_text(text: str) -> str:
    """Return text such that it can be encoded: names of files may have what is no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def fingerprint(bounds: Sequence[int]) -> int:
    """Return a number that tells bounds apart without sending them."""
    return zlib.crc32(repr(tuple(bounds)).encode())


def checked(batch: Iterable[Any], buckets: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Return a batch that came from elsewhere, once all of it can be added and shown.

    What is added stays until the process ends: a label that is no string would fail the whole
    page, a negative count would make a counter fall. What a later version adds to the end of a
    tally is left out.

    Raises
    ------
    ValueError
        It is not a batch of histograms with that many buckets, infinity's among them.
    """
    label: Any = None
    try:
        checked_batch = []
        for label, wire in batch:
            tally = tuple(wire[:5])
            if type(label) is not str or not _is_tally(tally, buckets):
                break
            checked_batch.append((to_label(label), tally))
        else:
            return checked_batch
    except (TypeError, ValueError, LookupError):
        pass
    raise ValueError(f"not a batch of counts, at label {label!r:.99}")


def _is_tally(tally: tuple[Any, ...], buckets: int) -> bool:
    # Exact types: a bool or a float of another process is no count, and this is the fastest.
    peak, growth, inputs, tasks, largest = tally
    for counts, total in (peak, growth, inputs):
        if not is_count(total):
            return False
        for bucket, count in counts:
            if type(bucket) is not int or not 0 <= bucket < buckets or not is_count(count):
                return False
    for scope, count in tasks:
        if type(scope) is not str or not is_count(count):
            return False
    one, other = largest
    return type(one) is type(other) is int and -1 <= one < _BEYOND and -1 <= other < _BEYOND


def is_count(value: Any) -> bool:
    """Return whether a value from elsewhere can be added to a counter."""
    return type(value) is int and 0 <= value < _BEYOND


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
