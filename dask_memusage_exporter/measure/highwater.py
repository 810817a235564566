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
import resource
from typing import NamedTuple, Protocol

KIB = 1024
PAGE = mmap.PAGESIZE

#: How far the mark may be from what the self-test allocates: the kernel counts pages per
#: processor and sums them lazily.
_TEST_BYTES = 16 * 2**20
_TEST_SLACK = 4 * 2**20


class Reading(NamedTuple):
    """What a source says at one moment, in bytes."""

    #: Peak RSS since the previous reading.
    peak: int
    #: RSS now.
    rss: int
    #: The part of ``rss`` that is backed by files or shared memory (RssFile + RssShmem).
    mapped: int


class Source(Protocol):
    """Where peaks come from. Not thread-safe: the tracker reads under its own lock.

    To add a source: 1. a class with this shape, 2. a line in ``choose`` (``measure/__init__.py``),
    3. its name in ``memusage.yaml``, the schema and ``config.py``.
    """

    #: The value of the label ``source``.
    name: str
    #: Whether a reading's ``peak`` holds all that happened since the previous reading.
    exact: bool

    def read(self) -> Reading:
        """Return the peak since the last call and start a new window."""

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
            call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
            call.restype = ctypes.c_ssize_t
        self._buffer = ctypes.create_string_buffer(4096)
        self._address = ctypes.addressof(self._buffer)
        self._five = ctypes.create_string_buffer(b"5")
        self._fds: list[int] = []
        try:
            self._clear = self._open(f"{proc}/clear_refs", os.O_WRONLY)
            self._statm = self._open(f"{proc}/statm", os.O_RDONLY)
            self._status = self._open(f"{proc}/status", os.O_RDONLY)
            self._floor = self._self_test()
        except OSError:
            self.close()
            raise

    def read(self) -> Reading:
        """Return the peak since the last call, and reset the mark.

        A peak that rises and falls between reading the mark and resetting it (about 3 us) is
        lost; nothing of size can be touched and freed in that time.
        """
        # ru_maxrss is ten times cheaper than VmHWM, but never falls below the peak of the
        # process image before its exec: at that floor it says nothing.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        if peak <= self._floor:
            peak = self._mark()
        self._pread(self._statm, self._address, 128, 0)
        fields = self._buffer.value.split(b" ", 3)
        self._pwrite(self._clear, self._five, 1, 0)
        rss = int(fields[1]) * PAGE
        return Reading(peak if peak > rss else rss, rss, int(fields[2]) * PAGE)

    def close(self) -> None:
        """Close the descriptors."""
        while self._fds:
            os.close(self._fds.pop())

    def _open(self, path: str, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC)
        self._fds.append(fd)
        return fd

    def _reset(self) -> None:
        if self._pwrite(self._clear, self._five, 1, 0) != 1:
            raise OSError("clear_refs: the kernel refuses the reset of the high-water mark")

    def _mark(self) -> int:
        got = self._pread(self._status, self._address, len(self._buffer) - 1, 0)
        text = self._buffer.raw[: max(got, 0)]
        at = text.find(b"VmHWM:")
        if at < 0:
            raise OSError("status: there is no VmHWM")
        return int(text[at + 6 :].split(None, 1)[0]) * KIB

    def _self_test(self) -> int:
        """Check that the mark rises and falls; return the floor of ``ru_maxrss`` (0: none)."""
        self._reset()
        before = self._mark()
        with mmap.mmap(-1, _TEST_BYTES) as block:
            for offset in range(0, _TEST_BYTES, PAGE):
                block[offset] = 1
        high = self._mark()
        self._reset()
        after = self._mark()
        if high - before < _TEST_BYTES - _TEST_SLACK or high - after < _TEST_BYTES - _TEST_SLACK:
            raise OSError(
                "clear_refs: the kernel accepts the reset, but VmHWM does not follow it "
                f"({before}, {high}, {after} bytes before, at and after {_TEST_BYTES} bytes)"
            )
        lowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        return lowest if lowest > after + _TEST_SLACK else 0
