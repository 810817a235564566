"""The tracker: opens and closes one bracket a task and gives each the peak of its own window.

One a process, whatever number of workers lives in it: the process has one high-water mark, and two
that reset it erase each other's peaks. At every start the mark is read, folded into every open
bracket and reset; at every stop it is read and folded. So each task has the exact peak of the
process over its own window.

Covers: windows, overlap, abandoned brackets, forks. Knows neither Dask nor exporters: what the
worker moves meanwhile is handed in as a number.

``start`` and ``stop`` stand in the user's way, twice a task: they read what must be read at that
moment and nothing else. What may be read a little earlier or later (:meth:`Tracker.look`), and the
thinking (:meth:`Tracker.settle`), is for the event loop.
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
from dask_memusage_exporter.measure.scopes import judge


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


class Look(NamedTuple):
    """What is read on the event loop before a task starts and after it has ended."""

    #: CPU times of the witnesses, in ns.
    witnesses: tuple[int | None, ...]
    #: See :meth:`Children.reaped`.
    reaped: int
    #: The worker's number: what it has moved so far.
    foreign: int


class Bracket:
    """A window. Made by :meth:`Tracker.start`; changed by the tracker only, under its lock."""

    # Defaults stand on the class: most brackets never meet another, and set few of these.
    start = stop = 0.0
    #: RSS at the start, children included, and the highest so far.
    rss = peak = 0
    #: The file-backed part of RSS at the start, and the highest seen so far.
    start_mapped = mapped = 0
    #: Page faults of the process at the start.
    faults: int | None = None
    #: By how much RSS fell below its start: room that it does not show.
    gone = 0
    reusable: int | None = None
    concurrency = 1
    overlapped = False
    #: The task's own thread; None: it has none.
    thread: int | None = None
    #: CPU times in ns, once there is a neighbour: of the own thread when it was first met, of the
    #: process and the house then, and of each neighbour when both were first open.
    cpu: int | None = None
    process_cpu = house_cpu = 0
    others: dict[Bracket, int | None] | None = None
    #: What neighbours have used while both were open, in ns.
    neighbours = 0.0
    #: See :attr:`Children.changes`, at the start and at the stop.
    changes = changes_after = 0

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
        self, source: Source, heap: Heap | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._source = source
        # A number that is only sampled is never a task's own, whatever the heap holds.
        self._heap = heap if source.exact else None
        self._clock = clock
        self._children = Children()
        self._open: list[Bracket] = []
        self._lock = threading.Lock()
        self._disabled = False
        self._rss, self._mapped = source.read()[1:]
        #: CPU clocks of threads that are no task's, by what their activity means: "offload",
        #: data of unknown size was (de)serialised; "code", unknown code ran.
        self._witnesses: list[tuple[int, str]] = []
        #: CPU clocks of the event loop and our own thread: what they do is told by other means.
        self._house: list[int] = []
        self._sampler = Sampler(self._tick)
        self.add_house(threads.clock_of(self._sampler.thread.ident))
        _trackers.add(self)

    def add_witness(self, clock: int | None, meaning: str) -> None:
        """Take the CPU clock of a thread as a witness against growth; "offload" or "code"."""
        if clock is not None and (clock, meaning) not in self._witnesses:
            self._witnesses.append((clock, meaning))

    def add_house(self, clock: int | None) -> None:
        """Take the CPU clock of a thread whose activity is explained."""
        if clock is not None and clock not in self._house:
            self._house.append(clock)

    def look(self, foreign: int) -> Look:
        """Read what surrounds a task, on the event loop; ``foreign`` is the worker's number."""
        witnesses = tuple(threads.cpu_ns(clock) for clock, _ in self._witnesses)
        return Look(witnesses, Children.reaped(), foreign)

    def start(self, thread: int | None, alive: Callable[[], bool]) -> Bracket | None:
        """Open a bracket, on the task's own thread where it has one.

        Parameters
        ----------
        thread
            The calling thread, if it is the task's own; None for coroutines and for work in other
            processes.
        alive
            Asked by others' brackets, from any thread: whether this one still stands for
            something that runs.

        Returns
        -------
        Bracket or None
            None in a forked child, which measures nothing.
        """
        if self._disabled:
            return None
        bracket = Bracket()
        bracket.thread = thread
        bracket.alive = alive
        if thread is not None and self._heap is not None:
            bracket.reusable = self._heap.ask()
        children = self._children
        if self._sampler.asleep:
            children.forget_the_dead()
            self._sampler.wake()
        with self._lock:
            if self._open:
                self._meet(bracket)
            rss, bracket.faults = self._source.reset()
            bracket.rss = bracket.peak = rss + children.rss
            bracket.start_mapped = bracket.mapped = self._mapped
            bracket.changes = children.changes
            self._open.append(bracket)
            bracket.start = self._clock()
        return bracket

    def stop(self, bracket: Bracket) -> bool:
        """Close a bracket, on the task's own thread where it has one.

        Returns
        -------
        bool
            Whether there is something to settle: False where the bracket was given up meanwhile,
            and in a forked child.
        """
        with self._lock:
            bracket.stop = self._clock()
            if self._disabled or bracket not in self._open:
                return False
            faults = self._source.faults()
            # No page fault in the whole window: nothing new was resident, nothing more to read.
            if faults is None or faults != bracket.faults:
                bracket.gone = bracket.rss - self._fold(0) - self._children.rss
            self._open.remove(bracket)
            if self._open:
                self._part(bracket)
            if bracket.others is not None:
                self._close_account(bracket)
            bracket.changes_after = self._children.changes
        return True

    def settle(self, bracket: Bracket, before: Look, after: Look) -> Window:
        """Return what a closed bracket has measured, by what surrounded it."""
        foreign = max(0, after.foreign - before.foreign) + max(0, bracket.gone)
        offloaded = False
        for (_, meaning), *used in zip(
            self._witnesses, before.witnesses, after.witnesses, strict=False
        ):
            if _between(*used) > threads.IDLE_NS:
                offloaded |= meaning == "offload"
                bracket.overlapped |= meaning == "code"
        growth, scope, reason = judge(
            start_bytes=bracket.rss,
            peak_bytes=bracket.peak,
            overlapped=bracket.overlapped,
            foreign_bytes=foreign,
            offloaded=offloaded,
            reusable_bytes=bracket.reusable,
            mapped_bytes=bracket.mapped - bracket.start_mapped,
            own_thread=bracket.thread is not None,
            exact=self._source.exact,
            children_changed=(
                bracket.changes != bracket.changes_after or before.reaped != after.reaped
            ),
        )
        return Window(
            bracket.start,
            bracket.stop,
            bracket.rss,
            bracket.peak,
            growth,
            scope,
            reason,
            bracket.reusable,
            foreign,
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

    def _fold(self, children_peak: int) -> int:
        """Read the source into all open brackets; return RSS. Locked."""
        peak, rss, mapped = self._source.read()
        self._rss, self._mapped = rss, mapped
        peak += children_peak or self._children.rss
        for bracket in self._open:
            if peak > bracket.peak:
                bracket.peak = peak
            if mapped > bracket.mapped:
                bracket.mapped = mapped
        return rss

    # -- neighbours ----------------------------------------------------------------------

    def _meet(self, new: Bracket) -> None:
        """Let a bracket that opens and those that are open know of each other. Locked.

        Must be called before the mark is reset: what was so far is the others'.
        """
        self._fold(0)
        self._open = [bracket for bracket in self._open if bracket.alive()]
        self._open_account(new)
        new.others = {}
        for bracket in self._open:
            # Its thread is alive, or it would not be: a dead one must not be asked.
            cpu = threads.cpu_ns(threads.clock_of(bracket.thread))
            new.others[bracket] = cpu
            if bracket.others is None:  # its first neighbour
                bracket.others = {}
                self._open_account(bracket)
            bracket.concurrency = max(bracket.concurrency, len(self._open) + 1)
        new.concurrency = len(self._open) + 1

    def _part(self, ending: Bracket) -> None:
        """Settle what a bracket that closes and those that stay open have used. Locked."""
        used = threads.cpu_ns(threads.clock_of(ending.thread))
        for bracket in self._open:
            if not bracket.alive():
                continue
            # What each has used since both have been open: one without a thread of its own
            # (coroutines) "infinitely" much, for it can have done anything.
            before = (bracket.others or {}).get(ending, ending.cpu)
            bracket.neighbours += _between(before, used)
            before = (ending.others or {}).get(bracket, bracket.cpu)
            cpu = threads.cpu_ns(threads.clock_of(bracket.thread))
            ending.neighbours += _between(before, cpu)
            if bracket.others is not None:
                bracket.others.pop(ending, None)

    def _open_account(self, bracket: Bracket) -> None:
        """Note processor times from which a bracket is no longer alone. Locked."""
        bracket.cpu = threads.cpu_ns(threads.clock_of(bracket.thread))
        bracket.process_cpu = time.process_time_ns()
        bracket.house_cpu = self._house_cpu()

    def _close_account(self, bracket: Bracket) -> None:
        """Say from processor times whether others can have touched memory meanwhile. Locked."""
        # A neighbour may be idle itself and have helper threads that are not.
        process = time.process_time_ns() - bracket.process_cpu
        own = _between(bracket.cpu, threads.cpu_ns(threads.clock_of(bracket.thread)))
        house = self._house_cpu() - bracket.house_cpu
        unexplained = process - own - house - bracket.neighbours
        bracket.overlapped |= bracket.neighbours > threads.IDLE_NS or unexplained > max(
            threads.UNEXPLAINED_NS, threads.UNEXPLAINED_SHARE * process
        )

    def _house_cpu(self) -> int:
        clocks = (*self._house, *(clock for clock, _ in self._witnesses))
        return sum(threads.cpu_ns(clock) or 0 for clock in clocks)

    # -- between boundaries --------------------------------------------------------------

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
                # A new window for the mark, so that what stood long ago is not added to what a
                # child holds now.
                self._source.reset()
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
