"""A record never blames a task for memory that is not its own, and never hides its growth.

On real worker processes: what the heap had free, what other workers of the process do, files that
are mapped, sources that only sample or fail. What a worker moves is in ``test_honesty_moved``.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import wait

from dask_memusage_exporter.records import TaskMemory
from tests import tasks, tasks_blocks
from tests.conftest import Measured, Metrics, measured, wait_until, worker_ports
from tests.tasks import Gate

MIB = 2**20

TOTAL = 200 * MIB
RUNS = 10

#: How far a growth that is called the task's own may be from the truth.
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def one() -> Iterator[Measured]:
    """One worker process with one thread."""
    with measured() as cluster:
        cluster.client.submit(tasks.nothing).result()
        yield cluster


@pytest.fixture(scope="module")
def trimming() -> Iterator[Measured]:
    """The same with the heap trimmed before tasks, for as much as half of the time."""
    with measured({"memusage.trim": 0.5}) as cluster:
        cluster.client.submit(tasks.nothing).result()
        yield cluster


def addresses(cluster: Measured) -> list[str]:
    return list(cluster.cluster.scheduler.workers)


def record(cluster: Measured, key: str) -> TaskMemory:
    """Return the one record of a key."""
    (found,) = (one for one in cluster.records if one.key == key)
    return found


def reached(gate: Gate) -> None:
    """Wait until a task waits at a gate."""
    wait_until(lambda: gate.reached, what=f"a task to come to {gate.path}")


def seen(one: TaskMemory) -> int:
    """Return by how much the process was seen to grow."""
    return one.peak_bytes - one.start_bytes


def assert_shared(one: TaskMemory, reason: str) -> None:
    assert (one.scope, one.reason, one.growth_bytes) == ("shared", reason, None), one


def assert_own(one: TaskMemory, truth: float, tolerance: float = 0.02) -> None:
    assert (one.scope, one.reason) == ("process", None), one
    assert one.growth_bytes == pytest.approx(truth, rel=tolerance), one


# -- mapped files ------------------------------------------------------------------------


@pytest.mark.parametrize("read", [tasks_blocks.read_mapped, tasks_blocks.read_memmap])
def test_mapped_file(read: Callable[[str], int], one: Measured, tmp_path: Path) -> None:
    """A file of 300 MiB that is read through a mapping is told apart from memory."""
    path = tmp_path / "mapped"
    path.write_bytes(b"\1" * (300 * MIB))
    one.client.submit(read, str(path), key=read.__name__).result()
    found = record(one, read.__name__)
    assert seen(found) > 290 * MIB
    assert_shared(found, "mapped")


@pytest.mark.parametrize("pieces", ["large", "small"])
def test_short_read_of_a_mapped_file(pieces: str, one: Measured, tmp_path: Path) -> None:
    """The same for 60 MiB that are read in a few milliseconds, alone or before other things.

    The page cache keeps a file in pieces as it was written, and maps it so.
    """
    path = tmp_path / "mapped"
    piece = 60 * MIB if pieces == "large" else 8192
    with path.open("wb", buffering=0) as file:
        for _ in range(60 * MIB // piece):
            file.write(b"\1" * piece)
    for run in range(5):
        key = f"short-read-{pieces}-{run}"
        one.client.submit(tasks_blocks.largest_of_memmap, str(path), key=key).result()
        assert seen(record(one, key)) > 55 * MIB
        assert_files(record(one, key))
    key = f"short-read-and-array-{pieces}"
    one.client.submit(tasks_blocks.memmap_and_array, str(path), 20, key=key).result()
    assert_files(record(one, key))


def assert_files(one: TaskMemory) -> None:
    # Where the heap held enough, or was not asked, that is the reason that comes first.
    assert one.reason in ("mapped", "warm_heap"), one
    assert_shared(one, one.reason)


# -- warm heaps --------------------------------------------------------------------------


def honest(one: TaskMemory, truth: float) -> str:
    """Check a record of a task that has allocated ``truth``; return its reason or its scope."""
    if one.scope == "process":
        assert one.growth_bytes == pytest.approx(truth, rel=TOLERANCE), one
        return "process"
    assert_shared(one, "warm_heap")
    if one.reusable_bytes is None:
        return "not asked"
    # The difference is covered: it may have been in the heap.
    assert seen(one) + one.reusable_bytes >= (1 - TOLERANCE) * truth, one
    return "warm_heap"


@pytest.mark.parametrize("kind", tasks_blocks.KINDS)
def test_warm_heap(kind: str, one: Measured) -> None:
    """Ten times 200 MiB on one thread: each row is right, or says what the heap had free.

    The truth is the size of the blocks by ``sys.getsizeof``, rounded up to units of 16 bytes.
    """
    keys = [f"{kind}-{run}" for run in range(RUNS)]
    truths = [
        one.client.submit(tasks_blocks.allocate, kind, TOTAL, key=key).result() for key in keys
    ]
    assert truths[0] == pytest.approx(TOTAL, rel=0.1)
    found = [honest(record(one, key), truth) for key, truth in zip(keys, truths, strict=True)]
    # A heap of that many pieces takes milliseconds to ask, so not each of them is asked for.
    assert found.count("not asked") < RUNS / 2


def test_warm_heap_with_something_kept(one: Measured) -> None:
    """The same where each run keeps one array of 64 kB, which pins the heap: never 0 for 200."""
    keys = [f"keeping-{run}" for run in range(RUNS)]
    kept = []
    for key in keys:
        kept.append(one.client.submit(tasks_blocks.allocate_and_keep, 64_000, TOTAL, key=key))
        wait(kept)
    found = [honest(record(one, key), TOTAL) for key in keys]
    # Two of its heaps of 64 MiB are full of holes by now: without trimming nothing else is true.
    assert "warm_heap" in found


def test_trimmed_heap_with_something_kept(trimming: Measured) -> None:
    """With trimming on, holes between what is kept go back too."""
    kept = []
    for run in range(RUNS):
        key = f"keeping-{run}"
        kept.append(trimming.client.submit(tasks_blocks.allocate_and_keep, 64_000, TOTAL, key=key))
        wait(kept)
        assert_own(record(trimming, key), TOTAL, TOLERANCE)


@pytest.mark.parametrize("kind", tasks_blocks.KINDS)
def test_trimmed_heap(kind: str, trimming: Measured) -> None:
    """With trimming on, blocks of malloc are the task's own in every run, to 10 %.

    Small Python objects are, as long as pymalloc has no half-filled arenas: those nobody can trim.
    """
    keys = [f"{kind}-{run}" for run in range(RUNS)]
    for key in keys:
        truth = trimming.client.submit(tasks_blocks.allocate, kind, TOTAL, key=key).result()
        scope = honest(record(trimming, key), truth)
        assert scope == "process" or kind not in ("5 kB", "64 kB", "1 MB"), record(trimming, key)


# -- arguments, which come with the scheduler's messages ----------------------------------


@pytest.mark.filterwarnings("ignore:Sending large graph:UserWarning")
@pytest.mark.parametrize(
    ("size", "make"),
    [
        (30 * MIB, lambda size: os.urandom(size)),
        (30 * MIB, lambda size: np.ones(size // 8)),
        (8 * MIB, lambda size: os.urandom(size)),
        (8 * MIB, lambda size: np.ones(size // 8)),
        (8 * MIB, lambda size: [os.urandom(5000) for _ in range(size // 5000)]),
    ],
    ids=["30 MiB of bytes", "30 MiB array", "8 MiB of bytes", "8 MiB array", "8 MiB of 5 kB"],
)
def test_argument_in_graph(
    size: int, make: Callable[[int], Any], trimming: Measured, go: Gate
) -> None:
    """An argument inside a graph is received and deserialised by the worker: nobody's growth."""
    key = f"waits-argument-{go.path}"
    waiting = trimming.client.submit(tasks.wait_for, go.path, key=key)
    reached(go)
    with_argument = trimming.client.submit(tasks.nothing, make(size), key=f"argument-{go.path}")
    # The client and its worker are on one ordered stream each, so this comes after it.
    marker = trimming.client.submit(tasks.nothing, key=f"after-argument-{go.path}")
    wait_until(lambda: arrived(trimming, marker.key))
    go.open()
    wait([waiting, with_argument, marker])
    found = record(trimming, key)
    assert seen(found) > 0.9 * size
    assert_shared(found, "transfer")
    assert found.foreign_bytes > 0.9 * size


