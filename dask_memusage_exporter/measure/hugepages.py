"""How much anonymous memory has come as huge pages: what a page fault may bring beside one page.

An anonymous page fault makes one small page resident, or one huge page; that of a mapped file up
to 2 MiB of what is in the page cache. So growth beyond one small page a fault and all new huge
pages was pages of files, however short their stay.

Covers: huge pages of the size of a page table, of the whole machine: other processes' hide some.
Does not cover: the smaller "multi-size" ones. Where these are on nothing is known.

Sources: proc_vmstat(5), ``Documentation/admin-guide/mm/transhuge.rst`` of the kernel.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

#: Their settings and the kernel's counters.
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
COUNTERS = "/proc/vmstat"

# By a fault, and made of small pages by khugepaged, which may fill holes.
_COUNT = re.compile(rb"^thp_(?:fault|collapse)_alloc (\d+)\n", re.MULTILINE)


class HugePages:
    """The machine's huge pages.

    Parameters
    ----------
    settings, counters
        Where to read. Tests give others.
    """

    def __init__(self, settings: Path = SETTINGS, counters: str = COUNTERS) -> None:
        self._fd = -1
        # As the kernel source: a call through PyDLL keeps the GIL.
        self._pread = ctypes.PyDLL(None).pread
        self._pread.restype = ctypes.c_ssize_t
        try:
            self._size = int((settings / "hpage_pmd_size").read_text())
            for enabled in settings.glob("hugepages-*/enabled"):
                small = enabled.parent.name != f"hugepages-{self._size // 1024}kB"
                if small and "[never]" not in enabled.read_text():
                    return
        except OSError:  # a kernel without any
            self._size = 0
        try:
            self._fd = os.open(counters, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return

    def taken(self) -> int | None:
        """Return the bytes that were made resident so far as huge pages; None: not known."""
        if self._fd < 0:
            return None
        text, counts = b"", list[bytes]()
        buffer = ctypes.create_string_buffer(2**13)
        # The kernel gives some whole lines at a time.
        while len(counts) < 2 and (
            (got := self._pread(self._fd, buffer, 2**13, ctypes.c_long(len(text)))) > 0
        ):
            text += buffer.raw[:got]
            counts = _COUNT.findall(text)
        return sum(map(int, counts)) * self._size

    def close(self) -> None:
        """Close the descriptor; nothing is known from now on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
