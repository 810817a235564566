"""Many threads a worker: with jemalloc each task has its own peak, whatever runs beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import wait

from dask_memusage_exporter.records import TaskMemory
from tests import tasks, tasks_blocks, tasks_children
from tests.conftest import (
    Measured,
    Metrics,
    measured,
    rows,
    scheduler_port,
    wait_until,
    worker_ports,
)
from tests.tasks import Gate

MIB = 2**20

#: jemalloc rounds sizes up to its classes.
TOLERANCE = 0.25


@contextmanager
def on_jemalloc(config: dict[str, Any] | None = None, **options: Any) -> Iterator[Measured]:
    """Hold a measured cluster whose workers run on jemalloc."""
    before = dict(os.environ)
    settings = {"memusage.jemalloc": True, "memusage.max-prefixes": 1000, **(config or {})}
    with measured(settings, n_workers=options.pop("n_workers", 1), **options) as cluster:
        (state, *_) = cluster.cluster.scheduler.workers.values()
        wait_until(lambda: source(cluster) == "jemalloc", what=f"jemalloc on {state}")
        assert not VARIABLES & added_to(before)
        yield cluster
    # What is started from here later on is started as ever.
    assert not VARIABLES & added_to(before)


VARIABLES = {"LD_PRELOAD", "PYTHONMALLOC", "ARROW_DEFAULT_MEMORY_POOL"}


def added_to(before: dict[str, str]) -> set[str]:
    """Return the variables of this process that are not what they were."""
    return {name for name, value in os.environ.items() if before.get(name) != value}


def source(cluster: Measured) -> str | None:
    """Return the source of the first worker that is connected, as its heartbeat says."""
    for state in cluster.cluster.scheduler.workers.values():
        said = state.metrics.get("memusage")
        return said and said.get("source")
    return None


@pytest.fixture(scope="module")
def many(jemalloc: str) -> Iterator[Measured]:
    """One worker process on jemalloc with 8 threads."""
    with on_jemalloc(threads_per_worker=8) as cluster:
        cluster.client.run(tasks_blocks.frame, 1000)  # imports pandas
        yield cluster


@pytest.fixture(scope="module")
def single(jemalloc: str) -> Iterator[Measured]:
    """One with one thread."""
    with on_jemalloc() as cluster:
        yield cluster


def record(cluster: Measured, key: str) -> TaskMemory:
    """Return the one record of a key."""
    (found,) = (one for one in cluster.records if one.key == key)
    return found


def assert_own(one: TaskMemory, truth: float) -> None:
    assert (one.scope, one.reason) == ("thread", None), one
    assert truth * 0.98 <= one.growth_bytes <= truth * (1 + TOLERANCE) + MIB, one


def reached(gate: Gate) -> None:
    wait_until(lambda: gate.reached, what=f"a task to come to {gate.path}")


# -- each task's own ---------------------------------------------------------------------


def test_eight_at_once(many: Measured, go: Gate) -> None:
    """Eight tasks hold 10 to 400 MB at the same time: each its own; the peak is everybody's."""
    sizes = [10, 50, 160, 400] * 2
    keys = [f"own-{number}" for number in range(8)]
    futures = [
        many.client.submit(tasks.counted_hold_until, go.path, mib, key=key)
        for key, mib in zip(keys, sizes, strict=True)
    ]
    executions = Path(go.path + ".executions")
    wait_until(lambda: executions.exists() and executions.stat().st_size == 8)
    go.open()
    many.client.gather(futures)
    for key, mib in zip(keys, sizes, strict=True):
        one = record(many, key)
        assert_own(one, mib * MIB)
        assert one.concurrency == 8
        assert one.peak_bytes - one.start_bytes > mib * MIB * 0.9


RACE = """
import sys, threading
import numpy as np
from dask_memusage_exporter.measure.jemalloc import ThreadPeak

peak, wrong = ThreadPeak(), []

def run(mib):
    for _ in range(2000):
        peak.start()
        np.empty(mib * 2**20, 'u1')  # allocated and not touched: quick
        found, _ = peak.stop()
        if abs(found / 2**20 - mib) > 0.5:
            wrong.append((mib, found / 2**20))

sys.setswitchinterval(1e-5)
threads = [threading.Thread(target=run, args=(2 << n,)) for n in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(wrong), wrong[:5])
"""


