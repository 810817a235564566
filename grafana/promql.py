"""Counters over a time range, such that clusters that live for two scrapes count in full.

``increase`` knows nothing of what a counter had when it was first seen, and extrapolates: of a
cluster that lives 40 s and is scraped every 15 s it makes half as much again, or nothing. What a
counter gained is known exactly: its last value less that from before, which is none for a series
that was not there in the hour before.
"""

from __future__ import annotations

#: How long before a window a series may have been seen last and still be the same counter.
_BEFORE = "1h"


def gained(series: str, window: str = "$__interval") -> str:
    """Return what a counter gained in a window, a step of a graph; steps add up to the whole.

    One that has fallen has started anew, and all of it is new.
    """
    last = f"last_over_time({series}[{window}])"
    before = f"last_over_time({series}[{_BEFORE}] offset {window})"
    return f"({last} - {before} >= 0 or {last})"


def in_range(series: str) -> str:
    """Return what a counter gained in the dashboard's time range.

    Exact but for a scheduler that was started anew at the same address in it: there Prometheus's
    own ``increase`` is the estimate.
    """
    window = f"{series}[$__range]"
    return f"({gained(series, '$__range')} unless resets({window}) > 0 or increase({window}))"


def before(series: str) -> str:
    """Return what a counter had at the start of the time range: the baseline's tasks.

    Of each cluster that was seen in ``$baseline`` before the range, its last total.
    """
    return f"last_over_time({series}[$baseline] offset $__range)"


def by_prefix(function: str, series: str) -> str:
    """Return an aggregation by task prefix."""
    return f"{function} by (task_prefix_name) ({series})"


def spread(histogram: str) -> str:
    """Return how many tasks each step had in each bucket, of those buckets that are in use.

    These are in one piece, from the empty one below the smallest value to that of the largest:
    Grafana counts a bucket's tasks from the one before it. Which they are is the same for all
    steps: one is empty that was so at every scrape of the range.
    """

    def seen(function: str, more: str = "") -> str:
        range_ = f"<{histogram}_bucket{more}>[$__range] @ end()"
        return f"sum by (le) ({function}({range_}))"

    samples, finite = seen("sum_over_time"), '{le!="+Inf"}'
    # PromQL computes with values only. What a histogram of one bucket alone ends with is its bound.
    one = f'label_join({seen("present_over_time", finite)}, "bound", "", "le")'
    closed = f'({one} or label_replace({one}, "le", "+Inf", "", ""))'
    bounds = f'label_join(histogram_quantile(1, {closed}), "le", "", "bound")'
    # Between values, as what is interpolated is rounded.
    smallest = f"0.999 * scalar(histogram_quantile(1e-9, {samples}))"
    largest = f"1.001 * scalar(histogram_quantile(1, {samples}))"
    beyond = (
        f"""{seen("sum_over_time", '{le="+Inf"}')} > """
        f"scalar(max({seen('sum_over_time', finite)}))"
    )
    return (
        f"sum by (le) ({gained(f'<{histogram}_bucket>')}) "
        f"and on (le) ({bounds} >= {smallest} <= {largest} or {beyond})"
    )


def mean(histogram: str, over: str = "in_range", by: str = "task_prefix_name") -> str:
    """Return the exact mean of a histogram.

    Parameters
    ----------
    histogram
        Its metric's name in our catalog.
    over
        ``in_range``, ``before`` or ``gained``.
    by
        Labels to keep.
    """
    counted = {"in_range": in_range, "before": before, "gained": gained}[over]
    total, count = (
        f"sum by ({by}) ({counted(f'<{histogram}_{part}>')})" for part in ("sum", "count")
    )
    # No task, no mean: 0 / 0 would be a NaN in a table.
    return f"{total} / ({count} > 0)"


def quantile(
    share: float, histogram: str, over: str = "in_range", by: str = "task_prefix_name"
) -> str:
    """Return a quantile: an estimate within its bucket, and no more than the exact maximum."""
    counted, window = {
        "in_range": (in_range, "$__range"),
        "gained": (gained, "$__interval"),
    }[over]
    buckets = f"sum by ({', '.join(filter(None, ('le', by)))}) ({counted(f'<{histogram}_bucket>')})"
    estimate = f"histogram_quantile({share}, {buckets})"
    maxima = f"<{histogram.removesuffix('_bytes')}_maximum_bytes>"
    largest = f"max by ({by}) (max_over_time({maxima}[{window}]))"
    # The smaller of the two, and the estimate, which is dear, asked for once. That of no task is a
    # NaN, which no comparison lets through.
    return f"{largest} - on ({by}) clamp_min({largest} - on ({by}) {estimate}, 0) >= 0"
