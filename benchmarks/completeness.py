"""Completeness: as many rows as tasks, in the file when the results are there."""

from __future__ import annotations

import time
from typing import Any

from dask.base import compute
from dask.delayed import delayed

from benchmarks.harness import CSV, OLD, Bench, bench, isolated
from benchmarks.report import Result, Table, Target
from benchmarks.throughput import nothing

PREFIX = "counted"

#: Workers report their counts to the scheduler once in a heartbeat's interval.
LONGEST_SECONDS = 30.0


def by_gather(it: Bench, tasks: int) -> None:
    keys = [f"{PREFIX}-{number}" for number in range(tasks)]
    it.client.gather(it.client.map(nothing, range(tasks), key=keys))


def by_compute(_: Bench, tasks: int) -> None:
    task = delayed(nothing)
    graph = [task(n, dask_key_name=f"{PREFIX}-{n}") for n in range(tasks)]
    compute(*graph, optimize_graph=False)


WAYS = {"client.gather": by_gather, "dask.compute": by_compute}


def measure(variant: str, way: str, tasks: int) -> dict[str, float]:
    """Run tasks and look at once: rows, rows of different tasks, zeros, histograms' counts."""
    with bench(variant, workers=2, threads=2) as it:
        WAYS[way](it, tasks)
        rows = it.rows()  # now, not later
        found: dict[str, float] = {
            "rows": len(rows),
            "tasks": len({row["task_key"] for row in rows}),
            "zeros": sum(float(row["max_memory_mb"]) == 0 for row in rows),
        }
        if variant == CSV:
            found |= counts(it, tasks)
        return found


def counts(it: Bench, tasks: int) -> dict[str, float]:
    """Return the counts on the pages: the workers' at once, the scheduler's when it has all."""
    found = {
        "peaks": it.metric("dask_worker_task_memory_peak_bytes_count"),
        "scopes": it.metric("dask_worker_task_memory_tasks_total"),
        "dropped": it.metric("dask_worker_task_memory_dropped_records_total"),
        "errors": it.metric("dask_worker_task_memory_errors_total"),
    }
    began = time.monotonic()
    while True:
        found["cluster"] = it.cluster_metric(
            "dask_scheduler_task_memory_peak_bytes_count", task_prefix_name=PREFIX
        )
        found["cluster_seconds"] = time.monotonic() - began
        if found["cluster"] >= tasks or found["cluster_seconds"] > LONGEST_SECONDS:
            return found
        time.sleep(0.05)


def run(quick: bool) -> Result:
    tasks = 500 if quick else 10_000
    table = Table(["way", "variant", "tasks", "rows at once", "different tasks", "rows of zero",
                   "workers' histograms", "by scope", "scheduler's histogram", "dropped",
                   "errors"], [])  # fmt: skip
    figures: dict[str, Any] = {"tasks": tasks}
    targets = []
    for way in list(WAYS)[:1] if quick else WAYS:
        for variant in (CSV,) if quick else (CSV, OLD):
            found = isolated(measure, variant=variant, way=way, tasks=tasks)
            figures[f"{way}/{variant}"] = found
            ours = variant == CSV
            cells = [f"{found[key]:.0f}" if ours else "-"
                    for key in ("peaks", "scopes", "cluster", "dropped", "errors")]  # fmt: skip
            table.rows.append(
                [way, "ours" if ours else variant, str(tasks), str(found["rows"]),
                 str(found["tasks"]), str(found["zeros"]), *cells]
            )  # fmt: skip
            if ours:
                told = [found[key] for key in ("rows", "tasks", "peaks", "scopes", "cluster")]
                targets.append(
                    Target(f"rows in the file when {way} returns, and the histograms' counts",
                           f"{tasks} each", ", ".join(f"{count:.0f}" for count in told),
                           all(count == tasks for count in told))
                )  # fmt: skip
    return Result(
        "completeness",
        "Completeness",
        f"{tasks} empty tasks on 2 workers of two threads. The file is read the moment that the "
        "call returns; `workers' histograms` (counts of peaks) and `by scope` are sums over the "
        "workers' `/metrics` pages, read right after. The scheduler's page is read until it has "
        "all: workers report once in a heartbeat's interval.",
        [table],
        targets,
        figures,
    )
