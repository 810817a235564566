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

from dask_memusage_exporter.measure import threads
from dask_memusage_exporter.measure.bracket import Bracket, Look, Window
from dask_memusage_exporter.measure.children import Children
from dask_memusage_exporter.measure.heap import Heap, outside
from dask_memusage_exporter.measure.highwater import PAGE, Source
from dask_memusage_exporter.measure.hugepages import HugePages
from dask_memusage_exporter.measure.jemalloc import ThreadPeak
from dask_memusage_exporter.measure.neighbours import Neighbours, part
from dask_memusage_exporter.measure.polling import Sampler
from dask_memusage_exporter.measure.scopes import BRIEF, FLOOR_BYTES, judge

#: One page fault maps so much of a file at the most: a large folio of the page cache.
FAULT_AROUND = 2**21
_PROCESSORS = os.cpu_count() or 1

#: So many page faults map less of files than what would be called much.
FEW_FAULTS = 8


class Tracker:
    """Measures tasks of this process.

    Parameters
    ----------
    source
        Where peaks come from.
    heap
        Asked before each task; None: never (then no task's growth is the process's).
    thread_peak
        Where each thread's own peak comes from; None: nowhere.
    on_look
        Called with the open brackets, peaks up to date, on the sampler's thread with the tracker
        locked: quick, and never blocking.
    clock
        Seconds since the epoch.
    """

    def __init__(
        self,
        source: Source,
        heap: Heap | None = None,
        thread_peak: ThreadPeak | None = None,
        *,
        on_look: Callable[[list[Bracket]], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._source = source
        # A number that is only sampled is never a task's own, whatever the heap holds.
        self._heap = heap if source.exact else None
        self._thread_peak = thread_peak
        self._on_look = on_look
        self._clock = clock
        self._children = Children()
        self._open: list[Bracket] = []
        # A finalizer may come in between on the same thread, and close a bracket: of an actor's
        # coroutine that is never finished, whenever the garbage collector gets to it.
        self._lock = threading.RLock()
        self._disabled = False
        self._rss, self._mapped = source.read()[1:]
        #: Page faults when ``_mapped`` was read: while there are few more it has hardly risen.
        self._faults = 0
        self._huge_pages = HugePages()
        #: What had come as huge pages when that was last asked.
        self._huge = self._huge_pages.taken()
        #: RSS, page faults and ``_huge`` at the last reset of the mark.
        self._base: tuple[int, int, int | None] = self._rss, 0, None
        self._neighbours = Neighbours()
        #: CPU clocks of threads that are no task's, by what their activity means: "offload",
        #: data of unknown size was (de)serialised; "code", unknown code ran.
        self._witnesses: list[tuple[int, str]] = []
        self._sampler = Sampler(self._tick)
        self._sampler_clock = threads.clock_of(self._sampler.thread.ident)
        self.add_house(self._sampler_clock)
        self._reaped = Children.reaped()
        _trackers.add(self)

    def add_witness(self, clock: int | None, meaning: str) -> None:
        """Take the CPU clock of a thread as a witness against growth; "offload" or "code"."""
        if clock is not None and (clock, meaning) not in self._witnesses:
            self._witnesses.append((clock, meaning))
            self._neighbours.explain(clock)

    def add_house(self, clock: int | None) -> None:
        """Take the CPU clock of a thread whose activity is explained."""
        if clock is not None:
            self._neighbours.explain(clock)

    def look(self) -> Look:
        """Read what surrounds a task, on the event loop."""
        if self._sampler.asleep:  # it has not asked for a while
            self._huge = self._huge_pages.taken()
        witnesses = tuple(threads.cpu_ns(clock) for clock, _ in self._witnesses)
        faults, loop_ns = threads.own_usage()
        sampler_ns = threads.cpu_ns(self._sampler_clock) or 0
        others = time.process_time_ns() - loop_ns - sampler_ns - threads.total(witnesses)
        return Look(witnesses, others, faults, self._reaped, self._outside())

    def _outside(self) -> int | None:
        return outside() if self._thread_peak is not None else 0

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
        bracket.alive = alive
        if thread is not None:
            bracket.own_thread = True
            bracket.clock = threads.own_clock()
            if self._heap is not None and self._heap.ready:
                bracket.reusable = self._heap.ask()
        children = self._children
        if self._sampler.asleep:
            self._sampler.wake()
        children_peak = children.refresh() if children.listed else 0
        with self._lock:
            if self._disabled:  # closed meanwhile: its descriptors may be somebody else's now
                return None
            if self._open:
                self._meet(bracket, children_peak)
            rss, bracket.faults = self._source.reset()
            self._base = rss, bracket.faults, self._huge
            if bracket.faults - self._faults >= FEW_FAULTS or not bracket.faults:
                # The event loop may have imported what the task needs since the last look, and
                # files mapped by that are not the task's.
                self._mapped, self._faults = self._source.mapped(), bracket.faults
            bracket.rss = bracket.peak = rss + children.rss
            bracket.start_mapped = bracket.mapped = self._mapped
            bracket.changes = children.changes
            self._open.append(bracket)
            bracket.start = self._clock()
        if thread is not None and self._thread_peak is not None:
            bracket.held = self._thread_peak.start()
        return bracket

    def stop(self, bracket: Bracket) -> bool:
        """Close a bracket, on the task's own thread where it has one.

        Returns
        -------
        bool
            Whether there is something to settle: False where the bracket was given up meanwhile,
            and in a forked child.
        """
        if bracket.own_thread and self._thread_peak is not None and not self._disabled:
            bracket.thread_peak, bracket.held_after = self._thread_peak.stop()
        children_peak = self._children.refresh() if self._children.listed else 0
        with self._lock:
            bracket.stop = self._clock()
            if self._disabled or bracket not in self._open:
                return False
            try:
                bracket.faults_after = faults = self._source.faults()
                bracket.quiet = faults == bracket.faults and faults > 0
                if children_peak or not bracket.quiet:
                    self._faults = faults
                    rss = self._fold(children_peak, faults) + self._children.rss
                    bracket.gone = max(0, bracket.rss - rss)
            finally:
                self._leave(bracket)
            if bracket.others is not None:
                self._neighbours.close_account(bracket)
            bracket.changes_after = self._children.changes
        return True

    def settle(self, bracket: Bracket, before: Look) -> Window:
        """Return what a closed bracket has measured, by what surrounded it.

        At the end of the window; of an uneventful one at any time later.
        """
        after = before if bracket.quiet else self.look()
        children_changed = bracket.changes != bracket.changes_after
        if not bracket.uneventful:
            self._reaped = Children.reaped()
            children_changed |= before.reaped != self._reaped or (
                bracket.peak - bracket.rss > FLOOR_BYTES and self._children.unseen()
            )
        foreign, mapped = self._brought_in(bracket, before, after, children_changed)
        reusable = bracket.reusable
        if reusable is not None:
            # What fell away and was not the worker's was room for the task too.
            reusable += max(0, bracket.gone - foreign)
        offloaded = False
        if not bracket.quiet:
            for (_, meaning), *used in zip(
                self._witnesses, before.witnesses, after.witnesses, strict=False
            ):
                # No thread uses more than the time there was, of whenever the look before is.
                if min(threads.between(*used), bracket.seconds * 1e9) > threads.IDLE_NS:
                    offloaded |= meaning == "offload"
                    bracket.overlapped |= meaning == "code"
        if self._heap is not None and bracket.peak - bracket.rss > FLOOR_BYTES:
            self._heap.has_grown(bracket.stop - bracket.start)
        growth, scope, reason = judge(
            start_bytes=bracket.rss,
            peak_bytes=bracket.peak,
            overlapped=bracket.overlapped,
            foreign_bytes=foreign,
            offloaded=offloaded,
            reusable_bytes=reusable,
            mapped_bytes=mapped,
            own_thread=bracket.own_thread,
            exact=self._source.exact,
            children_changed=children_changed,
            brief=bracket.seconds < BRIEF,
            thread_bytes=bracket.thread_peak,
            freed_bytes=bracket.held - bracket.held_after,
            outside_bytes=_rise(before.outside, self._outside()),
        )
        return Window(
            bracket.start,
            bracket.stop,
            bracket.rss,
            bracket.peak,
            growth,
            scope,
            reason,
            reusable,
            foreign,
            bracket.concurrency,
        )

    def _brought_in(
        self, bracket: Bracket, before: Look, after: Look, children_changed: bool
    ) -> tuple[int, int]:
        """Return what came in that is not the task's: by the worker, and as pages of files."""
        foreign = bracket.foreign_after - bracket.foreign
        if bracket.excess > FLOOR_BYTES:
            self._huge = self._huge_pages.taken()
            _weigh(bracket, self._huge)
        mapped = max(bracket.mapped - bracket.start_mapped, bracket.files)
        # After a fork every page is faulted in once more, by whoever writes to it first.
        if bracket.own_thread and self._source.exact and not children_changed:
            # The event loop's own page faults show what no counter of the worker's tells of:
            # message buffers, their copies. The same bytes may be in both numbers.
            faults = bracket.faults_after - bracket.faults
            loop_faults = min(after.faults - before.faults, faults)
            foreign = max(foreign, loop_faults * PAGE)
            unexplained = _unexplained(bracket, before, after)
            if unexplained <= (faults - loop_faults) * FAULT_AROUND:
                mapped = max(mapped, unexplained)
            else:
                foreign = max(foreign, unexplained)
        return max(0, foreign), mapped

    def abandon(self, bracket: Bracket) -> None:
        """Give up a bracket that nothing will close. It overlaps nothing from now on."""
        with self._lock:
            if bracket in self._open:
                self._leave(bracket)

    def close(self) -> None:
        """End the sampler's thread and give back the source's descriptors."""
        self._sampler.stop()
        with self._lock:
            self._disabled = True
            self._open.clear()
            self._source.close()
            self._huge_pages.close()

    def _fold(self, children_peak: int, faults: int) -> int:
        """Read the source into all open brackets; return RSS. Locked.

        ``faults`` is the source's count now.
        """
        peak, rss, mapped = self._source.read()
        self._rss, self._mapped = rss, mapped
        base, faults_before, huge = self._base
        excess = peak - base - (faults - faults_before) * PAGE if faults else 0
        peak += children_peak or self._children.rss
        for bracket in self._open:
            if peak > bracket.peak:
                bracket.peak = peak
            if mapped > bracket.mapped:
                bracket.mapped = mapped
            if excess > bracket.excess:
                bracket.excess, bracket.huge = excess, huge
        return rss

    def _meet(self, new: Bracket, children_peak: int) -> None:
        """Let a bracket that opens and those that are open know of each other. Locked.

        Must be called before the mark is reset: what was so far is the others'.
        """
        self._fold(children_peak, self._source.faults())
        self._bury()
        self._neighbours.meet(new, self._open)

    def _bury(self) -> None:
        """Take off the brackets of what has ended without closing them. Locked."""
        for bracket in [bracket for bracket in self._open if not bracket.alive()]:
            self._leave(bracket)

    def _leave(self, ending: Bracket) -> None:
        """Take a bracket off. Locked."""
        self._open.remove(ending)
        if self._open:
            part(ending, self._open)

    # -- between boundaries --------------------------------------------------------------

    def _tick(self) -> bool:
        """Look between boundaries, on the sampler's thread; return whether a task runs."""
        if self._disabled:
            return False
        if not self._open:
            self._huge = self._huge_pages.taken()  # for the next task's start
            return False
        try:
            children = self._children.look(self._rss - self._mapped)
            with self._lock:
                if self._disabled:
                    return False
                self._fold(children, self._source.faults())
                self._huge = self._huge_pages.taken()
                for bracket in self._open:
                    _weigh(bracket, self._huge)
                # A new window for the mark, so that what stood long ago is not added to what a
                # child holds now, nor pages of files to what else comes in.
                self._base = *self._source.reset(), self._huge
                self._bury()
                self._on_look(self._open)
        except Exception:  # the thread must live; a look that failed shows as a change
            self._children.changes += 1
        return bool(self._open)

    def _forked(self) -> None:
        """Measure nothing in a forked child: its kept descriptors are about its parent."""
        self._disabled = True
        self._lock = threading.RLock()
        self._open = []
        self._source.close()
        self._huge_pages.close()


def _weigh(bracket: Bracket, huge: int | None) -> None:
    """Tell pages of files from huge pages, of which there are ``huge`` bytes now."""
    if huge is not None and bracket.huge is not None:
        bracket.files = max(bracket.files, bracket.excess - (huge - bracket.huge))
    bracket.excess = 0


def _unexplained(bracket: Bracket, before: Look, after: Look) -> int:
    """Return how much more came in than all threads that may be the task's had the time to touch.

    Somebody else has touched it, or it was in memory before. None of it: 0 or less.
    """
    if len(before.witnesses) != len(after.witnesses):
        return 0  # a clock that was only met in between tells of its whole life
    # The look before a short task may be of a moment earlier.
    time_ns = min(max(0, after.others - before.others), bracket.seconds * 1e9 * _PROCESSORS)
    return bracket.peak - bracket.rss - int(time_ns * threads.TOUCH_BYTES_PER_NS)


def _rise(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


_trackers: weakref.WeakSet[Tracker] = weakref.WeakSet()


def _after_fork() -> None:
    for tracker in list(_trackers):
        tracker._forked()


os.register_at_fork(after_in_child=_after_fork)
