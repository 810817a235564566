"""Preloads of real ``dask scheduler`` and ``dask worker`` processes, alone and beside others."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Metrics, counted, page, rows, run_cli, wait_until
from tests.servers import Servers

TASKS = 40

PRELOAD = ("--preload", "dask_memusage_exporter")

#: A preload with options of its own, as Dask Gateway's scheduler and dask-cuda's workers have it.
CLICK_PRELOAD = """
import click

@click.command()
@click.option("--{option}", default="none")
def dask_setup(server, {name}):
    print("{option} is", {name}, flush=True)
"""


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """The servers of one test."""
    servers = Servers(tmp_path)
    yield servers
    servers.close()


def run(servers: Servers, prefix: str) -> None:
    """Run tasks of one prefix on the workers that have joined, and wait for their results."""
    servers.client.wait_for_workers(1, timeout=30)
    keys = [f"{prefix}-{i}" for i in range(TASKS)]
    servers.client.gather(servers.client.map(abs, range(TASKS), key=keys))


def test_on_the_scheduler_alone(servers: Servers) -> None:
    """Enough for workers that know nothing of us; the CSV's path comes from the environment."""
    path = servers.directory / "memusage.csv"
    scheduler = servers.scheduler(*PRELOAD, env={"DASK_MEMUSAGE__CSV__PATH": str(path)})
    worker = servers.worker("--no-nanny")
    run(servers, "scheduler")
    assert len(rows(path)) == TASKS
    assert counted(servers.worker_ports(), "scheduler") == TASKS

    def measured() -> float:
        metrics = Metrics.read(servers.scheduler_port)
        return metrics.total("dask_scheduler_task_memory_workers", source="kernel")

    wait_until(lambda: measured() == 1)
    assert scheduler.lines("dask-memusage 0")
    assert scheduler.lines(f"dask-memusage: writing {path}")
    # What was chosen to measure with, and why, is to be read in the worker's log.
    assert worker.lines("source kernel; exact")
    worker.stop()
    assert scheduler.stop() == 0
    assert len(rows(path)) == TASKS
    assert "Traceback" not in scheduler.log


def test_on_the_worker_alone(servers: Servers) -> None:
    """Its metrics, with its own settings; the scheduler knows nothing and nothing is sent."""
    scheduler = servers.scheduler()
    worker = servers.worker(*PRELOAD, env={"DASK_MEMUSAGE__MAX_PREFIXES": "1"})  # with a nanny
    run(servers, "worker")
    run(servers, "second")
    assert counted(servers.worker_ports(), "worker") == TASKS
    assert counted(servers.worker_ports(), "__overflow__") == TASKS
    assert "dask_scheduler_task_memory" not in page(servers.scheduler_port)
    assert worker.lines("source kernel; exact")
    assert "Traceback" not in worker.log + scheduler.log


def test_on_both(servers: Servers) -> None:
    """Each task once; the scheduler's settings take the place of the worker's, but for how."""
    path = servers.directory / "memusage.csv"
    servers.scheduler(
        *PRELOAD,
        env={
            "DASK_MEMUSAGE__CSV__PATH": str(path),
            "DASK_MEMUSAGE__BUCKETS": "['1MiB', '1GiB']",
            "DASK_MEMUSAGE__SOURCE": "kernel",
        },
    )
    worker = servers.worker(
        *PRELOAD,
        "--no-nanny",
        env={"DASK_MEMUSAGE__SOURCE": "polling", "DASK_MEMUSAGE__BUCKETS": "['2MiB']"},
    )
    run(servers, "both")
    assert len(rows(path)) == TASKS
    assert counted(servers.worker_ports(), "both") == TASKS
    metrics = Metrics.read(servers.worker_ports()[0])
    assert {
        dict(labels)["le"] for name, labels in metrics if name.endswith("peak_bytes_bucket")
    } == {
        "1.048576e+06",
        "1.073741824e+09",
        "+Inf",
    }
    assert metrics.total("dask_worker_task_memory_exporter_info", source="polling") == 1
    assert "Traceback" not in worker.log
    assert not worker.lines("WARNING")


def test_through_dasks_configuration(servers: Servers) -> None:
    """``distributed.scheduler.preload``, here from a file, with the settings beside it."""
    (servers.directory / "dask.yaml").write_text(
        "distributed: {scheduler: {preload: [dask_memusage_exporter]}}\n"
        "memusage: {csv: {path: memusage.csv, columns: full}, worker-metrics: off}\n"
    )
    env = {"DASK_CONFIG": str(servers.directory), "DASK_MEMUSAGE__WORKER_METRICS": None}
    servers.scheduler(env=env)
    servers.worker("--no-nanny", env={"DASK_MEMUSAGE__WORKER_METRICS": None})
    run(servers, "configured")
    found = rows(servers.directory / "memusage.csv")
    assert [row["task_prefix"] for row in found] == ["configured"] * TASKS
    assert "dask_worker_task_memory" not in page(servers.worker_ports()[0])


