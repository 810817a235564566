"""What the process's heaps hold free: memory that the next task can use without RSS rising.

Covers: glibc's malloc (``mallinfo2``) or jemalloc in its place, CPython's own small-object
allocator, Arrow's pools, and giving free pages back.
Does not cover: allocators that a library keeps to itself and that cannot be asked
(:data:`PRIVATE_ALLOCATORS`), and other malloc replacements. There the answer is None, "not
known", and so it is whenever the budget does not allow to ask.

Sources: mallinfo(3), malloc_info(3), malloc_trim(3), ``malloc/malloc.c`` of glibc,
``Objects/obmalloc.c`` of CPython, ``pyarrow.MemoryPool``.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dask_memusage_exporter.measure.jemalloc import JemallocHeap

#: Share of a worker's time that asking may cost, and of the time of tasks that turned out to
#: grow, for which the answer matters. One question costs from 0.2 us on a fresh heap to about 1 ms
#: with 100,000 free chunks, and 15 ms with 300,000 of 2 kB; 0.3 ms where a task has just driven a
#: worker's heap out of the caches.
ASK_SHARE = 0.005
GROWING_SHARE = 0.015
#: What is saved up for asking, in seconds: enough for a large heap, spent by a few hundred tasks
#: that come at once.
ASK_BURST = 0.05
#: The same for giving memory back, which takes up to 26 ms a time.
TRIM_BURST = 0.1

#: Importing one of these brings an allocator of its own that nobody outside can ask.
PRIVATE_ALLOCATORS = ("polars", "duckdb")


#: The peak of Arrow's pool up to which all of it is thought free. Beyond, nothing is known.
ARROW_BYTES = 2**19

# What malloc_info prints, for each arena and then for all together: free bytes by size of chunk,
# and in sum with the top of the heap, which has no line of its own.
_BIN = re.compile(rb'<(?:size|unsorted) [^>]*total="(\d+)" count="(\d+)"')
_REST = re.compile(rb'<total type="rest" count="\d+" size="(\d+)"')


class Budget:
    """A share of the time that passes, saved up to ``burst`` seconds.

    Parameters
    ----------
    share
        From 0 to 1.
    burst
        The most that can be saved, in seconds.
    now
        Seconds, monotonic.
    """

    def __init__(self, share: float, burst: float, now: float) -> None:
        self._share, self._burst = share, burst
        self._saved = burst if share > 0 else 0.0
        self._last = 0.0
        self._then = now

    def save(self, now: float) -> None:
        """Add the share of the time that has passed."""
        self.earn((now - self._then) * self._share)
        self._then = now

    @property
    def allows(self) -> bool:
        """Whether something may be spent now: as much as the last time, if the burst has that.

        What it costs is told afterwards.
        """
        return self._saved > 0 and self._saved >= min(self._last, self._burst)

    def spend(self, seconds: float) -> None:
        """Take off what was spent. The rest may become negative and is saved up again first."""
        self._saved -= seconds
        self._last = seconds

    def earn(self, seconds: float) -> None:
        """Add to what is saved."""
        self._saved = min(self._burst, self._saved + seconds)


class _MallInfo2(ctypes.Structure):
    # struct mallinfo2 of <malloc.h>; `fordblks` is all that is free, in `ordblks` chunks.
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


class Printed:
    """Calls C functions that print to a ``FILE *`` and returns what they print.

    Raises
    ------
    OSError
        The C library has no streams in memory.
    """

    def __init__(self) -> None:
        libc = ctypes.PyDLL(None)
        try:
            self._open, self._close, self._free = libc.open_memstream, libc.fclose, libc.free
        except AttributeError as error:
            raise OSError(f"open_memstream: {error}") from None
        self._open.restype = ctypes.c_void_p
        for call in (self._close, self._free):
            call.argtypes = (ctypes.c_void_p,)

    def __call__(self, print_to: Callable[[int], object]) -> bytes:
        """Return what ``print_to`` prints to the stream whose address it is given."""
        text, size = ctypes.c_void_p(), ctypes.c_size_t()
        stream = self._open(ctypes.byref(text), ctypes.byref(size))
        if not stream:
            raise OSError("open_memstream: no memory for it")
        print_to(stream)
        self._close(stream)
        try:
            return ctypes.string_at(text, size.value)
        finally:
            self._free(text)


class GlibcHeap:
    """glibc's malloc, if it is the one that the process uses.

    Raises
    ------
    OSError
        It is not (musl, macOS, glibc before 2.33, or a preloaded replacement).
    """

    def __init__(self, printed: Printed) -> None:
        process = ctypes.PyDLL(None)
        libc = ctypes.PyDLL("libc.so.6")
        try:
            # A preloaded allocator stands before libc in the global scope. glibc's own figures
            # would then be about a heap that nobody uses.
            ours, theirs = (
                ctypes.cast(lib.malloc, ctypes.c_void_p).value for lib in (process, libc)
            )
            self._mallinfo2, self._malloc_trim = libc.mallinfo2, libc.malloc_trim
            # int malloc_info(int options, FILE *stream); options must be 0.
            malloc_info = libc.malloc_info
        except AttributeError as error:
            raise OSError(f"mallinfo2: {error}") from None
        if ours != theirs:
            raise OSError("mallinfo2: malloc is not glibc's own")
        self._mallinfo2.restype = _MallInfo2
        self._malloc_trim.argtypes = (ctypes.c_size_t,)
        malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
        self._info = functools.partial(printed, functools.partial(malloc_info, 0))

    def free(self) -> int:
        """Return the free bytes, an upper bound: some of them may not be resident."""
        return int(self._mallinfo2().fordblks)

    def trim(self) -> int:
        """Give the free pages back; return a bound of what stays resident and free, in bytes.

        The figures do not fall with it: the chunks stay free, their pages go. What stays is a
        chunk's part of a page at either end, and the top of each thread's arena, which
        ``malloc_trim`` leaves alone.
        """
        self._malloc_trim(0)
        text = self._info()
        rest = int(_REST.findall(text)[-1])
        for total, count in _BIN.findall(text):
            rest -= max(0, int(total) - int(count) * 2 * mmap.PAGESIZE)
        return rest


class PyMalloc:
    """CPython's allocator for objects up to 512 bytes, which mallinfo2 knows nothing of.

    ``sys._debugmallocstats`` prints these figures to standard error; the C function behind it
    takes a stream, and we give it one in memory. It writes nothing where pymalloc is off
    (``PYTHONMALLOC=malloc``).

    Raises
    ------
    OSError
        The interpreter does not have the function, or prints something else.
    """

    def __init__(self, printed: Printed) -> None:
        try:
            print_stats = ctypes.pythonapi._PyObject_DebugMallocStats
        except AttributeError as error:
            raise OSError(f"pymalloc: {error}") from None
        print_stats.argtypes = (ctypes.c_void_p,)
        self._stats = functools.partial(printed, print_stats)
        text = self._stats()
        if text and b"unused pools" not in text:
            raise OSError("pymalloc: its statistics have another form than the known one")

    def free(self) -> int:
        """Return the bytes in free blocks and in unused pools."""
        text = self._stats()
        if not text:
            return 0
        return _figure(text, b"bytes in available blocks") + _figure(text, b" unused pools")


def _figure(text: bytes, name: bytes) -> int:
    """Return the figure behind ``=`` on the line that holds ``name``, written like 1,933,312."""
    at = text.index(b"=", text.index(name))
    return int(text[at + 1 : text.index(b"\n", at)].replace(b",", b""))


def _private() -> bool:
    """Return whether an allocator is loaded that cannot be asked."""
    return any(name in sys.modules for name in PRIVATE_ALLOCATORS)


def _arrow_pools() -> Sequence[Any]:
    """Return Arrow's pools but that of the system's malloc; none where Arrow is not loaded.

    Whichever is the default: a task may use another, or set its own and set it back.
    """
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow is None or not hasattr(pyarrow, "supported_memory_backends"):
        return ()
    return _pools_of(pyarrow)


@functools.cache
def _pools_of(pyarrow: Any) -> Sequence[Any]:
    return [
        getattr(pyarrow, f"{name}_memory_pool")()
        for name in pyarrow.supported_memory_backends()
        if name != "system"
    ]


def arrow_free() -> int | None:
    """Return a bound of what Arrow's pools keep free; None: it cannot be known.

    A pool on the system's malloc keeps nothing of its own. The others (mimalloc, jemalloc) tell
    what is in use and was at most, and keep more than the difference: 257 MB were resident after
    a peak of 209 MB. pyarrow is never imported for this.
    """
    peaks = [pool.max_memory() for pool in _arrow_pools()]
    if None in peaks or sum(peaks) > ARROW_BYTES:
        return None
    return int(sum(peaks))


def _malloc(printed: Printed) -> GlibcHeap | JemallocHeap:
    """Return the process's malloc.

    Raises
    ------
    OSError
        It is neither of those that can be asked.
    """
    try:
        return JemallocHeap()
    except OSError:
        return GlibcHeap(printed)


def outside() -> int | None:
    """Return bytes allocated so far, by anybody, that never passed malloc; None: not known.

    Of Arrow's pools and of allocators that cannot be asked; not of ``mmap`` itself.
    """
    if _private():
        return None
    try:
        return sum(int(pool.total_bytes_allocated()) for pool in _arrow_pools())
    except AttributeError:  # before Arrow 18
        return None


class Heap:
    """All heaps together, asked on a budget.

    Parameters
    ----------
    trim_share
        Share of the time for giving memory back before tasks; 0 is never.
    """

    def __init__(self, trim_share: float = 0.0) -> None:
        now = time.perf_counter()
        self._asking = Budget(ASK_SHARE, ASK_BURST, now)
        self._trimming = Budget(trim_share, TRIM_BURST, now)
        #: Why the heap cannot be asked at all; None where it can.
        self.unknown: str | None = None
        #: Whether asking is worth the call.
        self.ready = True
        try:
            printed = Printed()
            self._pymalloc = PyMalloc(printed)
            self._malloc = _malloc(printed)
        except OSError as error:
            self.unknown = str(error)

    def save(self, *, worth: bool = True) -> None:
        """Add to the budgets; off the tasks' threads, where every microsecond counts.

        ``worth`` is whether the answer would matter for the task that comes next.
        """
        now = time.perf_counter()
        self._asking.save(now)
        self._trimming.save(now)
        self.ready = worth and self.unknown is None and self._asking.allows

    def has_grown(self, seconds: float) -> None:
        """Hear of a task that has grown and how long it took: the next is asked for sooner."""
        self._asking.earn(seconds * GROWING_SHARE)

    def ask(self) -> int | None:
        """Return how many bytes the process can reuse without growing; None where not known.

        Trims first where there is something to give back and the budget allows. To be called on
        a task's own thread just before the task.
        """
        if self.unknown is not None or not self._asking.allows:
            self.ready = False
            return None
        if _private():
            return None
        arrow = arrow_free()
        if arrow is None:
            return None
        # Processor time: what a busy machine makes us wait is not the cost of asking.
        begin = time.thread_time()
        malloc = self._malloc.free()
        rest = self._pymalloc.free() + arrow
        self._asking.spend(time.thread_time() - begin)
        if malloc > 2**20 and self._trimming.allows:
            begin = time.thread_time()
            malloc = self._malloc.trim()
            self._trimming.spend(time.thread_time() - begin)
        return malloc + rest
