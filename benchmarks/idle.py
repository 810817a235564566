"""Processor time of idle workers: nothing runs, but the exporter is there."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.harness import NONE, OLD, OURS, Spread, bench, differences, isolated, rounds
from benchmarks.report import Result, Table, Target
from benchmarks.throughput import nothing, processor_seconds

VARIANTS = (NONE, OURS, OLD)
LIMIT_POINTS = 0.2
WORKERS = 2


def measure(variant: str, seconds: float) -> float:
    """Return what an idle worker uses of one processor, in percent, after it has had work."""
    with bench(variant, workers=WORKERS, threads=1) as it:
        it.client.gather(it.client.map(nothing, range(100), pure=False))
        time.sleep(min(2.0, seconds))  # until what lingers after work has gone to sleep
        began, before = time.perf_counter(), it.client.run(processor_seconds)
        time.sleep(seconds)
        ended, after = time.perf_counter(), it.client.run(processor_seconds)
        used: float = sum(after[worker] - before[worker] for worker in after)
        return used / WORKERS / (ended - began) * 100


def run(quick: bool) -> Result:
    seconds, count = (1.0, 1) if quick else (10.0, 7)
    variants = (NONE, OURS) if quick else VARIANTS
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for _, variant in rounds(count, variants):
        found[variant].append(isolated(measure, variant=variant, seconds=seconds))
    table = Table(["variant", "one worker uses of a processor", "points over none"], [])
    figures: dict[str, Any] = {"rounds": found}
    targets = []
    for variant in variants:
        over = differences(found[variant], found[NONE])
        figures[variant] = over._asdict()
        table.rows.append(
            [variant, f"{Spread.of(found[variant]).show(2)} %",
             "-" if variant == NONE else over.show(2, sign=True)]
        )  # fmt: skip
        if variant == OURS:
            targets.append(
                Target("processor time of an idle worker over none",
                       f"<= {LIMIT_POINTS} percentage points", over.show(2, sign=True),
                       over.median <= LIMIT_POINTS)
            )  # fmt: skip
    return Result(
        "idle",
        "Cost: idle workers",
        f"{count} rounds; in each, every variant has a fresh cluster of {WORKERS} workers, which "
        f"runs 100 empty tasks and is then left alone for {seconds:.0f} s. Processor time of the "
        "workers' processes (`time.process_time`), a worker, in percent of one processor.",
        [table],
        targets,
        figures,
    )
