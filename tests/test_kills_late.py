"""What is known of a kill late, by another way than its nanny's, or hardly at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, KilledWorker, LocalCluster, get_worker

from dask_memusage_exporter import flight, install
from tests.conftest import Measured, Metrics, scheduler_port, wait_until
from tests.deaths import grow, killed, nap, open_incarnations, pids, rss_mib, running, settled
from tests.servers import Servers, free_port


def test_what_was_measured_and_not_reported_is_counted(dying: Callable[..., Measured]) -> None:
    """Records that a dead worker had not sent are dropped records, by reason."""
    measured = dying()
    scheduler = measured.cluster.scheduler
    name = "dask_scheduler_task_memory_dropped_records_total"

    def lost() -> float:
        return Metrics.read(scheduler_port(measured.cluster)).total(name, reason="worker_gone")

    def die(_: int) -> None:
        # Everything before this was sent to the stream with the batch that is never sent.
        os.kill(os.getpid(), signal.SIGKILL)

    client = measured.client
    client.gather(client.map(nap, [0.0] * 20, pure=False, key="quick"))
    future = client.submit(die, 0, key="die-0")
    future.exception()
    wait_until(lambda: killed(measured, "die") == 1)
    counted = Metrics.read(scheduler_port(measured.cluster)).total(
        "dask_scheduler_task_memory_tasks_total", task_prefix_name="quick"
    )
    assert counted + lost() == 20
    assert set(scheduler.extensions["memusage"].batches._received) <= open_incarnations(measured)


def test_without_a_nanny_the_next_process_tells(tmp_path: Any) -> None:
    """A container that restarts with its volume kept: nanny and worker died in one instant.

    It comes back under its name and its address, as pods do.
    """
    environment = {
        "DASK_MEMUSAGE__FLIGHT_DIRECTORY": str(tmp_path / "flight"),
    }
    servers = Servers(tmp_path)
    same = ("--no-nanny", "--name", "pod", "--worker-port", str(free_port()))
    try:
        scheduler = servers.scheduler("--preload", "dask_memusage_exporter", env=environment)
        first = servers.worker(*same, env=environment)
        servers.client.gather(servers.client.map(nap, [0.0] * 5, pure=False, key="before"))
        future = servers.client.submit(grow, 50, 0.0, 200, key="pod-0")
        wait_until(lambda: rss_mib(first.process.pid) > 200)
        before = servers.addresses()
        first.process.kill()
        first.process.wait()
        servers.worker(*same, env=environment)
        name = "dask_scheduler_task_memory_killed_tasks_total"

        def told() -> bool:
            metrics = Metrics.read(servers.scheduler_port)
            return metrics.total(name, task_prefix_name="pod", cause="lost") == 1

        wait_until(told)
        wait_until(lambda: servers.addresses() == before)
        metrics = Metrics.read(servers.scheduler_port)
        counted = metrics.total("dask_scheduler_task_memory_tasks_total", task_prefix_name="before")
        lost = metrics.total("dask_scheduler_task_memory_dropped_records_total")
        assert counted + lost == 5
        assert metrics.total("dask_scheduler_task_memory_errors_total") == 0
        assert "Traceback" not in scheduler.log
        del future
    finally:
        servers.close()


def test_a_lost_worker_that_nobody_reads_is_told_from_its_last_heartbeat(
    dying: Callable[..., Measured], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no file is read the heartbeat is what is known, and it is said to be that."""
    monkeypatch.setattr("dask_memusage_exporter.deaths._PATIENCE", 0.5)
    measured = dying(config={"memusage.flight-directory": str(tmp_path / "away")})
    future = measured.client.submit(grow, 50, 0.0, 200, key="old-0")
    address = wait_until(lambda: running(measured, "old"))
    for file in (tmp_path / "away").iterdir():
        file.unlink()
    os.kill(pids(measured)[address], signal.SIGKILL)
    wait_until(lambda: killed(measured, "old") == 1)
    events = measured.client.get_events("memusage")
    assert events[-1][1]["known_from"] == "heartbeat"
    assert isinstance(future.exception(), KilledWorker)


