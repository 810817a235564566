"""record(): what runs inside a `with` block, for notebooks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, KilledWorker, LocalCluster, Scheduler

from dask_memusage_exporter import TaskMemory, record
from dask_memusage_exporter.exporters.recordings import RecordingSink
from dask_memusage_exporter.recording import Recording
from dask_memusage_exporter.scheduler import prepare
from tests.conftest import wait_until

MIB = 2**20


def block(mib: int) -> int:
    return int(np.ones(mib * MIB // 8).sum())


def test_records_are_those_of_the_block(
    make_cluster: Callable[..., LocalCluster], make_client: Callable[..., Client]
) -> None:
    """What runs before and after is not in it; what runs inside is, once."""
    client = make_client(make_cluster())
    client.submit(block, 1, key="before-0").result()
    with record(client) as recording:
        client.gather(client.map(block, [50, 100], pure=False, key="inside"))
    client.submit(block, 1, key="after-0").result()
    assert [type(one) for one in recording.records] == [TaskMemory] * 2
    assert {one.task_prefix for one in recording.records} == {"inside"}
    assert recording.left_out == 0
    peaks = sorted(one.peak_bytes - one.start_bytes for one in recording.records)
    assert peaks[0] == pytest.approx(50 * MIB, rel=0.1)
    assert peaks[1] == pytest.approx(100 * MIB, rel=0.1)


def test_frames_have_types_and_unknowns(
    make_cluster: Callable[..., LocalCluster], make_client: Callable[..., Client]
) -> None:
    """Sizes are nullable integers, times are UTC, and a growth that is not known is NA."""
    client = make_client(make_cluster(threads_per_worker=2))
    with record(client) as recording:
        client.gather(client.map(block, [200] * 4, pure=False, key="busy"))
    frame = recording.to_pandas()
    assert len(frame) == 4
    assert str(frame["peak_bytes"].dtype) == "Int64"
    assert str(frame["start"].dt.tz) == "UTC"
    shared = frame[frame["scope"] == "shared"]
    assert shared["growth_bytes"].isna().all()
    table = recording.by_prefix()
    assert table.loc["busy", "tasks"] == 4
    assert table.loc["busy", "own_growth"] == (frame["scope"] == "process").sum()


def test_an_empty_recording_is_empty(
    make_cluster: Callable[..., LocalCluster], make_client: Callable[..., Client]
) -> None:
    """A block in which nothing ran gives empty tables."""
    with record(make_client(make_cluster())) as recording:
        pass
    assert recording.to_pandas().empty
    assert recording.by_prefix().empty


def test_a_plot_shows_each_prefix(
    make_cluster: Callable[..., LocalCluster], make_client: Callable[..., Client]
) -> None:
    """One series a prefix, in MiB."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    client = make_client(make_cluster())
    with record(client) as recording:
        client.gather(client.map(block, [20, 30], pure=False, key="one"))
        client.submit(block, 40, key="two-0").result()
    axes = recording.plot()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["one", "two"]
    # Every point is drawn, filled or not.
    assert sum(len(points.get_offsets()) for points in axes.collections) == 3
    assert all(points.get_edgecolors().size for points in axes.collections)
    assert "MiB" in axes.get_ylabel()


