"""What jemalloc costs, or saves: a job that allocates all the time, on either malloc.

PYTHONMALLOC=malloc takes CPython's own allocator for small objects out of the way, which is made
for nothing else; jemalloc is faster than glibc with many threads. So it may go either way.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness import CSV, NONE, Spread, bench, isolated, ratios, rounds
from benchmarks.report import Result, Table
from dask_memusage_exporter import nanny

THREADS = (1, 4)

#: Variant, and whether the worker runs on jemalloc.
ASKED = {
    "glibc, none": (NONE, False),
    "jemalloc, none": (NONE, True),
    "jemalloc, ours": (CSV, True),
}


def count(number: int) -> int:
    """Count words: strings, dicts and lists."""
    counts: dict[str, int] = {}
    for word in (f"word-{(n * 7919 + number) % 20_011}" for n in range(40_000)):
        counts[word] = counts.get(word, 0) + 1
    return len(sorted(counts.items(), key=lambda item: -item[1])[:10])


def group(number: int) -> int:
    """Group a DataFrame: arrays of middle size."""
    frame = pd.DataFrame({"key": np.arange(100_000) % (number + 2), "value": np.ones(100_000)})
    return len(frame.assign(more=frame.value * 2).groupby("key").sum())


JOBS = {"words (strings, dicts)": count, "DataFrame groupby": group}


def measure(variant: str, jemalloc: bool, threads: int, tasks: int) -> dict[str, float]:
    """Return tasks a second of each job."""
    config: dict[str, Any] = {}
    if jemalloc:
        config = {"distributed.nanny.pre-spawn-environ": nanny.environment()}
    found = {}
    with bench(variant, threads=threads, config=config) as it:
        for name, job in JOBS.items():
            it.client.gather(it.client.map(job, range(tasks // 4), pure=False))
            began = time.perf_counter()
            it.client.gather(it.client.map(job, range(tasks), pure=False))
            found[name] = tasks / (time.perf_counter() - began)
    return found


def run(quick: bool) -> Result:
    tasks, count_of_rounds, threads = (8, 1, (1,)) if quick else (120, 5, THREADS)
    table = Table(["threads", "job", "worker", "tasks/s", "ratio to glibc, none"], [])
    figures: dict[str, Any] = {}
    for number in threads:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ASKED}
        for _, name in rounds(count_of_rounds, list(ASKED)):
            variant, jemalloc = ASKED[name]
            found[name].append(
                isolated(measure, variant=variant, jemalloc=jemalloc, threads=number, tasks=tasks)
            )
        figures[f"{number} threads"] = found
        for job in JOBS:
            base = [one[job] for one in found["glibc, none"]]
            for name in ASKED:
                speeds = [one[job] for one in found[name]]
                table.rows.append(
                    [str(number), job, name, Spread.of(speeds).show(0), ratios(speeds, base).show()]
                )
    return Result(
        "allocators",
        "Cost: jemalloc and PYTHONMALLOC=malloc",
        f"{tasks} tasks a batch on one worker, after a quarter of it to warm up; "
        f"{count_of_rounds} rounds, each in fresh clusters. `none`: nothing is measured; `ours`: "
        "with every task's row. Above 1 jemalloc is the faster one.",
        [table],
        [],
        figures,
    )
