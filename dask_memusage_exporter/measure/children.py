"""Memory of child processes, by looking at them between samples.

Covers: every descendant of this process that is alive at two looks, about 10 ms apart. A child's
own peak counts where its high-water mark rose since the last look, so that a spike between two
looks is seen as long as the child lives to the next one. Pages that a forked child still shares
with its parent count once.
Does not cover: a child that is born and gone within 20 ms or so. That one was there is known all
the same, from the page faults of children that were waited for.

Sources: waitid(2) with WNOWAIT, getrusage(2) with RUSAGE_CHILDREN, proc_pid_status(5), psutil.
"""

from __future__ import annotations

import os
import time
from resource import RUSAGE_CHILDREN, getrusage

import psutil

#: Listing processes may cost this share of the time, so hosts with many are listed more rarely.
LIST_SHARE = 0.02

#: A child first seen this many seconds after the look before it may be an old one.
GAP = 1.0


class _Child:
    """One child at its first look: it may be between fork and exec, so nothing of it counts yet."""

    __slots__ = ("mark", "process", "seen", "shared")

    def __init__(self, process: psutil.Process, mark: int, shared: int) -> None:
        self.process = process
        self.mark = mark
        self.shared = shared
        self.seen = False


class Children:
    """The children of this process, as of the last look. Called by the sampler's thread only."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._command = self._process.cmdline()
        self._known: dict[int, _Child] = {}
        self._listed = self._next_listing = 0.0
        #: RSS of all of them at the last look, in bytes.
        self.rss = 0
        #: Rises with every birth, death and new peak that a look finds.
        self.changes = 0

    @staticmethod
    def reaped() -> int:
        """Return a number that rises when a child has been waited for.

        Faults and not the peak: ``ru_maxrss`` of a child begins at the peak of the process that
        forked it, so it says nothing of small children.
        """
        return getrusage(RUSAGE_CHILDREN)[6]  # ru_minflt

    def forget_the_dead(self) -> None:
        """Take children off that have gone since the last look, if all have."""
        if self.rss and not _any_child():
            self.rss = 0

    def look(self, own_rss: int) -> int:
        """Look at all children; return their peak together since the last look, in bytes.

        ``own_rss`` is this process's RSS now: what a child that was only forked shares with it.
        """
        if not _any_child():
            if self._known:
                self.changes += 1
                self._known, self.rss = {}, 0
            return 0
        if time.monotonic() >= self._next_listing:
            self._list(own_rss)
        peak = self.rss = 0
        for pid, child in list(self._known.items()):
            rss, mark = _memory(child.process)
            if mark == 0:
                del self._known[pid]
                self.changes += 1
                continue
            if not child.seen:
                child.seen = True
                continue
            if child.shared and not self._only_forked(child):
                child.shared = 0
            self.rss += max(0, rss - child.shared)
            rose = mark > child.mark
            child.mark = max(mark, child.mark)
            self.changes += rose
            peak += max(0, (mark if rose else rss) - child.shared)
        return peak

    def _list(self, own_rss: int) -> None:
        began = time.monotonic()
        old = began - self._listed > GAP
        for process in self._process.children(recursive=True):
            if process.pid not in self._known:
                mark = _memory(process)[1]
                if mark == 0:  # gone, or ended and not yet waited for
                    continue
                # The peak of an old child belongs to the past; of a new one all counts.
                self._known[process.pid] = _Child(process, mark if old else 0, own_rss)
                self.changes += 1
        self._listed = time.monotonic()
        self._next_listing = self._listed + (self._listed - began) / LIST_SHARE

    def _only_forked(self, child: _Child) -> bool:
        try:
            return child.process.cmdline() == self._command
        except psutil.Error:
            return False


def _any_child() -> bool:
    """Return whether this process has a child at all, without taking anybody's exit status."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    except (AttributeError, OSError):  # not on every system; then look
        return True
    return True


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Return RSS and the high-water mark of a child in bytes, (0, 0) once it is gone."""
    try:
        with open(f"/proc/{process.pid}/status", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file if line.startswith(b"Vm"))
        return int(fields[b"VmRSS"].split()[0]) * 1024, int(fields[b"VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        rss = process.memory_info().rss
    except psutil.Error:
        return 0, 0
    return rss, rss
