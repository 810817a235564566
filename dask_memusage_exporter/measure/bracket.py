"""A bracket: the window of one task, and what is noted of it while it is open."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

#: In so many seconds no child process comes or goes, and a task is so short that to ask the heap
#: before it would take as long.
SHORT = 100e-6


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
    #: CPU time in ns of all threads but the witnesses, the event loop and the sampler.
    others: int
    #: Page faults of the event loop's thread.
    faults: int
    #: :meth:`Children.reaped` as it was last known: rather too early than too late.
    reaped: int
    #: See :func:`heap.outside`; 0 where no thread's own peak is known.
    outside: int | None


class Bracket:
    """A window. Made by :meth:`Tracker.start`; changed by the tracker only, under its lock."""

    # Defaults stand on the class: most brackets never meet another, and set few of these.
    start = stop = 0.0
    #: RSS at the start, children included, and the highest so far.
    rss = peak = 0
    #: The file-backed part of RSS at the start, and the highest seen so far.
    start_mapped = mapped = 0
    #: Page faults of the process at the start and at the stop; always 0 where not known.
    faults = faults_after = 0
    #: Growth between two resets of the mark beyond one small page a page fault, the most that is
    #: not weighed yet, and the huge pages there were before it; and what of it was pages of files.
    excess = files = 0
    huge: int | None = None
    #: By how much RSS fell below its start: room that it does not show.
    gone = 0
    reusable: int | None = None
    concurrency = 1
    overlapped = False
    #: Whether the task has a thread of its own, and that thread's CPU clock where it is known.
    own_thread = False
    clock: int | None = None
    #: CPU times in ns, once there is a neighbour: of the own thread when it was first met, of the
    #: process and the house then, and of each neighbour when both were first open.
    cpu: int | None = None
    process_cpu = house_cpu = 0
    others: dict[Bracket, int | None] | None = None
    #: What neighbours have used while both were open, in ns.
    neighbours = 0.0
    #: See :attr:`Children.changes`, at the start and at the stop.
    changes = changes_after = 0

    #: What the task's thread held at the start and at the stop, and its peak between; the peak is
    #: None where it is not known. See :class:`jemalloc.ThreadPeak`.
    held = held_after = 0
    thread_peak: int | None = None

    #: Whatever its maker wants to find again.
    tag: Any = None
    #: Its maker's span of the task, where it makes one.
    span: Any = None
    #: Whether the process had no page fault in the window. Then nothing new has become resident,
    #: by anybody, and most of what could be asked does not matter.
    quiet = False

    #: The worker's number, set by whoever opens and closes: what it had moved at either end.
    foreign = foreign_after = 0
    #: When its maker had opened it, in seconds of a clock that nobody sets.
    opened = 0.0
    #: How long it was open by that clock; infinite where not known.
    seconds = inf
    #: Its maker's time on the task's thread, to be counted once it is off it.
    start_seconds = stop_seconds = 0.0

    #: Returns False once what opened the bracket has ended without closing it.
    alive: Callable[[], bool]

    @property
    def uneventful(self) -> bool:
        """Whether nothing that surrounded it can matter: no page fault, and no time for much."""
        return self.quiet and self.seconds < SHORT and self.thread_peak is None
