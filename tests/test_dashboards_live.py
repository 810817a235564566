"""Every query of every dashboard, asked of a real Prometheus and of a real store of OTLP."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from distributed import wait

from dask_memusage_exporter import monitoring
from dask_memusage_exporter.config import DEFAULT_BUCKETS
from tests import tasks
from tests.conftest import page, rows, wait_until
from tests.grafana_panels import DataSource, targets
from tests.receivers import receiver
from tests.servers import Prometheus, Servers, VictoriaMetrics, free_port

MIB = 2**20
#: What the scrape configuration puts on.
LABELS = {"namespace": "data", "dask_cluster": "nightly"}

#: A kind of task whose name has what strings and patterns of PromQL are written with.
ODD = 'its "x\\y" isn\'t (a+b|c)*\nz/%&'

#: Of the example; the last has what the first drops then.
EXAMPLE_JOBS = ("dask-scheduler", "dask-worker", "dask-exemplars")

#: A scrape that fails takes all gauges away for its moment, and machines are busy.
PATIENT = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}}

pytestmark = [pytest.mark.component("prometheus"), pytest.mark.component("victoria-metrics")]


def dashboards(flavour: str) -> dict[str, Any]:
    return {
        Path(path).stem: json.loads(text)
        for path, text in monitoring.files(flavour).items()
        if path.startswith("dashboards/")
    }


SCRAPE, OTLP = dashboards("scrape"), dashboards("otlp")


def block(mib: int) -> np.ndarray:
    """What a task of ``load`` is given."""
    return np.ones(mib * MIB // 8)


def load(given: np.ndarray, mib: int, path: str | None = None) -> None:
    """Hold an array beside what was given; for ever where there is a path to say so at."""
    held = np.ones(mib * MIB // 8)
    if path is not None:
        Path(path).touch()
        time.sleep(600)
    del held


class Job(NamedTuple):
    """A cluster that has run, all that look at it, and what it wrote itself."""

    #: Scheduler and one worker, with labels of their own.
    labelled: DataSource
    #: The scheduler alone, with no label: what operators of hundreds of workers have.
    alone: DataSource
    otlp: DataSource
    #: By the example of a scrape configuration, with jobs for the workers and for exemplars.
    example: DataSource
    #: Rows of the time range; before it there was a smaller job.
    after: list[dict[str, str]]
    before: list[dict[str, str]]
    #: The row of the task that was killed in the time range.
    killed: dict[str, str]
    #: Names of both workers.
    workers: set[str]


def by_example(scheduler: int, worker: int) -> dict[str, Any]:
    """Return the shipped example of a configuration, variants for one machine switched on."""
    text = monitoring.files()["prometheus.yml"]
    config = yaml.safe_load(re.sub(r"^  #(- |  )", r"  \1", text, flags=re.MULTILINE))
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    jobs = {name: jobs[name] for name in EXAMPLE_JOBS}
    for name in ("dask-scheduler", "dask-exemplars"):
        (target,) = jobs[name]["static_configs"]
        assert target["targets"] == ["127.0.0.1:8787"]
        target["targets"] = [f"127.0.0.1:{scheduler}"]
    # As a file would name it.
    del jobs["dask-worker"]["file_sd_configs"]
    jobs["dask-worker"]["static_configs"] = [{"targets": [f"127.0.0.1:{worker}"]}]
    return {**PATIENT, "scrape_configs": list(jobs.values())}


def submit(servers: Servers, number: int, sizes: list[int]) -> None:
    """Run load on every worker, with inputs of other tasks, and prefixes beyond the limit."""
    client, done = servers.client, []
    for name, address in servers.addresses().items():
        here: dict[str, Any] = {"workers": [address], "pure": False}
        given = client.submit(block, 8, key=f"block-{number}-{name}", **here)
        for i, mib in enumerate(sizes):
            done.append(client.submit(load, given, mib, key=f"load-{number}-{name}-{i}", **here))
        # More than a worker's target: some of it is spilled.
        for i in range(3):
            done.append(client.submit(block, 60, key=f"kept-{number}-{name}-{i}", **here))
        done.append(client.submit(tasks.nothing, key=f"{ODD}-{number}-{name}", **here))
    # The first to come have a label, on each worker by itself.
    wait(done)
    done += [client.submit(tasks.nothing, key=f"other_{i}-{number}") for i in range(6)]
    wait(done)
    client.gather([one for one in done if not one.key.startswith("kept")])


def kill_one(servers: Servers, address: str, directory: Path) -> None:
    """Kill -9 a worker that runs a task of load."""
    pid = servers.client.run(os.getpid, workers=[address])[address]
    path = directory / "running"
    doomed = servers.client.submit(
        load, np.ones(1), 150, str(path), key="load-2-killed", workers=[address]
    )
    wait_until(path.exists, what="the task that is to be killed")

    def seen() -> bool:
        shown = json.loads(page(servers.scheduler_port, "/memusage/live"))
        running = [task for one in shown["workers"] for task in one["running"]]
        return any(task["peak_bytes"] > 150 * MIB for task in running)

    # Its last peak is what was seen of it, at the first look a hundredth of a second later.
    wait_until(seen, what="a look at it")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: doomed.status == "error", what="the task's end")


@pytest.fixture(scope="module")
def job(component: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Two workers of which one is scraped, two jobs, and a worker killed in the second."""
    directory = tmp_path_factory.mktemp("dashboards")
    with ExitStack() as stack:
        store = VictoriaMetrics(component("victoria-metrics"), directory / "store")
        stack.callback(store.stop)
        traces = stack.enter_context(receiver("grpc"))
        servers = Servers(directory)
        stack.callback(servers.close)
        csv = directory / "memusage.csv"
        environment = {
            "DASK_MEMUSAGE__CSV__PATH": str(csv),
            "DASK_MEMUSAGE__CSV__COLUMNS": "full",
            "DASK_MEMUSAGE__MAX_PREFIXES": "4",
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
            "DASK_DISTRIBUTED__WORKER__MEMORY__TARGET": "0.1",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": store.endpoint,
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
            "OTEL_METRIC_EXPORT_INTERVAL": "300",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": traces.endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OTEL_RESOURCE_ATTRIBUTES": "dask.cluster=nightly,k8s.namespace.name=data",
        }
        servers.scheduler("--preload", "dask_memusage_exporter", env=environment)
        port = free_port()
        servers.worker(
            *("--nworkers", "2", "--memory-limit", "1GiB", "--dashboard-address"),
            f"127.0.0.1:{port}",
            env=environment,
        )
        servers.client.wait_for_workers(2)
        workers = set(servers.addresses().values())
        ports = {
            about["services"]["dashboard"]: address
            for address, about in servers.client.scheduler_info()["workers"].items()
        }
        scraped = ports.pop(port)
        (unscraped,) = ports.values()
        program = component("prometheus")

        def scraping(name: str, *ports: int, **how: Any) -> Prometheus:
            return stack.enter_context(
                Prometheus(program, directory / name, ports, more=PATIENT, **how)
            )

        full = scraping("full", servers.scheduler_port, port, labels=LABELS)
        alone = scraping("alone", servers.scheduler_port)
        example = stack.enter_context(
            Prometheus(
                program, directory / "example", (), more=by_example(servers.scheduler_port, port)
            )
        )
        total = "sum(dask_{}_task_memory_tasks_total)"

        def seen() -> int:
            """Wait until all that ended has been scraped and sent; how many that are."""
            ended = rows(csv)
            count, there = len(ended), sum(row["worker"] == scraped for row in ended)
            looking = [(one, "scheduler", count) for one in (full, alone, example)]
            looking += [(store, "worker", count), (full, "worker", there)]
            looking += [(example, "worker", there)]
            for one, server, number in looking:
                wait_until(lambda: one.query(total.format(server)) == [number], 60, total)  # noqa: B023
            return count

        submit(servers, 1, [60, 80, 100, 120])
        first = seen()
        start = time.time()
        submit(servers, 2, [90, 120, 150, 180])
        seen()
        kill_one(servers, unscraped, directory)
        killed = 'dask_scheduler_task_memory_killed_tasks_total{cause="signal"} > 0'
        for one in (full, alone, example):
            wait_until(lambda: one.query(killed) == [1], what="the kill")  # noqa: B023
        wait_until(lambda: store.query(killed.replace("cause", "dask_task_kill_cause")) == [1])
        wait_until(lambda: full.query("sum(dask_scheduler_task_memory_workers)") == [2])
        wait_until(lambda: any(row["status"] == "killed" for row in rows(csv)), what="its row")
        finished = [row for row in rows(csv) if row["status"] != "killed"]
        (died,) = (row for row in rows(csv) if row["status"] == "killed")

        def looks() -> list[DataSource]:
            """Return what was there at a time when no scrape had failed; the range so far."""
            # Whole steps of whole seconds, as Grafana puts them into queries.
            steps = math.ceil((time.time() - start) / DataSource.STEPS)
            end = start + steps * DataSource.STEPS
            wait_until(lambda: time.time() > end)
            asked = [DataSource(one.url, start, end) for one in (full, alone, store, example)]
            scraped = [
                asked[n].ask("query", query="up == 1", time=end)["result"] for n in (0, 1, 3)
            ]
            whole = [len(one) for one in scraped] == [2, 1, 3]
            return asked if whole else []

        looked = wait_until(looks, timeout=60)
        yield Job(*looked, finished[first:], finished[:first], died, workers)