def test_asynchronous_clients_record_too() -> None:
    """`async with` is the same."""

    async def run() -> Any:
        options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
        async with (
            LocalCluster(**options, asynchronous=True) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            async with record(client) as recording:
                await client.submit(block, 10, key="aio-0")
            return recording.records

    assert [one.key for one in asyncio.run(run())] == ["aio-0"]


#: A notebook whose kernel dies inside the block.
DIES = """
import os, sys
from distributed import Client
from dask_memusage_exporter import record
record(Client(sys.argv[1])).__enter__()
os._exit(7)
"""


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "closes"])
def test_a_recording_goes_with_its_client(
    make_cluster: Callable[..., LocalCluster], make_client: Callable[..., Client], dies: bool
) -> None:
    """Nothing is kept for who will not come back, and workers send rows no longer."""
    cluster = make_cluster()
    client = make_client(cluster)
    with record(client) as others:
        pass
    agent = cluster.scheduler.extensions["memusage"]
    if dies:
        command = [sys.executable, "-c", DIES, cluster.scheduler_address]
        assert subprocess.run(command, timeout=60, check=False).returncode == 7
    else:
        with record(client) as others:
            with Client(cluster) as gone:
                record(gone).__enter__()
                assert len(agent.rows.sinks) == len(agent.recordings._sinks) == 2
            wait_until(lambda: len(agent.rows.sinks) == len(agent.recordings._sinks) == 1)
            client.submit(block, 1, key="other-0").result()
        assert [one.key for one in others.records] == ["other-0"]
    wait_until(lambda: not agent.rows.sinks and not agent.recordings._sinks)

    def rows(dask_worker: Any) -> bool:
        return dask_worker.extensions["memusage"].reporter.rows

    wait_until(lambda: set(client.run(rows).values()) == {False})


def test_who_has_gone_before_it_was_heard_leaves_nothing() -> None:
    """A client's death and its request come on connections of their own, in any order."""

    async def run() -> None:
        async with Scheduler(dashboard_address="127.0.0.1:0", port=0) as scheduler:
            agent = prepare(scheduler, None)
            await agent.recordings.start(client="gone")
            assert not agent.rows.sinks
            # Clients of before say no name: theirs stays until it is fetched.
            token = await agent.recordings.start()
            assert await agent.recordings.stop(token) == ([], 0)

    asyncio.run(run())


