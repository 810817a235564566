"""*Task memory overview*: what costs most, what is near the limit, what grew, what was killed."""

from __future__ import annotations

from grafana import killed
from grafana.panels import (
    ALL_RED,
    CHANGE,
    COUNT,
    NONE_IS_GOOD,
    OF_KNOWN,
    OF_LIMIT,
    PREFIX,
    Column,
    Dashboard,
    Heatmap,
    Lines,
    Query,
    Row,
    Stat,
    Table,
)
from grafana.promql import by_prefix, gained, in_range, mean, quantile

PEAK, GROWTH = "task_memory_peak_bytes", "task_memory_growth_bytes"
_MAX = "<task_memory_peak_maximum_bytes>"
_LIMIT = "<task_memory_worker_limit_bytes>"

#: Largest peak of the range, of each prefix.
MAXIMUM = by_prefix("max", f"max_over_time({_MAX}[$__range])")
#: The same as a share of the limit of the cluster in which it was.
OF_THE_LIMIT = by_prefix(
    "max",
    f"max_over_time({_MAX}[$__range]) / ignoring (task_prefix_name) group_left () "
    f"last_over_time({_LIMIT}[$__range])",
)
#: What each peak left of the limit.
_HEADROOM = (
    f"last_over_time({_LIMIT}[$__range]) - ignoring (task_prefix_name) group_right () "
    f"max_over_time({_MAX}[$__range])"
)
TASKS = by_prefix("sum", in_range("<task_memory_tasks_total>"))
_OWN = by_prefix("sum", in_range('<task_memory_tasks_total{scope!="shared"}>'))
#: Share of tasks whose growth is known.
KNOWN = f"{_OWN} / ({TASKS} > 0)"
#: Of prefixes that ran, and of those that were killed: none of them makes a row of a stranger.
_KILLED = f"({killed.KILLED} > 0 or {killed.KILLED} and on (task_prefix_name) {TASKS})"
_SECONDS = by_prefix("sum", in_range("<dask:scheduler_tasks_compute_seconds_total>"))
#: Of bytes and seconds, in the unit of bills.
_GIB_HOUR = 2**30 * 3600


def _change(histogram: str) -> str:
    return f"{mean(histogram)} / ({mean(histogram, 'before')}) - 1"


STATS = Row(
    "In the selected time range",
    (
        Stat(
            "Tasks measured",
            """Executions that ended in the time range, exact, those of clusters that have gone too.
            None: look at Exporter health whether anything is measured, and at the time range.""",
            (Query(f"sum({in_range('<task_memory_tasks_total>')})"),),
            decimals=0,
            width=3,
        ),
        Stat(
            "Largest peak",
            """The highest resident memory of any worker process during a task that ended, children
            included: everybody's in that process where tasks overlap. How high killed ones were is
            in the post-mortem below. It may be from up to 10 minutes before the range
            (memusage.maximum-window). Compare with the worker limit.""",
            (Query(f"max(max_over_time({_MAX}[$__range]))"),),
            "bytes",
            width=3,
        ),
        Stat(
            "Worker limit",
            """The smallest memory limit of the connected workers, as last seen; the smallest of all
            clusters that are selected. None: workers run without a limit, and only the kernel will
            stop them: set one.""",
            (Query(f"min(last_over_time({_LIMIT}[$__range]))"),),
            "bytes",
            no_value="no limit",
            width=3,
        ),
        Stat(
            "Headroom",
            """What the largest peak left below the limit of its workers, at the least. Little or
            below zero: the next larger input is killed. Give workers more memory or fewer threads,
            or make chunks smaller. Take memory away from workers only by this, and only where no
            task was killed: killed ones left none, and stand in red beside it.""",
            (Query(f"min({_HEADROOM})"),),
            "bytes",
            no_value="no limit",
            width=3,
        ),
        Stat(
            "Peak of limit",
            """How near the limit the largest peak of a task that ended came, and in red how near a
            killed one was when it was last seen: at least that. Dask pauses a worker at 80 % and
            kills it at 95 %. Orange or red: see in the table below whose it is, then give workers
            more memory or fewer threads, or make its inputs smaller.""",
            (Query(f"max({OF_THE_LIMIT})", "ended"), killed.BESIDE_SHARES),
            "percentunit",
            OF_LIMIT,
            no_value="no limit",
            decimals=0,
            width=3,
        ),
        Stat(
            "Tasks killed",
            """Tasks that were executing when their worker died, whatever the cause. Any: see
            Workers and deaths for which, how high they were, and why.""",
            (Query(f"sum({in_range('<task_memory_killed_tasks_total>')})"),),
            thresholds=NONE_IS_GOOD,
            decimals=0,
            width=3,
        ),
        Stat(
            "Growth known",
            """Share of tasks that were alone, or counted by jemalloc, so that what they added is
            their own number; of the others only the process's peak is known. Low: run one thread a
            worker, or turn jemalloc on.""",
            (
                Query(
                    f"""sum({in_range('<task_memory_tasks_total{scope!="shared"}>')}) / """
                    f"(sum({in_range('<task_memory_tasks_total>')}) > 0)"
                ),
            ),
            "percentunit",
            OF_KNOWN,
            decimals=0,
            width=3,
        ),
        Stat(
            "Workers",
            """Connected workers by where their peaks come from, now. 'missing' ones run without the
            package: install it there.""",
            (Query("sum by (source) (<task_memory_workers>) > 0", "{{source}}"),),
            decimals=0,
            no_value="no worker now",
            width=3,
        ),
    ),
)