def empty(look: DataSource, shown: dict[str, Any], **values: Any) -> list[str]:
    """Return what has no number of all panels' queries and annotations."""
    none = []
    for slug, dashboard in shown.items():
        # The one that has no "All".
        look.values = {"prefix": "load"} if slug == "prefix" else values
        none += [
            f"{slug}: {target.panel}: {target.name}"
            for target in targets(dashboard)
            if not look.run(dashboard, target)
        ]
    return none


def test_every_query_has_an_answer(job: Job) -> None:
    """Of every panel, variables at their defaults, series with the labels that a chart puts on."""
    assert empty(job.labelled, SCRAPE) == []


def test_the_scheduler_alone_is_enough(job: Job) -> None:
    """Scraped alone and with no label, it answers all but what is titled as worker series."""
    none = empty(job.alone, SCRAPE)
    assert none
    assert [one for one in none if "(worker series)" not in one] == []


def test_every_query_has_an_answer_by_otlp(job: Job) -> None:
    """The flavour for OTLP, from what workers and scheduler have sent."""
    assert empty(job.otlp, OTLP) == []


def test_what_is_chosen_is_shown(job: Job) -> None:
    """All queries with every variable set to a value that it offers; nothing of another cluster."""
    overview = SCRAPE["overview"]
    look = job.labelled
    look.values = {}
    offered = {name: look.variable(overview, name) for name in ("namespace", "job", "dask_cluster")}
    assert offered == {"namespace": ["data"], "job": ["dask"], "dask_cluster": ["nightly"]}
    prefixes = look.variable(overview, "prefix")
    assert {"block", "load", "__overflow__"} <= set(prefixes)
    assert empty(look, SCRAPE, **offered, prefix=prefixes) == []
    look.values = {"dask_cluster": ["other"]}
    assert look.column(overview, "Tasks measured") == {}
    look.values = {"prefix": ["load"]}
    assert set(look.column(overview, "Task prefixes by cost", "Tasks")) == {"load"}
    for shown, other in ((SCRAPE, job.alone), (OTLP, job.otlp)):
        other.values = {}
        # The one with the largest peak comes first.
        first, *others = other.variable(shown["prefix"], "prefix")
        assert first == "load"
        assert {"block", "kept"} & set(others)
    assert job.otlp.variable(OTLP["overview"], "namespace") == ["data"]
    assert job.otlp.variable(OTLP["overview"], "dask_cluster") == ["nightly"]


