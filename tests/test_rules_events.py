"""Alerts on what happens now (kills, limits, silence, losses), by promtool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.promtool import Phase, Promtool, Scrapes, says

GIB = 2**30
KILLED, FOR_MEMORY = "DaskTaskKilled", "DaskTaskKilledForMemory"
NEAR_LIMIT = "DaskTaskMemoryNearWorkerLimit"


@pytest.fixture
def promtool(component: Callable[[str], str], tmp_path: Path) -> Callable[..., Promtool]:
    """Return what runs the rules, with settings."""
    return lambda **given: Promtool(component("promtool"), tmp_path, **given)


def killed(
    scrapes: Scrapes,
    prefix: str,
    *,
    at: list[float | None],
    begin: str = "0s",
    instance: str = "10.0.0.1:8787",
    **by_cause: list[int],
) -> None:
    """Add what a scheduler shows of a prefix's kills; all causes not given are at 0."""
    labels = {"task_prefix_name": prefix, "instance": instance}
    for cause in ("memory", "signal", "lost"):
        values = by_cause.get(cause, [0] * len(at))
        scrapes.add("task_memory_killed_tasks_total", values, begin, cause=cause, **labels)
    scrapes.add("task_memory_killed_last_timestamp_seconds", at, begin, **labels)
    peaks = [None if time is None else 7.5 * GIB for time in at]
    scrapes.add("task_memory_killed_last_peak_bytes", peaks, begin, **labels)


def test_a_peak_near_the_limit_and_its_recovery(promtool: Callable[..., Promtool]) -> None:
    """Each scheduler's peaks are held against its own smallest limit, if there is one."""
    scrapes = Scrapes("30s")
    near, far = 3.8 * GIB, 2 * GIB
    for instance, limit in (("a:1", 4 * GIB), ("b:1", 400 * GIB), ("c:1", None)):
        scrapes.add(
            "task_memory_peak_maximum_bytes", [far] * 20 + [near] * 20 + [far] * 20,
            task_prefix_name="load", instance=instance,
        )  # fmt: skip
        scrapes.add("task_memory_worker_limit_bytes", [limit] * 60, instance=instance)
    fires = {"9m": [], "11m": ["load"], "19m": ["load"], "21m": [], "60m": []}
    near_limit = says(
        NEAR_LIMIT, "15m",
        "A worker was at 95 % of its memory limit while load ran.",
        "the process that ran load peaked at 95 % of the smallest worker's limit within the "
        "last minutes. At 95 % the nanny kills it, unless set otherwise. Where tasks overlap the "
        "peak is everybody's.",
        "warning", task_prefix_name="load",
    )  # fmt: skip
    promtool().check(scrapes, every="1m", firing={NEAR_LIMIT: fires}, texts=[near_limit])
    no = {NEAR_LIMIT: {"15m": []}}
    promtool(near_limit_percent=96).check(scrapes, every="1m", firing=no)


def test_the_first_kill_fires(promtool: Callable[..., Promtool]) -> None:
    """After scrapes at 0, and where one scrape is all there is of the scheduler; for an hour."""
    scrapes = Scrapes("30s")
    killed(scrapes, "known", at=[None] * 20 + [600] * 20, memory=[0] * 20 + [1] * 20)
    killed(scrapes, "once", at=[600], memory=[1], begin="10m", instance="10.0.0.2:8787")
    killed(scrapes, "never", at=[None] * 40)
    # The last peaks, near the limit and not the whole, are no matter of the alert on peaks.
    scrapes.add("task_memory_worker_limit_bytes", [8 * GIB] * 40)
    scrapes.add("task_memory_peak_maximum_bytes", [4 * GIB] * 40, task_prefix_name="known")
    fires = {"9m": [], "11m": ["known", "once"], "69m": ["known", "once"], "71m": []}
    none: dict[str, list[str]] = {time: [] for time in fires}
    once, known = (
        says(
            FOR_MEMORY, "12m",
            f"A worker was killed for memory while it ran {prefix}.",
            f"a worker was killed for memory with a task {prefix} executing. The last peak that "
            "was seen of such a process before it died: 7.5GiB. Which task it was stands in the "
            "scheduler's log and in its events.",
            "critical", task_prefix_name=prefix,
        )
        for prefix in ("once", "known")
    )  # fmt: skip
    once["exp_alerts"] += known["exp_alerts"]
    promtool().check(
        scrapes, every="1m",
        firing={FOR_MEMORY: fires, KILLED: none, NEAR_LIMIT: none}, texts=[once],
    )  # fmt: skip


