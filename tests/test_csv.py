"""The CSV: the old format exactly, every row in time, and disks that cannot be written."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client

from dask_memusage_exporter import TaskMemory, install
from dask_memusage_exporter.exporters.csv_file import CsvFile
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.records import from_row, to_row
from tests import tasks
from tests.conftest import (
    FULL,
    Measured,
    Records,
    counted,
    local_cluster,
    measured,
    rows,
    wait_until,
    worker_ports,
)

MB = 2**20

#: The contract's columns, in its order.
ALL_COLUMNS = (
    "task_key,min_memory_mb,max_memory_mb,task_prefix,worker,start,stop,start_bytes,peak_bytes,"
    "growth_bytes,scope,reason,reusable_bytes,foreign_bytes,concurrency,input_bytes,output_bytes,"
    "status,span_id"
)

RECORD = TaskMemory(
    key="x-1",
    task_prefix="x",
    worker="tcp://127.0.0.1:1",
    start=1.5,
    stop=2.5,
    start_bytes=MB,
    peak_bytes=3 * MB,
    growth_bytes=2 * MB,
    scope="process",
    reason=None,
    reusable_bytes=None,
    foreign_bytes=0,
    concurrency=1,
    input_bytes=7,
    output_bytes=8,
    status="finished",
    span_id=None,
)


@pytest.fixture(scope="module")
def two() -> Iterator[Measured]:
    """A measured cluster of two worker processes, and all its records."""
    with local_cluster(n_workers=2) as cluster, Client(cluster) as client:
        records = Records()
        install(cluster)
        cluster.scheduler.extensions["memusage"].add_sink(records)
        install(cluster)
        yield Measured(cluster, client, records)


@pytest.fixture(autouse=True)
def _no_file_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take the files of a test off the shared cluster: each one is written to for every record."""
    yield
    if "two" in request.fixturenames:
        rows = request.getfixturevalue("two").cluster.scheduler.extensions["memusage"].rows
        rows.sinks = [sink for sink in rows.sinks if not isinstance(sink, CsvFile)]


# -- the format ---------------------------------------------------------------------------


def test_the_old_format_exactly(two: Measured, tmp_path: Path) -> None:
    """Header, line ends, and the record's own start and peak in MB of 2**20 bytes."""
    path = tmp_path / "memusage.csv"
    install(two.cluster, str(path))
    allocate = lambda mib: len(b"x" * (mib * 2**20))  # noqa: E731
    two.client.gather(two.client.map(allocate, [1, 50, 100], key=["old-1", "old-2", "old-3"]))
    lines = path.read_bytes().split(b"\r\n")
    assert lines[0] == b"task_key,min_memory_mb,max_memory_mb"
    assert lines[-1] == b""
    records = two.records.of("old")
    assert len(records) == len(lines) - 2 == 3
    by_key = {row["task_key"]: row for row in rows(path)}
    for record in records:
        row = by_key[record.key]
        assert float(row["min_memory_mb"]) == record.start_bytes / MB
        assert float(row["max_memory_mb"]) == record.peak_bytes / MB
    grown = float(by_key["old-3"]["max_memory_mb"]) - float(by_key["old-3"]["min_memory_mb"])
    assert 99 < grown < 103


def state_of(key: str, dask_worker: Any) -> str | None:
    task = dask_worker.state.tasks.get(key)
    return None if task is None else task.state


def test_the_old_format_has_finished_and_erred_tasks_only(two: Measured, tmp_path: Path) -> None:
    """As dask-memusage wrote it; a cancelled task is in the full format alone."""
    from distributed import Event

    old, full = tmp_path / "old.csv", tmp_path / "full.csv"
    install(two.cluster, old)
    with dask.config.set(FULL):
        install(two.cluster, full)
    going, done = Event("csv-going", two.client), Event("csv-done", two.client)

    def fail() -> None:
        raise RuntimeError("on purpose")

    def wait() -> None:
        from distributed import Event

        Event("csv-going").set()
        Event("csv-done").wait(60)

    two.client.submit(abs, -1, key="statusfinished-1").result()
    with pytest.raises(RuntimeError, match="on purpose"):
        two.client.submit(fail, key="statuserred-1").result()
    future = two.client.submit(wait, key="statuscancelled-1")
    going.wait(60)
    future.cancel()
    # That it is over travels on another connection than that it is not wanted any more.
    wait_until(lambda: "cancelled" in two.client.run(state_of, "statuscancelled-1").values())
    done.set()
    wait_until(lambda: two.records.of("statuscancelled"))
    two.client.submit(abs, -2, key="statusfinished-2").result()
    finished_and_erred = ["statusfinished-1", "statuserred-1", "statusfinished-2"]
    assert [row["task_key"] for row in rows(old)] == finished_and_erred
    assert {row["task_key"]: row["status"] for row in rows(full)} == {
        "statusfinished-1": "finished",
        "statuserred-1": "erred",
        "statuscancelled-1": "cancelled",
        "statusfinished-2": "finished",
    }