@pytest.mark.parametrize("whose", ["labelled", "alone", "otlp"])
def test_a_prefix_may_have_any_name(job: Job, whose: str) -> None:
    """Quotes, backslashes and patterns in it: it has its page, and its row where it is chosen."""
    look, shown = getattr(job, whose), OTLP if whose == "otlp" else SCRAPE
    look.values = {}
    assert ODD in look.variable(shown["overview"], "prefix")
    assert ODD in look.variable(shown["prefix"], "prefix")
    for look.values in ({"prefix": [ODD]}, {"prefix": [ODD, "load"]}):
        counted = look.column(shown["overview"], "Task prefixes by cost", "Tasks")
        assert set(counted) == set(look.values["prefix"])
    look.values = {"prefix": ODD}
    measured = look.column(shown["prefix"], "Tasks measured")
    assert measured == {ODD: sum(row["task_prefix"] == ODD for row in job.after)}
    assert "peak, mean" in look.column(
        shown["prefix"], "Before and in the time range", "In the time range"
    )


def test_the_example_with_all_its_jobs(job: Job) -> None:
    """Exemplars' own job and the workers' count nothing twice, and can be chosen like any other."""
    overview, look = SCRAPE["overview"], job.example
    look.values = {}
    jobs = look.variable(overview, "job")
    assert set(jobs) == set(EXAMPLE_JOBS)
    assert empty(look, SCRAPE) == []
    assert empty(look, SCRAPE, job=jobs) == []
    for look.values in ({}, {"job": jobs}):
        assert look.column(overview, "Tasks measured") == {"": len(job.after)}
        assert set(look.column(overview, "Task prefixes by cost", "Memory x time")) > {"load"}
    (absent,) = (
        rule["expr"]
        for group in yaml.safe_load(monitoring.files()["rules/dask-memusage.yaml"])["groups"]
        for rule in group["rules"]
        if rule.get("alert") == "DaskMemusageAbsent"
    )
    assert look.ask("query", query=absent, time=look.end)["result"] == []


