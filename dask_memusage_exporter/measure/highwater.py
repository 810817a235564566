"""The kernel's high-water mark of resident memory: an exact peak with no polling.

Covers: peak, current and file-backed resident memory of this process, and resetting the peak.
Does not cover: child processes (see ``children``), other allocators' views (see ``heap``).

Sources: proc_pid_clear_refs(5), proc_pid_statm(5), proc_pid_status(5), getrusage(2) and
``fs/proc/task_mmu.c``, ``include/linux/mm.h`` (``reset_mm_hiwater_rss``) of the kernel.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from resource import RUSAGE_SELF, getrusage
from typing import Any, NamedTuple, Protocol

KIB = 1024
PAGE = mmap.PAGESIZE

# Where the fields of struct rusage stand in Python's tuple; by index because this is the hot path.
_MAXRSS, _MINFLT, _MAJFLT = 2, 6, 7

#: How far the mark may be from what the self-test allocates: the kernel counts pages per
#: processor and sums them lazily.
_TEST_BYTES = 16 * 2**20
_TEST_SLACK = 4 * 2**20


_REFUSED = "clear_refs: the kernel refuses the reset of the high-water mark"

_Arguments = tuple[ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]


class Reading(NamedTuple):
    """What a source says of the window since its last reset, in bytes."""

    #: Peak RSS in the window.
    peak: int
    #: RSS now.
    rss: int
    #: The part of ``rss`` that is backed by files or shared memory (RssFile + RssShmem).
    mapped: int


class Source(Protocol):
    """Where peaks come from. Not thread-safe: the tracker calls under its own lock.

    To add a source: 1. a class with this shape, 2. a line in ``choose`` (``measure/__init__.py``),
    3. its name in ``memusage.yaml``, the schema, ``config.py`` and ``catalog.SOURCES``.
    """

    #: The value of the label ``source``.
    name: str
    #: Whether a reading's ``peak`` holds all that happened in the window.
    exact: bool

    def reset(self) -> tuple[int, int]:
        """Begin a new window; return RSS now and a count of page faults.

        The count is the process's. While it stands still nothing new is resident. 0 where it is
        not known.
        """

    def faults(self) -> int:
        """Return the same count now."""

    def mapped(self) -> int:
        """Return the file-backed part of RSS now, in bytes."""

    def read(self) -> Reading:
        """Return what has been in the window so far. Changes nothing."""

    def close(self) -> None:
        """Release what the source holds."""


class KernelSource:
    """Peaks by resetting and reading the process's high-water mark.

    Parameters
    ----------
    proc
        The directory of this process in procfs. Tests give another.

    Raises
    ------
    OSError
        The files cannot be opened, or the kernel takes the reset but does not act on it
        (some sandboxes): the message says which.
    """

    name = "kernel"
    exact = True

    def __init__(self, proc: str = "/proc/self") -> None:
        # os.pread and os.pwrite release the GIL and may wait a switch interval (5 ms) to get
        # it back; calls through PyDLL keep it. The descriptors stay open: opening costs 15 us.
        libc = ctypes.PyDLL(None)
        self._pread, self._pwrite = libc.pread, libc.pwrite
        for call in (self._pread, self._pwrite):
            call.restype = ctypes.c_ssize_t
        self._buffer = ctypes.create_string_buffer(4096)
        self._five = ctypes.create_string_buffer(b"5")
        self._fds: list[ctypes.c_int] = []
        try:
            self._clear = self._arguments(f"{proc}/clear_refs", os.O_WRONLY, self._five, 1)
            self._statm = self._arguments(f"{proc}/statm", os.O_RDONLY, self._buffer, 128)
            self._status = self._arguments(f"{proc}/status", os.O_RDONLY, self._buffer, 4095)
            self._floor = 0
            self._floor = self._self_test()
        except OSError:
            self.close()
            raise

    def reset(self) -> tuple[int, int]:
        """Reset the mark; return RSS now and the process's page faults."""
        if self._pwrite(*self._clear) != 1:
            raise OSError(_REFUSED)
        usage = getrusage(RUSAGE_SELF)
        # The mark has just been set to RSS, and this is the cheapest way to read it. It is also
        # from where `read` takes the peak: the kernel counts pages per processor, and what is not
        # summed up yet is in statm (since Linux 6.17), but not in the mark.
        rss = int(usage[_MAXRSS]) * KIB
        if rss <= self._floor:
            rss = self._now()[0]
        return rss, int(usage[_MINFLT] + usage[_MAJFLT])

    def faults(self) -> int:
        """Return the process's page faults, minor and major, of all its threads."""
        usage = getrusage(RUSAGE_SELF)
        return int(usage[_MINFLT] + usage[_MAJFLT])

    def mapped(self) -> int:
        """Return RssFile and RssShmem now."""
        return self._now()[1]

    def read(self) -> Reading:
        """Return the mark and what is resident now."""
        # ru_maxrss is ten times cheaper than VmHWM, but never falls below the peak of the
        # process image before its exec: at that floor it says nothing.
        peak = int(getrusage(RUSAGE_SELF)[_MAXRSS]) * KIB
        if peak <= self._floor:
            peak = self._mark()
        return Reading(peak, *self._now())

    def close(self) -> None:
        """Close the descriptors."""
        while self._fds:
            fd = self._fds.pop()
            os.close(fd.value)
            fd.value = -1  # the number may be somebody else's file next

    def _arguments(self, path: str, flags: int, buffer: ctypes.Array[Any], size: int) -> _Arguments:
        """Open a file; return the arguments of all reads or writes of it.

        Made once: to convert them at every call costs as much as the call.
        """
        fd = ctypes.c_int(os.open(path, flags | os.O_CLOEXEC))
        self._fds.append(fd)
        address = ctypes.c_void_p(ctypes.addressof(buffer))
        return fd, address, ctypes.c_size_t(size), ctypes.c_long(0)

    def _now(self) -> tuple[int, int]:
        if self._pread(*self._statm) <= 0:
            raise OSError("statm: cannot be read")
        fields = self._buffer.value.split(b" ", 3)
        return int(fields[1]) * PAGE, int(fields[2]) * PAGE

    def _mark(self) -> int:
        got = self._pread(*self._status)
        text = self._buffer.raw[: max(got, 0)]
        at = text.find(b"VmHWM:")
        if at < 0:
            raise OSError("status: there is no VmHWM")
        return int(text[at + 6 :].split(None, 1)[0]) * KIB

    def _self_test(self) -> int:
        """Check that the mark rises and falls; return the floor of ``ru_maxrss``."""
        self.reset()
        before = self._mark()
        with mmap.mmap(-1, _TEST_BYTES) as block:
            for offset in range(0, _TEST_BYTES, PAGE):
                block[offset] = 1
        high = self._mark()
        self.reset()
        after = self._mark()
        if high - before < _TEST_BYTES - _TEST_SLACK or high - after < _TEST_BYTES - _TEST_SLACK:
            raise OSError(
                "clear_refs: the kernel accepts the reset, but VmHWM does not follow it "
                f"({before}, {high}, {after} bytes before, at and after {_TEST_BYTES} bytes)"
            )
        # Right after a reset: RSS, or the floor, however little it may be above that.
        return int(getrusage(RUSAGE_SELF)[_MAXRSS]) * KIB
