"""jemalloc's count of what each thread holds: a task's own peak, whatever else runs.

Covers: the peak of what the calling thread has allocated less what it has freed, exact to
jemalloc's size classes (sizes are rounded up by a quarter at most); what the heap holds free.
Does not cover: memory that never passes ``malloc`` (``mmap``, pools that a library keeps to
itself), and what other threads allocate for a task (BLAS, Arrow's own threads). Memory that is
allocated and never touched counts in full here, and not at all in RSS.

Sources: jemalloc(3), "MALLCTL NAMESPACE": ``thread.peak.*``, ``thread.allocatedp``, ``epoch``,
``stats.resident``, ``stats.allocated``, ``arena.<i>.purge``.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any

#: The index that stands for all arenas, ``MALLCTL_ARENAS_ALL`` of ``jemalloc.h``.
_ALL_ARENAS = 4096

#: What the self-test allocates, at once and in small objects, and what of it must be seen: the
#: peak is brought up to date every 64 KiB, and what Python itself frees meanwhile is taken off.
_TEST_BYTES, _TEST_OBJECT_BYTES = 2**21, 256
_TEST_SEEN = 2**20

_SIZE, _U64 = ctypes.c_size_t, ctypes.c_uint64


def _preloaded() -> str:
    """Return what LD_PRELOAD has, none of it a jemalloc, and what came of it."""
    libraries = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    if not libraries:
        return "LD_PRELOAD is not set"
    return "LD_PRELOAD has " + ", and ".join(f"{one}, which {_fate(one)}" for one in libraries)


def _fate(library: str) -> str:
    try:
        ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return "the loader has ignored, or which was set too late"
    return "is loaded and is no jemalloc"


class _Mallctl:
    """``mallctl`` of the process's malloc.

    Raises
    ------
    OSError
        The process's malloc is not jemalloc; the message says what there is.
    """

    def __init__(self) -> None:
        # Looked up as malloc itself is, in the global scope: libraries that bring a private
        # jemalloc are not there. PyDLL keeps the GIL, so that a call is not a chance to lose it.
        process = ctypes.PyDLL(None)
        for prefix in ("je_", "_rjem_"):
            if not hasattr(process, "mallctl") and hasattr(process, prefix + "mallctl"):
                raise OSError(
                    f"this build of jemalloc has its functions under the prefix {prefix} and does "
                    "not stand in for malloc; take one that is built without a prefix"
                )
        if not hasattr(process, "mallctl"):
            raise OSError(f"malloc is not jemalloc ({_preloaded()})")
        self.process = process
        self._call, self._resolve = process.mallctlbymib, process.mallctlnametomib

    def by_name(self, name: str) -> ctypes.Array[Any]:
        """Return what a name is called by.

        Raises
        ------
        OSError
            There is none of that name.
        """
        mib = (_SIZE * (name.count(".") + 1))()
        length = _SIZE(len(mib))
        if self._resolve(name.encode(), mib, ctypes.byref(length), None, _SIZE(0)):
            raise OSError(f"jemalloc has no {name}")
        return mib

    def arguments(
        self, name: str, into: Any = None, value: Any = None
    ) -> Sequence[ctypes._SimpleCData[Any] | ctypes.Array[Any] | None]:
        """Return the arguments of a call that reads into, or writes, a C value, or just acts."""
        mib = self.by_name(name)
        null, none = ctypes.c_void_p(), _SIZE(0)
        into_at: tuple[Any, ...] = (null, null)
        if into is not None:
            length = _SIZE(ctypes.sizeof(into))
            into_at = (ctypes.pointer(into), ctypes.pointer(length))
        value_at: tuple[Any, ...] = (null, none)
        if value is not None:
            value_at = (ctypes.pointer(value), _SIZE(ctypes.sizeof(value)))
        return (mib, _SIZE(len(mib)), *into_at, *value_at)

    def call(self, arguments: Sequence[Any]) -> None:
        """Do it.

        Raises
        ------
        OSError
            jemalloc refuses.
        """
        if self._call(*arguments):
            raise OSError("jemalloc refuses a mallctl that it had")

    def pointer(self, name: str) -> int:
        """Return an address."""
        found = ctypes.c_void_p()
        self.call(self.arguments(name, found))
        return found.value or 0

    def version(self) -> str:
        """Return jemalloc's version."""
        text = ctypes.c_char_p()
        self.call(self.arguments("version", text))
        return (text.value or b"?").decode(errors="replace").partition("-")[0]


