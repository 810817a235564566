"""*Exporter health*: whether the numbers of the other dashboards can be trusted."""

from __future__ import annotations

from grafana.panels import (
    COUNT,
    NONE_IS_GOOD,
    OF_SHARED,
    PREFIX,
    Column,
    Dashboard,
    Lines,
    Query,
    Row,
    Stat,
    Table,
)
from grafana.promql import gained, in_range

_TASKS = "<task_memory_tasks_total>"
_SHARED = '<task_memory_tasks_total{scope="shared"}>'
_SECONDS = "<task_memory_overhead_seconds_total>"
#: What a task pays; pages, batches and files cost by the scrape, the heartbeat, the disk.
_PAID = '<task_memory_overhead_seconds_total{stage=~"start|stop|record"}>'
_REPORT = "<task_memory_last_report_timestamp_seconds>"

STATS = Row(
    "In the selected time range",
    (
        Stat(
            "Since the last report",
            """How long ago any measured worker's heartbeat came. Minutes with workers connected:
            nothing is measured; see the scheduler's log. None: no cluster runs now.""",
            (Query(f"time() - max({_REPORT})"),),
            "s",
            ((None, "green"), (60, "orange"), (300, "red")),
            no_value="no cluster now",
        ),
        Stat(
            "Unmeasured workers",
            """Connected workers that are not measured: the package is not in their environment.
            Their tasks are in no number of ours. Install it there.""",
            (Query('sum(<task_memory_workers{source="missing"}>)'),),
            thresholds=NONE_IS_GOOD,
            decimals=0,
            no_value="no cluster now",
        ),
        Stat(
            "Records lost",
            """Tasks that ended and are not counted in full, whatever the reason. A few beside
            killed workers are what died with them. Else see below for the reason.""",
            (Query(f"sum({in_range('<task_memory_dropped_records_total>')})"),),
            thresholds=NONE_IS_GOOD,
            decimals=0,
        ),
        Stat(
            "Errors",
            """Errors of the exporter itself; no task was affected. Any: each kind stands once in
            the log of its process; report it.""",
            (Query(f"sum({in_range('<task_memory_errors_total>')})"),),
            thresholds=NONE_IS_GOOD,
            decimals=0,
        ),
        Stat(
            "Shared tasks",
            """Share of tasks whose growth is not known, because something else used memory
            meanwhile. High: the growth panels speak of few tasks. Run one thread a worker, or
            turn jemalloc on.""",
            (Query(f"sum({in_range(_SHARED)}) / (sum({in_range(_TASKS)}) > 0)"),),
            "percentunit",
            OF_SHARED,
            no_value="no tasks",
            decimals=0,
        ),
        Stat(
            "Cost of a task",
            """The exporter's own time for each task, on its thread and on its worker's event loop
            (stages start, stop and record). Above 1 ms: the machine is busy, or children are being
            looked at; see below for the stage.""",
            (Query(f"sum({in_range(_PAID)}) / (sum({in_range(_TASKS)}) > 0)"),),
            "s",
            ((None, "green"), (0.001, "orange"), (0.01, "red")),
            no_value="no tasks",
        ),
    ),
)

