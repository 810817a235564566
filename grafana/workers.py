"""*Workers and deaths*: how full workers are, which died, and what was executing on them."""

from __future__ import annotations

from grafana import killed
from grafana.overview import OF_THE_LIMIT
from grafana.panels import (
    COUNT,
    NO_WORKERS,
    NONE_IS_GOOD,
    OF_LIMIT,
    Dashboard,
    Lines,
    Query,
    Row,
    Stat,
)
from grafana.promql import by_prefix, gained, in_range

_KILLED = "<task_memory_killed_tasks_total>"
_FOR_MEMORY = '<task_memory_killed_tasks_total{cause="memory"}>'
_MAX = "<task_memory_peak_maximum_bytes>"
_LIMIT = "<task_memory_worker_limit_bytes>"
_PROCESS = '<dask:worker_memory_bytes{type=~"managed|unmanaged"}>'

STATS = Row(
    "In the selected time range",
    (
        Stat(
            "Tasks killed",
            """Tasks that were executing when their worker died, whatever the cause. The post-mortem
            below has which.""",
            (Query(f"sum({in_range(_KILLED)})"),),
            thresholds=NONE_IS_GOOD,
            decimals=0,
        ),
        Stat(
            "Killed for memory",
            """Of these, those whose worker is known to have been killed for memory. None beside
            others: look for the kernel's own words at the node, or OOMKilled in Kubernetes.""",
            (Query(f"sum({in_range(_FOR_MEMORY)})"),),
            thresholds=NONE_IS_GOOD,
            decimals=0,
        ),
        Stat(
            "Since the last kill",
            """How long ago a task was last killed. Short, and the job is still running: it may kill
            the next worker with the same task.""",
            (
                Query(
                    "time() - "
                    "max(last_over_time(<task_memory_killed_last_timestamp_seconds>[$__range]))"
                ),
            ),
            "s",
            no_value="none was killed",
        ),
        Stat(
            "Peak of limit",
            """How near the limit the largest peak of a task that ended came, and in red how near a
            killed one was when it was last seen: at least that. Dask pauses a worker at 80 % and
            kills it at 95 %. From orange on look below whose it is.""",
            (Query(f"max({OF_THE_LIMIT})", "ended"), killed.BESIDE_SHARES),
            "percentunit",
            OF_LIMIT,
            no_value="no limit",
            decimals=0,
        ),
        Stat(
            "Workers",
            """Connected workers now. Fewer than were asked for, with kills beside: they die faster
            than they start.""",
            (Query("sum(<task_memory_workers>)"),),
            decimals=0,
            no_value="no cluster now",
        ),
        Stat(
            "Workers that left",
            """Workers that left the cluster, in order or not, by Dask's own count: scaling down is
            here, too. Many more than kills: not a question of memory.""",
            (Query(f"sum({in_range('<dask:scheduler_workers_removed_total>')})"),),
            decimals=0,
        ),
    ),
)

DEATHS = Row("Deaths", (killed.TABLE, killed.OVER_TIME))

CLUSTER = Row(
    "The cluster",
    (
        Lines(
            "Task peaks and the worker limit",
            """The largest peak of each kind of task in the last minutes, below the smallest worker
            limit (dashed). Red points are killed tasks, as high as they were last seen: at least
            that. They are in no line, and they are the ones to look at.""",
            (
                Query(by_prefix("max", _MAX), "{{task_prefix_name}}"),
                Query(f"min({_LIMIT})", "worker limit", border=True),
                killed.BESIDE_LINES,
            ),
            drill=True,
        ),
        Lines(
            "Workers by state",
            """Dask's own states. Paused: above 80 % of their limit, they take no tasks until they
            have spilled or freed memory; many paused and nothing running is a cluster that is
            stuck. Give workers more memory, or fewer threads.""",
            (Query("sum by (state) (<dask:scheduler_workers>)", "{{state}}"),),
            COUNT,
        ),
        Lines(
            "Workers by source of their peaks",
            """How many workers there are, and how each is measured. Missing: they run without the
            package, and their kills and peaks are not known here.""",
            (Query("sum by (source) (<task_memory_workers>)", "{{source}}"),),
            COUNT,
        ),
        Lines(
            "Suspicious tasks, by Dask",
            """Tasks that were assigned to a worker when it died, executing or waiting there, by
            Dask's own count: far more than were killed. A prefix that is in both is the cause.""",
            (
                Query(
                    by_prefix("sum", gained("<dask:scheduler_tasks_suspicious_total>")),
                    "{{task_prefix_name}}",
                ),
            ),
            COUNT,
            bars=True,
        ),
    ),
)

PROCESSES = Row(
    "Each worker",
    (
        Lines(
            "Process memory (worker series)",
            """Resident memory of each worker, its limit dashed. Beside the task peaks above it says
            whether a worker was full of data before the task began: memory that stays high between
            tasks is data that is kept, or a leak. Empty: there are no worker series; nothing else
            on this page but what is called so needs them.""",
            (
                Query(f"sum by (instance) ({_PROCESS})", "{{instance}}"),
                Query("min(<worker:memory_limit_bytes>)", "limit", border=True),
            ),
            no_value=NO_WORKERS,
        ),
        Lines(
            "Managed, unmanaged, spilled (worker series)",
            """Of all workers together. Managed: results that Dask keeps. Unmanaged: all else, with
            what tasks use while they run. Spilled: results that went to disk. Unmanaged that only
            climbs is a leak or a heap that is not given back (memusage.trim). Empty: there
            are no worker series.""",
            (Query("sum by (type) (<dask:worker_memory_bytes>)", "{{type}}"),),
            no_value=NO_WORKERS,
        ),
        Lines(
            "Spilled to disk and read back (worker series)",
            """Bytes a second, of all workers. Reading back what was just written is thrashing: more
            memory, or fewer tasks at once. Empty: there are no worker series, or none
            has spilled.""",
            (
                Query(
                    "sum by (activity) (rate(<dask:worker_spill_bytes_total"
                    '{activity=~"disk-read|disk-write"}>[$__rate_interval]))',
                    "{{activity}}",
                ),
            ),
            "binBps",
            no_value="nothing was spilled, or no worker series",
        ),
        Lines(
            "Largest task peak by worker (worker series)",
            """The largest peak of the last minutes on each worker. Beside its process memory: how
            much of it came and went with a task. Empty: there are no worker series,
            or memusage.worker-metrics is not full.""",
            (Query("max by (instance) (<worker:task_memory_peak_maximum_bytes>)", "{{instance}}"),),
            no_value=NO_WORKERS,
        ),
    ),
)

DASHBOARD = Dashboard(
    "workers",
    "Workers and deaths",
    """Which workers died and what was executing on them, how near their limit workers are, and what
    else they keep.""",
    (STATS, DEATHS, CLUSTER, PROCESSES),
    since="now-6h",
    refresh="1m",
)
