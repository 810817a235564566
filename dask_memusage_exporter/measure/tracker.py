"""The tracker: opens and closes one bracket a task and gives each the peak of its own window.

One a process, whatever number of workers lives in it: the process has one high-water mark, and two
that reset it erase each other's peaks. At every start and stop the mark is read, folded into every
open bracket and reset, so each task has the exact peak of the process over its own window.

Covers: windows, overlap, abandoned brackets, forks. Knows neither Dask nor exporters: what the
worker moves meanwhile is handed in as a number, keys are opaque.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

from dask_memusage_exporter.measure import threads
from dask_memusage_exporter.measure.children import Children
from dask_memusage_exporter.measure.heap import Heap
from dask_memusage_exporter.measure.highwater import Source
from dask_memusage_exporter.measure.polling import Sampler
from dask_memusage_exporter.measure.scopes import Evidence, judge


class Window(NamedTuple):
    """What was measured of one task; see :class:`dask_memusage_exporter.records.TaskMemory`."""

    start: float
    stop: float
    start_bytes: int
    peak_bytes: int
    growth_bytes: int | None
    scope: str
    reason: str | None
    reusable_bytes: int | None
    foreign_bytes: int
    concurrency: int


class Witness(NamedTuple):
    """A thread that is not a task's, and what its activity in a window means."""

    clock: int
    #: "offload": data of unknown size was (de)serialised. "code": unknown code ran.
    #: "house": the event loop and our own sampler; what they do is told by other means.
    meaning: str


class Bracket:
    """A window that is open. Made and changed by the tracker under its lock."""

    __slots__ = (
        "alive", "changes", "clock", "concurrency", "cpu", "foreign", "mapped", "neighbours",
        "others", "overlapped", "peak", "process_cpu", "reaped", "reusable", "rss", "start",
        "start_mapped", "witnesses",
    )  # fmt: skip

    start: float
    #: RSS and its file-backed part at the start, children included.
    rss: int
    start_mapped: int
    #: The highest of both so far.
    peak: int
    mapped: int
    #: The worker's number at the start.
    foreign: int
    reusable: int | None
    concurrency: int
    overlapped: bool
    #: CPU clock of the task's own thread (None: it has none) and what it said at the start.
    clock: int | None
    cpu: int | None
    #: What the threads of brackets that were open at the start had used by then, in ns.
    others: dict[Bracket, int | None]
    #: What other brackets' threads have used in this window, in ns; None: there was no other.
    neighbours: float | None
    process_cpu: int
    witnesses: list[int | None]
    reaped: int
    changes: int
    #: Returns False once what opened the bracket has ended without closing it.
    alive: Callable[[], bool]


