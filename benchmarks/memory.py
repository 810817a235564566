"""Memory: a million tasks leave the worker's and the scheduler's memory flat.

Real tasks at Dask's own pace would take a quarter of an hour, so Dask's part is simulated and ours
is not. In a real worker process the real agent is driven as distributed drives it: a TaskState in
``worker.state.tasks``, ``transition`` to executing, the entry in ``active_threads`` under its lock
set and deleted on a thread of its own, ``transition`` out, the TaskState gone. The records travel
over the worker's real stream to the real scheduler, which writes a CSV. Once on glibc's malloc and
once on jemalloc, where each thread has figures of its own that must go with it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import time
from typing import Any

from distributed import Scheduler, Worker
from distributed.worker_state_machine import TaskState

from benchmarks.harness import CSV, Bench, bench, isolated
from benchmarks.report import Result, Table, Target
from dask_memusage_exporter import nanny
from dask_memusage_exporter.measure.jemalloc import JemallocHeap

#: Tasks between two turns of the event loop, of one thread, and samples of a run.
BATCH, THREAD, SAMPLES = 1000, 100, 10

#: Dask keeps the last 1,000 batches that a worker has sent, a few messages each; here they are
#: of BATCH records, so it is to keep fewer.
CONFIG = {"distributed.admin.low-level-log-length": 5}

#: Different prefixes: more than have a label of their own.
PREFIXES = 100

#: How executions end, by the last digits of a task's number.
ENDS = {7: ("executing", "error"), 8: ("executing", "rescheduled"), 9: ("cancelled", "memory")}

#: One in so many is lost: the transition out of it never comes.
LOST = 20

#: Of a run's second half, in bytes a task.
LIMIT_BYTES = 1.0


def drive(dask_worker: Worker, first: int, count: int) -> None:
    """Let a worker's agent see tasks come and go: on the event loop, and on threads that end."""
    agent, state = dask_worker.extensions["memusage"], dask_worker.state

    def run(keys: list[str]) -> None:
        lock, active = dask_worker.active_threads_lock, dask_worker.active_threads
        thread = threading.get_ident()
        for key in keys:
            with lock:
                active[thread] = key
            with lock:
                del active[thread]

    for start in range(first, first + count, THREAD):
        keys = {}
        for number in range(start, min(start + THREAD, first + count)):
            key = f"prefix{'abcdefghij'[number % 10]}{'abcdefghij'[number // 10 % 10]}-{number}"
            keys[key] = number
            task = state.tasks[key] = TaskState(key=key)
            task.nbytes = 1000
            agent.transition(key, "ready", "executing")
            dask_worker.active_keys.add(key)
        thread = threading.Thread(target=run, args=(list(keys),))
        thread.start()
        thread.join()
        for key, number in keys.items():
            dask_worker.active_keys.discard(key)
            before, after = ENDS.get(number // 100 % 100, ("executing", "memory"))
            if number % LOST != LOST // 2:
                agent.transition(key, before, after)
            if after == "memory":
                agent.transition(key, "memory", "released")
            del state.tasks[key]


def rss() -> int:
    """Return the resident memory of this process, without what is free in its heap."""
    gc.collect()
    try:
        JemallocHeap().trim()
    except OSError:
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024


def sizes(agent: Any) -> dict[str, int]:
    """Return how many entries every container of an agent has, and of what it holds of ours."""
    found, seen = {}, set()
    todo = [("", agent)]
    while todo:
        path, thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        for name, value in list(vars(thing).items()):
            where = f"{path}.{name}".lstrip(".")
            if isinstance(value, (dict, list, set)):
                if id(value) not in seen:  # two may share one
                    found[where] = len(value)
                seen.add(id(value))
            elif type(value).__module__.startswith("dask_memusage_exporter") and hasattr(
                value, "__dict__"
            ):
                todo.append((where, value))
    return found


def handles() -> dict[str, int]:
    """Return how many descriptors and threads this process has."""
    return {name: len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task")}


def look(dask_worker: Worker) -> tuple[int, dict[str, int], dict[str, int]]:
    """Look at a worker."""
    return rss(), sizes(dask_worker.extensions["memusage"]), handles()


def look_at_scheduler(dask_scheduler: Scheduler) -> tuple[int, dict[str, int], dict[str, int]]:
    """Look at the scheduler."""
    return rss(), sizes(dask_scheduler.extensions["memusage"]), handles()


def measure(tasks: int, jemalloc: bool) -> dict[str, Any]:
    """Drive the tasks through; return samples of both processes and how many rows came."""
    samples: list[dict[str, Any]] = []
    config: dict[str, Any] = dict(CONFIG)
    if jemalloc:
        config["distributed.nanny.pre-spawn-environ"] = nanny.environment()
    with bench(CSV, config=config) as it:
        began = time.monotonic()
        for number in range(0, tasks, BATCH):
            it.client.run(drive, first=number, count=min(BATCH, tasks - number))
            if (number + BATCH) % (tasks // SAMPLES) < BATCH:
                wait_for_rows(it, number + BATCH - (number + BATCH) // LOST)
                worker = next(iter(it.client.run(look).values()))
                scheduler = it.client.run_on_scheduler(look_at_scheduler)
                samples.append({"tasks": number + BATCH, "worker": worker, "scheduler": scheduler})
        seconds = time.monotonic() - began
        rows = count_rows(it)
    return {"samples": samples, "rows": rows, "seconds": seconds}


def count_rows(it: Bench) -> int:
    """Return how many rows are in the CSV."""
    with open(it.csv_path, "rb") as file:
        return sum(1 for _ in file) - 1


def wait_for_rows(it: Bench, count: int) -> None:
    """Wait until the scheduler has written all records: what is on its way is in memory too."""
    for _ in range(600):
        if count_rows(it) >= count:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{count_rows(it)} rows where {count} are due")


def slope(samples: list[dict[str, Any]], side: str) -> float:
    """Return bytes a task over the second half: the first one fills what has a bound."""
    half = samples[len(samples) // 2 :]
    return statistics.linear_regression(
        [one["tasks"] for one in half], [one[side][0] for one in half]
    ).slope


def run(quick: bool) -> Result:
    tasks = 10_000 if quick else 1_000_000
    table = Table(["malloc", "tasks so far", "worker's RSS", "scheduler's RSS", "worker's entries",
                   "scheduler's entries", "worker's descriptors",
                   "worker's threads"], [])  # fmt: skip
    targets, figures, rows, seconds = [], {}, [], []
    for malloc in ("glibc", "jemalloc"):
        found = isolated(measure, tasks=tasks, jemalloc=malloc == "jemalloc")
        samples = found["samples"]
        for one in samples:
            table.rows.append(
                [malloc, f"{one['tasks']:,}",
                 *(f"{one[side][0] / 2**20:.1f} MiB" for side in ("worker", "scheduler")),
                 *(str(sum(one[side][1].values())) for side in ("worker", "scheduler")),
                 *(str(one["worker"][2][name]) for name in ("fd", "task"))]
            )  # fmt: skip
        slopes = {side: slope(samples, side) for side in ("worker", "scheduler")}
        targets += [
            Target(f"{side}'s memory on {malloc}, second half", f"<= {LIMIT_BYTES} byte a task",
                   f"{slopes[side]:+.2f} bytes a task", slopes[side] <= LIMIT_BYTES)
            for side in slopes
        ]  # fmt: skip
        figures[malloc] = {**found, "slopes": slopes}
        rows.append(f"{found['rows']:,}")
        seconds.append(f"{found['seconds']:.0f}")
    return Result(
        "memory",
        "Memory: a million tasks",
        f"{tasks:,} tasks in {' and '.join(seconds)} s, Dask's part simulated, ours real: in a "
        "real worker process its agent sees, for each task with a key of its own, the TaskState, "
        "the transition to executing, the entry in `active_threads` set and deleted under its "
        f"lock, on a thread that ends after {THREAD} of them, and the transition out; the records "
        "travel over the worker's real stream to the scheduler, which writes a CSV "
        f"({' and '.join(rows)} rows). {PREFIXES} prefixes, more than have labels of their own; "
        f"1 % each err, are rescheduled and are cancelled, and one in {LOST} never tells of their "
        "end. RSS after a garbage collection, with what the heap has free given back, ten times, "
        "with all records written; `entries` are those of all containers that the agents hold. "
        "Dask's own log of sent batches (`distributed.admin.low-level-log-length`) is cut from "
        f"1,000 to 5, as a batch here has {BATCH:,} records where a real one has a few.",
        [table],
        targets,
        figures,
    )
