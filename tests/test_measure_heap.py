"""What the heaps hold free: asked of the real ones, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest

from dask_memusage_exporter.measure.heap import Budget, Heap

MIB = 2**20


def script(text: str, *arguments: str, **environment: str) -> str:
    """Run a script in a fresh process; return what it prints to both streams."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, **environment},
    ).stdout


# -- budgets -----------------------------------------------------------------------------


def test_budget() -> None:
    """A share of the time, saved up to a burst; what was overdrawn is saved up first."""
    budget = Budget(0.1, burst=1.0, now=0.0)
    assert budget.allows
    budget.spend(3.0)
    assert not budget.allows
    budget.save(19.0)  # 1.9 of the 2.0 that are owed
    assert not budget.allows
    budget.save(21.0)
    assert not budget.allows  # the next may cost as much as the last, and the burst is all there is
    budget.save(31.0)
    assert budget.allows
    budget.save(1031.0)
    budget.spend(1.0)  # no more than the burst has been saved
    assert not budget.allows
    budget.earn(1.0)
    assert budget.allows


def test_dear_questions_are_rare() -> None:
    """Each is asked once as much is saved as the last has cost: none overdraws what is saved."""
    budget = Budget(0.005, burst=0.05, now=0.0)
    asked = []
    for millisecond in range(10_000):
        budget.save(millisecond / 1000)
        if budget.allows:
            budget.spend(0.015)
            asked.append(millisecond)
    # Three from the burst; then one when its 15 ms are saved again, in 3 s.
    assert asked[:3] == [0, 1, 2]
    assert len(asked) == 3 + 3
    assert asked[3] >= 1990
    assert min(after - before for before, after in pairwise(asked[3:])) >= 2990
    # Once they cost little again, all that is saved is there for them.
    budget.spend(0.0001)
    budget.earn(0.001)
    assert budget.allows


def test_no_budget() -> None:
    """A share of nothing never allows anything."""
    budget = Budget(0.0, burst=1.0, now=0.0)
    budget.save(1e6)
    assert not budget.allows


def test_asking_stays_in_its_budget() -> None:
    """A heap that is asked all the time answers now and then: what it costs is bounded."""
    heap = Heap()
    answers = []
    for _ in range(20_000):
        heap.save()
        answers.append(heap.ask())
    assert answers[0] is not None
    assert None in answers


# -- glibc -------------------------------------------------------------------------------

#: 200 MiB in blocks of several sizes, again and again on one thread: what RSS shows of it, and
#: what the heap said to have free before.
BLOCKS = """
import sys, threading
from dask_memusage_exporter import nanny
from dask_memusage_exporter.measure.heap import Budget, Heap
from dask_memusage_exporter.measure.highwater import KernelSource
MIB = 2**20
heap, source, kept = Heap(0.5), KernelSource(), []
heap._asking = Budget(1, 1e9, 0)
heap._trimming = Budget(float(sys.argv[1]), 1e9, 0)
def run(size, keep):
    reusable = heap.ask()
    rss = source.reset()[0]
    blocks = [bytearray(size) for _ in range(200 * MIB // size)]
    if keep:
        kept.append(blocks[len(blocks) // 2])
    del blocks
    print((source.read().peak - rss) // MIB, -(-reusable // MIB), size, keep)
def all_kinds():
    bytearray(30 * MIB)  # without the nanny's settings it raises glibc's thresholds
    for size, keep in ((5000, 0), (64000, 0), (MIB, 0), (64000, 1), (MIB, 1), (5000, 1)):
        for _ in range(3):
            run(size, keep)
thread = threading.Thread(target=all_kinds)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("trim", ["0", "1"])
@pytest.mark.parametrize("environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "65536"}])
def test_free_bounds_what_is_hidden(trim: str, environment: dict[str, str]) -> None:
    """Growth and what was free at the start are together what a task takes, in every state.

    With the nanny's settings of glibc and without, with trimming and without.
    """
    lines = [line.split() for line in script(BLOCKS, trim, **environment).splitlines()]
    assert len(lines) == 18
    for grew, free, *kind in lines:
        assert int(grew) + int(free) >= 199, (grew, free, kind)
        if trim == "1":
            assert int(grew) >= 180, (grew, free, kind)
    # Without trimming a warm heap does hide growth: that is why it is asked.
    assert (trim == "1") == all(int(grew) >= 180 for grew, *_ in lines)


# -- pymalloc ----------------------------------------------------------------------------


def test_pymalloc_figures_are_those_of_the_interpreter() -> None:
    """What we read is what ``sys._debugmallocstats`` prints, of a heap with holes."""
    printed = script(
        """
        import sys
        from dask_memusage_exporter.measure.heap import Printed, PyMalloc
        pymalloc = PyMalloc(Printed())
        objects = [str(i) * 3 for i in range(100_000)]
        del objects[::2]
        print("ours =", pymalloc.free(), flush=True)
        sys._debugmallocstats()
        """
    )
    figures = {
        name.strip(): int(figure.replace(",", ""))
        for name, _, figure in (line.rpartition("=") for line in printed.splitlines())
        if figure.strip().replace(",", "").isdigit()
    }
    theirs = figures["# bytes in available blocks"] + sum(
        figure for name, figure in figures.items() if "unused pools" in name
    )
    assert figures["ours"] > MIB
    # Some lines were printed in between.
    assert figures["ours"] == pytest.approx(theirs, rel=0.05)


def test_pymalloc_that_is_off() -> None:
    """With ``PYTHONMALLOC=malloc`` it holds nothing; all is glibc's."""
    printed = script(
        """
        from dask_memusage_exporter.measure.heap import Heap, Printed, PyMalloc
        print(PyMalloc(Printed()).free(), Heap().unknown)
        """,
        PYTHONMALLOC="malloc",
    )
    assert printed.split() == ["0", "None"]


