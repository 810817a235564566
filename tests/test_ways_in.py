"""Every way in from Python, on real clusters: each task is counted exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Event, LocalCluster
from distributed.deploy.subprocess import SubprocessCluster

import dask_memusage_exporter
from dask_memusage_exporter import (
    ConfigError,
    MemusageSchedulerPlugin,
    MemusageWorkerPlugin,
    install,
)
from tests.conftest import (
    Measured,
    Metrics,
    Records,
    counted,
    local_cluster,
    page,
    rows,
    scheduler_port,
    wait_until,
    worker_ports,
)

TASKS = 40

#: One process for all, the quickest cluster: all its servers show one page.
IN_PROCESS = {"processes": False, "n_workers": 2}


def run(client: Client, prefix: str, tasks: int = TASKS) -> None:
    """Run tasks of one prefix and wait for their results."""
    client.gather(client.map(abs, range(tasks), key=[f"{prefix}-{i}" for i in range(tasks)]))


def in_process_counted(cluster: LocalCluster, prefix: str) -> float:
    """Return how many executions the page of a cluster in this process shows."""
    return counted([scheduler_port(cluster)], prefix)


WAYS: dict[str, Callable[[Client], Any]] = {
    "scheduler": lambda client: client.cluster.scheduler,
    "cluster": lambda client: client.cluster,
    "client": lambda client: client,
    "nothing": lambda client: None,
}


@pytest.mark.parametrize("way", WAYS)
def test_install_counts_each_task_once(
    way: str, make_cluster: Any, make_client: Any, tmp_path: Path
) -> None:
    """A Scheduler, a Cluster, a Client or nothing, with a CSV: one row and one count a task."""
    cluster = make_cluster(**IN_PROCESS)
    client = make_client(cluster)
    run(client, "before")
    assert install(WAYS[way](client), str(tmp_path / "memusage.csv")) is None
    run(client, "installed")
    assert len(rows(tmp_path / "memusage.csv")) == TASKS
    assert in_process_counted(cluster, "installed") == TASKS
    assert in_process_counted(cluster, "before") == 0


def test_install_without_a_csv_counts_too(make_cluster: Any, make_client: Any) -> None:
    """Without a CSV no record travels, and the pages count the same."""
    cluster = make_cluster(**IN_PROCESS)
    client = make_client(cluster)
    install(client)
    run(client, "quiet")
    assert in_process_counted(cluster, "quiet") == TASKS
    for worker in cluster.workers.values():
        assert not worker.extensions["memusage"].reporter.rows


def test_install_is_a_drop_in_for_the_old_tool(make_cluster: Any, make_client: Any) -> None:
    """The first two arguments stand in the old order, and the path may be any path-like object."""
    import inspect

    import dask_memusage

    ours, theirs = (
        [
            one.name
            for one in inspect.signature(it).parameters.values()
            if one.kind != one.KEYWORD_ONLY
        ]
        for it in (install, dask_memusage.install)
    )
    assert len(ours) == len(theirs) == 2
    assert ours[1] == theirs[1] == "csv_path"


def test_install_with_nothing_to_install_on_says_what_to_do() -> None:
    """Without a default client: a ValueError that names what would do."""
    with pytest.raises(
        ValueError, match=r"no Dask client; create distributed.Client\(\.\.\.\) first"
    ):
        install()


@pytest.mark.parametrize("target", ["memusage.csv", 8786, object, Client])
def test_install_on_something_else_is_a_type_error(target: object) -> None:
    """A wrong target is refused by its repr, and so is a path that is none."""
    with pytest.raises(TypeError, match="takes a distributed Client, Cluster or Scheduler"):
        install(target)


def test_a_path_that_is_no_path_is_an_error(make_cluster: Any) -> None:
    """The error comes at the call, before anything is set up; nothing is left out in silence."""
    cluster = make_cluster(**IN_PROCESS)
    with pytest.raises(TypeError, match=r"os\.PathLike"):
        install(cluster, 5)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="the CSV file cannot be written"):
        install(cluster, "")
    assert "memusage" not in cluster.scheduler.extensions


def test_a_wrong_jemalloc_is_an_error(make_cluster: Any) -> None:
    """As for the setting of that name, and no silence: neither true, nor false, nor a path."""
    cluster = make_cluster(**IN_PROCESS)
    for wrong in ("", " ", 1, 1.5):
        with pytest.raises(ConfigError, match=r"memusage\.jemalloc: .* is not true, false or the"):
            install(cluster, jemalloc=wrong)
    assert "memusage" not in cluster.scheduler.extensions


@pytest.mark.parametrize("way", WAYS)
def test_install_inside_an_event_loop(way: str, tmp_path: Path) -> None:
    """Asynchronous clients and clusters: awaited, in the loop that everything runs in."""

    async def main() -> None:
        async with (
            LocalCluster(
                processes=False, n_workers=1, asynchronous=True, dashboard_address="127.0.0.1:0"
            ) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            await install(WAYS[way](client), tmp_path / "memusage.csv")
            keys = [f"loop-{i}" for i in range(TASKS)]
            await client.gather(client.map(abs, range(TASKS), key=keys))
            assert len(rows(tmp_path / "memusage.csv")) == TASKS
            port = scheduler_port(cluster)
            assert await asyncio.to_thread(counted, [port], "loop") == TASKS

    asyncio.run(main())


def test_install_in_the_schedulers_own_loop_need_not_be_awaited(tmp_path: Path) -> None:
    """The old tool's call in a preload of one's own: errors come at once, measuring begins."""

    async def main() -> None:
        async with LocalCluster(
            processes=False, n_workers=1, asynchronous=True, dashboard_address="127.0.0.1:0"
        ) as cluster:
            with pytest.raises(OSError, match="cannot be written"):
                install(cluster.scheduler, str(tmp_path / "missing" / "memusage.csv"))
            assert "memusage" not in cluster.scheduler.extensions
            install(cluster.scheduler, str(tmp_path / "memusage.csv"))
            (worker,) = cluster.workers.values()
            while "memusage" not in worker.extensions:
                await asyncio.sleep(0.01)
            async with Client(cluster, asynchronous=True) as client:
                await client.submit(abs, 1, key="unawaited-1")
            assert len(rows(tmp_path / "memusage.csv")) == 1

    asyncio.run(main())


def test_a_cluster_whose_scheduler_lives_elsewhere(tmp_path: Path) -> None:
    """A Cluster with its scheduler in another process, as on Kubernetes: a client of our own."""
    with SubprocessCluster(
        host="127.0.0.1",
        n_workers=1,
        threads_per_worker=1,
        dashboard_address="127.0.0.1:0",
        worker_kwargs={"dashboard_address": "127.0.0.1:0"},
    ) as cluster:
        install(cluster, str(tmp_path / "memusage.csv"))
        with Client(cluster) as client:
            run(client, "elsewhere")
            assert len(rows(tmp_path / "memusage.csv")) == TASKS
            (worker,) = client.scheduler_info()["workers"].values()
            assert counted([worker["services"]["dashboard"]], "elsewhere") == TASKS
            with pytest.raises(OSError, match="cannot be written"):
                install(cluster, str(tmp_path / "missing" / "memusage.csv"))


def test_an_asynchronous_cluster_whose_scheduler_lives_elsewhere(tmp_path: Path) -> None:
    """The same in an event loop."""

    async def main() -> None:
        async with SubprocessCluster(
            host="127.0.0.1",
            n_workers=1,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            asynchronous=True,
        ) as cluster:
            await install(cluster, str(tmp_path / "memusage.csv"))
            async with Client(cluster, asynchronous=True) as client:
                await client.gather(client.map(abs, range(TASKS)))
            assert len(rows(tmp_path / "memusage.csv")) == TASKS

    asyncio.run(main())


@pytest.mark.parametrize("worker_first", [False, True])
def test_both_plugins_in_either_order(
    worker_first: bool, make_cluster: Any, make_client: Any, tmp_path: Path
) -> None:
    """Each task has one row, whichever plugin came first, on workers that join later too."""
    cluster = make_cluster(**IN_PROCESS)
    client = make_client(cluster)
    plugins = [MemusageSchedulerPlugin(str(tmp_path / "memusage.csv")), MemusageWorkerPlugin()]
    for plugin in reversed(plugins) if worker_first else plugins:
        client.register_plugin(plugin)
    cluster.scale(3)
    client.wait_for_workers(3)
    run(client, "both")
    assert len(rows(tmp_path / "memusage.csv")) == TASKS
    assert len({record["task_key"] for record in rows(tmp_path / "memusage.csv")}) == TASKS
    assert in_process_counted(cluster, "both") == TASKS


def test_the_schedulers_plugin_alone_is_enough(
    make_cluster: Any, make_client: Any, tmp_path: Path
) -> None:
    """It puts what is needed on every worker, now and later."""
    cluster = make_cluster(**IN_PROCESS)
    client = make_client(cluster)
    client.register_plugin(MemusageSchedulerPlugin(tmp_path / "memusage.csv"))
    run(client, "alone")
    assert len(rows(tmp_path / "memusage.csv")) == TASKS
    assert in_process_counted(cluster, "alone") == TASKS


def test_the_workers_plugin_alone_counts_and_sends_nothing(
    make_cluster: Any, make_client: Any
) -> None:
    """A scheduler without us would close the stream of a worker that sends it records."""
    cluster = make_cluster(**IN_PROCESS)
    client = make_client(cluster)
    client.register_plugin(MemusageWorkerPlugin())
    run(client, "workers-only")
    assert in_process_counted(cluster, "workers-only") == TASKS
    assert "memusage" not in cluster.scheduler.extensions
    assert "dask_scheduler_task_memory" not in page(scheduler_port(cluster))
    assert len(cluster.scheduler.workers) == 2


def test_installing_twice_keeps_the_file_and_adds_another(
    make_cluster: Any, make_client: Any, tmp_path: Path
) -> None:
    """The same file, by another name too, is not truncated; another path is a second file."""
    cluster = make_cluster(**IN_PROCESS)
    client = make_client(cluster)
    first, second, link = (tmp_path / name for name in ("first.csv", "second.csv", "link.csv"))
    link.symlink_to(first)
    install(cluster, first)
    run(client, "once")
    install(client, first)
    install(cluster.scheduler, os.path.relpath(first))
    install(cluster, link)
    run(client, "twice")
    install(client, second)
    run(client, "thrice")
    prefixes = ["once", "twice", "thrice"]
    assert [row["task_key"].split("-")[0] for row in rows(first)] == [
        prefix for prefix in prefixes for _ in range(TASKS)
    ]
    assert len(rows(second)) == TASKS
    for prefix in prefixes:
        assert in_process_counted(cluster, prefix) == TASKS


def test_tasks_that_run_while_it_is_installed_again_keep_their_record(measure: Any) -> None:
    """Dask tears a plugin of the same name down and replaces it; the task's start must survive."""
    measured = measure(**IN_PROCESS)
    client = measured.client
    going, done = Event("again-going", client), Event("again-done", client)

    def wait(_: int) -> None:
        Event("again-going").set()
        Event("again-done").wait(60)

    futures = client.map(wait, range(2), key=["running-1", "running-2"])
    going.wait(60)
    for _ in range(3):
        install(client)
    done.set()
    client.gather(futures)
    (one, two) = measured.records.of("running")
    assert one.status == two.status == "finished"
    assert in_process_counted(measured.cluster, "running") == 2


