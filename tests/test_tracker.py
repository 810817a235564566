"""The tracker on the real kernel, in this process: windows, neighbours, what surrounds them."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dask_memusage_exporter.measure import threads
from dask_memusage_exporter.measure.bracket import Bracket, Window
from dask_memusage_exporter.measure.highwater import KernelSource
from dask_memusage_exporter.measure.tracker import Tracker
from tests.conftest import wait_until

#: What children this process has is the question here.
pytestmark = pytest.mark.usefixtures("childless")

MIB = 2**20

#: What mmap makes by default is shared memory.
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Cold:
    """A heap that holds nothing free: what this process's own holds is not the question here."""

    ready = True

    def ask(self) -> int:
        return 0

    def save(self) -> None:
        pass

    def has_grown(self, seconds: float) -> None:
        pass


class Task:
    """A bracket on a thread of its own, and what surrounds it, as a worker would hold it."""

    def __init__(self, tracker: Tracker, *, thread: bool = True) -> None:
        self.tracker = tracker
        self.pool = ThreadPoolExecutor(1)
        self.runs = True
        self.before = tracker.look()
        self.bracket: Bracket = self.do(self._start, thread)

    def _start(self, thread: bool) -> Bracket:
        ident = threading.get_ident() if thread else None
        bracket = self.tracker.start(ident, lambda: self.runs)
        assert bracket is not None
        return bracket

    def do(self, what: Callable[..., Any], *args: Any) -> Any:
        """Do something on the task's thread, and wait for it."""
        return self.pool.submit(what, *args).result()

    def end(self) -> Window:
        """Close the bracket; return what was measured."""
        assert self.do(self.tracker.stop, self.bracket)
        return self.tracker.settle(self.bracket, self.before)


def touch(mib: int) -> mmap.mmap:
    """Return fresh memory, all of it resident; it goes back to the system when it is closed."""
    block = mmap.mmap(-1, mib * MIB, flags=PRIVATE)
    for offset in range(0, mib * MIB, mmap.PAGESIZE):
        block[offset] = 1
    return block


def spike(mib: int) -> None:
    touch(mib).close()


def burn() -> None:
    """Use more processor time than an idle thread may."""
    end = threads.cpu_ns(threads.clock_of(threading.get_ident())) + 20 * threads.IDLE_NS
    while threads.cpu_ns(threads.clock_of(threading.get_ident())) < end:
        sum(range(1000))


def fail(*_: Any) -> Any:
    raise OSError("on purpose")


@pytest.fixture
def tracker() -> Iterator[Tracker]:
    """A tracker whose event loop is this thread."""
    tracker = Tracker(KernelSource(), Cold())
    tracker.add_house(threads.clock_of(threading.get_ident()))
    yield tracker
    tracker.close()


def test_alone(tracker: Tracker) -> None:
    """A spike between two quiet moments is the task's own, however short."""
    task = Task(tracker)
    task.do(spike, 64)
    window = task.end()
    assert (window.scope, window.reason, window.concurrency) == ("process", None, 1)
    assert window.growth_bytes == pytest.approx(64 * MIB, rel=0.02)
    assert window.peak_bytes == window.start_bytes + window.growth_bytes
    assert window.start < window.stop


def test_what_was_before_does_not_count(tracker: Tracker) -> None:
    """A peak before the start, and one after the stop, are not in the window."""
    spike(64)
    task = Task(tracker)
    window = task.end()
    spike(64)
    assert window.peak_bytes - window.start_bytes < MIB


def test_overlap(tracker: Tracker) -> None:
    """Two tasks that overlap: each has the peak of its own window, and who waited is no one."""
    long, short = Task(tracker), Task(tracker)
    short.do(spike, 64)
    second = short.end()
    long.do(spike, 96)
    first = long.end()
    assert (first.scope, first.reason, first.growth_bytes) == ("shared", "overlap", None)
    assert first.concurrency == second.concurrency == 2
    assert first.peak_bytes - first.start_bytes >= 95 * MIB
    # The first one used no processor time while the second was open.
    assert second.scope == "process"
    assert second.growth_bytes == pytest.approx(64 * MIB, rel=0.02)


def test_busy_neighbour(tracker: Tracker) -> None:
    """A neighbour that uses the processor makes a task shared; who ends first is no matter."""
    for first_to_end in (0, 1):
        pair = [Task(tracker), Task(tracker)]
        for task in pair:
            task.do(burn)
        ends = [pair[first_to_end].end(), pair[1 - first_to_end].end()]
        assert [window.reason for window in ends] == ["overlap", "overlap"]


def test_neighbour_of_helpers(tracker: Tracker) -> None:
    """An idle neighbour whose helper thread works is not idle."""
    task, neighbour = Task(tracker), Task(tracker)

    def helped() -> None:
        helper = threading.Thread(target=burn)
        helper.start()
        helper.join()

    neighbour.do(helped)
    assert task.end().reason == "overlap"
    neighbour.end()