# -- others ------------------------------------------------------------------------------


def test_arrow() -> None:
    """Arrow is not imported for the question; its pool is unknown once it has been used."""
    printed = script(
        """
        import sys
        from dask_memusage_exporter.measure.heap import Heap, arrow_free
        print(arrow_free(), "pyarrow" in sys.modules)
        import pyarrow
        print(arrow_free())
        block = pyarrow.allocate_buffer(64 * 2**20)
        print(arrow_free(), Heap().ask(), pyarrow.default_memory_pool().backend_name)
        """,
        ARROW_DEFAULT_MEMORY_POOL="mimalloc",
    )
    assert printed.split() == ["0", "False", "0", "None", "None", "mimalloc"]


def test_arrow_on_the_systems_malloc() -> None:
    """On the system's malloc its pool keeps nothing of its own."""
    printed = script(
        """
        import pyarrow
        from dask_memusage_exporter.measure.heap import arrow_free
        block = pyarrow.allocate_buffer(64 * 2**20)
        print(arrow_free(), pyarrow.default_memory_pool().backend_name)
        """,
        ARROW_DEFAULT_MEMORY_POOL="system",
    )
    assert printed.split() == ["0", "system"]


@pytest.mark.parametrize("name", ["polars", "duckdb"])
def test_private_allocators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library with an allocator of its own is loaded, nothing is known."""
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)
    assert Heap().ask() is not None
    monkeypatch.setitem(sys.modules, name, sys)
    assert Heap().ask() is None


def test_malloc_that_is_not_glibcs(jemalloc: str) -> None:
    """Where another malloc is preloaded glibc's figures are about a heap that nobody uses."""
    printed = script(
        """
        from dask_memusage_exporter.measure.heap import GlibcHeap, Printed
        try:
            GlibcHeap(Printed())
        except OSError as error:
            print(error)
        """,
        LD_PRELOAD=jemalloc,
    )
    assert printed.strip() == "mallinfo2: malloc is not glibc's own"


def test_jemallocs_heap(jemalloc: str) -> None:
    """What it keeps is known, and can be given back: what is freed is free, whatever its size."""
    printed = script(
        """
        from dask_memusage_exporter.measure.heap import Heap
        heap = Heap()
        before = heap.ask()
        blocks = [bytearray(64_000) for _ in range(3000)]
        held = heap.ask()
        del blocks
        freed = heap.ask()
        print(before // 2**20, held // 2**20, freed // 2**20, heap._malloc.trim() // 2**20)
        """,
        LD_PRELOAD=jemalloc,
        PYTHONMALLOC="malloc",
    )
    before, held, freed, trimmed = map(int, printed.split())
    assert freed - held > 20  # it has begun to give back itself
    assert trimmed < freed // 2
    assert max(before, held, trimmed) < 40
