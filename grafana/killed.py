"""Panels about tasks that were executing when their worker died."""

from __future__ import annotations

from grafana.panels import COUNT, NONE_IS_GOOD, PREFIX, Column, Lines, Query, Table
from grafana.promql import by_prefix, gained, in_range

_KILLED = "task_memory_killed_tasks_total"
_PEAK = "<task_memory_killed_last_peak_bytes>"
_LIMIT = "<task_memory_worker_limit_bytes>"

#: In the time range, of each prefix.
KILLED = by_prefix("sum", in_range(f"<{_KILLED}>"))
#: Of prefixes that lost a task in the time range; the metrics stay for ever.
_LATELY = f"and on (task_prefix_name) ({KILLED} > 0)"


def _peaks(window: str, counted: str) -> str:
    """Return how high each latest kill was when last seen, of clusters that had one meanwhile."""
    return f"(last_over_time({_PEAK}[{window}]) and ignoring (cause) ({counted} > 0))"


#: At least so high were killed tasks of the time range; what they would have needed nobody knows.
_PEAKS = _peaks("$__range", in_range(f"<{_KILLED}>"))
#: As a share of their cluster's limit.
OF_THE_LIMIT = by_prefix(
    "max",
    f"{_PEAKS} / on (<cluster>) group_left () "
    f"min by (<cluster>) (last_over_time({_LIMIT}[$__range]))",
)

#: Beside panels that tell of peaks of tasks that ended.
BESIDE_SHARES = Query(f"max({OF_THE_LIMIT})", "killed, at least", killed=True)
BESIDE_LINES = Query(
    by_prefix("max", _peaks("$__interval", gained(f"<{_KILLED}>"))),
    "{{task_prefix_name}} killed, at least",
    killed=True,
)


def _by_cause(cause: str) -> str:
    return by_prefix("sum", in_range(f'<{_KILLED}{{cause="{cause}"}}>')) + f" {_LATELY}"


TABLE = Table(
    "Post-mortem: killed tasks by prefix",
    """What was executing when a worker died, in the time range; nothing here is good. Memory: known
    to be killed for it; give workers more, or fewer threads. Signal: the nanny saw a signal, which
    may be the kernel's; look at the node. Lost: nobody saw how; in Kubernetes look for OOMKilled.
    The last peak is that of the latest kill and may be from some seconds before it; key and age
    stand in the scheduler's log.""",
    PREFIX,
    (
        Column(
            "Killed",
            f"{KILLED} > 0",
            thresholds=NONE_IS_GOOD,
            decimals=0,
        ),
        Column("memory", _by_cause("memory"), decimals=0),
        Column("signal", _by_cause("signal"), decimals=0),
        Column("lost", _by_cause("lost"), decimals=0),
        Column(
            "Last peak",
            by_prefix("max", _PEAKS),
            "bytes",
        ),
        Column(
            "Last killed",
            by_prefix(
                "max", "last_over_time(<task_memory_killed_last_timestamp_seconds>[$__range])"
            )
            + f" * 1000 {_LATELY}",
            "dateTimeAsIso",
            width=160,
        ),
    ),
    ("Last killed", "Killed"),
    no_value="none",
    width=14,
    height=9,
)

OVER_TIME = Lines(
    "Killed tasks by cause",
    """When workers died with a task on them. One bar: look at that task. Bars that repeat: the same
    task is tried again on one worker after the other; cancel it. Worker processes that end in
    order, or are scaled down, are not here.""",
    (Query(f"sum by (cause) ({gained(f'<{_KILLED}>')})", "{{cause}}"),),
    COUNT,
    bars=True,
    no_value="none was killed",
    width=10,
)
