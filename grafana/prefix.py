"""*One task prefix*: how its peaks are spread, whether they grew, what its inputs do."""

from __future__ import annotations

from grafana import killed
from grafana.overview import GROWTH, KNOWN, MAXIMUM, OF_THE_LIMIT, PEAK, TASKS
from grafana.panels import (
    BESIDE,
    CHANGE,
    COUNT,
    NO_WORKERS,
    NONE_IS_GOOD,
    OF_KNOWN,
    OF_LIMIT,
    Column,
    Dashboard,
    Heatmap,
    Lines,
    Query,
    Ratio,
    Row,
    Stat,
    Table,
)
from grafana.promql import gained, in_range, mean, quantile

_INPUT = "task_memory_input_bytes"
_MAX = "<task_memory_peak_maximum_bytes>"
_GROWTH_MAX = "<task_memory_growth_maximum_bytes>"
_WORKER_MAX = "<worker:task_memory_peak_maximum_bytes>"


def _statistics(over: str, window: str) -> str:
    """Return one row a statistic, all of them exact: nothing is judged by estimates."""
    rows = {
        "peak, mean": mean(PEAK, over, ""),
        "peak, maximum": f"max(max_over_time({_MAX}{window}))",
        "growth, mean": mean(GROWTH, over, ""),
        "growth, maximum": f"max(max_over_time({_GROWTH_MAX}{window}))",
        "input, mean": mean(_INPUT, over, ""),
    }
    return " or ".join(
        f'label_replace({expr}, "statistic", "{name}", "", "")' for name, expr in rows.items()
    )


_NOW = _statistics("in_range", "[$__range]")
_BEFORE = _statistics("before", "[$baseline] offset $__range")

_RATIO = f"({mean(GROWTH, 'in_range', '')}) / ({mean(_INPUT, 'in_range', '')} > 0)"

STATS = Row(
    "In the selected time range",
    (
        Stat(
            "Tasks measured",
            """Executions of this prefix that ended in the time range, exact. Few: read its maximum
            and mean, and not the quantiles.""",
            (Query(TASKS),),
            decimals=0,
            width=3,
        ),
        Stat(
            "Mean peak",
            """Exact mean of the process's peaks while its tasks ran. The rest of what the process
            held is in it: see growth for what is the task's own.""",
            (Query(mean(PEAK)),),
            "bytes",
            width=3,
        ),
        Stat(
            "Max peak",
            """The largest peak of those that ended, exact; killed ones are in the post-mortem. It
            may be from up to 10 minutes before the range (memusage.maximum-window). Worker memory
            must be above it, or its tasks are killed.""",
            (Query(MAXIMUM),),
            "bytes",
            width=3,
        ),
        Stat(
            "Max of limit",
            """How near the limit of its workers the largest peak of those that ended came, and in
            red how near a killed one was when it was last seen: at least that. Dask pauses a worker
            at 80 % and kills it at 95 %: from orange on make chunks smaller, or workers larger.""",
            (Query(OF_THE_LIMIT, "ended"), killed.BESIDE_SHARES),
            "percentunit",
            OF_LIMIT,
            no_value="no limit",
            decimals=0,
            width=3,
        ),
        Stat(
            "Mean growth",
            """What one task itself added at its peak, exact mean of the tasks of which that is
            known. Times the threads of a worker it is what the worker needs on top of its data.""",
            (Query(mean(GROWTH)),),
            "bytes",
            no_value="not known",
            width=3,
        ),
        Stat(
            "Growth known",
            """Share of its tasks whose growth is their own number. Low: what is known is mostly of
            the large ones; jemalloc or one thread a worker make it more.""",
            (Query(KNOWN),),
            "percentunit",
            OF_KNOWN,
            decimals=0,
            width=3,
        ),
        Stat(
            "Growth changed",
            """Mean growth in the time range against that before it, in clusters seen in the time
            called Baseline. Red: as much as makes an alert by default; see below whether inputs
            grew, too.""",
            (Query(f"{mean(GROWTH)} / ({mean(GROWTH, 'before')}) - 1"),),
            "percentunit",
            CHANGE,
            no_value="no baseline",
            decimals=0,
            width=3,
        ),
        Stat(
            "Killed",
            """Its tasks that were executing when their worker died. Any: see the post-mortem at
            the end of this page.""",
            (Query(killed.KILLED),),
            thresholds=NONE_IS_GOOD,
            decimals=0,
            width=3,
        ),
    ),
)