def die(mib: int) -> None:
    """Take memory, and kill the worker once it has been seen."""
    block = np.ones(mib * MIB // 8)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
    del block


def test_a_kill_in_the_block_is_in_its_records(
    make_cluster: Callable[..., LocalCluster], make_client: Callable[..., Client]
) -> None:
    """The client hears that the worker died before it is known what it ran: the end waits."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        client = make_client(make_cluster())
        with record(client) as recording, contextlib.suppress(KilledWorker):
            client.submit(die, 100, key="die-0").result()
    (one,) = recording.records
    assert (one.key, one.status) == ("die-0", "killed")
    assert one.peak_bytes > 100 * MIB
    # The last peak that was seen is not taken for the whole.
    row = recording.by_prefix().loc["die"]
    assert (row["tasks"], row["own_growth"], row["killed"]) == (0, 0, 1)
    assert row[["peak_p50", "peak_p95", "peak_max", "growth_max"]].isna().all()


def test_sizes_that_nobody_has_seen_are_unknown() -> None:
    """A task that was killed before anybody had looked: NA and never 0, and no point of a plot."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    recording = Recording(Client)  # type: ignore[arg-type]  # it is not asked
    done = TaskMemory(
        "a-0", "a", "tcp://w", 1.0, 2.0, 5 * MIB, 9 * MIB, 4 * MIB, "process", None, 0, 0, 1, 0, 0,
        "finished", None,
    )  # fmt: skip
    last_seen = done._replace(
        key="a-1", peak_bytes=7 * MIB, growth_bytes=None, scope="shared", status="killed"
    )
    unseen = last_seen._replace(key="a-2", start_bytes=0, peak_bytes=0)
    recording.records = [done, last_seen, unseen]
    frame = recording.to_pandas().set_index("key")
    assert frame.loc["a-2", ["start_bytes", "peak_bytes"]].isna().all()
    assert frame.loc["a-1", "peak_bytes"] == 7 * MIB
    (row,) = recording.by_prefix().to_dict("records")
    assert (row["tasks"], row["own_growth"], row["killed"]) == (1, 1, 2)
    assert row["peak_p50"] == row["peak_max"] == 9 * MIB
    assert sum(len(points.get_offsets()) for points in recording.plot().collections) == 2


def test_a_recording_waits_for_no_death_for_ever(
    make_cluster: Callable[..., LocalCluster],
    make_client: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nobody tells what a worker ran, the records that are there are returned."""
    monkeypatch.setattr("dask_memusage_exporter.exporters.recordings._PATIENCE", 0.1)
    cluster = make_cluster(processes=False)
    client = make_client(cluster)
    with record(client) as recording:
        client.submit(block, 1, key="lived-0").result()
        deaths = cluster.scheduler.extensions["memusage"].deaths
        monkeypatch.setitem(deaths._open, "nobody-tells", None)
    assert [one.key for one in recording.records] == ["lived-0"]


def test_a_scheduler_that_closes_meanwhile_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for a death ends in an answer that the client takes for a loss, and in no error."""

    async def run() -> None:
        async with Scheduler(dashboard_address="127.0.0.1:0", port=0) as scheduler:
            agent = prepare(scheduler, None)
            token = await agent.recordings.start()
            monkeypatch.setitem(agent.deaths._open, "nobody-tells", None)
            stopping = asyncio.ensure_future(agent.recordings.stop(token))
            await asyncio.sleep(0)
            agent.teardown()
            monkeypatch.undo()
            assert await stopping is None

    asyncio.run(run())


def test_what_comes_while_a_recording_waits_is_not_in_it() -> None:
    """Of what arrives after the block, only kills of within it are the block's."""
    killed = TaskMemory(
        "key", "killed", "worker", 1.0, 5.0, 0, 0, None, "shared", "polling", None, 0, 1, None,
        None, "killed", None,
    )  # fmt: skip
    sink = RecordingSink(None)
    sink.end(6.0)
    sink.write(killed)
    sink.write(killed._replace(status="finished"))
    sink.write(killed._replace(stop=7.0))
    assert sink.records == [tuple(killed)]


class OwnError(Exception):
    """The block's."""


def close_cluster(cluster: LocalCluster, client: Client) -> None:
    cluster.close()
    wait_until(lambda: client.status != "running")


def close_client(cluster: LocalCluster, client: Client) -> None:
    client.close()


def lose_connection(cluster: LocalCluster, client: Client) -> None:
    """Cut it; the client connects anew, and the scheduler has let its recordings go."""
    agent, loop = cluster.scheduler.extensions["memusage"], cluster.scheduler.loop
    loop.add_callback(lambda: [comm.abort() for comm in cluster.scheduler.client_comms.values()])
    wait_until(lambda: not agent.recordings._sinks)
    wait_until(lambda: client.status == "running")


@pytest.mark.parametrize("lose", [close_cluster, close_client, lose_connection])
@pytest.mark.parametrize("raises", [True, False], ids=["raises", "ends"])
def test_records_that_are_lost_hide_no_error_of_the_block(
    make_cluster: Callable[..., LocalCluster],
    lose: Callable[[LocalCluster, Client], None],
    raises: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The block's own error comes through, and a line says what is lost; else an error says it."""
    cluster = make_cluster(processes=False)

    def run() -> None:
        with Client(cluster) as client, record(client):
            lose(cluster, client)
            if raises:
                raise OwnError

    with caplog.at_level("WARNING"), pytest.raises(OwnError if raises else ConnectionError) as hit:
        run()
    lines = [line for line in caplog.messages if "nothing was recorded" in line]
    assert len(lines) == raises
    assert "went with the scheduler" in (lines[0] if raises else str(hit.value))


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "ends"])
def test_asynchronous_blocks_keep_their_errors_too(raises: bool) -> None:
    """As in a `with` block."""

    async def run() -> None:
        options = {"n_workers": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
        async with (
            LocalCluster(**options, asynchronous=True) as cluster,
            Client(cluster, asynchronous=True) as client,
            record(client),
        ):
            await cluster.close()
            if raises:
                raise OwnError

    with pytest.raises(OwnError if raises else ConnectionError):
        asyncio.run(run())


def test_without_a_client_it_says_so() -> None:
    """The error says what to do."""
    with pytest.raises(ValueError, match="create distributed"):
        record()
