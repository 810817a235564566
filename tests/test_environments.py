"""Workers whose environment is another: without the package, or with another version of it."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client
from distributed.protocol.pickle import dumps

from dask_memusage_exporter import MemusageWorkerPlugin, install
from dask_memusage_exporter.bootstrap import ByValue
from tests.conftest import (
    Measured,
    Metrics,
    Records,
    counted,
    local_cluster,
    scheduler_port,
    wait_until,
)
from tests.servers import Server, Servers

TASKS = 40

#: What stands in sitecustomize.py of a worker's environment, and the line that is logged for it.
ENVIRONMENTS = {
    "absent": (
        """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dask_memusage_exporter":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
""",
        "not measured (ModuleNotFoundError: No module named 'dask_memusage_exporter",
    ),
    "broken": (
        """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "dask_memusage_exporter":
            raise RuntimeError("a broken installation")
sys.meta_path.insert(0, Broken())
""",
        "not measured (RuntimeError: a broken installation)",
    ),
    "newer": (
        """
import dask_memusage_exporter.reporter as reporter
to_row = reporter.to_row
reporter.to_row = lambda record: (*to_row(record), "a field of the future")
""",
        None,
    ),
    "older": (
        """
import dask_memusage_exporter.reporter as reporter
to_row = reporter.to_row
reporter.to_row = lambda record: to_row(record)[:-1]
""",
        None,
    ),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Measured, dict[str, Server]]]:
    """A measured scheduler here, and one real worker process of each environment."""
    directory = tmp_path_factory.mktemp("odd")
    servers = Servers(directory)
    with (
        dask.config.set({"memusage.source": "kernel", "memusage.max-prefixes": 7}),
        local_cluster(n_workers=0) as cluster,
        Client(cluster) as client,
    ):
        records = Records()
        install(cluster)
        cluster.scheduler.extensions["memusage"].add_sink(records)
        install(cluster)
        workers = {}
        for name, (code, _) in ENVIRONMENTS.items():
            (directory / name).mkdir()
            (directory / name / "sitecustomize.py").write_text(code)
            workers[name] = servers.worker(
                "--name", name, "--no-nanny",
                scheduler=cluster.scheduler_address,
                env={"PYTHONPATH": str(directory / name)},
            )  # fmt: skip
        workers["own-settings"] = servers.worker(
            "--name", "own-settings", "--no-nanny",
            scheduler=cluster.scheduler_address,
            env={"DASK_MEMUSAGE__SOURCE": "polling", "DASK_MEMUSAGE__MAX_PREFIXES": "3"},
        )  # fmt: skip
        client.wait_for_workers(len(workers))
        yield Measured(cluster, client, records), workers
        servers.close()


@pytest.mark.parametrize("name", [name for name in ENVIRONMENTS if ENVIRONMENTS[name][1]])
def test_a_worker_that_cannot_import_us_works_unmeasured(name: str, odd: Any) -> None:
    """Absent or broken there: it joins, runs tasks, says one clear line, and has no series."""
    measured, workers = odd
    client = measured.client
    keys = [f"{name}-{i}" for i in range(TASKS)]
    client.gather(client.map(abs, range(TASKS), key=keys, workers=[name], pure=False))
    assert measured.records.of(name) == []
    (line,) = wait_until(lambda: workers[name].lines("dask-memusage"))
    assert ENVIRONMENTS[name][1] in line
    assert "Mend: install dask-memusage-exporter in the worker's environment" in line
    assert "distributed.worker.memusage - WARNING" in line
    assert "Traceback" not in workers[name].log
    address = measured.cluster.scheduler.aliases[name]
    logged = client.get_worker_logs(workers=[address])[address]
    assert any(level == "WARNING" and "dask-memusage" in message for level, message in logged)


def test_workers_are_counted_by_source(odd: Any) -> None:
    """The two that cannot import us are missing, the others by where their peaks come from."""
    measured, _ = odd

    def sources() -> dict[str, float]:
        metrics = Metrics.read(scheduler_port(measured.cluster))
        return {
            source: metrics.total("dask_scheduler_task_memory_workers", source=source)
            for source in ("kernel", "polling", "missing")
        }

    wait_until(lambda: sources() == {"kernel": 2, "polling": 1, "missing": 2})


@pytest.mark.parametrize("name", ["newer", "older"])
def test_rows_of_another_version_are_taken(name: str, odd: Any) -> None:
    """One field more is ignored, one less is empty; nothing is invalid."""
    measured, workers = odd
    assert not workers[name].lines("sitecustomize")  # it is of another version
    client = measured.client
    keys = [f"{name}-{i}" for i in range(TASKS)]
    client.gather(client.map(abs, range(TASKS), key=keys, workers=[name], pure=False))
    records = measured.records.of(name)
    assert len(records) == TASKS
    assert {record.status for record in records} == {"finished"}
    health = measured.cluster.scheduler.extensions["memusage"].health
    assert health.dropped["invalid"] == 0


def test_a_workers_own_settings_say_how_to_measure_and_the_schedulers_what_to_keep(
    odd: Any,
) -> None:
    """The worker's explicit source wins, the scheduler's max-prefixes and all else."""
    measured, workers = odd
    client = measured.client
    for letter in "abcde":
        client.submit(abs, 1, key=f"own{letter}-1", workers=["own-settings"]).result()
    (port,) = (
        ws.services["dashboard"]
        for ws in measured.cluster.scheduler.workers.values()
        if ws.name == "own-settings"
    )
    metrics = Metrics.read(port)
    assert metrics.total("dask_worker_task_memory_exporter_info", source="polling") == 1
    assert metrics.total("dask_worker_task_memory_prefixes") == 5
    assert metrics.total("dask_worker_task_memory_overflow_tasks_total") == 0
    assert {record.reason for record in measured.records.of("owna")} == {"polling"}
    assert workers["own-settings"].lines("source polling; set by memusage.source")


def test_a_scheduler_that_cannot_import_us(tmp_path: Path) -> None:
    """install says where the package is missing; the workers alone can be measured all the same."""
    (tmp_path / "sitecustomize.py").write_text(ENVIRONMENTS["absent"][0])
    servers = Servers(tmp_path)
    try:
        servers.scheduler(env={"PYTHONPATH": str(tmp_path)})
        client = servers.client
        with pytest.raises(ModuleNotFoundError, match="the scheduler's environment lacks"):
            install(client)
        servers.worker("--no-nanny")
        client.wait_for_workers(1, timeout=30)
        client.register_plugin(MemusageWorkerPlugin())
        client.gather(client.map(abs, range(TASKS), key=[f"spared-{i}" for i in range(TASKS)]))
        assert counted(servers.worker_ports(), "spared") == TASKS
    finally:
        servers.close()


def test_options_of_another_version_are_ignored(make_cluster: Any, make_client: Any) -> None:
    """A newer scheduler may send options and settings that this version does not know."""
    cluster = make_cluster(processes=False, n_workers=2)
    client = make_client(cluster)
    options = {
        "settings": {"max-prefixes": 1, "from-the-future": {"a": 1}},
        "rows": False,
        "another": [1, 2],
    }
    client.sync(
        cluster.scheduler.register_worker_plugin,
        comm=None, plugin=dumps(ByValue(options)), name="memusage", idempotent=False,
    )  # fmt: skip
    for prefix in ("tolerated", "second"):
        client.gather(client.map(abs, range(TASKS), key=[f"{prefix}-{i}" for i in range(TASKS)]))
    assert counted([scheduler_port(cluster)], "tolerated") == TASKS
    assert counted([scheduler_port(cluster)], "__overflow__") == TASKS


def test_what_is_pushed_loads_on_any_worker() -> None:
    """The pickle refers to builtins only: no code objects, nothing of ours."""
    for plugin in (ByValue({"settings": {"csv.path": "x"}, "rows": True}), MemusageWorkerPlugin()):
        for protocol in range(2, 6):
            payload = pickle.dumps(plugin, protocol)
            strings = []
            for opcode, argument, _ in pickletools.genops(payload):
                if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                    found = argument.split() if argument else strings[-2:]
                    assert found in (["builtins", "eval"], ["__builtin__", "eval"])
                if isinstance(argument, str):
                    strings.append(argument)
            assert type(pickle.loads(payload)).__name__ == "Bootstrap"