def test_no_thread_reads_anothers(jemalloc: str) -> None:
    """Threads that take turns at every chance have each its own peak, every time."""
    assert script(RACE, LD_PRELOAD=jemalloc, PYTHONMALLOC="malloc") == "0 []"


@pytest.mark.parametrize(
    "kind", ["array", "5 kB", "64 kB", "integers", "strings", "dicts", "frame"]
)
def test_kinds_of_allocation(kind: str, many: Measured) -> None:
    """Each kind, first run and tenth, four at a time: within a quarter of its size."""
    kinds = [f"{kind}-{run}" for run in range(10)]
    futures = [many.client.submit(tasks_blocks.sized, kind, 100 * MIB, key=key) for key in kinds]
    for key, truth in zip(kinds, many.client.gather(futures), strict=True):
        one = record(many, key)
        assert (one.scope, one.reason) == ("thread", None), one
        assert one.growth_bytes == pytest.approx(truth, rel=TOLERANCE), one


def test_alone_and_overlapped_agree(single: Measured, many: Measured, go: Gate) -> None:
    """A prefix whose tasks run alone here and overlapped there has one scope and one size."""
    alone = [f"agree-{number}" for number in range(4)]
    for key in alone:
        single.client.submit(tasks_blocks.sized, "64 kB", 100 * MIB, key=key).result()
    many.client.gather(
        [many.client.submit(tasks_blocks.sized, "64 kB", 100 * MIB, key=k) for k in alone]
    )
    sizes = [record(cluster, key).growth_bytes for cluster in (single, many) for key in alone]
    assert {record(single, key).scope for key in alone} == {"thread"}
    assert max(sizes) <= min(sizes) * 1.1


def test_something_kept(single: Measured) -> None:
    """Each run keeps one array of those that it made: holes hide nothing of the next one."""
    kept = []
    for number in range(4):
        key = f"keeping-{number}"
        kept.append(
            single.client.submit(tasks_blocks.allocate_and_keep, 64_000, 200 * MIB, key=key)
        )
        wait(kept)
        assert_own(record(single, key), 200 * MIB)


def test_secede_and_rejoin(many: Measured) -> None:
    """A task that left the pool and came back has one growth over its whole time, and is alone."""
    many.client.submit(tasks.secede_and_rejoin, 50, 80, key="rejoins-1").result()
    many.client.submit(tasks.array, 40, key="rejoined-1").result()
    for key, mib in (("rejoins-1", 80), ("rejoined-1", 40)):
        assert_own(record(many, key), mib * MIB)
        assert record(many, key).concurrency == 1


def test_who_waits_for_its_own_tasks(many: Measured) -> None:
    """Inner tasks have a growth of their own, and it is not the waiting one's."""
    many.client.submit(tasks.with_get_client, 1, 100, key="outer-1").result()
    (inner,) = (one for one in many.records if one.task_prefix == "inner")
    assert_own(inner, 100 * MIB)
    waiting = record(many, "outer-1")
    assert waiting.scope == "thread"
    assert waiting.growth_bytes < 20 * MIB


# -- what the thread's count is not ------------------------------------------------------