def test_the_memory_alert_is_for_memory_alone(promtool: Callable[..., Promtool]) -> None:
    """A later kill of another cause fires the other alert, kills of long ago fire none."""
    scrapes = Scrapes("1m")
    killed(
        scrapes, "both", at=[0] * 150 + [9_000] * 60,
        memory=[1] * 210, lost=[0] * 150 + [1] * 60,
    )  # fmt: skip
    # As a Prometheus sees it that begins to scrape today.
    killed(scrapes, "long-ago", at=[-7_200] * 210, memory=[3] * 210, signal=[2] * 210)
    promtool().check(
        scrapes, every="1m",
        firing={
            FOR_MEMORY: {"30m": ["both"], "2h": [], "2h40m": [], "3h": []},
            KILLED: {"30m": [], "2h": [], "2h40m": ["both"], "3h": ["both"]},
        },
        texts=[
            says(
                KILLED, "3h",
                "A worker died while it ran both (cause: lost).",
                "a worker died with a task both executing; nobody saw how, which in Kubernetes may "
                "be memory too (OOMKilled). The last peak that was seen of such a process before "
                "it died: 7.5GiB. Which task it was stands in the scheduler's log and in its "
                "events.",
                "warning", task_prefix_name="both", cause="lost",
            )
        ],
    )  # fmt: skip


def test_a_kill_after_the_scheduler_began_anew(promtool: Callable[..., Promtool]) -> None:
    """The count is what it was, one, and yet it is another kill."""
    scrapes = Scrapes("1m")
    killed(
        scrapes, "load", at=[0] * 180 + [None] + [10_860] * 30,
        memory=[1] * 180 + [0] + [1] * 30,
    )  # fmt: skip
    fires = {"30m": ["load"], "2h": [], "3h": [], "3h5m": ["load"]}
    promtool().check(scrapes, every="1m", firing={FOR_MEMORY: fires})


def test_a_scale_down_is_nothing(promtool: Callable[..., Promtool]) -> None:
    """Workers that go in order leave nobody to report, and no alert of any kind."""
    scrapes = Scrapes("30s")
    killed(scrapes, "load", at=[None] * 80)
    for source, count in (("kernel", 10), ("missing", 0)):
        values = [count] * 40 + [0] * 40
        scrapes.add("task_memory_workers", values, source=source)
    reports = [30 * n for n in range(40)] + [1_200] * 40
    scrapes.add("task_memory_last_report_timestamp_seconds", reports)
    scrapes.add("task_memory_exporter_info", [1] * 80, exporter_version="1")
    scrapes.add("workers", [10] * 40 + [0] * 40, state="idle")
    scrapes.add("task_memory_dropped_records_total", [0] * 80, reason="worker_gone")
    times: dict[str, Any] = {"19m": {}, "21m": {}, "30m": {}, "39m": {}}
    promtool().check(scrapes, every="1m", queries={"ALERTS": times})


def test_silence(promtool: Callable[..., Promtool]) -> None:
    """Measured workers are connected and none is heard of: fires, and resolves with a heartbeat."""
    scrapes = Scrapes("30s")
    scrapes.add("task_memory_workers", [3] * 60, source="kernel")
    reports = [30 * n for n in range(20)] + [570] * 20 + [30 * n for n in range(40, 60)]
    scrapes.add("task_memory_last_report_timestamp_seconds", reports)
    # Nobody there could report.
    scrapes.add("task_memory_workers", [3] * 60, source="missing", instance="b:1")
    scrapes.add("task_memory_last_report_timestamp_seconds", [0] * 60, instance="b:1")
    fires = {"12m": [], "16m": [""], "19m": [""], "21m": []}
    silent = says(
        "DaskMemusageSilent", "16m",
        "No measured worker reports.",
        "Measured workers are connected, and the last heartbeat of any is 6m 30s old: what tasks "
        "need now is not seen.",
        "warning",
    )  # fmt: skip
    promtool().check(scrapes, every="1m", firing={"DaskMemusageSilent": fires}, texts=[silent])


