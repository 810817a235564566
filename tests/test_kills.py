"""Workers that die: the task that was executing is named, with its last peak and the cause."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, KilledWorker, LocalCluster, get_worker

from dask_memusage_exporter import flight, install
from tests.conftest import (
    FULL,
    Measured,
    Metrics,
    rows,
    scheduler_port,
    wait_until,
)
from tests.servers import Servers

MIB = 2**20


def grow(step_mib: int, pause: float, most_mib: int) -> None:
    """Allocate and touch memory step by step, then wait to be killed."""
    blocks = []
    for _ in range(0, most_mib, step_mib):
        blocks.append(b"x" * (step_mib * MIB))
        time.sleep(pause)
    time.sleep(600)


def hold_gil(mib: int) -> None:
    """Take memory and then never let the GIL go, from the first line on."""
    libc = ctypes.PyDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    libc.memset(libc.malloc(mib * MIB), 1, mib * MIB)
    libc.sleep(600)


def nap(seconds: float) -> None:
    time.sleep(seconds)


def pids(measured: Measured) -> dict[str, int]:
    """Return the pid of each worker process by address."""
    cluster = measured.cluster
    return {
        worker.worker_address: worker.pid
        for worker in cluster.workers.values()
        if worker.worker_address is not None
    }


def running(measured: Measured, prefix: str) -> str | None:
    """Return the worker on which a task of a prefix runs, as its heartbeat says."""
    for state in measured.cluster.scheduler.workers.values():
        for task in (state.metrics.get("memusage") or {}).get("running", ()):
            if flight.Flying(*task).key.startswith(prefix):
                return state.address
    return None


def killed(measured: Measured, prefix: str, **labels: str) -> float:
    """Return how many tasks of a prefix the scheduler's page shows as killed."""
    metrics = Metrics.read(scheduler_port(measured.cluster))
    return metrics.total(
        "dask_scheduler_task_memory_killed_tasks_total", task_prefix_name=prefix, **labels
    )


def kill_when_running(measured: Measured, prefix: str, mib: int) -> None:
    """Kill -9 the worker that runs a task once its process has grown."""
    address = wait_until(lambda: running(measured, prefix) or _by_processing(measured, prefix))
    pid = pids(measured)[address]
    wait_until(lambda: _rss_mib(pid) > mib, what=f"{mib} MiB in {pid}")
    os.kill(pid, signal.SIGKILL)


def _by_processing(measured: Measured, prefix: str) -> str | None:
    for state in measured.cluster.scheduler.workers.values():
        if any(ts.prefix.name == prefix for ts in state.processing):
            return state.address
    return None


def _rss_mib(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096 / MIB


def settled(measured: Measured) -> None:
    """Wait until all ends are settled, and not merely not yet noticed."""
    deaths = measured.cluster.scheduler.extensions["memusage"].deaths
    wait_until(lambda: not deaths.unsettled and not deaths._tasks, timeout=40)


def open_incarnations(measured: Measured) -> set[str]:
    """Return the incarnations of the workers that are connected, and of those that went lately."""
    deaths = measured.cluster.scheduler.extensions["memusage"].deaths
    return {home.incarnation for home in deaths._homes.values()} | set(deaths._settled)


def hold_gil_after(path: str, seconds: int) -> None:
    """Say that it runs, and never let the GIL go from then on."""
    Path(path).touch()
    ctypes.PyDLL(None).sleep(seconds)


@pytest.fixture
def dying(measure: Callable[..., Measured], tmp_path: Any) -> Callable[..., Measured]:
    """Return what makes a measured cluster whose workers may die: one death fails a task."""

    def make(**options: Any) -> Measured:
        config = {
            **FULL,
            "memusage.csv.path": str(tmp_path / "memusage.csv"),
            "distributed.scheduler.allowed-failures": 0,
            **options.pop("config", {}),
        }
        return measure(config, **options)

    return make


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(grow, (50, 0.05, 400)), (grow, (20, 0.1, 400)), (hold_gil, (400,))],
    ids=["fast", "slow", "gil"],
)
def test_kill_9_names_the_task(
    dying: Callable[..., Measured], tmp_path: Any, function: Any, arguments: Any
) -> None:
    """Whatever the task did until the end: its key, the cause, a row, an event, the series."""
    measured = dying()
    events: list[Any] = []
    measured.client.subscribe_topic("memusage", events.append)
    future = measured.client.submit(function, *arguments, key=("job-1", 7))
    kill_when_running(measured, "job", 350)
    wait_until(lambda: killed(measured, "job", cause="signal") == 1)
    assert isinstance(future.exception(), KilledWorker)
    (record,) = measured.records.of("job")
    assert (record.key, record.status, record.growth_bytes) == (("job-1", 7), "killed", None)
    (row,) = rows(tmp_path / "memusage.csv")
    assert (row["task_key"], row["status"]) == ("('job-1', 7)", "killed")
    (_, event) = wait_until(lambda: events)[0]
    assert (event["key"], event["cause"], event["known_from"]) == (
        "('job-1', 7)",
        "signal",
        "flight",
    )
    metrics = Metrics.read(scheduler_port(measured.cluster))
    died = metrics.total("dask_scheduler_task_memory_killed_last_timestamp_seconds")
    assert abs(died - time.time()) < 60
    if function is grow:  # the sampler could look
        peak = metrics.total("dask_scheduler_task_memory_killed_last_peak_bytes")
        assert peak > 300 * MIB
        assert record.peak_bytes == peak


