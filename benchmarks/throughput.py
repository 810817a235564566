"""Throughput of empty tasks, and the processor time that they cost.

Each measurement is a fresh cluster; the variants take turns. Two settings: Dask's own, where the
scheduler holds tasks back and one core is idle most of the time, and one where it does not
(``worker-saturation: inf``), so that everything that costs shows.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.harness import CSV, NONE, OLD, OURS, Spread, bench, isolated, ratios, rounds
from benchmarks.report import Result, Table, Target

VARIANTS = (NONE, OURS, CSV, OLD)
SATURATIONS = {"as Dask sets it": 1.1, "inf": "inf"}
LEAST_RATIO = 0.98


def nothing(_: int) -> None:
    """Do nothing: an empty task."""


def processor_seconds() -> float:
    """Return the processor time of this process; run on workers."""
    return time.process_time()


def measure(variant: str, saturation: float | str, tasks: int, batches: int) -> dict[str, float]:
    """Run batches of empty tasks on two workers of one thread; return rates of the whole."""
    config = {"distributed.scheduler.worker-saturation": saturation}
    with bench(variant, workers=2, threads=1, config=config) as it:
        it.client.gather(it.client.map(nothing, range(tasks // 2), pure=False))
        busy = sum(it.client.run(processor_seconds).values())
        rates = []
        for _ in range(batches):
            began = time.perf_counter()
            it.client.gather(it.client.map(nothing, range(tasks), pure=False))
            rates.append(tasks / (time.perf_counter() - began))
        busy = sum(it.client.run(processor_seconds).values()) - busy
        # The median of a cluster's batches: one that the machine disturbs does not count.
        return {
            "tasks_per_s": statistics.median(rates),
            "worker_us": busy / (tasks * batches) * 1e6,
        }


def run(quick: bool) -> Result:
    tasks, batches, count = (200, 1, 1) if quick else (1000, 3, 5)
    saturations = ["inf"] if quick else list(SATURATIONS)
    variants = (NONE, CSV, OLD) if quick else VARIANTS
    table = Table(["worker-saturation", "variant", "tasks/s", "ratio to none",
                   "worker's processor time a task", "more than none"], [])  # fmt: skip
    figures: dict[str, Any] = {}
    targets = []
    for name in saturations:
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for _, variant in rounds(count, variants):
            found[variant].append(
                isolated(measure, variant=variant, saturation=SATURATIONS[name], tasks=tasks,
                         batches=batches)
            )  # fmt: skip
        rates, times = (
            {variant: [one[key] for one in all_] for variant, all_ in found.items()}
            for key in ("tasks_per_s", "worker_us")
        )
        figures[name] = {"rounds": found}
        for variant in variants:
            ratio = ratios(rates[variant], rates[NONE])
            more = Spread.of([a - b for a, b in zip(times[variant], times[NONE], strict=True)])
            figures[name][variant] = {"ratio": ratio._asdict(), "more_us": more._asdict()}
            table.rows.append(
                [name, variant, Spread.of(rates[variant]).show(0),
                 "1" if variant == NONE else ratio.show(3),
                 f"{Spread.of(times[variant]).show(0)} us",
                 "-" if variant == NONE else f"{more.show(0, sign=True)} us"]
            )  # fmt: skip
            if variant in (OURS, CSV):
                targets.append(
                    Target(f"throughput of empty tasks, {variant}, worker-saturation {name}",
                           f">= {LEAST_RATIO} of none", ratio.show(3),
                           ratio.median >= LEAST_RATIO)
                )  # fmt: skip
    return Result(
        "throughput",
        "Cost: throughput of empty tasks",
        f"{count} rounds; in each, every variant has a fresh cluster of 2 workers of one thread, "
        f"which runs {tasks // 2} empty tasks to warm up and {batches} batches of {tasks}; the "
        "median batch counts. Ratios and differences are taken within a round: median (lowest to "
        "highest). With `worker-saturation` as Dask sets it the scheduler holds tasks back, and "
        "waiting hides some of what is spent; with `inf` nothing does.",
        [table],
        targets,
        figures,
    )
