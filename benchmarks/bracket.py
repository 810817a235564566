"""The bracket: what a task's own thread pays before and after the user's function.

Timed in a real worker, from taking the lock of ``Worker.active_threads`` to the end of all that
happens when it is let go, at the start and at the stop of every empty task. That is more than our
own two calls: what distributed itself does there is in it, and stands beside it as "none".
"""

from __future__ import annotations

import importlib
import statistics
import threading
from time import perf_counter_ns
from typing import Any, NamedTuple

from benchmarks.harness import NONE, OURS, bench, isolated, percentile
from benchmarks.report import Result, Table, Target

LIMIT_US = 25


class Shape(NamedTuple):
    """What is measured on."""

    name: str
    modules: tuple[str, ...] = ()
    threads: int = 1
    #: Held by the process that starts the worker: the floor of ``ru_maxrss`` in the worker.
    parent_mb: int = 0


SHAPES = (
    Shape("just started"),
    Shape("just started, by a process of 300 MB", parent_mb=300),
    Shape("pandas imported", ("pandas", "pyarrow")),
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


class TimedTransition:
    """A plugin's ``transition`` that adds up how long it takes, in ns."""

    def __init__(self, transition: Any) -> None:
        self._transition = transition
        self.took_ns = 0

    def __call__(self, *arguments: Any, **options: Any) -> None:
        began = perf_counter_ns()
        self._transition(*arguments, **options)
        self.took_ns += perf_counter_ns() - began


def prepare(dask_worker: Any, modules: list[str]) -> None:
    """Put the clocks into a worker."""
    for module in modules:
        importlib.import_module(module)
    dask_worker.active_threads_lock = TimedLock(dask_worker.active_threads_lock)
    plugin = dask_worker.plugins.get("memusage")
    if plugin is not None:
        plugin.transition = TimedTransition(plugin.transition)


def collect(dask_worker: Any) -> dict[str, Any]:
    """Take the times out of a worker, and whether it is at the floor of ``ru_maxrss``."""
    lock = dask_worker.active_threads_lock
    times, lock.took_ns = list(lock.took_ns.values()), {}
    plugin = dask_worker.plugins.get("memusage")
    loop_ns, below = 0, False
    if plugin is not None:
        loop_ns, plugin.transition.took_ns = plugin.transition.took_ns, 0
        source = dask_worker.extensions["memusage"]._process.tracker._source
        below = source._now()[0] <= source._floor
    return {"times_ns": times, "loop_ns": loop_ns, "below_floor": below}


def nothing(_: int) -> None:
    """Do nothing: an empty task."""


def measure(
    variant: str, modules: list[str], threads: int, parent_mb: int, tasks: int
) -> dict[str, Any]:
    """Run empty tasks on one worker; return a task's bracket in us, and the event loop's share."""
    held = b"x" * (parent_mb * 10**6)
    with bench(variant, threads=threads) as it:
        del held
        it.client.run(prepare, modules=modules)
        it.client.gather(it.client.map(nothing, range(tasks // 10), pure=False))
        it.client.run(collect)
        it.client.gather(it.client.map(nothing, range(tasks), pure=False))
        found = next(iter(it.client.run(collect).values()))
    # On each thread starts and stops alternate.
    pairs = [
        (start + stop) / 1e3
        for times in found["times_ns"]
        for start, stop in zip(times[::2], times[1::2], strict=True)
    ]
    return {
        "tasks": len(pairs),
        "median_us": statistics.median(pairs),
        "p90_us": percentile(pairs, 90),
        "p99_us": percentile(pairs, 99),
        "loop_us": found["loop_ns"] / tasks / 1e3,
        "below_floor": found["below_floor"],
    }


def run(quick: bool) -> Result:
    tasks = 200 if quick else 3000
    table = Table(["worker", "variant", "tasks", "median", "p90", "p99", "below the floor",
                   "event loop"], [])  # fmt: skip
    figures: dict[str, Any] = {}
    targets = []
    for name, modules, threads, parent_mb in SHAPES[:1] if quick else SHAPES:
        medians = {}
        for variant in (NONE, OURS):
            found = isolated(measure, variant=variant, modules=modules, threads=threads,
                             parent_mb=parent_mb, tasks=tasks)  # fmt: skip
            figures[f"{name}/{variant}"] = found
            medians[variant] = found["median_us"]
            table.rows.append(
                [name, variant, str(found["tasks"]),
                 *(f"{found[key]:.1f} us" for key in ("median_us", "p90_us", "p99_us")),
                 "-" if variant == NONE else "yes" if found["below_floor"] else "no",
                 "-" if variant == NONE else f"{found['loop_us']:.1f} us"]
            )  # fmt: skip
        more = medians[OURS] - medians[NONE]
        if threads == 1:
            targets.append(
                Target(f"bracket on the task's thread, median over none ({name})",
                       f"<= {LIMIT_US} us", f"{more:.1f} us", more <= LIMIT_US)
            )  # fmt: skip
    return Result(
        "bracket",
        "Cost: the bracket on the task's thread",
        "Empty tasks on one worker. Start and stop together, each from taking the lock of "
        "`Worker.active_threads` to the end of what happens when it is let go: with distributed's "
        "own share and the clock's, which stand beside it as `none`. `below the floor`: whether "
        "RSS is below the least that `ru_maxrss` can be, the peak of the process that started the "
        "worker; then `/proc/self/status` must be read, which costs more. `event loop`: the mean "
        "a task of all our transitions there; no record is sent, as nobody listens.",
        [table],
        targets,
        figures,
    )