def test_only_what_executed_is_killed(dying: Callable[..., Measured]) -> None:
    """Tasks that were only assigned to the worker are not blamed."""
    measured = dying(config={"distributed.scheduler.worker-saturation": "inf"})
    first = measured.client.submit(grow, 50, 0.0, 200, key="culprit-0")
    kill_at = [measured.client.submit(nap, 0.01, key=f"queued-{n}") for n in range(50)]
    kill_when_running(measured, "culprit", 150)
    wait_until(lambda: killed(measured, "culprit") == 1)
    assert isinstance(first.exception(), KilledWorker)
    assert killed(measured, "queued") == 0
    del kill_at


def test_the_nannys_memory_kill_is_known_to_be_memory(dying: Callable[..., Measured]) -> None:
    """The nanny says so itself, and its last look at the process counts as a peak."""
    measured = dying(
        memory_limit="300MiB",
        config={"distributed.worker.memory.pause": False, "distributed.worker.memory.spill": False},
    )
    future = measured.client.submit(grow, 20, 0.02, 500, key="hog-0")
    assert isinstance(future.exception(), KilledWorker)
    wait_until(lambda: killed(measured, "hog", cause="memory") == 1)
    (record,) = measured.records.of("hog")
    assert record.peak_bytes > 0.9 * 300 * MIB
    assert killed(measured, "hog") == 1


def test_a_process_that_ends_itself_is_lost(dying: Callable[..., Measured]) -> None:
    """os._exit(137) looks like a kill and is none that anybody knows of."""
    measured = dying()
    future = measured.client.submit(os._exit, 137, key="quitter-0")
    assert isinstance(future.exception(), KilledWorker)
    wait_until(lambda: killed(measured, "quitter", cause="lost") == 1)
    assert killed(measured, "quitter") == 1


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


def test_the_counter_stands_at_0_before_the_first_kill(dying: Callable[..., Measured]) -> None:
    """All causes of a prefix are on the page as soon as the scheduler has seen a task of it."""
    measured = dying()
    measured.client.submit(nap, 0.0, key="calm-0").result()
    metrics = Metrics.read(scheduler_port(measured.cluster))
    for prefix in ("calm", "__overflow__"):
        for cause in ("memory", "signal", "lost"):
            assert (
                metrics.get_value(
                    "dask_scheduler_task_memory_killed_tasks_total",
                    task_prefix_name=prefix,
                    cause=cause,
                )
                == 0
            )


def test_several_tasks_at_once_are_all_named(dying: Callable[..., Measured]) -> None:
    """Whose memory it was cannot be told; that all of them ran can, and is said."""
    measured = dying(threads_per_worker=2)
    futures = [measured.client.submit(grow, 50, 0.0, 150, key=f"{name}-0") for name in "ab"]
    kill_when_running(measured, "a", 250)
    wait_until(lambda: killed(measured, "a") == killed(measured, "b") == 1)
    assert {record.concurrency for record in measured.records if record.status == "killed"} == {2}
    del futures


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
    """A container that restarts with its volume kept: nanny and worker died in one instant."""
    environment = {
        "DASK_MEMUSAGE__FLIGHT_DIRECTORY": str(tmp_path / "flight"),
    }
    servers = Servers(tmp_path)
    try:
        servers.scheduler("--preload", "dask_memusage_exporter", env=environment)
        first = servers.worker("--no-nanny", env=environment)
        future = servers.client.submit(grow, 50, 0.0, 200, key="pod-0")
        wait_until(lambda: _rss_mib(first.process.pid) > 200)
        first.process.kill()
        first.process.wait()
        servers.worker("--no-nanny", env=environment)
        name = "dask_scheduler_task_memory_killed_tasks_total"

        def told() -> bool:
            metrics = Metrics.read(servers.scheduler_port)
            return metrics.total(name, task_prefix_name="pod", cause="lost") == 1

        wait_until(told)
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