def free_then_take(held: list[Any], mib: int) -> int:
    """Free what somebody else has allocated, then take half of it."""
    held.clear()
    return int(np.ones(mib * MIB // 8)[0])


def test_freeing_what_others_allocated(many: Measured, go: Gate) -> None:
    """A thread's count that fell below its start is no growth: never 0 for 50 MB."""

    def hold() -> None:
        import builtins

        builtins.held = [np.ones(100 * MIB // 8)]

    def free() -> float:
        import builtins

        builtins.held.clear()
        return float(np.ones(50 * MIB // 8).sum())

    (worker,) = many.cluster.scheduler.workers
    many.client.run(hold)
    wait_beside = many.client.submit(tasks.busy_until, go.path, key="beside-free")
    reached(go)
    many.client.submit(free, key="free-1").result()
    go.open()
    wait_beside.result()
    one = record(many, "free-1")
    assert (one.scope, one.reason, one.growth_bytes) == ("shared", "overlap", None), one
    assert worker in many.cluster.scheduler.workers


def test_freeing_beside_one_that_grows(many: Measured, go: Gate) -> None:
    """However much a neighbour takes: what the task freed is held against its own figure."""

    def hold() -> None:
        import builtins

        builtins.held = [np.ones(20 * MIB // 8)]

    def free(path: str) -> None:
        import builtins

        builtins.held.clear()
        tasks.hold_until(path, 20)

    many.client.run(hold)
    one = many.client.submit(free, go.path, key="free-20")
    reached(go)
    many.client.submit(tasks.array, 700, key="beside-free-20").result()
    go.open()
    one.result()
    found = record(many, "free-20")
    assert (found.scope, found.reason, found.growth_bytes) == ("shared", "overlap", None), found


def test_freeing_alone(single: Measured) -> None:
    """Nor where it was alone: what it freed may hide what it took, in both figures."""

    def hold() -> None:
        import builtins

        builtins.held = [np.ones(100 * MIB // 8)]

    def free() -> float:
        import builtins

        builtins.held.clear()
        return float(np.ones(50 * MIB // 8).sum())

    single.client.run(hold)
    single.client.submit(free, key="free-alone").result()
    one = record(single, "free-alone")
    assert one.growth_bytes is None
    assert one.reason in ("warm_heap", "contradiction"), one


def test_untouched_memory(many: Measured, single: Measured) -> None:
    """Memory that is allocated and never touched counts in full; more than there is does not."""

    def empty(mib: int) -> int:
        return np.empty(mib * MIB, dtype="u1").size

    single.client.submit(empty, 60, key="empty-60").result()
    one = record(single, "empty-60")
    assert_own(one, 60 * MIB)
    assert one.peak_bytes - one.start_bytes < 10 * MIB
    single.client.submit(empty, 40_000, key="empty-40000").result()
    one = record(single, "empty-40000")
    assert one.growth_bytes is None
    assert one.reason in ("warm_heap", "contradiction"), one


def test_helper_threads(single: Measured, many: Measured, go: Gate) -> None:
    """What a task's helper threads allocate is seen where the task was alone, and only there."""

    def helped() -> None:
        helper = threading.Thread(target=lambda: np.ones(100 * MIB // 8).sum())
        helper.start()
        helper.join()

    single.client.submit(helped, key="helped-1").result()
    one = record(single, "helped-1")
    if one.scope == "thread":
        assert_own(one, 100 * MIB)
    else:  # and the heap may have hidden some of it
        assert (one.reason, one.growth_bytes) == ("warm_heap", None)
        assert one.peak_bytes - one.start_bytes + one.reusable_bytes > 99 * MIB
    beside = many.client.submit(tasks.busy_until, go.path, key="beside-helped")
    reached(go)
    many.client.submit(helped, key="helped-1").result()
    go.open()
    beside.result()
    assert record(many, "helped-1").growth_bytes < 20 * MIB


@pytest.mark.parametrize("pool", ["default", "mimalloc"])
def test_arrows_pool(pool: str, many: Measured, go: Gate) -> None:
    """Arrow's memory comes to malloc; where its pool keeps it to itself no growth is claimed."""
    pytest.importorskip("pyarrow")

    def buffer(pool: str) -> int:
        import pyarrow

        pool = getattr(pyarrow, f"{pool}_memory_pool")()
        block = pyarrow.allocate_buffer(100 * MIB, pool)
        np.frombuffer(block, dtype="u1")[:] = 1
        return block.size

    beside = many.client.submit(tasks.busy_until, go.path, key=f"beside-{pool}")
    reached(go)
    many.client.submit(buffer, pool, key=f"arrow-{pool}").result()
    go.open()
    beside.result()
    one = record(many, f"arrow-{pool}")
    if pool == "default":
        assert_own(one, 100 * MIB)
    else:
        assert (one.scope, one.reason, one.growth_bytes) == ("shared", "overlap", None), one


def test_blas(many: Measured, go: Gate) -> None:
    """What its threads take is small and not counted: the matrices are."""

    def multiply() -> int:
        one = np.ones((2000, 2000))
        return sum(matrix.nbytes for matrix in (one, one @ one))

    beside = many.client.submit(tasks.busy_until, go.path, key="beside-blas")
    reached(go)
    truth = many.client.submit(multiply, key="blas-1").result()
    go.open()
    beside.result()
    assert_own(record(many, "blas-1"), truth)


def test_what_the_event_loop_lets_go(many: Measured, go: Gate) -> None:
    """Results that are freed on the event loop are nothing to the task that runs."""
    held = many.client.submit(tasks.made, 200, key="held-1")
    wait(held)
    one = many.client.submit(tasks.hold_until, go.path, 50, key="beside-release")
    reached(go)
    held.release()
    wait_until(lambda: "held-1" not in many.cluster.scheduler.tasks)
    many.client.run(lambda: None)  # the worker has heard of it before this
    go.open()
    one.result()
    assert_own(record(many, "beside-release"), 50 * MIB)


def test_spilled_inputs(many: Measured, go: Gate) -> None:
    """Inputs that are read back from disk for one task are nothing to another."""
    spilled = many.client.submit(tasks.made, 200, key="spilled-1")
    wait(spilled)

    def spill(dask_worker: Any) -> int:
        dask_worker.data.evict()
        return len(dask_worker.data.slow)

    assert list(many.client.run(spill).values()) == [1]
    one = many.client.submit(tasks.hold_until, go.path, 50, key="beside-spilled")
    reached(go)
    many.client.submit(tasks.nothing, spilled, key="reads-spilled").result()
    go.open()
    one.result()
    assert_own(record(many, "beside-spilled"), 50 * MIB)
    reads = record(many, "reads-spilled")
    assert (reads.growth_bytes or 0) < MIB, reads


def test_children_are_not_the_threads(many: Measured) -> None:
    """A task that starts a process has no growth: what the child took is not in its count."""
    many.client.submit(tasks_children.child_holds, 100, 0.3, key="child-1").result()
    one = record(many, "child-1")
    assert (one.scope, one.growth_bytes) == ("shared", None), one


def test_overlap_is_not_said_on_jemalloc(
    jemalloc: str, tmp_path: Path, go: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """The few rows that still overlap say so themselves; what would be advised is done."""
    path = tmp_path / "memusage.csv"
    with on_jemalloc(
        {"memusage.csv.path": str(path), "memusage.csv.columns": "full"}, threads_per_worker=2
    ) as cluster:
        beside = cluster.client.submit(tasks.busy_until, go.path, key="busy-1")
        reached(go)
        cluster.client.submit(tasks_children.child_holds, 10, 0.1, key="child-1").result()
        go.open()
        beside.result()
    assert {row["reason"] for row in rows(path)} & {"overlap"}
    assert not [line for line in caplog.messages if "tasks overlap in a worker" in line]


# -- what is said of it, and what it leaves ------------------------------------------------


def test_what_metrics_and_log_say(many: Measured) -> None:
    """The source is on both pages, and the scope has a count of its own."""
    for number in range(5):  # at times the child of another test is only just gone
        many.client.submit(tasks.array, 20, key=f"told-{number}").result()
    (port,) = worker_ports(many.cluster)
    metrics = Metrics.read(port)
    assert metrics.total("dask_worker_task_memory_exporter_info", source="jemalloc") == 1
    told = {"task_prefix_name": "told", "scope": "thread"}
    own = metrics.total("dask_worker_task_memory_tasks_total", **told)
    assert own >= 3
    grown = metrics.total("dask_worker_task_memory_growth_bytes_count", task_prefix_name="told")
    assert grown == own
    workers = Metrics.read(scheduler_port(many.cluster))
    # Every cluster of this process is on the page.
    assert workers.total("dask_scheduler_task_memory_workers", source="jemalloc") >= 1
    assert workers.total("dask_scheduler_task_memory_workers", source="kernel") == 0
    (lines,) = many.client.get_worker_logs().values()
    assert any("source jemalloc" in line for _, line in lines)


def script(text: str, **environment: str) -> str:
    """Run a script in a fresh process; return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, **environment},
    ).stdout.strip()


def test_thread_ends_and_descriptors(many: Measured) -> None:
    """Thousands of tasks, on threads that come and go, leave no descriptor."""
    (before,) = many.client.run(_open_files).values()
    for _ in range(5):
        many.client.gather(many.client.map(tasks.secede_only, range(200), pure=False))

    def left() -> int:
        (count,) = many.client.run(_open_files).values()
        return count - before

    # Some are open for a moment: what the sampler reads, a connection that comes or goes.
    wait_until(lambda: left() <= 0, what="descriptors to be closed")


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
