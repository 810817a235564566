"""Every kind of task on real worker processes: what is recorded, with which scope and reason.

``docs/kinds-of-task.md`` is the same as a table.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, Future, KilledWorker, wait
from distributed.worker_state_machine import FreeKeysEvent

from dask_memusage_exporter.records import TaskMemory
from tests import tasks, tasks_children
from tests.conftest import Measured, Metrics, measured, wait_until, worker_ports
from tests.tasks import Gate

pytestmark = pytest.mark.ends

MIB = 2**20

#: Workers may start processes by multiprocessing; a daemon may not.
#: And more prefixes than get a label by default: a test each.
MAY_FORK = {"distributed.worker.daemon": False, "memusage.max-prefixes": 1000}

COROUTINES = 20


@pytest.fixture(scope="module")
def one() -> Iterator[Measured]:
    """One worker process with one thread."""
    with measured(MAY_FORK) as cluster:
        cluster.client.submit(tasks.nothing).result()
        cluster.client.run(add_executors)
        yield cluster


@pytest.fixture(scope="module")
def many() -> Iterator[Measured]:
    """One worker process with more threads than any test needs."""
    with measured(threads_per_worker=COROUTINES + 2) as cluster:
        cluster.client.submit(tasks.nothing).result()
        yield cluster


def add_executors(dask_worker: Any) -> None:
    dask_worker.executors["threads"] = ThreadPoolExecutor(1)
    dask_worker.executors["processes"] = ProcessPoolExecutor(1)


def records(cluster: Measured, key: str, count: int = 1) -> list[TaskMemory]:
    """Return the records of a key, of which there are to be so many."""
    found = wait_until(
        lambda: len(found := [r for r in cluster.records if r.key == key]) >= count and found,
        what=f"{count} records of {key}",
    )
    assert len(found) == count
    return found


def run(cluster: Measured, key: str, function: Callable[..., Any], *args: Any) -> TaskMemory:
    """Run one task to its end, whatever that is; return its one record."""
    wait(cluster.client.submit(function, *args, key=key))
    # No waiting: a record is there before the client hears of the end.
    (record,) = (r for r in cluster.records if r.key == key)
    return record


def run_until_own(cluster: Measured, key: str, function: Callable[..., Any]) -> TaskMemory:
    """Run a task until its growth is its own, and return that record.

    Many short ones use up the budget for asking the heap, and a thread of Dask's may happen to
    use the processor beside a neighbour that does not: then it is shared, and says so.
    """
    runs = (run(cluster, f"{key}-{number}", function) for number in range(200))
    return next(record for record in runs if record.scope == "process")


def reached(gate: Gate) -> None:
    """Wait until a task waits at a gate."""
    wait_until(lambda: gate.reached, what=f"a task to come to {gate.path}")


def assert_own(record: TaskMemory, mib: int, status: str = "finished") -> None:
    """Check that a record has the task's own growth, to 2 %."""
    assert (record.scope, record.reason, record.status) == ("process", None, status), record
    assert record.growth_bytes == record.peak_bytes - record.start_bytes, record
    assert record.growth_bytes == pytest.approx(mib * MIB, rel=0.02), record
    assert record.concurrency == 1, record


def assert_shared(record: TaskMemory, reason: str, mib: float, status: str = "finished") -> None:
    """Check that a record has no growth, a reason, and a peak of at least so much."""
    assert (record.scope, record.reason, record.status) == ("shared", reason, status), record
    assert record.growth_bytes is None, record
    assert record.peak_bytes - record.start_bytes >= mib * MIB, record


def memusage(cluster: Measured, ask: Callable[[Any], Any]) -> Any:
    """Return what a function says of the agent of the only worker."""
    (answer,) = cluster.client.run(
        lambda dask_worker: ask(dask_worker.extensions["memusage"])
    ).values()
    return answer


# -- ends of a task ----------------------------------------------------------------------


