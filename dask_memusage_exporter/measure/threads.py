"""CPU clocks and page faults of threads: the witnesses of who can have touched memory.

A thread that used no processor time in a window has allocated nothing in it. So a task that
waits for its own inner tasks does not overlap them, and one that only sleeps does not either.

Sources: pthread_getcpuclockid(3), clock_gettime(2), getrusage(2) with RUSAGE_THREAD.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterable
from math import inf

#: Processor time, in ns, below which a thread counts as idle in a window: waking up to look at
#: a condition costs some ten microseconds, touching 1 MiB of fresh memory a hundred or more.
IDLE_NS = 200_000

#: Beside an idle neighbour: processor time of the process that belongs to no known thread, above
#: which the neighbour's helper threads must be thought busy. Part of it is the rounding of clocks.
UNEXPLAINED_NS = 1_000_000
UNEXPLAINED_SHARE = 0.02

#: Bytes that a processor makes resident in one ns at the very most: 12 were measured by touching
#: one byte of each huge page, 10 by filling them, 2 with small pages (EPYC, Linux 6.18). Growth
#: beyond it is another thread's, or pages that were in memory before (mapped files).
TOUCH_BYTES_PER_NS = 20

#: Both are missing on some systems (macOS); then no thread is ever called idle.
_CLOCK_OF = getattr(time, "pthread_getcpuclockid", None)
_own = threading.local()
_THIS_THREAD = getattr(resource, "RUSAGE_THREAD", None)


def clock_of(thread: int | None) -> int | None:
    """Return the id of the CPU clock of a thread (its ``ident``); None where there is none.

    The thread must be alive, for the C library looks into its descriptor: ask on the thread
    itself. The id may be kept for longer.
    """
    return None if _CLOCK_OF is None or thread is None else _CLOCK_OF(thread)


def own_clock() -> int | None:
    """Return the id of the calling thread's CPU clock, found out once a thread."""
    try:
        clock: int | None = _own.clock
    except AttributeError:
        clock = _own.clock = clock_of(threading.get_ident())
    return clock


def own_usage() -> tuple[int, int]:
    """Return page faults and processor time in ns of the calling thread; 0 where not known."""
    if _THIS_THREAD is None:
        return 0, 0
    usage = resource.getrusage(_THIS_THREAD)
    return usage[6] + usage[7], int((usage[0] + usage[1]) * 1e9)  # minflt, majflt, utime, stime


def cpu_ns(clock: int | None) -> int | None:
    """Return the processor time of a thread in ns; None where unknown or the thread has ended."""
    if clock is None:
        return None
    try:
        return time.clock_gettime_ns(clock)
    except OSError:
        return None


def total(times: Iterable[int | None]) -> int:
    """Return a sum of processor times in ns; unknown ones count nothing."""
    return sum(one or 0 for one in times)


def between(before: int | None, now: int | None) -> float:
    """Return processor time in ns between two looks; infinite where a thread has no clock."""
    return inf if before is None or now is None else now - before
