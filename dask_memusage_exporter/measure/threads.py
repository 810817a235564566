"""CPU clocks of threads: the witness of who can have touched memory.

A thread that used no processor time in a window has allocated nothing in it. So a task that
waits for its own inner tasks does not overlap them, and one that only sleeps does not either.

Source: pthread_getcpuclockid(3), clock_gettime(2).
"""

from __future__ import annotations

import time

#: Processor time, in ns, below which a thread counts as idle in a window: waking up to look at
#: a condition costs some ten microseconds, touching 1 MiB of fresh memory a hundred or more.
IDLE_NS = 200_000

#: Beside an idle neighbour: processor time of the process that belongs to no known thread, above
#: which the neighbour's helper threads must be thought busy. Part of it is the rounding of clocks.
UNEXPLAINED_NS = 1_000_000
UNEXPLAINED_SHARE = 0.02

#: Both are missing on some systems (macOS); then no thread is ever called idle.
_CLOCK_OF = getattr(time, "pthread_getcpuclockid", None)


def clock_of(thread: int | None) -> int | None:
    """Return the id of the CPU clock of a thread (its ``ident``); None where there is none.

    The thread must be alive: the C library looks into its descriptor.
    """
    return None if _CLOCK_OF is None or thread is None else _CLOCK_OF(thread)


def cpu_ns(clock: int | None) -> int | None:
    """Return the processor time of a thread in ns; None where unknown or the thread has ended."""
    if clock is None:
        return None
    try:
        return time.clock_gettime_ns(clock)
    except OSError:
        return None