COSTS = Row(
    "What costs most",
    (
        Table(
            "Task prefixes by cost",
            """A row a kind of task; click it for its own dashboard. Memory x time is the mean peak
            times the time on threads, what an otherwise empty worker of one thread would be billed.
            Means and maximum are exact, of tasks that ended; p50 and p95 are estimates within their
            bucket (at most half too high or a third too low), and never above the maximum. Mean
            growth is of those tasks whose growth is known. Killed, of limit: how near it killed
            ones were when last seen, at least that. Begin with the top row: smaller chunks there
            save most. __overflow__ stands for all prefixes beyond memusage.max-prefixes.""",
            PREFIX,
            (
                Column(
                    "Memory x time",
                    f"{mean(PEAK)} * {_SECONDS} / {_GIB_HOUR}",
                    "suffix:GiB h",
                    decimals=3,
                    width=130,
                ),
                Column("Tasks", TASKS, decimals=0),
                Column("Mean peak", mean(PEAK), "bytes"),
                Column("p50 peak (est.)", quantile(0.5, PEAK), "bytes"),
                Column("p95 peak (est.)", quantile(0.95, PEAK), "bytes"),
                Column("Max peak", MAXIMUM, "bytes"),
                Column("Max of limit", OF_THE_LIMIT, "percentunit", OF_LIMIT, decimals=0),
                Column("Mean growth", mean(GROWTH), "bytes"),
                Column("Growth known", KNOWN, "percentunit", decimals=0),
                Column("Killed", _KILLED, thresholds=NONE_IS_GOOD, decimals=0),
                Column("Killed, of limit", killed.OF_THE_LIMIT, "percentunit", ALL_RED, decimals=0),
            ),
            ("Memory x time", "Max peak"),
        ),
    ),
)

OVER_TIME = Row(
    "Over time",
    (
        Heatmap(
            "Peaks of all tasks",
            """How many tasks had which peak, by the colours below. A band that climbs is a job that
            grows or workers that leak; one that comes near the limit is the next kill. Click a
            prefix in the table to see its own.""",
            PEAK,
        ),
        Lines(
            "Largest peak by prefix",
            """The largest peak of the last minutes (memusage.maximum-window), exact, below the
            smallest worker limit (dashed). A line that climbs towards it will be killed: click it
            for its own dashboard. Red points are killed tasks, at least so high, in no line.""",
            (
                Query(by_prefix("max", _MAX), "{{task_prefix_name}}"),
                Query(f"min({_LIMIT})", "worker limit", border=True),
                killed.BESIDE_LINES,
            ),
            drill=True,
        ),
        Lines(
            "Mean peak by prefix",
            """Exact, of the tasks that ended in each step. A step up with no change of code is a
            change of input.""",
            (Query(mean(PEAK, "gained"), "{{task_prefix_name}}"),),
            drill=True,
        ),
        Lines(
            "Mean growth by prefix",
            """What a task itself added, exact, of the tasks whose growth is known. No line: no
            task's growth was known; see Growth known.""",
            (Query(mean(GROWTH, "gained"), "{{task_prefix_name}}"),),
            no_value="no task's growth was known",
            drill=True,
        ),
        Lines(
            "Tasks ended by prefix",
            """How many tasks each step's other panels speak of. Few tasks make quantiles jump. The
            first steps begin before the range, so the totals here are a little above those of the
            tables.""",
            (
                Query(
                    by_prefix("sum", gained("<task_memory_tasks_total>")) + " > 0",
                    "{{task_prefix_name}}",
                ),
            ),
            COUNT,
            bars=True,
            width=24,
        ),
    ),
)

GREW = Row(
    "Against the baseline",
    (
        Table(
            "Mean memory, in the time range and before it",
            """Exact means of the time range beside those of the tasks that ran before it, in
            clusters seen in the time called Baseline. Red grew by as much as makes an alert by
            default: click it, and see whether its inputs grew as well or the code did. No value
            before: a new prefix, or too short a baseline.""",
            PREFIX,
            (
                Column("Peak changed", _change(PEAK), "percentunit", CHANGE, decimals=0),
                Column("Mean peak", mean(PEAK), "bytes"),
                Column("Peak before", mean(PEAK, "before"), "bytes"),
                Column("Growth changed", _change(GROWTH), "percentunit", CHANGE, decimals=0),
                Column("Mean growth", mean(GROWTH), "bytes"),
                Column("Growth before", mean(GROWTH, "before"), "bytes"),
                Column("Tasks", TASKS, decimals=0),
            ),
            ("Growth changed", "Peak changed"),
        ),
    ),
)

DASHBOARD = Dashboard(
    "overview",
    "Task memory overview",
    """Which kind of task needs how much memory at its peak, how near workers are to their limit,
    what grew, and what was killed.""",
    (STATS, COSTS, OVER_TIME, GREW, Row("Killed tasks", (killed.TABLE, killed.OVER_TIME))),
    baseline=True,
)
