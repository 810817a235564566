"""The bracket: what a task's own thread pays before and after the user's function.

Timed in a real worker, from taking the lock of ``Worker.active_threads`` to the end of all that
happens when it is let go, at the start and at the stop of every empty task. That is more than our
own two calls: what distributed itself does there is in it, and stands beside it as "none".
"""

from __future__ import annotations

import importlib
import itertools
import statistics
import threading
import time
from time import perf_counter_ns
from typing import Any, NamedTuple

from benchmarks.harness import (
    NONE,
    OURS,
    Bench,
    Spread,
    bench,
    differences,
    isolated,
    percentile,
    rounds,
)
from benchmarks.report import Result, Table, Target
from dask_memusage_exporter import nanny

LIMIT_US = 25

#: How tasks come to the worker, and the setting that does it.
FEEDS: dict[str, float | str] = {"back to back": "inf", "one by one": 1.1}


class Shape(NamedTuple):
    """What is measured on."""

    name: str
    modules: tuple[str, ...] = ()
    threads: int = 1
    #: Held by the process that starts the worker: the floor of ``ru_maxrss`` in the worker.
    parent_mb: int = 0
    jemalloc: bool = False


SHAPES = (
    Shape("just started"),
    Shape("just started, by a process of 300 MB", parent_mb=300),
    Shape("pandas imported", ("pandas", "pyarrow")),
    Shape("pandas imported, jemalloc", ("pandas", "pyarrow"), jemalloc=True),
    Shape("pandas imported, 4 threads", ("pandas", "pyarrow"), 4),
)


class TimedLock:
    """A lock that notes how long each ``with`` takes on threads that run tasks, in ns."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._house = threading.get_ident()  # the event loop takes the lock too, for its profiler
        self._began: dict[int, int] = {}
        self.took_ns: dict[int, list[int]] = {}

    def acquire(self, *arguments: Any) -> Any:
        return self._lock.acquire(*arguments)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self._began[threading.get_ident()] = perf_counter_ns()
        self._lock.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)
        now = perf_counter_ns()
        if (thread := threading.get_ident()) != self._house:
            self.took_ns.setdefault(thread, []).append(now - self._began[thread])


class Timed:
    """A function that adds up how long it takes, in ns."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.took_ns = 0

    def __call__(self, *arguments: Any, **options: Any) -> None:
        began = perf_counter_ns()
        self._function(*arguments, **options)
        self.took_ns += perf_counter_ns() - began


def prepare(dask_worker: Any, modules: list[str]) -> None:
    """Put the clocks into a worker."""
    for module in modules:
        importlib.import_module(module)
    dask_worker.active_threads_lock = TimedLock(dask_worker.active_threads_lock)
    plugin = dask_worker.plugins.get("memusage")
    if plugin is not None:
        plugin.transition = Timed(plugin.transition)
        # Records of short tasks are made many at a time.
        reporter = dask_worker.extensions["memusage"].reporter
        reporter.flush = Timed(reporter.flush)


def collect(dask_worker: Any) -> dict[str, Any]:
    """Take the times out of a worker, and whether it is at the floor of ``ru_maxrss``."""
    lock = dask_worker.active_threads_lock
    times, lock.took_ns = list(lock.took_ns.values()), {}
    plugin = dask_worker.plugins.get("memusage")
    loop_ns, below = 0, False
    if plugin is not None:
        agent = dask_worker.extensions["memusage"]
        for timed in (plugin.transition, agent.reporter.flush):
            loop_ns += timed.took_ns
            timed.took_ns = 0
        source = agent.measuring.tracker._source
        below = source._now()[0] <= source._floor
    return {
        "times_ns": times,
        "loop_ns": loop_ns,
        "below_floor": below,
        "cpu_ns": time.process_time_ns(),
    }


def nothing(_: int) -> None:
    """Do nothing: an empty task."""


def in_a_loop(dask_worker: Any, times: int) -> None:
    """Open and close brackets in a row on a thread of the worker's, which nobody disturbs."""

    def loop() -> None:
        time.sleep(
            0.5
        )  # until the call that has started us is over: it runs user code, and overlaps
        lock, thread, took = dask_worker.active_threads_lock, threading.get_ident(), []
        for number in range(times):
            dask_worker.active_keys.add(key := f"nothing-{number}")
            began = perf_counter_ns()
            with lock:
                dask_worker.active_threads[thread] = key
            with lock:
                del dask_worker.active_threads[thread]
            took.append(perf_counter_ns() - began)
            dask_worker.active_keys.discard(key)
        dask_worker.in_a_loop_ns = statistics.median(took)

    threading.Thread(target=loop, daemon=True).start()


def look_at_loop(dask_worker: Any) -> float | None:
    """Return a median in ns once the loop is over."""
    found: float | None = getattr(dask_worker, "in_a_loop_ns", None)
    return found