def test_schedulers_and_workers_without_the_exporter(promtool: Callable[..., Promtool]) -> None:
    """Fire after a quarter of an hour, each by its own alert."""
    scrapes = Scrapes("30s")
    for instance, measured in (("a:1", True), ("b:1", False)):
        cluster = {"instance": instance, "dask_cluster": instance}
        for state in ("idle", "saturated"):
            scrapes.add("workers", [2] * 80, state=state, **cluster)
        if measured:
            # By the job of the page that has exemplars.
            info = {"exporter_version": "1", "job": "dask-exemplars", **cluster}
            scrapes.add("task_memory_exporter_info", [1] * 80, **info)
            for source, values in (("kernel", [3] * 80), ("missing", [0] * 20 + [1] * 60)):
                scrapes.add("task_memory_workers", values, source=source, **cluster)
    promtool().check(
        scrapes, every="1m",
        firing={
            "DaskMemusageAbsent": {"14m": [], "16m": [""]},
            "DaskMemusageWorkersMissing": {"24m": [], "26m": [""]},
        },
        texts=[
            says(
                "DaskMemusageAbsent", "16m",
                "A scheduler of b:1 runs without the exporter.",
                "1 scheduler(s) show Dask's own metrics and none of dask_memusage_exporter: no "
                "task is measured there, and none of its other alerts can fire.",
                "info", dask_cluster="b:1",
            ),
            says(
                "DaskMemusageWorkersMissing", "26m",
                "Workers of a:1 are not measured.",
                "1 connected worker(s) cannot measure their tasks: the package is not in their "
                "environment, or it could not start there.",
                "warning", dask_cluster="a:1",
            ),
        ],
    )  # fmt: skip


def test_losses_and_errors(promtool: Callable[..., Promtool]) -> None:
    """More than are allowed within an hour; also of a scheduler with one scrape, or begun anew."""
    scrapes = Scrapes("1m")

    def lost(instance: str, values: list[int], begin: str = "0s") -> None:
        labels = {"instance": instance, "dask_cluster": instance, "reason": "queue_full"}
        scrapes.add("task_memory_dropped_records_total", values, begin, **labels)

    lost("few", [0] * 60 + [10] * 120)
    lost("many", [5] * 60 + [17] * 120)
    lost("once", [11], begin="1h")
    lost("anew", [50] * 10 + [0] * 50 + [11] * 120)
    for stage, values in (("csv", [0] * 60 + [1] * 120), ("export", [0] * 180)):
        scrapes.add("task_memory_errors_total", values, stage=stage)
    dropped = 'count by (dask_cluster) (ALERTS{alertname="DaskMemusageRecordsDropped"})'
    firing = {f'{{dask_cluster="{one}"}}': 1.0 for one in ("many", "once", "anew")}
    promtool().check(
        scrapes, every="1m",
        firing={"DaskMemusageErrors": {"59m": [], "61m": [""], "119m": [""], "121m": []}},
        queries={dropped: {"61m": firing, "2h1m": {}}},
        texts=[
            says(
                "DaskMemusageErrors", "61m",
                "The exporter has errors of its own (csv).",
                "1 errors lately at stage csv. No task was affected; what the stage does is "
                "missing for each.",
                "warning", stage="csv",
            )
        ],
    )  # fmt: skip
    errors = {"DaskMemusageErrors": {"61m": []}}
    only = says(
        "DaskMemusageRecordsDropped", "61m",
        "Records of tasks of many were lost (queue_full).",
        "12 records were lost lately, reason queue_full: those tasks are in no total, or not in "
        "the CSV or trace that the reason names.",
        "warning", dask_cluster="many", reason="queue_full",
    )  # fmt: skip
    promtool(errors=1, dropped_records=11).check(scrapes, every="1m", firing=errors, texts=[only])


def test_tasks_without_a_number_or_a_label_of_their_own(
    promtool: Callable[..., Promtool],
) -> None:
    """Mostly shared, and mostly in the overflow: each cluster is told of, where tasks are many."""
    scrapes = Scrapes("1m")
    clusters = {
        "shared": {"tasks": 20, "known": 1},
        "known": {"tasks": 20, "known": 10},
        "few": {"tasks": 1, "known": 0},
        "overflow": {"tasks": 20, "known": 20, "prefix": "__overflow__"},
    }
    for cluster, what in clusters.items():
        prefix = str(what.pop("prefix", "load"))
        phase = Phase("30m", **what)  # type: ignore[arg-type]
        scrapes.scheduler(phase, prefix=prefix, dask_cluster=cluster, instance=cluster)
    shared = says(
        "DaskTaskMemoryMostlyShared", "20m",
        "Most tasks of shared have no growth of their own.",
        "Of 95.0 % of the tasks of the last 1d it is not known what they added themselves (scope "
        "shared); regressions are judged by the others only.",
        "info", dask_cluster="shared",
    )  # fmt: skip
    overflow = says(
        "DaskMemusagePrefixOverflow", "20m",
        "Many tasks of overflow have no label of their own.",
        "100.0 % of the tasks of the last 1d count under __overflow__, beyond "
        "memusage.max-prefixes or not wanted; nothing is judged of them.",
        "info", dask_cluster="overflow",
    )  # fmt: skip
    too_few = {alert["alertname"]: {"3m": []} for alert in (shared, overflow)}
    promtool().check(scrapes, every="1m", firing=too_few, texts=[shared, overflow])