class Tracker:
    """Measures tasks of this process.

    Parameters
    ----------
    source
        Where peaks come from.
    heap
        Asked before each task; None: never (then no task's growth is its own).
    clock
        Seconds since the epoch.
    """

    def __init__(
        self,
        source: Source,
        heap: Heap | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._source = source
        # A number that is only sampled is never a task's own, whatever the heap holds.
        self._heap = heap if source.exact else None
        self._clock = clock
        self._children = Children()
        self._witnesses: list[Witness] = []
        self._open: list[Bracket] = []
        self._lock = threading.Lock()
        self._rss = 0
        self._disabled = False
        self._sampler = Sampler(self._tick)
        self.add_witness(threads.clock_of(self._sampler.thread), "house")
        _trackers.add(self)

    def add_witness(self, clock: int | None, meaning: str) -> None:
        """Take the CPU clock of a thread that is not a task's as evidence; see Witness."""
        if clock is not None and Witness(clock, meaning) not in self._witnesses:
            self._witnesses.append(Witness(clock, meaning))

    def start(
        self,
        foreign: int,
        *,
        alive: Callable[[], bool],
        own_thread: bool = True,
    ) -> Bracket | None:
        """Open a bracket, on the task's own thread where it has one.

        Parameters
        ----------
        foreign
            Bytes that the worker has moved so far, less what it is moving now.
        alive
            Asked by others' brackets, from any thread: whether this one still stands for
            something that runs.
        own_thread
            False for coroutines and for work in other processes.

        Returns
        -------
        Bracket or None
            None in a forked child, which measures nothing.
        """
        if self._disabled:
            return None
        bracket = Bracket()
        bracket.foreign = foreign
        bracket.alive = alive
        bracket.overlapped = False
        bracket.reusable = bracket.neighbours = None
        if own_thread:
            if self._heap is not None:
                bracket.reusable = self._heap.ask()
            bracket.clock = threads.own_clock()
            bracket.cpu = time.thread_time_ns()
        else:
            bracket.clock = bracket.cpu = None
        bracket.witnesses = [threads.cpu_ns(witness.clock) for witness in self._witnesses]
        bracket.process_cpu = time.process_time_ns()
        bracket.reaped = Children.reaped()
        if self._sampler.asleep:
            self._children.forget_the_dead()
            self._sampler.wake()
        with self._lock:
            bracket.start = self._clock()
            rss, mapped = self._fold(0)
            bracket.rss = bracket.peak = rss + self._children.rss
            bracket.start_mapped = bracket.mapped = mapped
            bracket.changes = self._children.changes
            bracket.others = {}
            if self._open:
                self._meet(bracket)
            bracket.concurrency = len(self._open) + 1
            self._open.append(bracket)
        return bracket

    def stop(self, bracket: Bracket, foreign: int | Callable[[], int]) -> Window | None:
        """Close a bracket, on the task's own thread where it has one.

        Parameters
        ----------
        foreign
            Bytes that the worker has moved so far and those it is moving now, or a function that
            says so once the memory has been read.

        Returns
        -------
        Window or None
            None where the bracket was given up meanwhile, or in a forked child.
        """
        with self._lock:
            if self._disabled or bracket not in self._open:
                return None
            rss, _ = self._fold(0)
            stop = self._clock()
            self._open.remove(bracket)
            used = threads.cpu_ns(bracket.clock)
            if self._open:
                self._part(bracket, used)
        foreign_bytes = max(0, (foreign if isinstance(foreign, int) else foreign()) - bracket.foreign)
        # Memory that was there before and has gone made room that RSS does not show.
        foreign_bytes += max(0, bracket.rss - rss - self._children.rss)
        offloaded = self._hear_witnesses(bracket, used)
        growth, scope, reason = judge(
            Evidence(
                start_bytes=bracket.rss,
                peak_bytes=bracket.peak,
                overlapped=bracket.overlapped,
                foreign_bytes=foreign_bytes,
                offloaded=offloaded,
                reusable_bytes=bracket.reusable,
                mapped_bytes=bracket.mapped - bracket.start_mapped,
                own_thread=bracket.cpu is not None,
                exact=self._source.exact,
                children_changed=(
                    bracket.changes != self._children.changes
                    or bracket.reaped != Children.reaped()
                ),
            )
        )
        return Window(
            bracket.start,
            stop,
            bracket.rss,
            bracket.peak,
            growth,
            scope,
            reason,
            bracket.reusable,
            foreign_bytes,
            bracket.concurrency,
        )

    def abandon(self, bracket: Bracket) -> None:
        """Give up a bracket that nothing will close. It overlaps nothing from now on."""
        with self._lock:
            if bracket in self._open:
                self._open.remove(bracket)

    def close(self) -> None:
        """End the sampler's thread and give back the source's descriptors."""
        self._sampler.stop()
        with self._lock:
            self._disabled = True
            self._open.clear()
            self._source.close()

    def _fold(self, children_peak: int) -> tuple[int, int]:
        """Read the source into all open brackets; return RSS and its mapped part. Locked."""
        peak, rss, mapped = self._source.read()
        self._rss = rss
        total = peak + (children_peak or self._children.rss)
        for bracket in self._open:
            if total > bracket.peak:
                bracket.peak = total
            if mapped > bracket.mapped:
                bracket.mapped = mapped
        return rss, mapped

    def _meet(self, new: Bracket) -> None:
        """Let a bracket that opens and those that are open know of each other. Locked."""
        self._open = [bracket for bracket in self._open if bracket.alive()]
        new.others = {bracket: threads.cpu_ns(bracket.clock) for bracket in self._open}
        for bracket in self._open:
            bracket.concurrency = max(bracket.concurrency, len(self._open) + 1)

    def _part(self, ending: Bracket, used: int | None) -> None:
        """Settle overlap between a bracket that closes and those that stay open. Locked."""
        for bracket in self._open:
            if not bracket.alive():
                continue
            # What each has used since both have been open. One without a thread of its own
            # (coroutines) used "infinitely" much: it can have done anything.
            since = bracket.others.pop(ending, ending.cpu)
            bracket.neighbours = (bracket.neighbours or 0) + _between(since, used)
            since = ending.others.get(bracket, bracket.cpu)
            ending.neighbours = (ending.neighbours or 0) + _between(
                since, threads.cpu_ns(bracket.clock)
            )

    def _hear_witnesses(self, bracket: Bracket, used: int | None) -> bool:
        """Settle overlap from processor times; return whether the offload thread was active."""
        offloaded = False
        explained = _between(bracket.cpu, used)
        for witness, before in zip(self._witnesses, bracket.witnesses, strict=False):
            busy = _between(before, threads.cpu_ns(witness.clock))
            explained += busy
            if busy > threads.IDLE_NS:
                offloaded |= witness.meaning == "offload"
                bracket.overlapped |= witness.meaning == "code"
        if bracket.neighbours is not None:
            # A neighbour may be idle itself and have helper threads that are not.
            process = time.process_time_ns() - bracket.process_cpu
            unexplained = process - explained - bracket.neighbours
            if bracket.neighbours > threads.IDLE_NS or unexplained > max(
                threads.UNEXPLAINED_NS, threads.UNEXPLAINED_SHARE * process
            ):
                bracket.overlapped = True
        return offloaded

    def _tick(self) -> bool:
        """Look between boundaries, on the sampler's thread; return whether a task runs."""
        if self._disabled or not self._open:
            return False
        try:
            children = self._children.look(self._rss)
            with self._lock:
                if self._disabled:
                    return False
                self._fold(children)
                self._open = [bracket for bracket in self._open if bracket.alive()]
        except Exception:  # the thread must live; a look that failed shows as a change
            self._children.changes += 1
        return bool(self._open)

    def _forked(self) -> None:
        """Measure nothing in a forked child: its kept descriptors are about its parent."""
        self._disabled = True
        self._lock = threading.Lock()
        self._open = []
        self._source.close()


def _between(before: int | None, now: int | None) -> float:
    """Return processor time in ns between two looks; infinite where a thread has no clock."""
    return float("inf") if before is None or now is None else now - before


_trackers: weakref.WeakSet[Tracker] = weakref.WeakSet()


def _after_fork() -> None:
    for tracker in list(_trackers):
        tracker._forked()


os.register_at_fork(after_in_child=_after_fork)