def test_finished(one: Measured) -> None:
    """A task that finishes has one record, with its own growth, and sizes of inputs and result."""
    block = one.client.submit(tasks.made, 50, key="finished-input")
    record = run(one, "finished", tasks.arrays, 2, 50)
    assert_own(record, 100)
    assert record.task_prefix == "finished"
    assert record.worker in one.cluster.scheduler.workers
    assert record.start < record.stop
    assert record.input_bytes == 0
    assert record.output_bytes == pytest.approx(100 * MIB, rel=0.01)
    record = run(one, "finished-with-input", tasks.nothing, block)
    assert record.input_bytes == pytest.approx(50 * MIB, rel=0.01)


def test_failed(one: Measured) -> None:
    """A task that raises has a record like any other, and no result."""
    record = run(one, "failed", tasks.fail)
    assert_own(record, 100, "erred")
    assert record.output_bytes is None


def test_retried(one: Measured, tmp_path: Path) -> None:
    """A task that is retried has one record an attempt."""
    future = one.client.submit(tasks.fail_twice, str(tmp_path / "calls"), key="retried", retries=2)
    future.result()
    attempts = records(one, "retried", 3)
    for record, status in zip(attempts, ("erred", "erred", "finished"), strict=True):
        assert_own(record, 100, status)


def test_cancelled(one: Measured, go: Gate) -> None:
    """A task that is cancelled while it runs goes on, and has one record once it has ended."""
    future = one.client.submit(tasks.hold_until, go.path, 100, key="cancelled")
    reached(go)
    future.cancel()
    in_state(one, "cancelled", "cancelled")
    assert not one.records.of("cancelled")
    # Asked again, as happens when two clients let it go.
    one.client.run(
        lambda dask_worker: dask_worker.handle_stimulus(
            FreeKeysEvent(keys=["cancelled"], stimulus_id="test")
        )
    )
    go.open()
    (record,) = records(one, "cancelled")
    assert record.status == "cancelled"
    # What the test itself ran on the event loop meanwhile counts as overlap.
    assert_shared(record, "overlap", 99, "cancelled")


def in_state(cluster: Measured, key: str, state: str) -> None:
    """Wait until the only worker has a task in a state; the question is overlap for the task."""

    def ask(agent: Any) -> bool:
        task = agent.worker.state.tasks.get(key)
        return task is not None and task.state == state

    wait_until(lambda: memusage(cluster, ask), what=f"{key} to be {state}")


def test_cancelled_alone(one: Measured, go: Gate) -> None:
    """A cancelled task's growth is its own where it was alone."""
    future = one.client.submit(tasks.hold_until, go.path, 100, key="cancelled-alone")
    reached(go)
    future.cancel()
    wait_until(lambda: "cancelled-alone" not in one.cluster.scheduler.tasks)
    go.open()
    assert_own(records(one, "cancelled-alone")[0], 100, "cancelled")


def test_cancelled_and_wanted_again(one: Measured, go: Gate) -> None:
    """A task that is wanted again while it runs on as cancelled has one record an execution."""
    hold = (tasks.counted_hold_until, go.path, 100)
    first = one.client.submit(*hold, key="wanted-again")
    reached(go)
    first.cancel()
    in_state(one, "wanted-again", "cancelled")
    second = one.client.submit(*hold, key="wanted-again")
    in_state(one, "wanted-again", "executing")
    go.open()
    second.result()
    # Some versions of distributed take the result, others compute it again.
    executions = Path(f"{go.path}.executions").stat().st_size
    found = records(one, "wanted-again", executions)
    assert_shared(found[0], "overlap", 99)
    for record in found[1:]:
        assert_own(record, 100)


def test_rescheduled(one: Measured, tmp_path: Path) -> None:
    """A task that raises Reschedule has a record, and another one for the execution after it."""
    calls = str(tmp_path / "calls")
    one.client.submit(tasks.reschedule_once, calls, key="rescheduled").result()
    first, second = records(one, "rescheduled", 2)
    assert_own(first, 100, "rescheduled")
    assert_own(second, 100, "finished")


