"""Quantiles read back from the buckets beside the true ones.

The interpolation is Prometheus's own ``histogram_quantile`` (linear inside a bucket), as its
documentation and ``promql/quantile.go`` have it; a test holds this copy against a real Prometheus.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence

from benchmarks.harness import percentile
from benchmarks.report import Result, Table, Target
from dask_memusage_exporter.aggregate import Histogram
from dask_memusage_exporter.config import DEFAULT_BUCKETS, MIB

PERCENTS = (50, 95, 99)


def histogram_quantile(
    quantile: float, bounds: Sequence[float], cumulative: Sequence[int]
) -> float:
    """Return what Prometheus's function of that name does for classic buckets, +Inf last."""
    rank = quantile * cumulative[-1]
    bucket = bisect_left(cumulative, rank)
    if bucket == len(bounds):
        return bounds[-1]
    low = bounds[bucket - 1] if bucket else 0.0
    before = cumulative[bucket - 1] if bucket else 0
    return low + (bounds[bucket] - low) * (rank - before) / (cumulative[bucket] - before)


def run(quick: bool) -> Result:
    chance = random.Random(1)
    count = 2_000 if quick else 100_000
    low, high = 20, 38  # 1 MiB to 256 GiB
    kinds = {
        "log-uniform, 1 MiB to 256 GiB": lambda: 2 ** chance.uniform(low, high),
        "one size, 100 MiB +- 2 %": lambda: 100 * MIB * chance.gauss(1, 0.02),
        "one size, 700 MiB +- 2 %": lambda: 700 * MIB * chance.gauss(1, 0.02),
        "two sizes, 90 % of 50 MiB, 10 % of 2 GiB": lambda: (
            (50 if chance.random() < 0.9 else 2048) * MIB * chance.gauss(1, 0.02)
        ),
    }
    rows, worst = [], 0.0
    for kind, draw in kinds.items():
        sizes = [int(draw()) for _ in range(count)]
        histogram = Histogram()
        for size in sizes:
            histogram.observe(size, DEFAULT_BUCKETS)
        cumulative = histogram.snapshot(len(DEFAULT_BUCKETS) + 1).cumulative
        row = [kind]
        for percent in PERCENTS:
            true = percentile(sizes, percent)
            error = histogram_quantile(percent / 100, DEFAULT_BUCKETS, cumulative) / true - 1
            row.append(f"{100 * error:+.1f} %")
            if kind.startswith("log"):
                worst = max(worst, abs(error))
        rows.append(row)
    series = len(DEFAULT_BUCKETS) + 3
    return Result(
        name="quantiles",
        title="Quantiles from the buckets",
        how=f"histogram_quantile over the default {len(DEFAULT_BUCKETS)} bounds and +Inf against "
        f"the true quantile of {count} values. One histogram of one prefix is {series} series. "
        "Means, from sum and count, are exact; use them for judgements.",
        tables=[Table(["sizes", *(f"p{percent}" for percent in PERCENTS)], rows)],
        targets=[
            Target("error on log-uniform sizes", "<= 15 %", f"{100 * worst:.1f} %", worst <= 0.15)
        ],
        figures={"worst_log_uniform": worst, "series_a_histogram": series},
    )