def test_tasks_find_the_worker_as_it_was(dying: Callable[..., Measured]) -> None:
    """Noting what runs changes nothing for the task."""
    measured = dying()
    key = measured.client.submit(lambda: get_worker().get_current_task(), key="me-0").result()
    assert key == "me-0"


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


# -- ends in order that look like kills --------------------------------------------------


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


def touch_and_nap(path: str, seconds: float) -> None:
    Path(path).touch()
    time.sleep(seconds)


# -- who was executing -------------------------------------------------------------------


def test_who_waits_for_a_thread_is_not_named(dying: Callable[..., Measured]) -> None:
    """Tasks that were handed to an executor with fewer threads, and had not begun."""
    measured = dying(threads_per_worker=4)
    with dask.annotate(executor="offload"):  # one thread
        futures = [measured.client.submit(nap, 60, key=f"narrow{n}-0") for n in range(4)]
    address = wait_until(lambda: running(measured, "narrow"))
    os.kill(pids(measured)[address], signal.SIGKILL)
    wait_until(lambda: sum(killed(measured, f"narrow{n}") for n in range(4)))
    settled(measured)
    assert sum(killed(measured, f"narrow{n}") for n in range(4)) == 1
    del futures


def test_keys_with_the_same_text(dying: Callable[..., Measured]) -> None:
    """The one that was executing is named, of whatever type and length the others are."""
    measured = dying(config={"distributed.scheduler.worker-saturation": "inf"})
    long = "k" * 2000
    keys = ["1", 1, ("x", 0), "('x', 0)", long + "-a", long + "-b"]
    for key in keys:
        others = [other for other in keys if other != key]
        future = measured.client.submit(nap, 60, key=key)
        address = wait_until(lambda: running(measured, ""))
        queued = [measured.client.submit(nap, 60, key=other) for other in others]
        state = measured.cluster.scheduler.workers[address]
        wait_until(lambda state=state: len(state.processing) == len(keys))
        os.kill(pids(measured)[address], signal.SIGKILL)
        future.exception()
        settled(measured)
        assert measured.records[-1].key == key
        assert type(measured.records[-1].key) is type(key)
        for one in (future, *queued):
            one.cancel()
        wait_until(lambda: not measured.cluster.scheduler.tasks)
        wait_until(lambda: measured.cluster.scheduler.workers)
    assert [record.key for record in measured.records if record.status == "killed"] == keys


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


# -- causes, and what comes late ---------------------------------------------------------


def test_every_death_under_one_nanny_has_its_cause(dying: Callable[..., Measured]) -> None:
    """The second and third as the first."""
    measured = dying()
    for number in range(3):
        future = measured.client.submit(nap, 60, key=f"again-{number}")
        address = wait_until(lambda: running(measured, "again"))
        os.kill(pids(measured)[address], signal.SIGKILL)
        future.exception()
        wait_until(lambda number=number: killed(measured, "again", cause="signal") == number + 1)
        wait_until(lambda: measured.cluster.scheduler.workers)


def test_a_worker_that_is_killed_at_once_is_known(dying: Callable[..., Measured]) -> None:
    """A task that holds the GIL is the first on each new worker: all four kills are counted."""
    measured = dying(
        memory_limit="300MiB",
        config={
            "distributed.worker.memory.pause": False,
            "distributed.worker.memory.spill": False,
            "distributed.scheduler.allowed-failures": 3,
        },
    )
    future = measured.client.submit(hold_gil, 500, key="hog-0")
    assert isinstance(future.exception(), KilledWorker)
    wait_until(lambda: killed(measured, "hog") >= 4, what="four kills")
    settled(measured)
    assert killed(measured, "hog") == killed(measured, "hog", cause="memory") == 4
    assert len(measured.records.of("hog")) == 4


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