def test_neighbour_without_thread(tracker: Tracker) -> None:
    """What has no thread of its own, a coroutine, may have done anything at any time."""
    coroutine, task = Task(tracker, thread=False), Task(tracker)
    assert task.end().reason == "overlap"
    task = Task(tracker)
    task.do(burn)
    assert coroutine.end().reason == "overlap"
    assert task.end().reason == "overlap"
    assert Task(tracker, thread=False).end().reason == "executor"


def test_abandoned(tracker: Tracker) -> None:
    """A bracket that nothing closes overlaps nothing from its end on, and everything before it."""
    beside, left = Task(tracker), Task(tracker)
    left.do(burn)
    left.runs = False
    assert beside.end().reason == "overlap"
    window = Task(tracker).end()
    assert (window.scope, window.concurrency) == ("process", 1)
    assert not left.do(tracker.stop, left.bracket)


def test_thread_that_has_ended(tracker: Tracker) -> None:
    """A bracket whose thread is gone is asked for no clock that is gone with it."""
    left = Task(tracker)
    left.pool.shutdown()
    assert Task(tracker).end().reason == "overlap"  # nobody can say what it has done meanwhile
    left.runs = False
    assert Task(tracker).end().scope == "process"


def test_endless(tracker: Tracker) -> None:
    """A bracket that stays open for ever keeps nothing of all those that come and go."""
    endless = Task(tracker)
    for number in range(200):
        other = Task(tracker)
        if number % 2:
            other.end()
        else:
            other.runs = False
        other.pool.shutdown()
    Task(tracker).end()
    assert not endless.bracket.others
    assert tracker._open == [endless.bracket]


def test_growth_of_somebody_else(tracker: Tracker) -> None:
    """A task that only sleeps is not blamed for what the event loop makes resident."""
    task = Task(tracker)
    block = touch(64)
    window = task.end()
    assert (window.scope, window.reason) == ("shared", "transfer")
    assert window.foreign_bytes == pytest.approx(64 * MIB, rel=0.05)
    block.close()


def test_growth_of_huge_pages(tracker: Tracker) -> None:
    """Nor where huge pages make it a few faults: the task's threads had not the time for it."""
    task = Task(tracker)
    block = mmap.mmap(-1, 256 * MIB, flags=PRIVATE)
    block.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, len(block), mmap.PAGESIZE):
        block[offset] = 1
    window = task.end()
    assert (window.scope, window.reason) == ("shared", "transfer")
    assert window.foreign_bytes >= 128 * MIB
    block.close()


def test_code_on_the_main_thread() -> None:
    """Where the main thread is no event loop, what it does is somebody's code."""
    tracker = Tracker(KernelSource(), Cold())
    tracker.add_witness(threads.clock_of(threading.main_thread().ident), "code")
    task = Task(tracker)
    burn()
    spike(2)
    assert task.end().reason == "overlap"
    tracker.close()


def test_offload_thread(tracker: Tracker) -> None:
    """A helper thread of the worker that has been busy has (de)serialised something."""
    with ThreadPoolExecutor(1) as offload:
        clock = threads.clock_of(offload.submit(threading.get_ident).result())
        tracker.add_witness(clock, "offload")
        assert Task(tracker).end().scope == "process"
        task = Task(tracker)
        offload.submit(burn).result()
        offload.submit(spike, 1).result()
        assert task.end().reason == "transfer"


def test_witness_that_comes_late(tracker: Tracker) -> None:
    """A clock that is met while a task runs tells of its whole life, and nothing of the window."""
    task = Task(tracker)
    task.do(spike, 32)
    with ThreadPoolExecutor(1) as offload:
        for _ in range(10):
            offload.submit(burn).result()
        clock = threads.clock_of(offload.submit(threading.get_ident).result())
        tracker.add_witness(clock, "offload")
        window = task.end()
    assert (window.scope, window.reason) == ("process", None)


def test_room_that_falls_away(tracker: Tracker) -> None:
    """Memory that goes back during the task was room for it that its growth does not show."""
    held = touch(64)
    task = Task(tracker)
    task.do(held.close)
    task.do(spike, 48)
    window = task.end()
    assert (window.scope, window.reason) == ("shared", "warm_heap")
    assert window.peak_bytes - window.start_bytes + window.reusable_bytes >= 48 * MIB


def test_shared_memory(tracker: Tracker) -> None:
    """Shared memory, as a mapped file, may be somebody else's too: it is told apart."""
    task = Task(tracker)
    block = task.do(mmap.mmap, -1, 64 * MIB)
    task.do(block.write, bytes(64 * MIB))
    window = task.end()
    assert (window.scope, window.reason) == ("shared", "mapped")
    block.close()


def mapped_file(path: Path) -> Callable[[], int]:
    """Return what reads a file of 60 MiB through a mapping, which is gone again at its end."""
    path.write_bytes(b"\1" * 60 * MIB)

    def read() -> int:
        return int(np.memmap(path, mode="r").max())

    assert read()  # in the page cache by now
    return read