def bucket(value: float) -> tuple[float, float]:
    """Return the bounds of a value's bucket."""
    return next(
        (low, high)
        for low, high in zip((0, *DEFAULT_BUCKETS), DEFAULT_BUCKETS, strict=False)
        if value <= high
    )


@pytest.mark.parametrize("whose", ["labelled", "alone", "otlp"])
def test_panels_say_what_the_csv_says(job: Job, whose: str) -> None:
    """Counts, means and maxima exactly, of the time range alone; quantiles within their bucket."""
    look, shown = getattr(job, whose), OTLP if whose == "otlp" else SCRAPE
    look.values = {}
    overview = shown["overview"]

    def costs(name: str) -> float:
        return look.column(overview, "Task prefixes by cost", name)["load"]

    load = [row for row in job.after if row["task_prefix"] == "load"]
    peaks = sorted(int(row["peak_bytes"]) for row in load)
    growths = [int(row["growth_bytes"]) for row in load if row["growth_bytes"]]
    assert growths, "no growth is known; the job should be one where it mostly is"
    assert look.column(overview, "Tasks measured") == {"": len(job.after)}
    assert costs("Tasks") == len(load)
    assert costs("Mean peak") == pytest.approx(sum(peaks) / len(peaks))
    assert costs("Max peak") == max(peaks)
    assert costs("Mean growth") == pytest.approx(sum(growths) / len(growths))
    assert costs("Growth known") == pytest.approx(len(growths) / len(load))
    assert costs("Max of limit") == pytest.approx(max(peaks) / 2**30)
    assert look.column(overview, "Headroom") == {"": 2**30 - max(peaks)}
    for share, name in ((0.5, "p50 peak (est.)"), (0.95, "p95 peak (est.)")):
        low, high = bucket(peaks[math.ceil(share * len(peaks)) - 1])
        assert low <= costs(name) <= min(high, max(peaks)), name
    assert costs("Killed") == 1
    assert look.column(overview, "Tasks killed") == {"": 1}

    # How high the killed one was when last seen is beside what is known of those that ended.
    (last,) = look.column(overview, "Post-mortem: killed tasks by prefix", "Last peak").values()
    assert last == int(job.killed["peak_bytes"]) > 150 * MIB
    share = last / 2**30
    assert costs("Killed, of limit") == pytest.approx(share)
    at_least = look.column(overview, "Peak of limit", "killed, at least")
    assert at_least == {"": pytest.approx(share)}
    (points,) = (one for one in targets(overview) if one.name.endswith("}} killed, at least"))
    assert [values for _, values in look.run(overview, points)] == [[last]]

    # The job before the range is the baseline, and nothing of the range is in it.
    earlier = [int(row["peak_bytes"]) for row in job.before if row["task_prefix"] == "load"]
    compared = "Mean memory, in the time range and before it"
    was = look.column(overview, compared, "Peak before")["load"]
    assert was == pytest.approx(sum(earlier) / len(earlier))
    changed = look.column(overview, compared, "Peak changed")["load"]
    assert changed == pytest.approx(costs("Mean peak") / was - 1)

    # Each task is in one cell of the heatmap.
    (cells,) = (one for one in targets(overview) if one.kind == "heatmap")
    by_bound = {float(labels["le"]): values for labels, values in look.run(overview, cells)}
    # The first step is from before the range.
    assert sum(by_bound[max(by_bound)][1:]) == len(job.after)
    # Rows are those in use: from the bucket below the smallest peak to that of the largest.
    every = [int(row["peak_bytes"]) for row in (*job.before, *job.after)]
    assert max(by_bound) == bucket(max(every))[1]
    assert min(by_bound) == bucket(min(every))[0]

    # One prefix on its own page says the same.
    look.values = {"prefix": "load"}
    rows_of = look.column(shown["prefix"], "Before and in the time range", "In the time range")
    assert rows_of["peak, mean"] == pytest.approx(costs("Mean peak"))
    assert rows_of["peak, maximum"] == max(peaks)
    assert rows_of["growth, mean"] == pytest.approx(costs("Mean growth"))
    inputs = [int(row["input_bytes"]) for row in load]
    assert rows_of["input, mean"] == pytest.approx(sum(inputs) / len(inputs))


