"""Exemplars: the span of one recent task of each bucket of the histograms.

They come after the counts that they belong to, when a span has ended and is kept, and travel
beside them: what is wrong with one, or unknown to another version, costs no count.

Covers: the latest of each bucket of each label, which is all that is ever held.
Does not cover: which spans are kept (``spans``), and how they are shown (``exporters``).
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dask_memusage_exporter.aggregate import is_count, to_label
from dask_memusage_exporter.records import TaskMemory

#: Histograms that have exemplars.
PEAK, GROWTH = "peak", "growth"

#: An exemplar as it travels: the histogram's label and name, and the fields of :class:`Exemplar`.
Wire = tuple[str, str, int, float, str, str]

_NONE: Mapping[int, Any] = {}


class Exemplar(NamedTuple):
    """One task's value and its span. Nothing else: OpenMetrics allows 128 characters in all."""

    #: Bytes.
    value: int
    #: When the task had ended, in seconds since the epoch.
    time: float
    #: In hexadecimal, as W3C's trace context has them.
    trace_id: str
    span_id: str


class Exemplars:
    """The latest exemplar of each bucket, by label and histogram. Thread-safe.

    Parameters
    ----------
    bounds
        Upper bounds of the histograms' buckets in bytes, rising.
    most_labels
        Labels that are held; those of more are left out.
    """

    def __init__(self, bounds: Sequence[int], most_labels: int) -> None:
        self._bounds, self._most = bounds, 2 * most_labels
        self._lock = threading.Lock()
        self._latest: dict[tuple[str, str], dict[int, Exemplar]] = {}

    def observe(self, record: TaskMemory, trace_id: int, span_id: int) -> bool:
        """Take the span of a record; return whether it is the first since the last :meth:`take`."""
        label, when = to_label(record.task_prefix), record.stop
        ids = f"{trace_id:032x}", f"{span_id:016x}"
        first = not self._latest
        self.add(label, PEAK, Exemplar(record.peak_bytes, when, *ids))
        if record.growth_bytes is not None:
            self.add(label, GROWTH, Exemplar(record.growth_bytes, when, *ids))
        return first

    def add(self, label: str, name: str, exemplar: Exemplar) -> None:
        """Take one, unless its bucket has a later one."""
        bucket, histogram = bisect_left(self._bounds, exemplar.value), (label, name)
        with self._lock:
            latest = self._latest.get(histogram)
            if latest is None:
                if len(self._latest) >= self._most:
                    return
                latest = self._latest[histogram] = {}
            known = latest.get(bucket)
            if known is None or exemplar.time >= known.time:
                latest[bucket] = exemplar

    def merge(self, exemplars: Iterable[Wire], counted_under: Callable[[str], str]) -> None:
        """Take those of a batch, as :meth:`take` or :func:`checked` returns them.

        ``counted_under`` returns the label under which those of a batch's label have counted.
        """
        for label, name, value, when, trace_id, span_id in exemplars:
            exemplar = Exemplar(value, when, trace_id, span_id)
            self.add(counted_under(label), name, exemplar)

    def of(self, label: str, name: str) -> Mapping[int, Exemplar]:
        """Return those of one histogram, by the number of their bucket."""
        with self._lock:
            found = self._latest.get((label, name))
            return dict(found) if found else _NONE

    def take(self) -> list[Wire]:
        """Return what has come since the last take; begin anew."""
        with self._lock:
            latest, self._latest = self._latest, {}
        return [
            (label, name, *exemplar)
            for (label, name), by_bucket in latest.items()
            for exemplar in by_bucket.values()
        ]


def checked(exemplars: Iterable[Any]) -> list[Wire]:
    """Return exemplars that came from elsewhere, once all of them can be shown.

    Those of other histograms and further fields are a later version's, and left out. None is from
    the future, by the clock here: it would stand until then.

    Raises
    ------
    ValueError
        One of them is none.
    """
    now, checked_ones, one = time.time(), [], None
    try:
        for one in exemplars:
            label, name, *rest = one
            if name not in (PEAK, GROWTH):
                continue
            value, when, trace_id, span_id = rest[:4]
            if not (
                type(label) is str
                and is_count(value)
                and type(when) is float
                and when > 0
                and _is_id(trace_id, 32)
                and _is_id(span_id, 16)
            ):
                break
            checked_ones.append((to_label(label), name, value, min(when, now), trace_id, span_id))
        else:
            return checked_ones
    except (TypeError, ValueError, LookupError):
        pass
    raise ValueError(f"not an exemplar: {one!r:.200}")


def _is_id(value: Any, length: int) -> bool:
    return type(value) is str and len(value) == length and not value.strip("0123456789abcdef")