# -- workers that come and go ------------------------------------------------------------


@pytest.fixture(scope="module")
def living() -> Iterator[Measured]:
    """A measured cluster of worker processes under nannies, whose workers come and go."""
    with local_cluster(n_workers=1) as cluster, Client(cluster) as client:
        records = Records()
        install(cluster)
        cluster.scheduler.extensions["memusage"].add_sink(records)
        install(cluster)
        yield Measured(cluster, client, records)


def measured_workers(cluster: LocalCluster) -> int:
    """Return how many workers the scheduler's page says are measured."""
    return int(
        Metrics.read(scheduler_port(cluster)).total(
            "dask_scheduler_task_memory_workers", source="kernel"
        )
    )


def test_a_worker_that_joins_later_is_measured(living: Measured) -> None:
    """It gets the plugin as it registers."""
    living.cluster.scale(2)
    living.client.wait_for_workers(2)
    wait_until(lambda: measured_workers(living.cluster) == 2)
    run(living.client, "later")
    assert len(living.records.of("later")) == TASKS
    assert len({record.worker for record in living.records.of("later")}) == 2
    assert counted(worker_ports(living.cluster), "later") == TASKS


def test_restarted_workers_are_measured(living: Measured) -> None:
    """After Client.restart the processes are new, and so are their counts."""
    run(living.client, "old")
    workers = len(living.cluster.workers)
    living.client.restart()
    living.client.wait_for_workers(workers)
    run(living.client, "new")
    assert len(living.records.of("old")) == len(living.records.of("new")) == TASKS
    assert counted(worker_ports(living.cluster), "new") == TASKS
    assert counted(worker_ports(living.cluster), "old") == 0