def test_system_exit(measure: Callable[..., Measured]) -> None:
    """SystemExit ends the worker, as without us: no record, and the next process is measured."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        cluster = measure()
    with pytest.raises(KilledWorker):
        cluster.client.submit(tasks.leave, key="leave").result()
    wait_until(lambda: cluster.cluster.scheduler.workers, what="a new worker")
    assert_own(run(cluster, "after-leave", tasks.array), 100)
    assert [one.status for one in cluster.records.of("leave")] in ([], ["killed"])


def test_never_started(one: Measured) -> None:
    """A task for an executor that is not there never starts: no record, and nothing is wrong."""
    future = submit_to(one.client, "no-such-executor", tasks.array, key="never-started")
    with pytest.raises(ValueError, match="Invalid executor"):
        future.result()
    assert_own(run(one, "after-never-started", tasks.array), 100)
    assert not one.records.of("never")
    assert healthy(one)


def healthy(cluster: Measured) -> bool:
    """Return whether no error has been counted, no record dropped and nothing of a task left."""

    def ask(agent: Any) -> tuple[int, int, int]:
        health = agent.measuring.health
        # An actor's method that has raised keeps its place until the next call on its thread.
        on_threads = [is_task for _, _, is_task in agent.hooks._by_thread.values()]
        held = agent.executions
        left = map(len, (held.closed, held.without_thread, held._before))
        return sum(health.errors.values()), sum(health.dropped.values()), sum(on_threads, sum(left))

    assert memusage(cluster, ask) == (0, 0, 0)
    return True


# -- tasks that leave the pool or wait for others ----------------------------------------


def test_secede_and_rejoin(one: Measured) -> None:
    """A task that secedes and comes back has one record over its whole time."""
    assert_own(run(one, "seceded", tasks.secede_and_rejoin, 50, 80), 80)
    assert_own(run(one, "after-seceded", tasks.array), 100)


def test_seceded_for_ever(one: Measured, go: Gate) -> None:
    """A seceded task that never ends costs bounded memory, and others are alone beside it."""
    endless = one.client.submit(tasks.secede_until, go.path, key="endless")
    reached(go)
    actor = actor_on(one)
    for _ in range(20):
        with pytest.raises(ValueError, match="on purpose"):
            actor.fail(0).result()
    one.client.gather(one.client.map(tasks.nothing, range(200), key="beside-endless"))
    record = run_until_own(one, "alone-beside-endless", tasks.array)
    assert (record.scope, record.reason, record.concurrency) == ("process", None, 2), record
    assert record.growth_bytes == pytest.approx(100 * MIB, rel=0.02)
    held = memusage(
        one,
        lambda agent: [len(bracket.others or ()) for bracket in agent.hooks.on_threads()],
    )
    assert sum(held) <= 2
    assert memusage(one, lambda agent: len(agent.measuring.tracker._open)) <= 3
    go.open()
    endless.result()
    (record,) = records(one, "endless")
    assert_shared(record, "overlap", 99)
    assert record.concurrency >= 2


def test_worker_client(one: Measured) -> None:
    """Inner tasks of worker_client are alone beside their idle waiter; the outer one is not."""
    outer = run(one, "outer", tasks.with_worker_client, 3, 100)
    assert_shared(outer, "overlap", 99)
    assert outer.concurrency == 2
    # The children do not add up in it.
    assert outer.peak_bytes - outer.start_bytes < 130 * MIB
    inner = one.records.of("inner")
    assert len(inner) == 3
    for record in inner:
        assert (record.scope, record.reason, record.concurrency) == ("process", None, 2), record
        assert record.growth_bytes == pytest.approx(100 * MIB, rel=0.02)
    assert_own(run(one, "after-outer", tasks.array), 100)


def test_get_client(many: Measured) -> None:
    """The same with get_client, where the waiter keeps its place in the pool."""
    outer = run(many, "outer", tasks.with_get_client, 1, 100)
    assert_shared(outer, "overlap", 99)
    assert outer.concurrency == 2
    (inner,) = many.records.of("inner")
    assert (inner.scope, inner.concurrency) == ("process", 2)
    assert inner.growth_bytes == pytest.approx(100 * MIB, rel=0.02)


# -- on the event loop -------------------------------------------------------------------


def test_coroutines(many: Measured, go: Gate) -> None:
    """Coroutines have a record each, all shared, and thread tasks beside them are shared too."""
    keys = [f"coroutine-{i}" for i in range(COROUTINES)]
    together = many.client.map(tasks.coroutine, [10] * COROUTINES, path=go.path, key=keys)
    for key in keys:
        in_state(many, key, "executing")
    beside = run(many, "beside-coroutines", tasks.array)
    assert_shared(beside, "overlap", 99)
    assert beside.concurrency == COROUTINES + 1
    go.open()
    many.client.gather(together)
    for key in keys:
        (record,) = records(many, key)
        assert_shared(record, "overlap", 10)
        assert record.concurrency == COROUTINES + 1
    assert_own(run(many, "after-coroutines", tasks.array), 100)


def test_coroutine_alone(many: Measured) -> None:
    """A coroutine that is alone is shared all the same: the event loop is never its own."""
    assert_shared(run(many, "coroutine-alone", tasks.coroutine, 100), "executor", 99)


def test_coroutine_fails(many: Measured) -> None:
    """A coroutine that raises has a record too."""
    wait(many.client.submit(tasks.coroutine, 100, error=True, key="coroutine-fails"))
    assert_shared(records(many, "coroutine-fails")[0], "executor", 99, "erred")


def test_coroutine_cancelled(many: Measured, go: Gate) -> None:
    """A coroutine that is cancelled has one record once it has ended, and overlaps no more then."""
    future = many.client.submit(tasks.coroutine, 100, go.path, key="coroutine-cancelled")
    in_state(many, "coroutine-cancelled", "executing")
    future.cancel()
    in_state(many, "coroutine-cancelled", "cancelled")
    go.open()
    (record,) = records(many, "coroutine-cancelled")
    assert record.status == "cancelled"
    assert_own(run(many, "after-cancelled-coroutine", tasks.array), 100)


# -- actors ------------------------------------------------------------------------------


def actor_on(cluster: Measured, **options: Any) -> Any:
    """Return an actor that lives as long as what is returned."""
    future = cluster.client.submit(tasks.Actor, actor=True, **options)
    actor = future.result()
    actor.__dict__["kept"] = future
    return actor


def test_actor_that_raises(one: Measured) -> None:
    """Calls of an actor have no record; one that raises leaves nothing behind."""
    before = len(one.records)
    actor = actor_on(one, key="raising-actor")
    with pytest.raises(ValueError, match="on purpose"):
        actor.fail(100).result()
    assert_own(run(one, "after-actor", tasks.array), 100)
    assert [record.key for record in one.records[before:]] == ["raising-actor", "after-actor"]
    shown = {dict(labels).get("task_prefix_name", "") for _, labels in page(one)}
    assert "raising-actor" in shown
    assert not [prefix for prefix in shown if "." in prefix]


def page(cluster: Measured) -> Metrics:
    (port,) = worker_ports(cluster.cluster)
    return Metrics.read(port)


def test_actor_overlaps(one: Measured, stop: Gate, go: Gate) -> None:
    """What an actor's method allocates beside a task is not the task's; an idle call is no one."""
    actor = actor_on(one)
    busy = one.client.submit(tasks.busy_until, stop.path, key="beside-actor")
    reached(stop)
    call = actor.hold(go.path, 100)
    reached(go)
    stop.open()
    busy.result()
    (record,) = records(one, "beside-actor")
    assert_shared(record, "overlap", 99)
    assert record.concurrency == 2
    # The call waits from now on, with its 100 MiB.
    record = run(one, "beside-idle-actor", tasks.array)
    assert (record.scope, record.reason, record.concurrency) == ("process", None, 2), record
    assert record.growth_bytes == pytest.approx(100 * MIB, rel=0.02)
    go.open()
    call.result()


def test_actor_that_raises_overlaps(one: Measured, stop: Gate) -> None:
    """A method that has raised before the task beside it ends has overlapped it all the same."""
    actor = actor_on(one)
    busy = one.client.submit(tasks.busy_until, stop.path, key="beside-raising-actor")
    reached(stop)
    with pytest.raises(ValueError, match="on purpose"):
        actor.fail(100).result()
    stop.open()
    busy.result()
    assert_shared(records(one, "beside-raising-actor")[0], "overlap", 99)


def test_actor_on_the_event_loop(one: Measured, stop: Gate) -> None:
    """A coroutine method runs on the event loop, and overlaps there."""
    actor = actor_on(one)
    busy = one.client.submit(tasks.busy_until, stop.path, key="beside-loop-actor")
    reached(stop)
    actor.on_loop(100).result()
    stop.open()
    busy.result()
    (record,) = records(one, "beside-loop-actor")
    assert_shared(record, "overlap", 99)
    assert record.concurrency == 2
    assert_own(run(one, "after-loop-actor", tasks.array), 100)


def test_client_run(one: Measured, stop: Gate) -> None:
    """What Client.run runs on the worker's event loop overlaps the tasks beside it."""
    busy = one.client.submit(tasks.busy_until, stop.path, key="beside-run")
    reached(stop)
    one.client.run(tasks.array, 100)
    stop.open()
    busy.result()
    assert_shared(records(one, "beside-run")[0], "overlap", 99)
    assert_own(run(one, "after-run", tasks.array), 100)