def test_the_full_format(two: Measured, tmp_path: Path) -> None:
    """The contract's columns in its order: seconds, whole bytes, and empty where not known."""
    path = tmp_path / "full.csv"
    with dask.config.set(FULL):
        install(two.cluster, path)
    two.client.submit(abs, -1, key="full-1").result()
    assert path.read_text().splitlines()[0] == ALL_COLUMNS
    (row,) = rows(path)
    (record,) = two.records.of("full")
    assert row["task_key"] == "full-1"
    for name in ("worker", "start_bytes", "peak_bytes", "scope", "foreign_bytes", "concurrency"):
        assert row[name] == str(getattr(record, name))
    for name in record._fields[1:]:
        if getattr(record, name) is None:
            assert row[name] == ""
    assert float(row["start"]) <= float(row["stop"]) < float(row["start"]) + 60
    assert row["task_prefix"] == "full"
    assert row["status"] == "finished"
    assert row["span_id"]


def test_absent_values_are_empty(tmp_path: Path) -> None:
    """None is an empty field, never 0 and never the word None."""
    path = tmp_path / "full.csv"
    csv_file = CsvFile(path, columns="full", health=Health())
    csv_file.write(RECORD._replace(growth_bytes=None, scope="shared", reason="overlap"))
    csv_file.close()
    line = path.read_text().splitlines()[1]
    assert line == (
        "x-1,1.0,3.0,x,tcp://127.0.0.1:1,1.5,2.5,1048576,3145728,,shared,overlap,,0,1,7,8,finished,"
    )


def test_a_task_that_was_killed_unseen_has_no_sizes(tmp_path: Path) -> None:
    """Whoever takes the largest or the mean of a column does not meet a 0 that nobody measured."""
    path = tmp_path / "full.csv"
    csv_file = CsvFile(path, columns="full", health=Health())
    unseen = {"start_bytes": 0, "peak_bytes": 0, "growth_bytes": None, "status": "killed"}
    csv_file.write(RECORD._replace(**unseen, scope="shared", reason="polling"))
    csv_file.close()
    line = path.read_text().splitlines()[1]
    assert line == "x-1,,,x,tcp://127.0.0.1:1,1.5,2.5,,,,shared,polling,,0,1,7,8,killed,"


KEYS = [
    5,
    ('a,b\n"q"', 1),
    "x'y-1",
    "naïve-ключ-1",
    "/data/secret/file.nc:grp/1",
    "process_2024_01_01_user42",
    "ae05086432ca935f6eba409a8ecd4896",
    "long" * 2500,
    "line\r\nend-1",
    " leading and trailing ",
    "=1+1",
]


@pytest.mark.parametrize("columns", ["task", "full"])
def test_odd_keys_read_back_the_same(columns: str, two: Measured, tmp_path: Path) -> None:
    """With csv and with pandas; prefixes are Dask's own."""
    import pandas

    path = tmp_path / "odd.csv"
    with dask.config.set({"memusage.csv.columns": columns}):
        install(two.cluster, path)
    before = len(two.records)
    # Beyond what a client lets through, so as tasks of a graph.
    graph = dict.fromkeys(KEYS, (abs, -1))
    assert two.client.get(graph, KEYS) == [1] * len(KEYS)
    with open(path, newline="", encoding="utf-8") as file:
        read = {row["task_key"] for row in csv.DictReader(file)}
    assert read == {str(key) for key in KEYS}
    frame = pandas.read_csv(path, dtype={"task_key": str})
    assert set(frame["task_key"]) == {str(key) for key in KEYS}
    assert (frame["max_memory_mb"] > 1).all()
    for record in two.records[before:]:
        assert record.task_prefix == dask.utils.key_split(record.key)


def test_a_key_that_is_no_valid_text_leaves_the_file_readable(tmp_path: Path) -> None:
    """A lone surrogate, as Python makes it of a file name that is no UTF-8, is escaped."""
    import pandas

    path = tmp_path / "bad.csv"
    csv_file = CsvFile(path, columns="task", health=Health())
    for key in ("bad\udcff-1", "bad\ud800-2", "good-3"):
        csv_file.write(RECORD._replace(key=key))
    csv_file.flush()
    assert list(pandas.read_csv(path)["task_key"]) == ["bad\\udcff-1", "bad\\ud800-2", "good-3"]
    assert csv_file._health.errors["csv"] == 0


def test_an_existing_file_is_overwritten(two: Measured, tmp_path: Path) -> None:
    """As by the old tool, from the first byte."""
    path = tmp_path / "memusage.csv"
    path.write_text("x" * 10_000)
    install(two.cluster, path)
    assert path.read_bytes() == b"task_key,min_memory_mb,max_memory_mb\r\n"


# -- completeness ---------------------------------------------------------------------------