def arrived(cluster: Measured, key: str) -> bool:
    """Return whether the only worker knows of a task. Waiting there is no user's code."""
    (worker,) = cluster.cluster.scheduler.workers
    story = cluster.cluster.sync(
        cluster.cluster.scheduler.rpc(worker).get_story, keys_or_stimuli=[key]
    )
    return bool(story)


# -- several workers in one process ------------------------------------------------------


def test_two_workers_in_a_process(measure: Callable[..., Measured], go: Gate, stop: Gate) -> None:
    """One tracker a process: a spike beside the other worker's short task is fully seen."""
    cluster = measure(processes=False, n_workers=2)
    here, there = addresses(cluster)
    spike = cluster.client.submit(tasks.hold_until, go.path, 200, key="spike", workers=here)
    reached(go)
    cluster.client.submit(tasks.nothing, key="short", workers=there).result()
    go.open()
    wait(spike)
    found = record(cluster, "spike")
    assert seen(found) >= 199 * MIB
    assert found.concurrency == 2
    # One of the two goes; the other is measured on. It waits for a gate, and so do we: what the
    # main thread does is somebody's code.
    held = cluster.client.submit(tasks.hold_until, stop.path, 200, key="stays", workers=there)
    reached(stop)
    cluster.client.submit(tasks.array, 150, key="beside", workers=here).result()
    cluster.client.retire_workers([here])
    wait_until(lambda: len(cluster.cluster.scheduler.workers) == 1)
    stop.open()
    wait(held)
    # What the other worker's task took meanwhile is in the process's peak, and not its own.
    found = record(cluster, "stays")
    assert seen(found) >= 349 * MIB
    assert_shared(found, "overlap")
    assert found.concurrency == record(cluster, "beside").concurrency == 2