def test_short_read_of_a_mapped_file(tracker: Tracker, tmp_path: Path) -> None:
    """A read between two looks at what is mapped: one page fault brings more than its own page."""
    read = mapped_file(tmp_path / "mapped")
    tracker._sampler._tick = lambda: True  # no look between
    for _ in range(5):
        task = Task(tracker)
        task.do(read)
        window = task.end()
        assert (window.scope, window.reason) == ("shared", "mapped"), window
        assert window.peak_bytes - window.start_bytes > 59 * MIB


def test_short_read_before_other_growth(tracker: Tracker, tmp_path: Path) -> None:
    """Page faults of later, between other looks, do not explain the growth of before."""
    read = mapped_file(tmp_path / "mapped")
    task = Task(tracker)
    task.do(read)
    wait_until(lambda: task.bracket.files > 40 * MIB, what="a look after the file was read")
    task.do(spike, 40)
    window = task.end()
    assert (window.scope, window.reason) == ("shared", "mapped"), window


@pytest.mark.parametrize("pages", [1600, 4500, 6104, 9000, 15000])
def test_huge_pages_are_the_tasks_own(pages: int, tracker: Tracker) -> None:
    """Huge pages come with fewer faults than there are pages in them, and are no files."""

    def fill() -> None:
        with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=PRIVATE) as block:
            block.madvise(mmap.MADV_HUGEPAGE)
            for offset in range(0, len(block), mmap.PAGESIZE):
                block[offset] = 1

    for _ in range(5):
        task = Task(tracker)
        task.do(fill)
        window = task.end()
        assert (window.scope, window.reason) == ("process", None), window
        assert window.growth_bytes == pytest.approx(pages * mmap.PAGESIZE, rel=0.02, abs=MIB)


def test_moved_by_the_worker(tracker: Tracker) -> None:
    """The worker's number is the one that its owner has put on the bracket."""
    task = Task(tracker)
    task.bracket.foreign, task.bracket.foreign_after = 5 * MIB, 8 * MIB
    window = task.end()
    assert (window.reason, window.foreign_bytes) == ("transfer", 3 * MIB)


def test_fork(tracker: Tracker) -> None:
    """A forked child measures nothing, and its parent is not disturbed."""
    task = Task(tracker)
    child = os.fork()
    if child == 0:
        try:
            started = tracker.start(None, lambda: True)
            stopped = tracker.stop(task.bracket)
            os._exit(0 if started is None and not stopped else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    task.do(spike, 64)
    window = task.end()
    assert (window.scope, window.reason) == ("shared", "polling")
    assert window.peak_bytes - window.start_bytes == pytest.approx(64 * MIB, rel=0.05)


def test_closed(tracker: Tracker) -> None:
    """After it is closed nothing starts, and what was open ends without a record."""
    task = Task(tracker)
    tracker.close()
    assert not task.do(tracker.stop, task.bracket)
    assert tracker.start(None, lambda: True) is None
    wait_until(lambda: not tracker._sampler.thread.is_alive(), what="the sampler's thread to end")


def test_source_that_fails(tracker: Tracker) -> None:
    """A bracket whose end cannot be read is closed all the same, and overlaps nothing."""
    task = Task(tracker)
    tracker._source.faults = fail
    with pytest.raises(OSError, match="on purpose"):
        task.do(tracker.stop, task.bracket)
    del tracker._source.faults
    window = Task(tracker).end()
    assert (window.scope, window.concurrency) == ("process", 1)


def test_sampler_sleeps_and_wakes(tracker: Tracker) -> None:
    """The sampler looks while something is open, and sleeps when nothing is."""
    wait_until(lambda: tracker._sampler.asleep)
    looks = SimpleNamespace(count=0)
    look = tracker._children.look

    def counting(own: int) -> int:
        looks.count += 1
        return look(own)

    tracker._children.look = counting
    task = Task(tracker)
    assert not tracker._sampler.asleep
    wait_until(lambda: looks.count >= 5, what="five looks")
    task.end()
    wait_until(lambda: tracker._sampler.asleep)
    # One that wakes it while it falls asleep is not missed, whatever the moment.
    for _ in range(20):
        before = looks.count
        task = Task(tracker)
        wait_until(lambda before=before: looks.count > before, what="a look at this task")
        task.end()


def test_look_that_fails(tracker: Tracker) -> None:
    """A look that fails neither ends the sampler nor lets a growth be called exact."""
    tracker._children.look = fail
    task = Task(tracker)
    changes = task.bracket.changes
    wait_until(lambda: tracker._children.changes > changes)
    assert tracker._sampler.thread.is_alive()
    assert task.end().reason == "polling"


def test_a_finalizer_may_close_a_bracket_while_another_opens(tracker: Tracker) -> None:
    """The garbage collector runs on any thread, whatever lock of ours that holds."""
    coroutine = tracker.start(None, lambda: True)
    assert coroutine is not None

    def collected() -> bool:
        return tracker.stop(coroutine) or True

    one = tracker.start(None, collected)
    other = tracker.start(None, lambda: True)  # asks whether the first one still runs
    assert one is not None
    assert other is not None
    assert not tracker.stop(coroutine)
    assert tracker.stop(one)
    assert tracker.stop(other)