class _Counts:
    """Where jemalloc keeps the calling thread's counts, and where it writes that one's peak.

    Each thread has one: between a call that writes a value and the line that reads it another
    thread may get its turn, and would write its own in the same place.
    """

    def __init__(self, mallctl: _Mallctl) -> None:
        self.peak = _U64()
        self.read_peak = mallctl.arguments("thread.peak.read", self.peak)
        # Gone when the thread is.
        self.allocated, self.freed = (
            _U64.from_address(mallctl.pointer(f"thread.{name}p"))
            for name in ("allocated", "deallocated")
        )


class ThreadPeak:
    """The calling thread's own peak since it was last reset. Each thread has its own.

    Raises
    ------
    OSError
        It cannot be had here: malloc is not jemalloc, the version is too old, or Python's own
        objects do not pass it. The message says which, and what to do.
    """

    def __init__(self) -> None:
        mallctl = self._mallctl = _Mallctl()
        self._call = mallctl._call
        try:
            self._reset_it = mallctl.arguments("thread.peak.reset")
            mallctl.by_name("thread.peak.read")
        except OSError:
            raise OSError(
                f"jemalloc {mallctl.version()} has no thread.peak; take 5.3 or newer"
            ) from None
        self._own = threading.local()
        self._self_test(mallctl)
        self.version = mallctl.version()

    def start(self) -> int:
        """Begin a new window on the calling thread; return what it holds now, see :meth:`stop`."""
        try:
            own = self._own.counts
        except AttributeError:
            own = self._own.counts = _Counts(self._mallctl)
        held = own.allocated.value - own.freed.value
        self._call(*self._reset_it)
        return int(held)

    def stop(self) -> tuple[int, int]:
        """Return, in bytes, the peak of the window, and what the thread holds now.

        What it holds is all that it has ever allocated less all that it has ever freed: it falls,
        below 0 even, where a thread frees what others have allocated.
        """
        own = self._own.counts
        self._call(*own.read_peak)
        return own.peak.value, int(own.allocated.value - own.freed.value)

    def _self_test(self, mallctl: _Mallctl) -> None:
        malloc, free = mallctl.process.malloc, mallctl.process.free
        malloc.restype, malloc.argtypes = ctypes.c_void_p, (_SIZE,)
        free.restype, free.argtypes = None, (ctypes.c_void_p,)
        self.start()
        free(malloc(_TEST_BYTES))
        peak, _ = self.stop()
        if peak < _TEST_SEEN:
            raise OSError("jemalloc is loaded, but malloc does not come to it")
        self.start()
        objects = [bytes(_TEST_OBJECT_BYTES) for _ in range(_TEST_BYTES // _TEST_OBJECT_BYTES)]
        peak, _ = self.stop()
        del objects
        if peak < _TEST_SEEN:
            raise OSError(
                "jemalloc is loaded, but Python keeps small objects to itself; set "
                "PYTHONMALLOC=malloc beside LD_PRELOAD"
            )


class JemallocHeap:
    """What jemalloc keeps of freed memory, where it is the process's malloc.

    Raises
    ------
    OSError
        It is not.
    """

    def __init__(self) -> None:
        mallctl = _Mallctl()
        self._call = mallctl.call
        self._epoch, self._resident, self._allocated = _U64(1), _SIZE(), _SIZE()
        self._refresh = mallctl.arguments("epoch", value=self._epoch)
        self._read_resident = mallctl.arguments("stats.resident", self._resident)
        self._read_allocated = mallctl.arguments("stats.allocated", self._allocated)
        self._purge = mallctl.arguments(f"arena.{_ALL_ARENAS}.purge")

    def free(self) -> int:
        """Return resident bytes that are not allocated; jemalloc's own tables are among them."""
        self._call(self._refresh)
        self._call(self._read_resident)
        self._call(self._read_allocated)
        return max(0, self._resident.value - self._allocated.value)

    def trim(self) -> int:
        """Give the free pages back; return what is still resident and free."""
        self._call(self._purge)
        return self.free()