def test_who_comes_after_the_patience_still_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that comes back late: what its predecessor ran and had not sent is told then."""
    monkeypatch.setattr("dask_memusage_exporter.deaths._PATIENCE", 0.2)
    directory = str(tmp_path / "flight")
    environment = {"DASK_MEMUSAGE__FLIGHT_DIRECTORY": directory}
    servers = Servers(tmp_path)
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster:
        install(cluster)
        deaths = cluster.scheduler.extensions["memusage"].deaths
        try:
            with Client(cluster) as client:
                first = servers.worker(
                    "--no-nanny", scheduler=cluster.scheduler_address, env=environment
                )
                client.wait_for_workers(1)
                client.gather(client.map(abs, range(20), key="unsent"))
                future = client.submit(os.kill, first.process.pid, signal.SIGKILL, key="late-0")
                wait_until(lambda: deaths._settled and not deaths.unsettled)
                name = "dask_scheduler_task_memory_killed_tasks_total"
                port = cluster.scheduler.http_server.port
                assert Metrics.read(port).total(name) == 0
                servers.worker("--no-nanny", scheduler=cluster.scheduler_address, env=environment)
                wait_until(lambda: Metrics.read(port).total(name, task_prefix_name="late") == 1)
                metrics = Metrics.read(port)
                counted = metrics.total(
                    "dask_scheduler_task_memory_tasks_total", task_prefix_name="unsent"
                )
                lost = metrics.total("dask_scheduler_task_memory_dropped_records_total")
                assert counted + lost == 20
                future.cancel()
        finally:
            servers.close()


def test_a_broken_connection_loses_nothing_uncounted(dying: Callable[..., Measured]) -> None:
    """What could not be sent comes by another way, or is counted as lost."""
    measured = dying()
    client = measured.client

    client.gather(client.map(nap, [0.0] * 100, pure=False, key="cut"))
    abort = client.submit(abort_stream, key="abort-0")
    name = "dask_scheduler_task_memory_tasks_total"

    def told() -> bool:
        metrics = Metrics.read(scheduler_port(measured.cluster))
        lost = metrics.total("dask_scheduler_task_memory_dropped_records_total")
        return metrics.total(name, task_prefix_name="cut") + lost >= 100

    wait_until(told)
    settled(measured)
    assert killed(measured, "cut") == killed(measured, "abort") == 0
    del abort


def abort_stream() -> None:
    worker = get_worker()
    worker.loop.add_callback(worker.batched_stream.comm.abort)


def test_without_a_file_the_heartbeat_is_there(
    dying: Callable[..., Measured], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flight directory that cannot be written: what runs is live, and a kill has its cause."""
    monkeypatch.setattr("dask_memusage_exporter.deaths._PATIENCE", 0.5)
    (tmp_path / "file").touch()
    measured = dying(config={"memusage.flight-directory": str(tmp_path / "file" / "below")})
    future = measured.client.submit(nap, 60, key="blind-0")
    address = wait_until(lambda: running(measured, "blind"))
    metrics = Metrics.read(scheduler_port(measured.cluster))
    assert metrics.total("dask_scheduler_task_memory_errors_total", stage="send") == 1
    os.kill(pids(measured)[address], signal.SIGKILL)
    wait_until(lambda: killed(measured, "blind", cause="signal") == 1)
    assert isinstance(future.exception(), KilledWorker)


def test_an_odd_wreck_silences_nobody(dying: Callable[..., Measured], tmp_path: Path) -> None:
    """A file of another version is passed over; the worker that found it is known."""
    directory = tmp_path / "flight"
    measured = dying(config={"memusage.flight-directory": str(directory)}, n_workers=0)
    odd = {"incarnation": "odd", "scheduler_id": measured.cluster.scheduler.id}
    flight.FlightFile(str(directory), odd).forget()
    (file,) = directory.iterdir()
    file.write_bytes(file.read_bytes().replace(b'"incarnation"', b'"incarcerate"'))
    measured.cluster.scale(1)
    future = measured.client.submit(nap, 60, key="known-0")
    address = wait_until(lambda: running(measured, "known"))
    os.kill(pids(measured)[address], signal.SIGKILL)
    wait_until(lambda: killed(measured, "known") == 1)
    assert isinstance(future.exception(), KilledWorker)