def test_the_post_mortem(job: Job) -> None:
    """It has the killed task's prefix alone, with its cause, its last peak and when it was."""
    look, workers = job.labelled, SCRAPE["workers"]
    look.values = {}

    def column(name: str) -> dict[str, float]:
        return look.column(workers, "Post-mortem: killed tasks by prefix", name)

    assert column("Killed") == column("signal") == {"load": 1}
    assert column("memory") == column("lost") == {"load": 0}
    assert column("Last peak")["load"] > 150 * MIB
    assert look.start * 1000 < column("Last killed")["load"] < look.end * 1000
    assert job.otlp.column(OTLP["workers"], "Post-mortem: killed tasks by prefix", "signal") == {
        "load": 1
    }


def test_one_scraped_worker_of_two_is_not_the_cluster(job: Job) -> None:
    """With one of two workers at the dashboard's port the totals are those of both."""
    look = job.labelled
    look.values = {"prefix": "load"}
    prefix = SCRAPE["prefix"]
    (seen,) = look.column(prefix, "Workers (worker series)", "Tasks").values()
    of_all = look.column(prefix, "Tasks measured")["load"]
    load = [row for row in job.after if row["task_prefix"] == "load"]
    assert {row["worker"] for row in load} == job.workers
    assert seen < of_all == len(load)


def test_exemplars_of_a_prefix_lead_to_its_traces(job: Job) -> None:
    """Every query of the panels that show exemplars finds some, each with a trace."""
    prefix = SCRAPE["prefix"]
    shown = [target for target in targets(prefix) if target.exemplar]
    assert {target.panel for target in shown} >= {"Peaks", "Growth"}
    job.example.values = {"prefix": "load"}
    for target in shown:
        series = wait_until(lambda: job.example.exemplars(prefix, target))  # noqa: B023
        assert {one["seriesLabels"]["task_prefix_name"] for one in series} == {"load"}
        for one in series:
            for exemplar in one["exemplars"]:
                assert len(exemplar["labels"]["trace_id"]) == 32
