"""Memory of child processes, by looking at them between samples.

Covers: every descendant of this process that is alive at two looks, about 10 ms apart. A child's
own peak counts where its high-water mark rose since the last look, so that a spike between two
looks is seen as long as the child lives to the next one. Below an old mark a spike between two
looks is not; that the child took something is known from its page faults. Pages that a forked
child still shares with its parent count once.
Does not cover: a child that is born and gone within 20 ms or so. That one was there is known all
the same: from the page faults of children that were waited for, or because it was not waited for.
Nor pages that a forked child and its parent share at first and one of them writes to later.

Sources: waitid(2) with WNOWAIT, getrusage(2) with RUSAGE_CHILDREN, proc_tid_children(5),
proc_pid_stat(5), proc_pid_statm(5), proc_pid_status(5); psutil where these are missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from resource import RUSAGE_CHILDREN, getrusage

import psutil

from dask_memusage_exporter.measure.highwater import KIB, PAGE

#: Listing descendants may cost this share of the time; with many it happens more rarely.
LIST_SHARE = 0.02

#: A child first seen this many seconds after the look before it may be an old one.
GAP = 1.0


class _Child:
    """One child at its first look: it may be between fork and exec, so nothing of it counts yet."""

    __slots__ = ("counted", "faults", "mark", "seen", "shared")

    def __init__(self, faults: int, mark: int, shared: int) -> None:
        #: Page faults at the last look: while they stand still it takes nothing new.
        self.faults = faults
        self.mark = mark
        self.shared = shared
        self.seen = False
        #: What of it is in :attr:`Children.rss`.
        self.counted = 0

    def part(self, size: int, file: int) -> int:
        """Return what of a size is not its parent's; ``file`` is what of it is mapped files.

        A child that was only forked has its parent's libraries too.
        """
        return max(0, size - self.shared - file) if self.shared else size


class Children:
    """The children of this process, as of the last look.

    Called by the sampler's thread, except where it says otherwise.
    """

    def __init__(self) -> None:
        self._own = os.getpid()
        self._image = _image(self._own)
        self._known: dict[int, _Child] = {}
        #: Their ids, those included that have ended and were not waited for.
        self.listed: set[int] = set()
        self._listed = self._next_listing = 0.0
        #: RSS of all of them at the last look, in bytes.
        self.rss = 0
        #: Rises with every birth and death that a look finds, and wherever a child took memory.
        self.changes = 0

    @staticmethod
    def reaped() -> int:
        """Return a number that rises when a child has been waited for; from any thread.

        Faults and not the peak: ``ru_maxrss`` of a child begins at the peak of the process that
        forked it, so it says nothing of small children.
        """
        return getrusage(RUSAGE_CHILDREN)[6]  # ru_minflt

    def unseen(self) -> bool:
        """Return whether there is a child that no look has seen yet; from any thread."""
        return _any_child() and not self.listed.issuperset(_children(self._own))

    def refresh(self) -> int:
        """Look at those children again that a look has seen; from any thread.

        What they have let go, or taken, and that they have ended is to be in the figures of the
        task that ends or was before, and not in the next one's. Returns what :meth:`look` does.
        """
        peak = 0
        for pid, child in list(self._known.items()):
            if child.seen:
                peak += self._see(pid, child)
        self.rss = sum(child.counted for child in list(self._known.values()))
        return peak

    def look(self, own_anonymous: int) -> int:
        """Look at all children; return their peak together since the last look, in bytes.

        ``own_anonymous`` is this process's RSS now without mapped files: what a child that was
        only forked shares with it.
        """
        if not _any_child():
            if self.listed:
                self.changes += 1
                self._known, self.listed, self.rss = {}, set(), 0
            return 0
        if time.monotonic() >= self._next_listing:
            self._list(own_anonymous)
        for pid, child in list(self._known.items()):
            if child.seen and child.shared and _image(pid) != self._image:
                child.shared = 0
        peak = self.refresh()
        for pid, child in list(self._known.items()):
            if not child.seen:
                child.seen = _now(pid) is not None
                if not child.seen:
                    self._drop(pid)
        return peak

    def _see(self, pid: int, child: _Child) -> int:
        """Take what a child holds now; return its peak since the last look."""
        faults = _faults(pid)  # first: what comes while we look belongs to the next look
        now = _now(pid)
        if now is None:
            self._drop(pid)
            return 0
        # Within an old mark nothing else tells of what comes and goes between two looks.
        took = faults != child.faults
        mark = _mark(pid) if took or not faults else child.mark
        counted, rose = child.part(*now), mark > child.mark
        self.changes += took or rose or counted > child.counted
        child.faults, child.mark, child.counted = faults, max(mark, child.mark), counted
        return max(counted, child.part(mark, now[1])) if rose else counted

    def _list(self, own_anonymous: int) -> None:
        # Processor time: what a busy machine makes us wait is not the cost of listing.
        began = time.thread_time()
        old = time.monotonic() - self._listed > GAP
        pids = _descendants(self._own)
        # By their ids too: one that has ended and was not waited for shows nothing else.
        self.changes += len(self.listed ^ pids)
        self.listed = pids
        for pid in pids - self._known.keys():
            # The peak of an old child belongs to the past; of a new one all counts.
            past = (_faults(pid), _mark(pid)) if old else (0, 0)
            self._known[pid] = _Child(*past, own_anonymous)
        self._listed = time.monotonic()
        self._next_listing = self._listed + (time.thread_time() - began) / LIST_SHARE

    def _drop(self, pid: int) -> None:
        if self._known.pop(pid, None) is not None:
            self.changes += 1
            self.listed.discard(pid)


def _any_child() -> bool:
    """Return whether this process has a child at all, without taking anybody's exit status."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    except (AttributeError, OSError):  # not on every system; then look
        return True
    return True


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    unread = [pid]
    while unread:
        new = _children(unread.pop()) - found
        found |= new
        unread += new
    return found