# -- executors, processes ----------------------------------------------------------------


def submit_to(client: Client, executor: str, function: Any, *args: Any, key: str) -> Future:
    """Submit a task that is annotated with an executor."""
    with dask.annotate(executor=executor):
        return client.submit(function, *args, key=key)


def test_other_threads(one: Measured) -> None:
    """A task on another pool of threads is like any other."""
    wait(submit_to(one.client, "threads", tasks.array, key="other-threads"))
    assert_own(records(one, "other-threads")[0], 100)


def test_process_pool(one: Measured) -> None:
    """A task on a pool of processes has one record, shared, with its process's memory."""
    wait(submit_to(one.client, "processes", tasks.array, 100, 0.3, key="process-pool"))
    assert_shared(records(one, "process-pool")[0], "executor", 99)
    assert_own(run(one, "beside-idle-pool", tasks.array), 100)


def test_subprocess(one: Measured) -> None:
    """A program that a task starts counts in the peak, if it lives long enough to be seen."""
    record = run(one, "subprocess", tasks_children.child_holds, 300, 0.5)
    assert_shared(record, "polling", 300)
    assert record.peak_bytes - record.start_bytes < 330 * MIB
    # It is not in the next one's figures.
    assert_own(run(one, "after-subprocess", tasks.array), 100)


