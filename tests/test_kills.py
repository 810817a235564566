"""Workers that die: the task that was executing is named, with its last peak and the cause."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pytest
from dask.utils import format_bytes
from distributed import KilledWorker, get_worker

from dask_memusage_exporter import flight
from tests.conftest import Measured, Metrics, rows, scheduler_port, wait_until
from tests.deaths import MIB, grow, hold_gil, kill_when_running, killed, nap, pids, running, settled


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(grow, (50, 0.05, 400)), (grow, (20, 0.1, 400)), (hold_gil, (400,))],
    ids=["fast", "slow", "gil"],
)
def test_kill_9_names_the_task(
    dying: Callable[..., Measured],
    tmp_path: Any,
    function: Any,
    arguments: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the task did until the end: its key, the cause, a row, an event, the series, a line.

    The last peak that was seen is told with its age.
    """
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
    assert row["peak_bytes"] == (str(record.peak_bytes) if record.peak_bytes else "")
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
        assert record.peak_bytes == event["peak_bytes"] == peak
        assert 0 <= event["peak_age"] < 10
        seen = f"{format_bytes(peak)}, {event['peak_age']:.2f} s before"
        assert f"last seen peak of the process {seen}" in event["message"]
    (line,) = (one for one in caplog.messages if "was killed by a signal while it ran" in one)
    assert "task ('job-1', 7) (job)" in line
    assert event["message"] in line


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


#: A worker in whose cgroup nobody has been killed for memory yet.
NO_OOM_KILLS = """
from dask_memusage_exporter import flight

flight.oom_kills = lambda: 0

def dask_setup(worker):
    pass
"""


def test_a_kill_that_the_cgroup_counted_is_for_memory(
    dying: Callable[..., Measured], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nanny lives on, and sees that the kernel's count has gone up since the worker began."""
    (tmp_path / "none_yet.py").write_text(NO_OOM_KILLS)
    measured = dying(config={"distributed.worker.preload": [str(tmp_path / "none_yet.py")]})
    monkeypatch.setattr(flight, "oom_kills", lambda: 1)  # here, where the nanny is
    future = measured.client.submit(nap, 60, key="counted-0")
    address = wait_until(lambda: running(measured, "counted"))
    os.kill(pids(measured)[address], signal.SIGKILL)
    wait_until(lambda: killed(measured, "counted", cause="memory") == 1)
    assert isinstance(future.exception(), KilledWorker)
    assert killed(measured, "counted") == 1


def test_a_process_that_ends_itself_is_lost(dying: Callable[..., Measured]) -> None:
    """os._exit(137) looks like a kill and is none that anybody knows of."""
    measured = dying()
    future = measured.client.submit(os._exit, 137, key="quitter-0")
    assert isinstance(future.exception(), KilledWorker)
    wait_until(lambda: killed(measured, "quitter", cause="lost") == 1)
    assert killed(measured, "quitter") == 1


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


def test_tasks_find_the_worker_as_it_was(dying: Callable[..., Measured]) -> None:
    """Noting what runs changes nothing for the task."""
    measured = dying()
    key = measured.client.submit(lambda: get_worker().get_current_task(), key="me-0").result()
    assert key == "me-0"


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


# -- causes ------------------------------------------------------------------------------


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