def test_main_thread(measure: Callable[..., Measured], go: Gate) -> None:
    """What the user's own code allocates in the main thread is no task's growth."""
    assert threading.current_thread() is threading.main_thread()
    cluster = measure(processes=False)
    waiting = cluster.client.submit(tasks.wait_for, go.path, key="beside-main")
    reached(go)
    block = np.ones(200 * MIB // 8)
    go.open()
    wait(waiting)
    found = record(cluster, "beside-main")
    assert seen(found) >= 199 * MIB
    assert_shared(found, "overlap")
    del block
    gc.collect()


def test_threads(measure: Callable[..., Measured], go: Gate) -> None:
    """Tasks that overlap are shared, with the peak of them all."""
    cluster = measure(threads_per_worker=4)
    cluster.client.submit(tasks.nothing).result()
    waiting = [
        cluster.client.submit(tasks.array_after, f"{go.path}", mib, key=f"threads-{mib}")
        for mib in (20, 30, 40, 50)
    ]
    wait_until(
        lambda: sum(s.processing == {} for s in cluster.cluster.scheduler.workers.values()) == 0
    )
    reached(go)
    wait_until(lambda: running(cluster) == 4)
    go.open()
    wait(waiting)
    found = cluster.records.of("threads")
    assert len(found) == 4
    for one in found:
        assert_shared(one, "overlap")
        assert one.concurrency == 4
    assert max(map(seen, found)) >= 139 * MIB


def running(cluster: Measured) -> int:
    """Return how many tasks run on the only worker."""
    return sum(map(len, cluster.client.call_stack().values()))


# -- sources -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{"source": "polling"}, {"kernel-reset": False}])
def test_polling(config: dict[str, Any], measure: Callable[..., Measured]) -> None:
    """A source that only samples works, says so everywhere, and claims nothing."""
    cluster = measure({f"memusage.{key}": value for key, value in config.items()})
    cluster.client.submit(tasks.array, 100, 0.3, key="polled").result()
    found = record(cluster, "polled")
    assert_shared(found, "polling")
    assert seen(found) >= 99 * MIB
    (port,) = worker_ports(cluster.cluster)
    info = [dict(labels) for name, labels in Metrics.read(port) if "exporter_info" in name]
    assert [labels["source"] for labels in info] == ["polling"]


def test_failing_source(one: Measured) -> None:
    """An error of ours in start and stop reaches no task: counted by stage, and logged once."""

    def break_it(dask_worker: Any) -> None:
        source = dask_worker.extensions["memusage"].measuring.tracker._source

        def fail(*_: Any) -> None:
            raise OSError("broken on purpose")

        source.faults = fail

    def mend_it(dask_worker: Any) -> tuple[dict[str, int], dict[str, int], Any]:
        agent = dask_worker.extensions["memusage"]
        del agent.measuring.tracker._source.faults
        health = agent.measuring.health
        return health.errors, health.dropped, agent.executions.seam_fault

    one.client.run(break_it)
    results = one.client.gather(one.client.map(len, [[1]] * 20, key="unmeasured", pure=False))
    assert results == [1] * 20
    ((errors, dropped, fault),) = one.client.run(mend_it).values()
    # The call that broke it has a bracket too.
    assert errors["stop"] == 20 + 1
    assert dropped["invalid"] == 20
    # That is no fault of the seam.
    assert fault is None
    (log,) = one.client.get_worker_logs().values()
    assert len([line for level, line in log if "broken on purpose" in line]) == 1
    # Nothing is left open of those that failed.
    one.client.submit(tasks.array, 400, key="after-failures").result()
    found = record(one, "after-failures")
    assert found.concurrency == 1
    assert honest(found, 400 * MIB) != "not asked"


def test_event_loop_is_free(one: Measured, go: Gate) -> None:
    """While our work runs on the task's thread, the worker's lock is free and its loop goes on."""

    def hold_up(dask_worker: Any, path: str) -> None:
        tracker = dask_worker.extensions["memusage"].measuring.tracker
        start = tracker.start

        def slow(*args: Any) -> Any:
            del tracker.start
            tasks.wait_for(path)
            return start(*args)

        tracker.start = slow

    one.client.run(hold_up, path=go.path)
    future = one.client.submit(tasks.nothing, key="held-up")
    reached(go)
    # Would not come back if the loop stood still; the lock is taken as the profiler takes it.
    assert list(one.client.run(lock_is_free).values()) == [True]
    go.open()
    future.result()


def lock_is_free(dask_worker: Any) -> bool:
    if not dask_worker.active_threads_lock.acquire(timeout=5):
        return False
    dask_worker.active_threads_lock.release()
    return "held-up" in dask_worker.active_threads.values()