def test_short_subprocess(one: Measured) -> None:
    """A program of two milliseconds is never claimed, and its task's growth is not called exact."""
    assert_shared(run(one, "short-child", tasks_children.short_child, 100), "polling", 99)
    assert_own(run(one, "after-short-child", tasks.array), 100)


def test_unwaited_subprocess(one: Measured) -> None:
    """Nor is one that the task does not wait for."""
    child = one.client.submit(tasks_children.unwaited_child, 100, key="unwaited-child")
    one.client.submit(tasks_children.wait_for_child, child).result()
    assert_shared(records(one, "unwaited-child")[0], "polling", 99)
    # What the worker itself brings in meanwhile, if anything, is said, and is no child's doing.
    after = (run(one, f"after-unwaited-child-{n}", tasks.array) for n in range(3))
    assert_own(next(record for record in after if record.reason != "transfer"), 100)


def test_multiprocessing_fork(one: Measured) -> None:
    """Memory of a forked child counts, and what it shares with its parent counts once."""
    record = run(one, "multiprocessing", tasks_children.fork_holds, 300, 0.3)
    assert_shared(record, "polling", 295)
    assert record.peak_bytes - record.start_bytes < 330 * MIB
    assert_own(run(one, "after-multiprocessing", tasks.array), 100)


