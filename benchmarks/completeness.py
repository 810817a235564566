"""Completeness: as many rows as tasks, in the file when the results are there."""

from __future__ import annotations

from typing import Any

from dask.base import compute
from dask.delayed import delayed

from benchmarks.harness import CSV, OLD, Bench, bench, isolated
from benchmarks.report import Result, Table, Target
from benchmarks.throughput import nothing

PREFIX = "counted"


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
        prefix = {"task_prefix_name": PREFIX}
        ours = variant == CSV
        return {
            "rows": len(rows),
            "tasks": len({row["task_key"] for row in rows}),
            "zeros": sum(float(row["max_memory_mb"]) == 0 for row in rows),
            "peaks": it.metric("dask_worker_task_memory_peak_bytes_count", **prefix) if ours else 0,
            "scopes": it.metric("dask_worker_task_memory_tasks_total", **prefix) if ours else 0,
            "dropped": it.metric("dask_worker_task_memory_dropped_records_total") if ours else 0,
            "errors": it.metric("dask_worker_task_memory_errors_total") if ours else 0,
        }


def run(quick: bool) -> Result:
    tasks = 500 if quick else 10_000
    table = Table(["way", "variant", "tasks", "rows at once", "different tasks", "rows of zero",
                   "histograms' count", "by scope", "dropped", "errors"], [])  # fmt: skip
    figures: dict[str, Any] = {"tasks": tasks}
    targets = []
    for way in list(WAYS)[:1] if quick else WAYS:
        for variant in (CSV,) if quick else (CSV, OLD):
            found = isolated(measure, variant=variant, way=way, tasks=tasks)
            figures[f"{way}/{variant}"] = found
            ours = variant == CSV
            told = [f"{found[key]:.0f}" if ours else "-"
                    for key in ("peaks", "scopes", "dropped", "errors")]  # fmt: skip
            table.rows.append(
                [way, "ours" if ours else variant, str(tasks), str(found["rows"]),
                 str(found["tasks"]), str(found["zeros"]), *told]
            )  # fmt: skip
            if ours:
                counts = [found[key] for key in ("rows", "tasks", "peaks", "scopes")]
                targets.append(
                    Target(f"rows in the file when {way} returns, and the histograms' count",
                           f"{tasks} each", ", ".join(f"{count:.0f}" for count in counts),
                           all(count == tasks for count in counts))
                )  # fmt: skip
    return Result(
        "completeness",
        "Completeness",
        f"{tasks} empty tasks on 2 workers of two threads. The file is read the moment that the "
        "call returns; `histograms' count` and `by scope` are sums over the workers' `/metrics` "
        "pages, read right after.",
        [table],
        targets,
        figures,
    )
