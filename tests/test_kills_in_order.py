"""Ends in order that look like kills: none is told as one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from tests.conftest import Measured, Metrics, wait_until
from tests.deaths import (
    hold_gil_after,
    killed,
    nap,
    open_incarnations,
    pids,
    running,
    settled,
    touch_and_nap,
)
from tests.servers import Servers


def test_leaving_in_order_is_no_kill(measure: Callable[..., Measured]) -> None:
    """Retiring, scaling down and restarting with tasks running kill nothing."""
    measured = measure(n_workers=2)
    client, scheduler = measured.client, measured.cluster.scheduler
    futures = client.map(nap, [2.0] * 2, pure=False, key="steady")
    wait_until(lambda: running(measured, "steady"))
    client.retire_workers([next(iter(scheduler.workers))])
    client.gather(futures)
    futures = client.map(nap, [30.0] * 2, pure=False, key="cut")
    wait_until(lambda: running(measured, "cut"))
    client.restart()
    settled(measured)
    assert killed(measured, "steady") == killed(measured, "cut") == 0
    assert set(scheduler.extensions["memusage"].batches._received) <= open_incarnations(measured)


def test_no_file_is_left_by_a_cluster_that_ends(
    make_cluster: Callable[..., LocalCluster], measure: Callable[..., Measured], tmp_path: Any
) -> None:
    """Closing a cluster leaves the flight directory empty."""
    directory = tmp_path / "flight"
    measured = measure({"memusage.flight-directory": str(directory)}, n_workers=2)
    wait_until(lambda: directory.exists() and len(list(directory.iterdir())) == 2)
    measured.client.close()
    measured.cluster.close()
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("end", ["scale", "restart", "retire"])
def test_an_ordered_end_is_no_kill_though_the_gil_is_held(
    end: str, dying: Callable[..., Measured], tmp_path: Path
) -> None:
    """The worker can say nothing, and its nanny ends it the hard way: because it was told to."""
    measured = dying(config={"distributed.comm.timeouts.connect": "3s"})
    client, cluster = measured.client, measured.cluster
    running = tmp_path / "running"
    future = client.submit(hold_gil_after, str(running), 40, key="held-0")
    wait_until(running.exists)
    if end == "scale":
        cluster.scale(0)
        wait_until(lambda: not cluster.scheduler.workers, timeout=60)
    elif end == "restart":
        client.restart(timeout=60)
    else:
        (address,) = cluster.scheduler.workers
        client.sync(cluster.scheduler.retire_workers, [address])
        wait_until(lambda: address not in cluster.scheduler.workers, timeout=60)
    settled(measured)
    assert killed(measured, "held") == 0
    del future


@pytest.mark.parametrize("options", [(), ("--no-nanny",)])
@pytest.mark.parametrize("held", [False, True])
def test_sigterm_is_no_kill(options: tuple[str, ...], held: bool, tmp_path: Path) -> None:
    """A worker that is ended by SIGTERM in the middle of a task has not been killed by it."""
    if held and options:
        pytest.skip("a process that holds the GIL without a nanny ends by SIGKILL, or not at all")
    environment = {
        "DASK_MEMUSAGE__FLIGHT_DIRECTORY": str(tmp_path / "flight"),
    }
    servers = Servers(tmp_path)
    running = tmp_path / "running"
    try:
        servers.scheduler("--preload", "dask_memusage_exporter", env=environment)
        worker = servers.worker(*options, env=environment)
        servers.client.gather(servers.client.map(nap, [0.0] * 50, pure=False, key="before"))
        function, seconds = (hold_gil_after, 8) if held else (touch_and_nap, 3)
        future = servers.client.submit(function, str(running), seconds, key="term-0")
        wait_until(running.exists)
        worker.stop()
        wait_until(lambda: not servers.client.scheduler_info()["workers"])
        # Another one tells what the first one has left, if it has.
        servers.worker("--no-nanny", env=environment)
        servers.client.submit(nap, 0.0, key="after-0").result()
        # Once this one's counts are there, all that came before it has been taken in; what is lost
        # is counted when the first one's end is settled.
        name = "dask_scheduler_task_memory_tasks_total"
        wait_until(
            lambda: Metrics.read(servers.scheduler_port).total(name, task_prefix_name="after") == 1
        )

        def accounted() -> tuple[float, float] | None:
            metrics = Metrics.read(servers.scheduler_port)
            counted = metrics.total(name, task_prefix_name="before")
            lost = metrics.total("dask_scheduler_task_memory_dropped_records_total")
            return (counted, lost) if counted + lost >= 50 else None

        counted, lost = wait_until(accounted, timeout=60, what="all records to be accounted for")
        assert counted + lost == 50
        assert held or lost == 0
        metrics = Metrics.read(servers.scheduler_port)
        assert metrics.total("dask_scheduler_task_memory_killed_tasks_total") == 0
        del future
    finally:
        servers.close()


def test_what_ended_while_nothing_was_measured(dying: Callable[..., Measured]) -> None:
    """A task that ran across the end of measuring is not named once it is over."""
    measured = dying()
    client = measured.client
    future = client.submit(nap, 1.0, key="across-0")
    wait_until(lambda: running(measured, "across"))
    client.unregister_worker_plugin("memusage")
    future.result()
    workers = measured.cluster.scheduler.workers
    for address, pid in pids(measured).items():
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda address=address: workers and address not in workers, timeout=60)
    settled(measured)
    assert killed(measured, "across") == 0


def test_a_scheduler_that_closes_tells_of_no_death(tmp_path: Path) -> None:
    """It loses all its workers, with what they run: nobody has killed them."""
    servers = Servers(tmp_path)
    running = tmp_path / "running"
    try:
        scheduler = servers.scheduler("--preload", "dask_memusage_exporter")
        servers.worker()
        future = servers.client.submit(touch_and_nap, str(running), 30, key="cut-0")
        wait_until(running.exists)
        servers.client.close()
        assert scheduler.stop() == 0
        assert not scheduler.lines("failed")
        assert not scheduler.lines("killed")
        del future
    finally:
        servers.close()
