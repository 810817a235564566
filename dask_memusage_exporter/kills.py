"""A task that was executing when its worker died: counted, told to a person, written as a row."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import NamedTuple

from dask.typing import Key
from dask.utils import format_bytes

from dask_memusage_exporter.aggregate import OVERFLOW, Aggregate
from dask_memusage_exporter.exporters.prometheus import KilledSnapshot
from dask_memusage_exporter.records import TaskMemory

#: Values of the label ``cause``.
CAUSES = ("memory", "signal", "lost")


class Kill(NamedTuple):
    """One task that was executing when its worker died."""

    key: Key
    prefix: str
    cause: str
    #: Of the worker that died.
    worker: str
    #: When the scheduler saw the death, in seconds since the epoch.
    time: float
    #: The last peak that was seen, in bytes, and its age at death in seconds; None: none was.
    peak_bytes: int | None
    peak_age: float | None
    start: float | None
    start_bytes: int | None
    concurrency: int
    #: ``flight`` (its own file) or ``heartbeat`` (the last one).
    known_from: str


class Kills:
    """Counts of kills by label and cause, with the latest of each label.

    Parameters
    ----------
    aggregate
        Whose labels and whose cap these are.
    """

    def __init__(self, aggregate: Aggregate) -> None:
        self._aggregate = aggregate
        self._counts: dict[str, dict[str, int]] = {OVERFLOW: dict.fromkeys(CAUSES, 0)}
        self._latest: dict[str, Kill] = {}
        self._learnt = 0

    def learn(self, prefixes: Collection[str]) -> None:
        """Give labels to prefixes that the scheduler has seen, in order; it only ever adds some.

        So that the counter of a prefix stands at 0 before its first kill.
        """
        for prefix in islice(prefixes, self._learnt, None):
            self._of(prefix)
        self._learnt = len(prefixes)

    def count(self, kill: Kill) -> None:
        """Count a kill."""
        label = self._of(kill.prefix)
        self._counts[label][kill.cause] += 1
        self._latest[label] = kill

    def snapshot(self) -> dict[str, KilledSnapshot]:
        """Return everything, by label."""
        snapshot = {}
        for label, counts in list(self._counts.items()):
            latest = self._latest.get(label)
            snapshot[label] = KilledSnapshot(
                dict(counts),
                latest.peak_bytes if latest is not None else None,
                latest.time if latest is not None else None,
            )
        return snapshot

    def _of(self, prefix: str) -> str:
        label = self._aggregate.label_of(prefix)
        self._counts.setdefault(label, dict.fromkeys(CAUSES, 0))
        return label


def describe(kill: Kill) -> str:
    """Return a line that a person understands."""
    why = {
        "memory": "was killed for memory",
        "signal": "was killed by a signal",
        "lost": "was lost",
    }[kill.cause]
    line = f"worker {kill.worker} {why} while it ran task {kill.key!r} ({kill.prefix})"
    if kill.peak_bytes is None or kill.peak_age is None:
        line += "; its memory had not been seen yet"
    else:
        line += (
            f"; last seen peak of the process {format_bytes(kill.peak_bytes)}, "
            f"{kill.peak_age:.2f} s before"
        )
    if kill.concurrency > 1:
        line += f", with {kill.concurrency} tasks running at once"
    if kill.known_from == "heartbeat":
        line += " (from its last heartbeat: what began after that is not known)"
    return line


def to_record(kill: Kill) -> TaskMemory:
    """Return the row of a kill for sinks: status ``killed``, no growth."""
    peak = kill.peak_bytes or 0
    return TaskMemory(
        key=kill.key,
        task_prefix=kill.prefix,
        worker=kill.worker,
        start=kill.start or kill.time,
        stop=kill.time,
        start_bytes=kill.start_bytes or 0,
        peak_bytes=peak,
        growth_bytes=None,
        scope="shared",
        reason="overlap" if kill.concurrency > 1 else "polling",
        reusable_bytes=None,
        foreign_bytes=0,
        concurrency=kill.concurrency,
        input_bytes=None,
        output_bytes=None,
        status="killed",
        span_id=None,
    )