def test_a_worker_that_its_nanny_replaces_is_measured(living: Measured) -> None:
    """After kill -9 the task runs again elsewhere: a record of the kill, one of the other run."""
    client = living.client
    living.cluster.scale(1)
    wait_until(lambda: len(living.cluster.scheduler.workers) == 1)
    going, done = Event("kill-going", client), Event("kill-done", client)

    def wait() -> None:
        Event("kill-going").set()
        Event("kill-done").wait(60)

    ((address, pid),) = client.run(os.getpid).items()
    future = client.submit(wait, key="killed-1")
    going.wait(60)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: living.cluster.scheduler.workers.keys() - {address})
    done.set()
    future.result()
    run(client, "after-kill")
    wait_until(lambda: len(living.records.of("killed")) == 2)
    assert {record.status for record in living.records.of("killed")} == {"killed", "finished"}
    assert len(living.records.of("after-kill")) == TASKS
    assert counted(worker_ports(living.cluster), "after-kill") == TASKS


def test_stopping_and_beginning_again(living: Measured) -> None:
    """After unregister_worker_plugin nothing is counted; registered again, counters go on."""
    client = living.client
    run(client, "on")
    client.unregister_worker_plugin("memusage")
    run(client, "off")
    assert living.records.of("off") == []
    assert counted(worker_ports(living.cluster), "off") == 0
    wait_until(lambda: measured_workers(living.cluster) == 0)
    install(living.cluster)
    client.gather(client.map(abs, range(3), key=[f"on-{i}" for i in range(100, 103)]))
    assert counted(worker_ports(living.cluster), "on") == TASKS + 3
    wait_until(lambda: measured_workers(living.cluster) == len(living.cluster.scheduler.workers))