@pytest.mark.parametrize("keeps", [False, True])
def test_living_child(keeps: bool, one: Measured) -> None:
    """What an old child takes during a short task is never left out unsaid.

    Not even where it stays below what the child once had at its peak.
    """
    one.client.submit(tasks_children.open_pool, 100, key=f"opens-pool-{keeps}").result()
    try:
        assert_own(run(one, f"beside-idle-child-{keeps}", tasks.array, 100), 100)
        for number in range(5):
            key = f"beside-child-{keeps}-{number}"
            one.client.submit(tasks_children.beside_pool, 100, 15, keeps=keeps, key=key).result()
            # What it has kept was at its highest when the task ended.
            assert_shared(records(one, key)[0], "polling", 114 if keeps else 99)
        assert_own(run(one, f"beside-child-idle-again-{keeps}", tasks.array, 100), 100)
    finally:
        one.client.submit(tasks_children.close_pool, key=f"closes-pool-{keeps}").result()


def test_fork(one: Measured) -> None:
    """In a forked child nothing of ours works; the parent's figures are right."""
    future = one.client.submit(tasks_children.fork_and_look, 100, key="forks")
    assert future.result() == {"ours_open": [], "starts": False, "exports": False, "exit": 7}
    record = records(one, "forks")[0]
    assert_shared(record, "polling", 99)
    assert record.peak_bytes - record.start_bytes < 110 * MIB
    assert_own(run(one, "after-fork", tasks.array), 100)


# -- other kinds -------------------------------------------------------------------------


def test_gil_held(one: Measured) -> None:
    """A spike that is made and gone in C while the GIL is held is seen."""
    assert_own(run(one, "gil-held", tasks.in_c, 100), 100)


def test_large_results(one: Measured) -> None:
    """A result that stays on the worker is in the task's growth, and not in the next one's."""
    first = one.client.submit(tasks.arrays, 4, 25, key="large-result")
    wait(first)
    assert_own(records(one, "large-result")[0], 100)
    # A heartbeat's worth of the event loop's own pages may fall into its window.
    assert_own(run_until_own(one, "after-large-result", tasks.array), 100)


def test_generator(one: Measured) -> None:
    """Whoever takes from a generator that a task has returned has the memory."""
    lazy = one.client.submit(tasks.lazily, 10, 10, key="generator")
    taken = one.client.submit(tasks.taken, lazy, key="taken", pure=False)
    assert taken.result() == 10
    (made,) = records(one, "generator")
    assert made.peak_bytes - made.start_bytes < MIB
    assert_own(records(one, "taken")[0], 100)


def test_short_tasks(many: Measured) -> None:
    """Tasks shorter than a millisecond have one record and one count each, and claim nothing."""
    count = 2000
    many.client.gather(many.client.map(tasks.nothing, range(count), key="short", pure=False))
    short = many.records.of("short")
    assert Counter(Counter(record.key for record in short).values()) == {1: count}
    assert (
        page(many).total("dask_worker_task_memory_tasks_total", task_prefix_name="short") == count
    )
    assert not [record for record in short if (record.growth_bytes or 0) > MIB]


def test_nothing_is_left(one: Measured, many: Measured, caplog: pytest.LogCaptureFixture) -> None:
    """After all of this no error is counted, no record is lost and no bracket is open."""
    for cluster in (one, many):
        assert healthy(cluster)
        # The question itself runs on the event loop.
        wait_until(lambda c=cluster: memusage(c, lambda a: len(a.measuring.tracker._open)) == 1)
        logs = cluster.client.get_worker_logs()
        lines = [line for log in logs.values() for level, line in log if level == "WARNING"]
        assert not [line for line in lines if "memusage" in line]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "memusage" in r.name]