def _children(pid: int) -> set[int]:
    """Return the ids of a process's children, those included that have ended."""
    try:
        found: set[int] = set()
        # Much cheaper than to ask every process of the machine for its parent.
        for thread in os.listdir(f"/proc/{pid}/task"):
            found.update(map(int, _read(f"/proc/{pid}/task/{thread}/children").split()))
    except OSError:  # gone, or the kernel does not have the file
        pass
    else:
        return found
    try:
        return {child.pid for child in psutil.Process(pid).children()}
    except psutil.Error:
        return set()


def _now(pid: int) -> tuple[int, int] | None:
    """Return RSS of a process and its part in mapped files, in bytes; None once it is gone.

    Both are 0 while it waits to be waited for, and in the middle of an exec.
    """
    try:
        fields = _read(f"/proc/{pid}/statm").split(None, 3)
        return int(fields[1]) * PAGE, int(fields[2]) * PAGE
    except (OSError, IndexError):
        pass
    try:
        return psutil.Process(pid).memory_info().rss, 0
    except psutil.Error:
        return None


def _mark(pid: int) -> int:
    """Return the high-water mark of a process in bytes; 0 where it has none."""
    try:
        return int(_read(f"/proc/{pid}/status").split(b"VmHWM:", 1)[1].split(None, 1)[0]) * KIB
    except (OSError, IndexError):
        return 0


def _faults(pid: int) -> int:
    """Return the page faults of a process, minor and major; 0 where not known."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        return int(fields[7]) + int(fields[9])
    except (OSError, IndexError):
        return 0


def _image(pid: int) -> Sequence[object]:
    """Return what an exec changes: where the parts of the program lie, by chance and by its size.

    Not its command line: a worker and what it spawns by multiprocessing may have the same.
    """
    try:
        # start_code to start_stack, start_data to env_end.
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        return *fields[23:26], *fields[42:49]
    except OSError:
        pass
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return ()


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()