@pytest.mark.parametrize("coroutine", [False, True])
def test_stopping_in_the_middle_of_a_task(coroutine: bool, measure: Any, tmp_path: Path) -> None:
    """A task that ran across is not measured, overlaps nothing later, and is no fault of ours."""
    measured = measure(processes=False, n_workers=1)
    client = measured.client
    going, done = tmp_path / "going", tmp_path / "done"

    def wait() -> None:
        going.touch()
        wait_until(done.exists)

    async def wait_on_the_loop() -> None:
        going.touch()
        while not done.exists():
            await asyncio.sleep(0.01)

    future = client.submit(wait_on_the_loop if coroutine else wait, key="across-1")
    wait_until(going.exists)
    client.unregister_worker_plugin("memusage")
    (worker,) = measured.cluster.workers.values()
    wait_until(lambda: worker.metrics["memusage"](worker)["source"] == "missing")
    install(client)
    done.touch()
    future.result()
    run(client, "afterwards", 5)
    assert measured.records.of("across") == []
    assert [record.concurrency for record in measured.records.of("afterwards")] == [1] * 5
    metrics = Metrics.read(scheduler_port(measured.cluster))
    assert metrics.total("dask_worker_task_memory_errors_total") == 0
    assert metrics.total("dask_worker_task_memory_dropped_records_total") == 0


def test_an_adaptive_cluster_counts_each_task_once(make_cluster: Any, make_client: Any) -> None:
    """Down to no worker and up again: the records are complete."""
    cluster = make_cluster(n_workers=0)
    client = make_client(cluster)
    records = Records()
    install(cluster)
    cluster.scheduler.extensions["memusage"].add_sink(records)
    install(cluster)
    cluster.adapt(minimum=0, maximum=2, interval="50ms", wait_count=1)
    run(client, "up")
    wait_until(lambda: not cluster.scheduler.workers, what="no workers")
    run(client, "up-again")
    assert len(records.of("up")) == len(records.of("up-again")) == TASKS


def test_a_worker_that_leaves_while_all_are_told_hinders_nobody(
    make_cluster: Any, make_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are told before install returns, though one can no longer be reached."""
    cluster = make_cluster(processes=False, n_workers=3)
    client = make_client(cluster)
    gone = next(iter(cluster.workers.values()))
    connect = cluster.scheduler.rpc.connect

    async def refuse(address: str, *args: Any, **options: Any) -> Any:
        if address == gone.address:
            raise OSError("it has left")
        await asyncio.sleep(0.2)  # the others answer later
        return await connect(address, *args, **options)

    monkeypatch.setattr(cluster.scheduler.rpc, "connect", refuse)
    install(client)
    assert ["memusage" in worker.extensions for worker in cluster.workers.values()] == [
        worker is not gone for worker in cluster.workers.values()
    ]


def test_the_public_names_are_there() -> None:
    """What the README names can be imported from the package."""
    for name in dask_memusage_exporter.__all__:
        assert hasattr(dask_memusage_exporter, name)
