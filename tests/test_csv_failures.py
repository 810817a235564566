"""CSVs that cannot be written: paths that are wrong, and disks that fill."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster

from dask_memusage_exporter import MemusageSchedulerPlugin, install
from dask_memusage_exporter.exporters import prometheus
from dask_memusage_exporter.exporters.csv_file import CsvFile
from dask_memusage_exporter.health import Health
from tests.conftest import FULL, Metrics, rows, scheduler_port
from tests.test_csv import RECORD

# -- paths that cannot be written -------------------------------------------------------------

TARGETS: dict[str, Callable[[Client], Any]] = {
    "scheduler": lambda client: client.cluster.scheduler,
    "cluster": lambda client: client.cluster,
    "client": lambda client: client,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("missing/memusage.csv", FileNotFoundError),
        ("", IsADirectoryError),
        ("file/memusage.csv", NotADirectoryError),
        ("pipe", OSError),
        ("/dev/full", OSError),
    ],
)
def test_a_path_that_cannot_be_written_is_an_error_of_install(
    path: str,
    error: type[Exception],
    target: str,
    tmp_path: Path,
    make_cluster: Any,
    make_client: Any,
) -> None:
    """Before any work starts, naming the path and the mend; nothing is half set up."""
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    cluster = make_cluster(processes=False)
    client = make_client(cluster)
    shown = list(prometheus._collector.renderers)
    with pytest.raises(error, match="the CSV file cannot be written") as caught:
        install(TARGETS[target](client), tmp_path / path)
    assert os.path.abspath(tmp_path / path) in str(caught.value)
    assert "give a path in a directory that exists" in str(caught.value)
    assert "memusage" not in cluster.scheduler.extensions
    assert "memusage" not in cluster.scheduler.plugins
    assert "memusage" not in cluster.scheduler.worker_plugins
    assert "memusage-records" not in cluster.scheduler.stream_handlers
    (worker,) = cluster.workers.values()
    assert "memusage" not in worker.plugins
    assert prometheus._collector.renderers == shown
    # And it can be done right afterwards.
    install(client, tmp_path / "right.csv")
    client.submit(abs, -1).result()
    assert len(rows(tmp_path / "right.csv")) == 1


def test_the_error_of_a_plugin_reaches_the_caller(make_cluster: Any, make_client: Any) -> None:
    """Through client.register_plugin too."""
    client = make_client(make_cluster(processes=False))
    with pytest.raises(OSError, match="the CSV file cannot be written"):
        client.register_plugin(MemusageSchedulerPlugin("/missing/memusage.csv"))


def test_a_second_file_that_cannot_be_written_leaves_the_first(
    make_cluster: Any, make_client: Any, tmp_path: Path
) -> None:
    """What is measured goes on."""
    cluster = make_cluster(processes=False)
    client = make_client(cluster)
    install(client, tmp_path / "first.csv")
    with pytest.raises(OSError, match="cannot be written"):
        install(client, tmp_path / "missing" / "second.csv")
    client.submit(abs, -1).result()
    assert len(rows(tmp_path / "first.csv")) == 1


# -- disks that fill ----------------------------------------------------------------------------


class SmallDisk:
    """64 kB of room for a CSV, and more of it on demand."""

    def __init__(self, directory: Path, more_room: Callable[[], None]) -> None:
        self.directory = directory
        self.more_room = more_room


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of 64 kB; half of it is taken by a file that can be removed."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        ballast = directory / "ballast"
        ballast.write_bytes(b"x" * 2**15)
        yield SmallDisk(directory, ballast.unlink)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[SmallDisk]:
    """A limit of 32 kB on the size of a file that this process writes, as a quota sets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, hard))
    try:
        yield SmallDisk(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["mounted", "limited"])
def test_a_disk_that_fills(
    kind: str,
    request: pytest.FixtureRequest,
    make_cluster: Any,
    make_client: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The work goes on; whole rows only; lost ones are counted and logged once; then it goes on."""
    cluster: LocalCluster = make_cluster(processes=False)
    client = make_client(cluster)
    disk: SmallDisk = request.getfixturevalue(kind)
    path = disk.directory / "memusage.csv"
    with dask.config.set(FULL), caplog.at_level(logging.INFO, "distributed.scheduler.memusage"):
        install(cluster, path)
        for turn in range(10):
            keys = [f"filling-{turn}-{i}" for i in range(50)]
            results = client.gather(client.map(abs, range(50), key=keys))
            assert results == list(range(50))
    lost = cluster.scheduler.extensions["memusage"].health.dropped["csv_write"]
    assert 0 < lost < 500
    written = rows(path)
    assert len(written) == 500 - lost
    assert path.read_bytes().endswith(b"\r\n")
    assert {row["status"] for row in written} == {"finished"}
    # (The limit is on the workers' flight files too, as they live in this process.)
    # Tasks of several threads may overlap, which is said as well.
    ours = (one for one in caplog.records if one.name == "distributed.scheduler.memusage")
    (line,) = (one for one in ours if "csv failed" in one.getMessage())
    assert line.levelno == logging.WARNING
    assert str(path) in line.getMessage()
    assert 'task_memory_dropped_records_total{reason="csv_write"}' in line.getMessage()
    metrics = Metrics.read(scheduler_port(cluster))
    name = "dask_scheduler_task_memory_dropped_records_total"
    assert metrics.total(name, reason="csv_write") == metrics.total(name) == lost
    assert metrics.total("dask_scheduler_task_memory_errors_total", stage="csv") > 0
    disk.more_room()
    client.gather(client.map(abs, range(50), key=[f"roomy-{i}" for i in range(50)]))
    after = rows(path)
    assert after[: len(written)] == written
    assert [row["task_prefix"] for row in after[len(written) :]] == ["roomy"] * 50
    assert {row["status"] for row in after} == {"finished"}


def test_a_device_that_is_no_file_and_is_full(tmp_path: Path) -> None:
    """What cannot be truncated is lost and counted, by the error that mattered."""
    health = Health()
    csv_file = CsvFile("/dev/null", columns="task", health=health)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, csv_file._fd)
    os.close(full)
    csv_file.write(RECORD)
    csv_file.write(RECORD)
    csv_file.flush()
    assert health.dropped["csv_write"] == 2
    assert health.errors["csv"] == 1
    csv_file.close()


def test_closing_a_file_twice_or_broken_raises_nothing(tmp_path: Path) -> None:
    """The scheduler's close must not fail because of us."""
    health = Health()
    csv_file = CsvFile(tmp_path / "x.csv", columns="task", health=health)
    os.close(csv_file._fd)
    csv_file.close()
    csv_file.close()
    assert health.errors["csv"] == 1
    assert not csv_file.is_at(tmp_path / "x.csv")
