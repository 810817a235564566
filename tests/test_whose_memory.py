"""Whose memory it is: nothing is blamed on a task that is not its own, and nothing hidden is shown.

The truth is known to each test from what its task allocates: sizes of blocks are exact to the
allocator's rounding (16 bytes a block), Python objects are compared with a task's first run in a
fresh process, where nothing can be hidden.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dask_memusage_exporter.records import TaskMemory
from tests.conftest import Measured, wait_until

MIB = 2**20
SIZE = 200 * MIB


def blocks(_: int, size: int) -> int:
    """Allocate and touch 200 MiB in blocks, and free them."""
    return len([b"x" * size for _ in range(SIZE // size)])


def objects(_: int) -> int:
    """About 200 MiB of ints and strings."""
    return len([str(number) for number in range(3_300_000)])


def nap(seconds: float, *_: Any) -> None:
    time.sleep(seconds)


def array(mib: int) -> np.ndarray:
    return np.ones(mib * MIB // 8)


def total(values: np.ndarray) -> float:
    return float(values.sum())


def read_mapped(path: str) -> int:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        return sum(view[at] for at in range(0, len(view), 4096))


def honest(record: TaskMemory, truth: int) -> bool:
    """Return whether a record is right within 10 %, or says by how much it may be wrong."""
    if record.scope == "process":
        assert record.growth_bytes is not None
        return abs(record.growth_bytes - truth) <= 0.1 * truth
    assert record.growth_bytes is None
    if record.reason == "warm_heap":
        hidden = truth - (record.peak_bytes - record.start_bytes)
        return record.reusable_bytes is None or record.reusable_bytes >= 0.95 * hidden
    return record.reason == "transfer"


@pytest.mark.parametrize("size", [5_000, 64_000, MIB])
def test_blocks_again_and_again(measure: Callable[..., Measured], size: int) -> None:
    """200 MiB in blocks, ten times on one thread: right, or said to be hidden, every time."""
    measured = measure()
    for number in range(10):
        measured.client.submit(blocks, number, size, key=f"blocks-{number}").result()
    records = measured.records.of("blocks")
    assert len(records) == 10
    assert [record for record in records if not honest(record, SIZE)] == []
    assert records[0].scope == "process"


def test_python_objects_again_and_again(measure: Callable[..., Measured]) -> None:
    """The same for small objects, which CPython's own allocator keeps."""
    measured = measure()
    for number in range(10):
        measured.client.submit(objects, number, key=f"objects-{number}").result()
    records = measured.records.of("objects")
    truth = records[0].growth_bytes
    assert truth is not None
    assert truth == pytest.approx(3_300_000 * (56 + 8), rel=0.15)
    assert [record for record in records if not honest(record, truth)] == []


def test_trimming_gives_most_rows_a_growth(measure: Callable[..., Measured]) -> None:
    """With memusage.trim, rows whose trim the budget allowed are the task's own."""
    measured = measure({"memusage.trim": 0.5})
    for number in range(10):
        measured.client.submit(blocks, number, 64_000, key=f"trimmed-{number}").result()
    records = measured.records.of("trimmed")
    assert [record for record in records if not honest(record, SIZE)] == []
    assert sum(record.scope == "process" for record in records) >= 8


def test_a_sleeper_is_not_blamed_for_a_transfer(measure: Callable[..., Measured]) -> None:
    """200 MB of another task's input arrive while a task sleeps alone in its process."""
    measured = measure(n_workers=2)
    client = measured.client
    first, second = list(measured.cluster.scheduler.workers)
    data = client.submit(array, 200, key="data-0", workers=[second])
    wait_until(lambda: data.status == "finished")
    sleeper = client.submit(nap, 3, key="sleeper-0", workers=[first])
    wait_until(lambda: measured.cluster.scheduler.workers[first].processing)
    client.submit(total, data, key="user-0", workers=[first]).result()
    sleeper.result()
    (record,) = measured.records.of("sleeper")
    assert (record.scope, record.reason, record.growth_bytes) == ("shared", "transfer", None)
    assert record.foreign_bytes >= 200 * MIB


def test_a_read_only_mapped_file_is_told_apart(
    measure: Callable[..., Measured], tmp_path: Path
) -> None:
    """Pages of a file that the kernel can drop at any time are not what a task needs."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.writelines(b"x" * MIB for _ in range(300))
    measured = measure()
    measured.client.submit(read_mapped, str(path), key="mapped-0").result()
    (record,) = measured.records.of("mapped")
    assert record.peak_bytes - record.start_bytes > 250 * MIB
    assert record.scope == "shared"
    assert record.reason in ("mapped", "warm_heap")


def test_overlapping_tasks_share_and_keep_their_peaks(measure: Callable[..., Measured]) -> None:
    """Four threads without a thread's own counter: peaks are full, growth is nobody's."""
    measured = measure(threads_per_worker=4)
    client = measured.client
    client.gather(client.map(blocks, range(4), size=MIB, key="busy", pure=False))
    records = measured.records.of("busy")
    shared = [record for record in records if record.concurrency > 1]
    assert len(shared) >= 2
    for record in shared:
        assert (record.scope, record.growth_bytes) == ("shared", None)
        assert record.peak_bytes - record.start_bytes > 100 * MIB


@pytest.mark.parametrize(
    "setting", [{"memusage.source": "polling"}, {"memusage.kernel-reset": False}]
)
def test_what_is_only_sampled_says_so(
    measure: Callable[..., Measured], setting: dict[str, Any]
) -> None:
    """Polling finds what is held long enough, and never calls it a task's own."""
    measured = measure(setting)
    measured.client.submit(lambda: nap(0.3, array(100)), key="held-0").result()
    (record,) = measured.records.of("held")
    assert (record.scope, record.reason, record.growth_bytes) == ("shared", "polling", None)
    assert record.peak_bytes - record.start_bytes == pytest.approx(100 * MIB, rel=0.1)


def test_two_workers_in_one_process_do_not_erase_each_others_peaks(
    measure: Callable[..., Measured],
) -> None:
    """A spike on one worker is whole though a short task starts and stops on the other."""
    measured = measure(processes=False, n_workers=2)
    client = measured.client
    one, other = list(measured.cluster.scheduler.workers)

    def spike() -> None:
        values = array(200)
        time.sleep(0.3)
        del values
        time.sleep(0.3)

    future = client.submit(spike, key="spike-0", workers=[one])
    for number in range(40):
        client.submit(nap, 0.005, key=f"short-{number}", workers=[other]).result()
    future.result()
    (record,) = measured.records.of("spike")
    assert record.peak_bytes - record.start_bytes >= 195 * MIB
    assert record.concurrency == 2
