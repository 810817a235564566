"""Memory that the worker moves is no task's: transfers, scatter, spills, releases, shuffles."""

from __future__ import annotations

from collections.abc import Iterator

import dask
import numpy as np
import pandas as pd
import pytest
from distributed import Future, wait

from tests import tasks
from tests.conftest import Measured, measured, wait_until
from tests.tasks import Gate
from tests.test_honesty import MIB, addresses, assert_shared, reached, record, seen


@pytest.fixture(scope="module")
def pair() -> Iterator[Measured]:
    """Two worker processes with one thread each, and P2P shuffles."""
    with measured(n_workers=2) as cluster:
        for worker in addresses(cluster):
            cluster.client.submit(tasks.nothing, worker, workers=worker).result()
        yield cluster


def waits_while_held(pair: Measured, go: Gate, key: str, where: str) -> tuple[Future, Future]:
    """Return a result of 200 MiB that a worker holds, and a task that waits on the first one."""
    block = pair.client.submit(tasks.made, 200, key=key, workers=where)
    wait(block)
    here = addresses(pair)[0]
    waiting = pair.client.submit(tasks.wait_for, go.path, key=f"waits-{key}", workers=here)
    reached(go)
    return block, waiting


def test_arriving_transfer(pair: Measured, go: Gate) -> None:
    """A task that only waits while 200 MiB of another task's input arrive is not blamed."""
    here, there = addresses(pair)
    block, waiting = waits_while_held(pair, go, "arriving", there)
    needs = pair.client.submit(tasks.nothing, block, key="needs", workers=here)
    wait_until(lambda: len(pair.cluster.scheduler.tasks["arriving"].who_has) == 2)
    go.open()
    wait([waiting, needs])
    found = record(pair, "waits-arriving")
    assert_shared(found, "transfer")
    assert found.foreign_bytes >= 200 * MIB
    assert seen(found) >= 199 * MIB
    assert found.concurrency == 1


def test_leaving_transfer(pair: Measured, go: Gate) -> None:
    """Nor where 200 MiB leave: what is sent may be copied for it."""
    here, there = addresses(pair)
    block, waiting = waits_while_held(pair, go, "leaving", here)
    wait(pair.client.submit(tasks.nothing, block, key="needs-leaving", workers=there))
    go.open()
    wait(waiting)
    found = record(pair, "waits-leaving")
    assert_shared(found, "transfer")
    assert found.foreign_bytes >= 200 * MIB


def test_release(pair: Measured, go: Gate) -> None:
    """A result that is released while a task runs makes room that its growth does not show."""
    here, _ = addresses(pair)
    held = pair.client.submit(tasks.made, 150, key="held", workers=here)
    wait(held)
    result = pair.client.submit(
        tasks.array_after, go.path, 150, key="releases-beside", workers=here
    )
    reached(go)
    held.release()
    wait_until(lambda: "held" not in pair.cluster.scheduler.tasks)
    # On the same ordered stream as the release: the worker knows of it.
    pair.client.run(tasks.nothing, workers=[here])
    go.open()
    wait(result)
    found = record(pair, "releases-beside")
    # What it has made is all there at the end, and RSS is what it was.
    assert seen(found) < 10 * MIB
    assert found.foreign_bytes >= 150 * MIB
    assert found.scope == "shared"


def test_release_before(pair: Measured) -> None:
    """What is released between two tasks is nobody's: it makes neither of them shared."""
    here, _ = addresses(pair)
    for run in range(5):
        wait(pair.client.submit(tasks.made, 100, key=f"chain-{run}", workers=here))
        # Its result is released as the next one is sent.
    assert {one.scope for one in pair.records.of("chain")} == {"process"}


@pytest.mark.parametrize("direct", [True, False])
def test_scatter(direct: bool, pair: Measured, go: Gate) -> None:
    """Data that a client sends to the worker is nobody's growth."""
    here, _ = addresses(pair)
    key = f"waits-scatter-{direct}"
    waiting = pair.client.submit(tasks.wait_for, go.path, key=key, workers=here)
    reached(go)
    data = pair.client.scatter(np.ones(100 * MIB // 8), workers=[here], direct=direct)
    go.open()
    wait(waiting)
    found = record(pair, key)
    assert_shared(found, "transfer")
    assert found.foreign_bytes >= 100 * MIB
    del data


@pytest.fixture(scope="module")
def spilling() -> Iterator[Measured]:
    """One worker process of two threads that spills above 300 MiB, and at nothing else."""
    memory = {f"distributed.worker.memory.{what}": False for what in ("spill", "pause")}
    memory |= {"distributed.worker.memory.terminate": False}
    with measured(
        {**memory, "distributed.worker.memory.target": 0.3}, threads_per_worker=2, memory_limit=1e9
    ) as cluster:
        cluster.client.submit(tasks.nothing).result()
        yield cluster


def test_spilling(spilling: Measured, go: Gate, stop: Gate) -> None:
    """Writing results to disk, and reading them back with room to spare, is nobody's growth."""
    first = spilling.client.submit(tasks.made, 200, key="spilled")
    wait(first)
    waiting = spilling.client.submit(tasks.wait_for, go.path, key="waits-spilling")
    reached(go)
    second = spilling.client.scatter(np.ones(200 * MIB // 8))
    go.open()
    wait(waiting)
    found = record(spilling, "waits-spilling")
    assert_shared(found, "transfer")
    # It came in, and the other one was written.
    assert found.foreign_bytes >= 400 * MIB
    second.release()
    wait_until(lambda: second.key not in spilling.cluster.scheduler.tasks)
    waiting = spilling.client.submit(tasks.wait_for, stop.path, key="waits-unspilling")
    reached(stop)
    reads = spilling.client.submit(tasks.nothing, first, key="unspills")
    wait(reads)
    stop.open()
    wait(waiting)
    found = record(spilling, "waits-unspilling")
    # The task that needs it may have used some processor time beside this one.
    assert found.scope == "shared"
    assert found.reason in ("transfer", "overlap")
    assert found.foreign_bytes >= 200 * MIB
    assert seen(found) >= 199 * MIB
    # The one that needed it began when it was there.
    assert record(spilling, "unspills").foreign_bytes < MIB


def test_p2p_shuffle(pair: Measured, go: Gate) -> None:
    """What a P2P shuffle sends to a worker is not the growth of the task that waits there."""
    import dask.dataframe as dd

    here, there = addresses(pair)
    frame = pd.DataFrame({"k": np.arange(200_000) % 1000, "x": 1.0, "y": 2.0})
    parts = pair.client.map(
        lambda _, frame=frame: frame.copy(), range(20), workers=there, key="part"
    )
    wait(parts)
    waiting = pair.client.submit(tasks.wait_for, go.path, key="waits-p2p", workers=here)
    reached(go)
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        shuffled = dd.from_delayed(parts, meta=frame.iloc[:0]).shuffle("k")
        shuffled = pair.client.persist(shuffled)
    # How many of its parts are sent while that task waits is the scheduler's choice; some are.
    wait_until(lambda: shuffled_to(pair, here) > 4 * MIB, what="shards at the waiting worker")
    go.open()
    wait([waiting, shuffled])
    found = record(pair, "waits-p2p")
    assert_shared(found, "transfer")
    assert found.foreign_bytes > 4 * MIB
    assert found.concurrency == 1


def shuffled_to(cluster: Measured, worker: str) -> int:
    """Return how many bytes a worker has received in shuffles, as its heartbeat says."""
    beats = cluster.cluster.scheduler.plugins["shuffle"].heartbeats
    return sum(beat[worker]["comm"]["read"] for beat in beats.values() if worker in beat)