SOURCES = Row(
    "How it is measured",
    (
        Lines(
            "Workers by source",
            """Kernel: exact peaks of the process. Jemalloc: each task's own as well. Polling: only
            sampled; the high-water mark cannot be used there. Missing: not measured at all. Ask
            dask memusage doctor for the reason.""",
            (Query("sum by (source) (<task_memory_workers>)", "{{source}}"),),
            COUNT,
        ),
        Lines(
            "Tasks by scope",
            """Thread and process: the number is the task's own. Shared: only the process's peak is
            known. A change here changes of which tasks the growth panels speak.""",
            (Query(f"sum by (scope) ({gained(_TASKS)})", "{{scope}}"),),
            COUNT,
            bars=True,
        ),
        Table(
            "Shared tasks by prefix",
            """Which kinds of task have no growth of their own. Reasons stand in the full CSV and on
            spans: overlap wants one thread a worker or jemalloc, warm_heap wants memusage.trim or
            jemalloc, transfer ends by itself.""",
            PREFIX,
            (
                Column(
                    "Shared",
                    f"sum by (task_prefix_name) ({in_range(_SHARED)}) / "
                    f"(sum by (task_prefix_name) ({in_range(_TASKS)}) > 0)",
                    "percentunit",
                    OF_SHARED,
                    decimals=0,
                ),
                Column("Tasks", f"sum by (task_prefix_name) ({in_range(_TASKS)})", decimals=0),
            ),
            ("Tasks",),
            width=12,
            height=9,
        ),
        Table(
            "Versions",
            """The exporter's version on each scheduler now. Two versions: a cluster that was not
            restarted since the last release.""",
            ("exporter_version", "Version"),
            (
                Column(
                    "Schedulers",
                    "count by (exporter_version) (<task_memory_exporter_info>)",
                    decimals=0,
                ),
            ),
            ("Schedulers",),
            width=12,
            height=9,
        ),
    ),
)

LOSSES = Row(
    "Losses and limits",
    (
        Lines(
            "Records lost by reason",
            """worker_gone: what a killed worker had not sent. disconnected: its scheduler had gone.
            csv_write: the disk is full or slow. queue_full, span_export: the trace backend cannot
            keep up. invalid: versions that do not fit; update the older one.""",
            (
                Query(
                    f"sum by (reason) ({gained('<task_memory_dropped_records_total>')})",
                    "{{reason}}",
                ),
            ),
            COUNT,
            bars=True,
            no_value="none was lost",
        ),
        Lines(
            "Errors by stage",
            """Where the exporter failed; no task was affected. The log of that process has the
            traceback, once.""",
            (Query(f"sum by (stage) ({gained('<task_memory_errors_total>')})", "{{stage}}"),),
            COUNT,
            bars=True,
            no_value="no error",
        ),
        Lines(
            "Prefixes with a label",
            """How many kinds of task have a label of their own. At memusage.max-prefixes (40) all
            others count under __overflow__: raise it, or choose by memusage.prefixes.allow.""",
            (Query("max(<task_memory_prefixes>)", "prefixes"),),
            COUNT,
        ),
        Lines(
            "Tasks in __overflow__",
            """Tasks that count under no prefix of their own. Many: the prefixes that were first are
            not those that matter. Keys with paths or dates in their names make a prefix each.""",
            (
                Query(
                    f"sum({gained('<task_memory_overflow_tasks_total>')})", "tasks in __overflow__"
                ),
            ),
            COUNT,
            bars=True,
        ),
    ),
)

COST = Row(
    "What it costs",
    (
        Lines(
            "Time spent by stage",
            """Seconds a second, of all processes together: 0.01 is one hundredth of a processor.
            Start and stop are on the task's thread, the rest is on event loops and threads of
            ours.""",
            (
                Query(
                    f"sum by (stage) (rate({_SECONDS}[$__rate_interval]))",
                    "{{stage}}",
                ),
            ),
            "percentunit",
            decimals=2,
        ),
        Lines(
            "Time for each task",
            """The exporter's own time on a task's thread and on its worker's event loop (stages
            start, stop and record), by the tasks that ended. A step up without a change of version
            is a busier machine.""",
            (Query(f"sum({gained(_PAID)}) / (sum({gained(_TASKS)}) > 0)", "time for each task"),),
            "s",
        ),
    ),
)

DASHBOARD = Dashboard(
    "exporter",
    "Exporter health",
    """Whether the numbers of the other dashboards can be trusted: how workers are measured, of how
    many tasks it is known whose the number is, what was lost, and what measuring costs.""",
    (STATS, SOURCES, LOSSES, COST),
    prefix="none",
    since="now-6h",
    refresh="1m",
)