def measure_loop(variant: str, times: int) -> float:
    """Return what a bracket costs in a loop, in us."""
    with bench(variant) as it:
        it.client.run(in_a_loop, times=times)
        while (found := next(iter(it.client.run(look_at_loop).values()))) is None:
            time.sleep(1)  # each look is user code on the worker and disturbs a few brackets
        return float(found) / 1e3


def measure(
    variant: str,
    modules: list[str],
    threads: int,
    parent_mb: int,
    jemalloc: bool,
    feed: str,
    tasks: int,
) -> dict[str, Any]:
    """Run empty tasks on one worker; return a task's bracket in us, and the event loop's share."""
    held = b"x" * (parent_mb * 10**6)
    config: dict[str, Any] = {"distributed.scheduler.worker-saturation": FEEDS[feed]}
    if jemalloc:
        config["distributed.nanny.pre-spawn-environ"] = nanny.environment()
    with bench(variant, threads=threads, config=config) as it:
        del held
        return time_tasks(it, modules, tasks)


def time_tasks(it: Bench, modules: list[str], tasks: int) -> dict[str, Any]:
    """Run empty tasks on a cluster's one worker; see :func:`measure`."""
    it.client.run(prepare, modules=modules)
    it.client.gather(it.client.map(nothing, range(tasks // 4), pure=False))
    before = next(iter(it.client.run(collect).values()))
    it.client.gather(it.client.map(nothing, range(tasks), pure=False))
    found = next(iter(it.client.run(collect).values()))
    # On each thread starts and stops alternate.
    pairs = [
        (start + stop) / 1e3
        for times in found["times_ns"]
        for start, stop in zip(times[::2], times[1::2], strict=True)
    ]
    return {
        "median_us": statistics.median(pairs),
        "p90_us": percentile(pairs, 90),
        "p99_us": percentile(pairs, 99),
        "loop_us": found["loop_ns"] / tasks / 1e3,
        "cpu_us": (found["cpu_ns"] - before["cpu_ns"]) / tasks / 1e3,
        "below_floor": found["below_floor"],
    }


def run(quick: bool) -> Result:
    tasks, count = (200, 1) if quick else (2000, 3)
    table = Table(["worker", "tasks come", "variant", "median", "p90", "p99", "below the floor",
                   "event loop"], [])  # fmt: skip
    figures: dict[str, Any] = {}
    targets = []
    shapes = SHAPES[:1] if quick else SHAPES
    for shape, feed in itertools.product(shapes, list(FEEDS)[:1] if quick else FEEDS):
        name, modules, threads, parent_mb, jemalloc = shape
        found: dict[str, list[dict[str, Any]]] = {NONE: [], OURS: []}
        for _, variant in rounds(count, (NONE, OURS)):
            found[variant].append(
                isolated(measure, variant=variant, modules=modules, threads=threads,
                         parent_mb=parent_mb, jemalloc=jemalloc, feed=feed, tasks=tasks)
            )  # fmt: skip
        figures[f"{name}/{feed}"] = found
        for variant, all_ in found.items():
            told = {key: Spread.of([one[key] for one in all_]) for key in
                    ("median_us", "p90_us", "p99_us", "loop_us")}  # fmt: skip
            table.rows.append(
                [name, feed, variant, f"{told['median_us'].show(1)} us",
                 *(f"{told[key].median:.0f} us" for key in ("p90_us", "p99_us")),
                 "-" if variant == NONE else "yes" if all_[0]["below_floor"] else "no",
                 "-" if variant == NONE else f"{told['loop_us'].show(0)} us"]
            )  # fmt: skip
        more = differences(*([one["median_us"] for one in found[v]] for v in (OURS, NONE)))
        if threads == 1:
            targets.append(
                Target(f"bracket on the task's thread, median over none ({name}, {feed})",
                       f"<= {LIMIT_US} us", f"{more.show(1)} us", more.median <= LIMIT_US)
            )  # fmt: skip
    loop = {v: isolated(measure_loop, variant=v, times=tasks * 10) for v in (NONE, OURS)}
    figures["in a loop"] = loop
    in_loop = Table(["variant", "a bracket in a loop, median"],
                    [[variant, f"{took:.2f} us"] for variant, took in loop.items()])  # fmt: skip
    return Result(
        "bracket",
        "Cost: the bracket on the task's thread",
        f"{tasks} empty tasks on one worker, after as many as a quarter of it to warm up; {count} "
        "rounds, each in fresh clusters. Start and stop together, each from taking the lock of "
        "`Worker.active_threads` to the end of what happens when it is let go: with distributed's "
        "own share and the clock's, which stand beside it as `none`. `back to back`: the worker "
        "has the next task at hand (`worker-saturation: inf`); `one by one`: as Dask sets it, it "
        "waits 2 ms for each, and what the bracket needs has left the processor's caches. `below "
        "the floor`: RSS is below the least that `ru_maxrss` can be, the peak of the process that "
        "started the worker; then `/proc/self/status` must be read. `event loop`: the mean a task "
        "of all that we do there, without rows. In a loop: brackets opened and closed on a "
        "thread of a worker that does nothing else.",
        [table, in_loop],
        targets,
        figures,
    )
