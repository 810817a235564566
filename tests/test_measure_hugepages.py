"""The machine's huge pages, real ones and as other machines have them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from dask_memusage_exporter.measure.hugepages import SETTINGS, HugePages

MIB = 2**20


@pytest.mark.skipif(
    not SETTINGS.exists() or "[never]" in (SETTINGS / "enabled").read_text(),
    reason="there are no huge pages here",
)
def test_counts() -> None:
    """A block of huge pages is counted, and nothing is known once it is closed."""
    pages = HugePages()
    before = pages.taken()
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(block), mmap.PAGESIZE):
            block[offset] = 1
    assert pages.taken() - before >= 32 * MIB
    pages.close()
    assert pages.taken() is None


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Settings of a kernel that has huge pages of 2 MiB, and smaller ones that are off."""
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    for size, text in (("64kB", "always inherit madvise [never]"), ("2048kB", "[inherit] never")):
        (tmp_path / f"hugepages-{size}").mkdir()
        (tmp_path / f"hugepages-{size}" / "enabled").write_text(text)
    return tmp_path


def test_elsewhere(settings: Path, tmp_path: Path) -> None:
    """By faults and by khugepaged; of the smaller ones nothing is told, so nothing is known."""
    counters = tmp_path / "vmstat"
    counters.write_text("nr_x 7\n" * 3000 + "thp_fault_alloc 3\nthp_collapse_alloc 2\nthp_y 5\n")
    assert HugePages(settings, str(counters)).taken() == 10 * MIB
    # A kernel without any has no settings, or no counters.
    assert HugePages(tmp_path / "none", str(counters)).taken() == 0
    counters.write_text("nr_x 7\n")
    assert HugePages(settings, str(counters)).taken() == 0
    assert HugePages(settings, str(tmp_path / "none")).taken() is None
    (settings / "hugepages-64kB" / "enabled").write_text("[always] inherit madvise never")
    assert HugePages(settings, str(counters)).taken() is None
