"""Tasks that run at once in one process: is each task's own growth known, and how well.

Arrays, blocks and Python objects of 10 to 400 MB, in a mix drawn by chance, on 1 to 8 threads of
one worker. The truth of a task is what it holds at its peak, as it knows itself: bytes of arrays
and blocks, and what its Python objects say of their size.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness import CSV, MIB, OLD, bench, isolated, percentile, share, task_bytes
from benchmarks.report import Result, Table, Target
from benchmarks.sizes import deep_bytes

SIZES_MB = (10, 50, 200, 400)
THREADS = (1, 2, 4, 8)
RUNS = 10

MEDIAN, CLOSE = 0.12, 0.25


def filled(count: int, one: Callable[[int], Any]) -> list[Any]:
    """Return a list of so many objects that has not grown: growing needs room of its own."""
    made = [None] * count
    for n in range(count):
        made[n] = one(n)
    return made


KINDS: dict[str, Callable[[int], Any]] = {
    "array": lambda total: np.ones(total, dtype=np.uint8),
    "64 kB blocks": lambda total: filled(total // 64_000, lambda _: bytearray(64_000)),
    "5 kB blocks": lambda total: filled(total // 5_000, lambda _: bytearray(5_000)),
    "ints": lambda total: filled(total // 40, lambda n: 10**6 + n),
    "strings": lambda total: filled(total // 208, lambda n: f"{n:0151d}"),
    "dicts": lambda total: filled(total // 248, lambda n: {"a": 10**6 + n, "b": -1000 - n}),
    "DataFrame": lambda total: pd.DataFrame(
        np.ones((total // 32, 4)), columns=list("abcd"), copy=False
    ),
}

#: What is measured: variant, whether on jemalloc.
ASKED = {"ours, jemalloc": (CSV, True), "ours, glibc": (CSV, False), OLD: (OLD, False)}


def make(kind: str, total: int) -> int:
    """Make objects, hold them for a moment, return how large they are: one task."""
    made = KINDS[kind](total)
    time.sleep(0.02)
    return deep_bytes(made)


def measure(threads: int, variant: str, jemalloc: bool, sizes: list[int], runs: int) -> Any:
    """Run the mix; return ``[kind, run, truth, row]`` of each task."""
    jobs = [(k, mb, run) for run in range(runs) for k in KINDS for mb in sizes]
    if runs > 1:  # the first and the last runs stay first and last
        middle = jobs[len(KINDS) * len(sizes) : -len(KINDS) * len(sizes)]
        random.Random(threads).shuffle(middle)
        jobs[len(KINDS) * len(sizes) : -len(KINDS) * len(sizes)] = middle
    with bench(variant, threads=threads, config={"memusage.jemalloc": jemalloc}) as it:
        it.client.wait_for_workers(1)
        it.client.run(pd.DataFrame)
        keys = [f"make-{number}" for number in range(len(jobs))]
        futures = [
            it.client.submit(make, kind, mb * 10**6, key=key)
            for key, (kind, mb, _) in zip(keys, jobs, strict=True)
        ]
        truths = it.client.gather(futures)
        rows = {row["task_key"]: row for row in it.rows()}
    return [
        [kind, run, truth, rows.get(key)]
        for key, (kind, _, run), truth in zip(keys, jobs, truths, strict=True)
    ]


def risen(row: dict[str, str]) -> float:
    """Return by how much the process rose in a task's window: all that RSS can tell."""
    return (float(row["max_memory_mb"]) - float(row["min_memory_mb"])) * MIB


def run(quick: bool) -> Result:
    threads, sizes, runs = ((2,), [2], 2) if quick else (THREADS, list(SIZES_MB), RUNS)
    table = Table(["threads", "variant", "tasks", "size claimed", "median error",
                   f"within {CLOSE:.0%}", "95th percentile of error"], [])  # fmt: skip
    by_kind = Table(["kind", "run", "tasks", "median error", f"within {CLOSE:.0%}"], [])
    figures: dict[str, Any] = {}
    targets = []
    errors_of: dict[tuple[str, str], list[float]] = {}
    for count in threads:
        for name, (variant, jemalloc) in ASKED.items():
            if variant == OLD and count > 1:
                table.rows.append([str(count), name, "-", "one thread only", "-", "-", "-"])
                continue
            found = isolated(measure, threads=count, variant=variant, jemalloc=jemalloc,
                             sizes=sizes, runs=runs)  # fmt: skip
            readings = {name: [task_bytes(row) for *_, row in found]}
            if jemalloc:
                readings["process RSS, jemalloc"] = [risen(row) for *_, row in found]
            for title, claimed in readings.items():
                errors = [
                    size / truth - 1
                    for size, (_, _, truth, _) in zip(claimed, found, strict=True)
                    if size is not None
                ]
                figures[f"{count} threads/{title}"] = errors
                table.rows.append([str(count), title, str(len(found)), *_told(errors, len(found))])
            if jemalloc:
                own = [task_bytes(row) for *_, row in found]
                errors = figures[f"{count} threads/{name}"]
                median, close = _errors(errors)
                good = median <= MEDIAN and close >= 0.95 and len(errors) == len(found)
                targets.append(
                    Target(
                        f"growth of each of the tasks that overlap, {count} threads",
                        f"all claimed, median error <= {MEDIAN:.0%}, 95 % within {CLOSE:.0%}",
                        f"{len(errors)} of {len(found)}, {median:.1%}, {100 * close:.1f} %",
                        good,
                    )
                )
                for size, (kind, number, truth, _) in zip(own, found, strict=True):
                    when = {0: "first", runs - 1: "last"}.get(number)
                    if when and size is not None:
                        errors_of.setdefault((kind, when), []).append(size / truth - 1)
    for (kind, when), errors in sorted(errors_of.items()):
        median, close = _errors(errors)
        by_kind.rows.append([kind, when, str(len(errors)), f"{median:.1%}", f"{close:.1%}"])
    return Result(
        "threads",
        "Many threads: each task's own growth",
        f"Tasks of {', '.join(map(str, sizes))} MB of {len(KINDS)} kinds, each {runs} times, in a "
        "mix drawn by chance, on one worker. The truth is what a task's objects say of their size. "
        "`size claimed`: rows that have a growth; the others say why not. `process RSS`: by how "
        "much the process rose in the task's window, which is all that there is to read without "
        "the thread's own count. dask-memusage allows one thread only. Below, by kind, ours on "
        "jemalloc over all numbers of threads.",
        [table, by_kind],
        targets,
        figures,
    )


def _errors(errors: list[float]) -> tuple[float, float]:
    """Return the median of absolute errors, and the share of those that are close."""
    sizes = [abs(error) for error in errors]
    if not sizes:
        return sys.float_info.max, 0.0
    return statistics.median(sizes), sum(size <= CLOSE for size in sizes) / len(sizes)


def _told(errors: list[float], tasks: int) -> list[str]:
    claimed = share(len(errors), tasks)
    if not errors:
        return [claimed, "-", "-", "-"]
    median, close = _errors(errors)
    return [claimed, f"{median:.1%}", f"{close:.1%}",
            f"{percentile([abs(error) for error in errors], 95):.0%}"]  # fmt: skip