def test_all_rows_are_there_when_the_results_are(two: Measured, tmp_path: Path) -> None:
    """1,000 tasks, five times: the file is read the moment that gather returns."""
    path = tmp_path / "memusage.csv"
    install(two.cluster, path)
    for turn in range(1, 6):
        keys = [f"complete-{turn}-{i}" for i in range(1000)]
        two.client.gather(two.client.map(abs, range(1000), key=keys))
        assert path.read_bytes().count(b"\n") == 1 + turn * 1000
    assert len({row["task_key"] for row in rows(path)}) == 5_000
    assert counted(worker_ports(two.cluster), "complete") == 5_000


def test_the_row_of_a_single_result_is_there(two: Measured, tmp_path: Path) -> None:
    """The same for result() and compute(), one task at a time: no batch hides a race."""
    path = tmp_path / "memusage.csv"
    install(two.cluster, path)
    for i in range(100):
        two.client.submit(abs, i, key=f"single-{i}").result()
        assert path.read_bytes().count(b"\n") == 2 + i
    for i in range(50):
        dask.delayed(abs)(-i).compute()
        assert path.read_bytes().count(b"\n") == 102 + i


def test_an_error_has_its_row_when_it_is_raised(two: Measured, tmp_path: Path) -> None:
    """A task that fails is told by another message; its row comes first as well."""
    path = tmp_path / "memusage.csv"
    install(two.cluster, path)

    def fail(_: int) -> None:
        raise RuntimeError("on purpose")

    for i in range(50):
        with pytest.raises(RuntimeError, match="on purpose"):
            two.client.submit(fail, i, key=f"failing-{i}").result()
        assert path.read_bytes().count(b"\n") == 2 + i


# -- records that are none ----------------------------------------------------------------------


def test_garbage_is_counted_and_harms_nothing(two: Measured) -> None:
    """Whatever comes over the wire: no exception, counted as invalid, good rows beside it kept."""
    agent = two.cluster.scheduler.extensions["memusage"]
    before = agent.health.dropped["invalid"]
    good = to_row(RECORD._replace(key="wheat-1"))
    garbage = [
        (), None, 5, "text", {"a": 1}, ("x-1",), (None,) * 17, ((), *good[1:]),
        ("x-1", 1.0, 2.0, "many", "more"), ("x-1", 1.0, 2.0, 5.0, None), b"bytes",
    ]  # fmt: skip

    async def feed() -> None:
        agent.rows.take(rows=[good, *garbage, good], worker="tcp://127.0.0.1:1")
        agent.rows.take(rows=None, worker="tcp://127.0.0.1:1")
        agent.rows.take(rows=good, worker="tcp://127.0.0.1:1")
        agent.rows.take()
        agent.rows.take(rows=[good], worker="", surprise=True)

    two.client.sync(feed)
    assert len(two.records.of("wheat")) == 3
    assert agent.health.dropped["invalid"] - before == len(garbage) + 1 + len(good)
    assert two.client.submit(abs, -3).result() == 3


def test_records_of_a_worker_that_has_gone_are_kept(two: Measured) -> None:
    """A removed or unknown worker's records count: what they tell has happened."""
    agent = two.cluster.scheduler.extensions["memusage"]
    before = agent.health.dropped["invalid"]

    async def feed() -> None:
        for worker in ("tcp://10.0.0.1:1234", "", "tcp://127.0.0.1:1"):
            agent.rows.take(rows=[to_row(RECORD._replace(key="late-1"))], worker=worker)

    two.client.sync(feed)
    assert [record.worker for record in two.records.of("late")] == [
        "tcp://10.0.0.1:1234",
        "",
        "tcp://127.0.0.1:1",
    ]
    assert agent.health.dropped["invalid"] == before


def test_a_row_comes_back_as_its_record() -> None:
    """There and back again; one field more or less of another version is none or nothing."""
    row = to_row(RECORD._replace(span_id="span"))
    assert from_row(row, RECORD.worker) == RECORD._replace(span_id="span")
    assert from_row((*row, "new"), RECORD.worker) == RECORD._replace(span_id="span")
    assert from_row(row[:-1], RECORD.worker) == RECORD


@pytest.mark.parametrize("threads", [1, 4])
def test_overlap_is_said_once(threads: int, tmp_path: Path, caplog: Any) -> None:
    """Who writes the old columns with more than one thread a worker is told what they mean.

    They are as full as ever.
    """
    path = tmp_path / "x.csv"
    with measured({"memusage.csv.path": str(path)}, threads_per_worker=threads) as it:
        it.client.gather(it.client.map(tasks.array, [20] * 20, hold=0.01, pure=False))
    sizes = [(float(row["min_memory_mb"]), float(row["max_memory_mb"])) for row in rows(path)]
    assert len(sizes) == 20
    assert all(20 < least <= most for least, most in sizes)
    said = [line for line in caplog.messages if "tasks overlap in a worker" in line]
    assert len(said) == (threads > 1)