SPREAD = Row(
    "How it is spread",
    (
        Heatmap(
            "Peaks",
            """How many of its tasks had which peak, by the colours below. Two bands are two kinds
            of input under one name. Diamonds are single tasks: click one to open its trace
            (exemplars; they need spans and a scrape of /memusage/metrics).""",
            PEAK,
            exemplar=True,
        ),
        Heatmap(
            "Growth",
            """The same of what tasks themselves added, of those of which it is known. Smaller
            chunks make this smaller; where it is flat and peaks climb, the worker keeps data.""",
            GROWTH,
            exemplar=True,
        ),
        Lines(
            "Peaks: p50, p95, mean, maximum",
            """Mean and maximum are exact, quantiles are estimates within their bucket (at most
            half too high or a third too low). Diamonds open the trace of a task. Maximum far above
            p95: a few inputs are much larger than the rest; split those. Red points are killed
            tasks, at least so high, and in none of the lines.""",
            (
                Query(quantile(0.5, PEAK, "gained", ""), "p50 (estimate)", exemplar=True),
                Query(quantile(0.95, PEAK, "gained", ""), "p95 (estimate)", exemplar=True),
                Query(mean(PEAK, "gained", ""), "mean"),
                Query(f"max({_MAX})", "maximum of the last minutes"),
                Query("min(<task_memory_worker_limit_bytes>)", "worker limit", border=True),
                killed.BESIDE_LINES,
            ),
        ),
        Lines(
            "Growth: p50, p95, mean, maximum",
            """As beside, of what tasks themselves added. Size chunks by p95 times the threads of a
            worker.""",
            (
                Query(quantile(0.5, GROWTH, "gained", ""), "p50 (estimate)", exemplar=True),
                Query(quantile(0.95, GROWTH, "gained", ""), "p95 (estimate)", exemplar=True),
                Query(mean(GROWTH, "gained", ""), "mean"),
                Query(f"max({_GROWTH_MAX})", "maximum of the last minutes"),
            ),
            no_value="no task's growth was known",
        ),
    ),
)

CHANGED = Row(
    "Before and after",
    (
        Table(
            "Before and in the time range",
            """Its tasks in the time range beside those that ran before it, in clusters seen in the
            time called Baseline; all of it exact. Choose the range to begin at a release. Growth up
            and input up: the data grew. Growth up alone: the code did; compare the releases.""",
            ("statistic", "Statistic"),
            (
                Column("Before", _BEFORE, "bytes"),
                Column("In the time range", _NOW, "bytes"),
            ),
            (),
            Ratio("Of before", "In the time range", "Before", BESIDE),
            width=12,
        ),
        Lines(
            "Input and growth",
            """Exact means of what tasks were given, as Dask estimates it, and of what they added.
            Lines that rise together: larger chunks. Growth that rises alone: another copy in the
            code. No input: the task reads its data itself, and Dask does not know how much.""",
            (
                Query(mean(_INPUT, "gained", ""), "mean input"),
                Query(mean(GROWTH, "gained", ""), "mean growth"),
            ),
            height=10,
        ),
        Stat(
            "Growth by input",
            """Mean growth divided by mean input, over the time range. About 1: one copy of the
            input. 3 and more: temporaries; see what the code copies. None: no input that Dask
            knows of, or no growth that is known.""",
            (Query(_RATIO),),
            no_value="no input",
            decimals=2,
            width=6,
            height=9,
        ),
        Lines(
            "Whose number it is",
            """Its tasks by scope: thread and process are the task's own number; of shared ones only
            the process's peak is known. Reasons stand in the full CSV and on spans.""",
            (Query(f"sum by (scope) ({gained('<task_memory_tasks_total>')})", "{{scope}}"),),
            COUNT,
            bars=True,
            width=18,
        ),
    ),
)

WHERE = Row(
    "Where it ran and died",
    (
        Table(
            "Workers (worker series)",
            """Which workers ran it. One far above the others: its inputs, or what else it keeps.
            Empty: there are no worker series, or memusage.worker-metrics is not full, so
            that their pages have no prefixes; the panels above need neither.""",
            ("instance", "Worker"),
            (
                Column(
                    "Max peak",
                    f"max by (instance) (max_over_time({_WORKER_MAX}[$__range]))",
                    "bytes",
                ),
                Column(
                    "Tasks",
                    f"sum by (instance) ({in_range('<worker:task_memory_tasks_total>')})",
                    decimals=0,
                ),
            ),
            ("Max peak",),
            no_value=NO_WORKERS,
            width=10,
            height=9,
        ),
        killed.TABLE,
    ),
)

DASHBOARD = Dashboard(
    "prefix",
    "One task prefix",
    """How much memory one kind of task needs: how it is spread, whether it grew, what its inputs
    have to do with it, where it ran and died.""",
    (STATS, SPREAD, CHANGED, WHERE),
    prefix="one",
    baseline=True,
)
