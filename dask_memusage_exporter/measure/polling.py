"""Sampling: the fallback source, and the thread that looks between two boundaries.

Covers: RSS by psutil where the high-water mark cannot be used; a thread that wakes every 10 ms
while tasks run, for what no mark tells (children, mapped files, spikes of a polled process).
Does not cover: what lives and dies between two samples. It is never claimed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil

from dask_memusage_exporter.measure.highwater import Reading

#: Seconds between two samples while a task runs, as in dask-memusage.
INTERVAL = 0.01

#: Seconds without a task after which the thread sleeps until it is woken.
LINGER = 0.1


class PollingSource:
    """RSS at the moment of asking, by psutil: works wherever psutil does."""

    name = "polling"
    exact = False

    def __init__(self, process: psutil.Process | None = None) -> None:
        self._process = process or psutil.Process()

    def reset(self) -> tuple[int, int]:
        """Return RSS now; page faults are not counted."""
        return self.read().rss, 0

    def faults(self) -> int:
        """Return 0: not known."""
        return 0

    def mapped(self) -> int:
        """Return the shared part of RSS now."""
        return self.read().mapped

    def read(self) -> Reading:
        """Return RSS now as the peak as well: nothing is known of the time between."""
        info = self._process.memory_info()
        return Reading(info.rss, info.rss, getattr(info, "shared", 0))

    def close(self) -> None:
        """Do nothing: nothing is held."""


class Sampler:
    """A daemon thread that calls ``tick`` every :data:`INTERVAL` seconds while it returns True.

    Parameters
    ----------
    tick
        Called with no lock held. Returns whether there is anything to look at.
    """

    def __init__(self, tick: Callable[[], bool]) -> None:
        self._tick = tick
        self._wake = threading.Event()
        self._stopped = False
        #: Read by :meth:`Tracker.start` on every task: cheaper than asking the event.
        self.asleep = True
        self.thread = threading.Thread(target=self._run, name="dask-memusage", daemon=True)
        self.thread.start()

    def wake(self) -> None:
        """Begin to sample again."""
        self.asleep = False
        self._wake.set()

    def stop(self) -> None:
        """End the thread; it is gone within an interval."""
        self._stopped = True
        self._wake.set()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.wait()
            self._wake.clear()
            busy_until = time.monotonic() + LINGER
            while not self._stopped and time.monotonic() < busy_until:
                time.sleep(INTERVAL)
                if self._tick():
                    busy_until = time.monotonic() + LINGER
            # A task may start between the last look and this line: it sees `asleep` and wakes
            # us, or is seen by one more look.
            self.asleep = True
            if not self._stopped and self._tick():
                self.wake()