def test_with_the_old_tools_option(servers: Servers) -> None:
    """``--memusage-csv`` on the scheduler; a worker with the same preload needs no file at all."""
    elsewhere = servers.directory / "elsewhere"
    (elsewhere / "memusage.csv").mkdir(parents=True)  # the default's name cannot be written there
    module = ("--preload", "dask_memusage_exporter.preload")
    servers.scheduler(*module, "--memusage-csv", "old.csv")
    worker = servers.worker(*module, "--no-nanny", cwd=elsewhere)
    run(servers, "old")
    with open(servers.directory / "old.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["task_key", "min_memory_mb", "max_memory_mb"]
    assert len(lines) == TASKS
    assert counted(servers.worker_ports(), "old") == TASKS
    assert "Traceback" not in worker.log


@pytest.mark.parametrize("first", [True, False])
def test_beside_a_preload_with_options(first: bool, servers: Servers) -> None:
    """In either order, on scheduler and worker: the other keeps its options, and each task once."""
    path = servers.directory / "memusage.csv"

    def preloads(option: str) -> tuple[str, ...]:
        code = CLICK_PRELOAD.format(option=option, name=option.replace("-", "_"))
        module = servers.directory / f"{option}.py"
        module.write_text(code)
        other = ("--preload", str(module))
        return (*PRELOAD, *other) if first else (*other, *PRELOAD)

    scheduler = servers.scheduler(
        *preloads("gateway-heartbeat"),
        *("--gateway-heartbeat", "15"),
        env={"DASK_MEMUSAGE__CSV__PATH": str(path)},
    )
    worker = servers.worker(
        *("--no-nanny", *preloads("rmm-pool"), "--rmm-pool", "1GB"),
        scheduler=servers.identity()["address"],
    )
    run(servers, "beside")
    assert scheduler.lines("gateway-heartbeat is 15")
    assert worker.lines("rmm-pool is 1GB")
    assert len(rows(path)) == TASKS
    assert counted(servers.worker_ports(), "beside") == TASKS


def test_two_preloads_with_options_are_dasks_own_error(tmp_path: Path) -> None:
    """What Dask refuses is the second module beside another click preload; the first stacks."""
    (tmp_path / "other.py").write_text(CLICK_PRELOAD.format(option="x", name="x"))
    done = run_cli(
        *("scheduler", "--port", "0", "--preload", str(tmp_path / "other.py")),
        *("--preload", "dask_memusage_exporter.preload"),
    )
    assert done.returncode == 2
    assert "Multiple --preload modules with click-configurable setup" in done.stderr


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: (path / "x.csv").mkdir(parents=True), "Is a directory"),
        (lambda path: path.write_text("a file"), "Not a directory"),
    ],
    ids=["missing", "directory", "file"],
)
def test_an_option_that_cannot_be_written_stops_the_command_line(
    make: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    """Exit status 2 and one clear line, before the scheduler runs: later Dask only logs."""
    make(tmp_path / "where")
    path = tmp_path / "where" / "x.csv"
    done = run_cli(
        *("scheduler", "--host", "127.0.0.1", "--port", "0"),
        *("--preload", "dask_memusage_exporter.preload", "--memusage-csv", str(path)),
    )
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("Error:"))
    assert f"Invalid value for '--memusage-csv': {path} cannot be written ({reason})" in line
    assert "Traceback" not in done.stderr
    assert "Scheduler at" not in done.stderr


def test_reading_the_command_line_leaves_files_as_they_are(tmp_path: Path) -> None:
    """Whether a path can be written is found out without a trace: the option may be read twice."""
    import click

    from dask_memusage_exporter.preload import dask_setup

    (tmp_path / "there.csv").write_text("something")
    for name in ("there.csv", "new.csv"):
        dask_setup.parse_args(click.Context(dask_setup), ["--memusage-csv", str(tmp_path / name)])
    assert (tmp_path / "there.csv").read_text() == "something"
    assert not (tmp_path / "new.csv").exists()


def test_a_configured_path_that_cannot_be_written_is_one_line_and_a_metric(
    servers: Servers,
) -> None:
    """The scheduler runs on, all is measured, and one line says why there is no CSV."""
    path = servers.directory / "missing" / "memusage.csv"
    scheduler = servers.scheduler(*PRELOAD, env={"DASK_MEMUSAGE__CSV__PATH": str(path)})
    servers.worker("--no-nanny")
    run(servers, "unwritable")
    (line,) = scheduler.lines("dask-memusage: csv failed")
    assert "the CSV file cannot be written (No such file or directory)" in line
    assert str(path) in line
    assert "Traceback" not in scheduler.log
    metrics = Metrics.read(servers.scheduler_port)
    assert metrics.total("dask_scheduler_task_memory_errors_total", stage="csv") == 1
    assert metrics.total("dask_scheduler_task_memory_errors_total") == 1
    assert counted(servers.worker_ports(), "unwritable") == TASKS


def test_a_wrong_setting_is_one_line_and_the_cluster_runs(servers: Servers) -> None:
    """On a scheduler nothing is measured then, on a worker not that one; both work on."""
    scheduler = servers.scheduler(*PRELOAD, env={"DASK_MEMUSAGE__MAX_PREFIXES": "many"})
    worker = servers.worker(*PRELOAD, "--no-nanny", env={"DASK_MEMUSAGE__SORCE": "kernel"})
    run(servers, "wrong")
    (line,) = scheduler.lines("memusage.max-prefixes")
    assert "'many' is not a whole number from 1 to 10000" in line
    assert "nothing is measured" in line
    (line,) = worker.lines("memusage.sorce")
    assert "there is no such setting; did you mean memusage.source?" in line
    assert "Traceback" not in scheduler.log + worker.log
    assert "task_memory" not in page(servers.worker_ports()[0])
