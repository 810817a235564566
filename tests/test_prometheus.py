"""``/metrics`` of real worker processes: names, labels, types, and the programs that read them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import dask
import pytest
from dask.utils import key_split
from distributed import Client, LocalCluster
from prometheus_client.parser import text_string_to_metric_families

from dask_memusage_exporter import __version__, install
from dask_memusage_exporter.health import DROP_REASONS, STAGES
from tests.conftest import (
    Measured,
    Metrics,
    Records,
    local_cluster,
    page,
    scheduler_port,
    wait_until,
    worker_ports,
)

#: What the contract's table owes on a worker's page: type, and names of labels.
WORKER_FAMILIES = {
    "dask_worker_task_memory_peak_bytes": ("histogram", {"task_prefix_name", "le"}),
    "dask_worker_task_memory_growth_bytes": ("histogram", {"task_prefix_name", "le"}),
    "dask_worker_task_memory_peak_maximum_bytes": ("gauge", {"task_prefix_name"}),
    "dask_worker_task_memory_growth_maximum_bytes": ("gauge", {"task_prefix_name"}),
    "dask_worker_task_memory_tasks_total": ("counter", {"task_prefix_name", "scope"}),
    "dask_worker_task_memory_dropped_records_total": ("counter", {"reason"}),
    "dask_worker_task_memory_errors_total": ("counter", {"stage"}),
    "dask_worker_task_memory_overhead_seconds_total": ("counter", {"stage"}),
    "dask_worker_task_memory_prefixes": ("gauge", set()),
    "dask_worker_task_memory_overflow_tasks_total": ("counter", set()),
    "dask_worker_task_memory_exporter_info": ("gauge", {"exporter_version", "source"}),
    "dask_worker_memory_limit_bytes": ("gauge", set()),
}

#: The same on the scheduler's.
SCHEDULER_FAMILIES = {
    "dask_scheduler_task_memory_peak_bytes": ("histogram", {"task_prefix_name", "le"}),
    "dask_scheduler_task_memory_growth_bytes": ("histogram", {"task_prefix_name", "le"}),
    "dask_scheduler_task_memory_input_bytes": ("histogram", {"task_prefix_name", "le"}),
    "dask_scheduler_task_memory_peak_maximum_bytes": ("gauge", {"task_prefix_name"}),
    "dask_scheduler_task_memory_growth_maximum_bytes": ("gauge", {"task_prefix_name"}),
    "dask_scheduler_task_memory_tasks_total": ("counter", {"task_prefix_name", "scope"}),
    "dask_scheduler_task_memory_killed_tasks_total": ("counter", {"task_prefix_name", "cause"}),
    # No worker has died here.
    "dask_scheduler_task_memory_killed_last_peak_bytes": ("gauge", set()),
    "dask_scheduler_task_memory_killed_last_timestamp_seconds": ("gauge", set()),
    "dask_scheduler_task_memory_worker_limit_bytes": ("gauge", set()),
    "dask_scheduler_task_memory_last_report_timestamp_seconds": ("gauge", set()),
    "dask_scheduler_task_memory_prefixes": ("gauge", set()),
    "dask_scheduler_task_memory_overflow_tasks_total": ("counter", set()),
    "dask_scheduler_task_memory_workers": ("gauge", {"source"}),
    "dask_scheduler_task_memory_dropped_records_total": ("counter", {"reason"}),
    "dask_scheduler_task_memory_errors_total": ("counter", {"stage"}),
    "dask_scheduler_task_memory_overhead_seconds_total": ("counter", {"stage"}),
    "dask_scheduler_task_memory_exporter_info": ("gauge", {"exporter_version"}),
}


def ours(text: str) -> dict[str, tuple[str, set[str]]]:
    """Return name, type and labels of what a page has of us; each family stands there once."""
    types = [line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len({name for name, _ in types}) == len(types), "a family stands twice on the page"
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(family.name, set()).update(sample.labels)
    return {
        name: (kind, labels.get(name.removesuffix("_total"), set()))
        for name, kind in types
        if "task_memory" in name or "memory_limit" in name
    }


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    """A measured cluster of one worker process."""
    with local_cluster() as cluster, Client(cluster) as client:
        records = Records()
        install(cluster)
        cluster.scheduler.extensions["memusage"].add_sink(records)
        install(cluster)
        yield Measured(cluster, client, records)


def test_counters_are_at_0_from_the_start(measured: Measured) -> None:
    """A series that first appears at 1 has no increase: no alert would see the first."""
    worker = Metrics.read(worker_ports(measured.cluster)[0])
    scheduler = Metrics.read(scheduler_port(measured.cluster))
    for metrics, server in ((worker, "worker"), (scheduler, "scheduler")):
        name = f"dask_{server}_task_memory"
        for stage in STAGES:
            assert metrics.get_value(f"{name}_errors_total", stage=stage) == 0
            assert metrics.get_value(f"{name}_overhead_seconds_total", stage=stage) is not None
        for reason in DROP_REASONS:
            assert metrics.get_value(f"{name}_dropped_records_total", reason=reason) == 0
    assert worker.get_value("dask_worker_task_memory_overflow_tasks_total") == 0
    assert worker.get_value("dask_worker_task_memory_prefixes") == 0
    for source in ("kernel", "polling", "missing"):
        assert scheduler.get_value("dask_scheduler_task_memory_workers", source=source) is not None


def test_names_types_and_labels_are_the_contracts(measured: Measured) -> None:
    """Neither more nor less; once somebody's dashboard uses a name it stays."""
    measured.client.submit(lambda: len(b"x" * 100 * 2**20), key="golden-1").result()
    assert ours(page(worker_ports(measured.cluster)[0])) == WORKER_FAMILIES
    # The scheduler hears of tasks and workers with their heartbeats.
    wait_until(lambda: ours(page(scheduler_port(measured.cluster))) == SCHEDULER_FAMILIES)


def test_the_histograms(measured: Measured) -> None:
    """Cumulative, 37 bounds and infinity; infinity is the count, and the sum is the records'."""
    touch = lambda mib: len(b"x" * (mib * 2**20))  # noqa: E731
    sizes = [1, 10, 100]
    measured.client.gather(measured.client.map(touch, sizes, key=[f"histo-{i}" for i in sizes]))
    records = measured.records.of("histo")
    text = page(worker_ports(measured.cluster)[0])
    for name, values in (
        ("peak", [record.peak_bytes for record in records]),
        ("growth", [r.growth_bytes for r in records if r.growth_bytes is not None]),
    ):
        full = f"dask_worker_task_memory_{name}_bytes"
        (family,) = (one for one in text_string_to_metric_families(text) if one.name == full)
        samples = [s for s in family.samples if s.labels["task_prefix_name"] == "histo"]
        buckets = [(s.labels["le"], s.value) for s in samples if s.name == f"{full}_bucket"]
        assert len(buckets) == 38
        assert [le for le, _ in buckets[:3]] == ["1.048576e+06", "1.572864e+06", "2.097152e+06"]
        assert [le for le, _ in buckets[-2:]] == ["2.74877906944e+11", "+Inf"]
        for le, value in buckets:
            assert value == sum(one <= float(le) for one in values)
        (observed,) = (s.value for s in samples if s.name == f"{full}_count")
        (total,) = (s.value for s in samples if s.name == f"{full}_sum")
        assert observed == buckets[-1][1] == len(values)
        assert total == sum(values)


def test_a_scrape_changes_nothing(measured: Measured) -> None:
    """Two servers that scrape the same worker see the same maxima, which are the records'."""
    touch = lambda mib: len(b"x" * (mib * 2**20))  # noqa: E731
    keys = (f"maximum-{i}" for i in count())

    def growths() -> list[int]:
        measured.client.submit(touch, 50, key=next(keys)).result()
        records = measured.records.of("maximum")
        return [record.growth_bytes for record in records if record.growth_bytes is not None]

    largest = max(wait_until(growths))
    peak = max(record.peak_bytes for record in measured.records.of("maximum"))
    for _ in range(3):
        metrics = Metrics.read(worker_ports(measured.cluster)[0])
        for name, value in (("peak", peak), ("growth", largest)):
            name = f"dask_worker_task_memory_{name}_maximum_bytes"
            assert metrics.get_value(name, task_prefix_name="maximum") == value


def test_the_page_tells_version_source_and_limit(measured: Measured) -> None:
    """The exporter's version, where peaks come from, and the worker's memory limit."""
    metrics = Metrics.read(worker_ports(measured.cluster)[0])
    name = "dask_worker_task_memory_exporter_info"
    assert metrics.get_value(name, exporter_version=__version__, source="kernel") == 1
    assert metrics.get_value("dask_worker_memory_limit_bytes") == 4 * 2**30


ODD_KEYS = [
    5,
    ('a,b\n"q"', 1),
    "x'y-1",
    "back\\slash-1",
    "naïve-ключ-1",
    "/data/secret/file.nc:grp/1",
    "process_2024_01_01_user42",
    "ae05086432ca935f6eba409a8ecd4896",
    "line\r\nend-1",
    "x" * 10_000,
]


def promtool_complaints(component: Callable[[str], str], text: str) -> list[str]:
    """Return what ``promtool check metrics`` finds wrong with what a page has of us."""
    done = subprocess.run(
        [component("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr  # 3: findings of style, Dask's own among them
    assert "error while linting" not in done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if "task_memory" in line or "memory_limit" in line]


def test_odd_keys_make_a_valid_page(measured: Measured, component: Callable[[str], str]) -> None:
    """Labels are escaped and bounded, and join with Dask's own ``task_prefix_name``."""
    graph = dict.fromkeys(ODD_KEYS, (abs, -1))
    assert measured.client.get(graph, ODD_KEYS) == [1] * len(ODD_KEYS)
    text = page(worker_ports(measured.cluster)[0])
    assert promtool_complaints(component, text) == []

    def prefixes(metrics: Metrics, name: str) -> set[str]:
        return {dict(labels)["task_prefix_name"] for other, labels in metrics if other == name}

    seen = prefixes(
        Metrics.read(worker_ports(measured.cluster)[0]), "dask_worker_task_memory_tasks_total"
    )
    dasks = prefixes(
        Metrics.read(scheduler_port(measured.cluster)), "dask_scheduler_prefix_state_totals_total"
    )
    for key in ODD_KEYS:
        prefix = key_split(key)
        assert prefix in dasks
        assert prefix[:255] in seen
    assert max(map(len, seen)) == 255


def test_promtool_finds_nothing_wrong(measured: Measured, component: Callable[[str], str]) -> None:
    """Names, units, help texts and types are as Prometheus wants them, on both pages."""
    measured.client.submit(abs, -1, key="linted-1").result()
    for port in (*worker_ports(measured.cluster), scheduler_port(measured.cluster)):
        text = page(port)
        assert "task_memory" in text
        assert promtool_complaints(component, text) == []


# -- settings ----------------------------------------------------------------------------------


@pytest.fixture
def configured(make_cluster: Any, make_client: Any) -> Callable[..., str]:
    """Return what runs 3 tasks of 3 prefixes under a configuration; a worker's page comes back."""

    def run(config: dict[str, Any], **options: Any) -> tuple[str, LocalCluster]:
        with dask.config.set(config):
            cluster = make_cluster(**options)
            client = make_client(cluster)
            install(cluster)
            keys = ["one-1", "two-1", "two-2", "three-1", "three-2", "three-3"]
            client.gather(client.map(abs, range(6), key=keys))
            return page(worker_ports(cluster)[0])

    return run


@pytest.mark.parametrize("namespace", ["acme", ""])
def test_the_namespace_is_dasks_own_setting(namespace: str, configured: Any) -> None:
    """Our names follow it, as Dask's own on the same page do."""
    text = configured({"distributed.dashboard.prometheus.namespace": namespace})
    start = f"{namespace}_" if namespace else ""
    expected = {name.replace("dask_", start, 1) for name in WORKER_FAMILIES}
    assert ours(text).keys() == expected
    assert f"\n{start}worker_threads " in text


def test_worker_metrics_in_full(configured: Any) -> None:
    """Everything by prefix."""
    text = configured({"memusage.worker-metrics": "full"})
    assert ours(text).keys() == WORKER_FAMILIES.keys()
    assert text.count("dask_worker_task_memory_peak_bytes_bucket{") == 3 * 38


@pytest.mark.parametrize("mode", ["totals", "auto"])
def test_worker_metrics_as_totals(mode: str, configured: Any) -> None:
    """Histograms and counters without a prefix, and no maxima: the same numbers in few series.

    ``auto`` is that where the scheduler shows the cluster's own.
    """
    text = configured({"memusage.worker-metrics": mode})
    families = ours(text)
    assert families.keys() == {name for name in WORKER_FAMILIES if "maximum" not in name}
    for _, labels in families.values():
        assert "task_prefix_name" not in labels
    assert families["dask_worker_task_memory_tasks_total"] == ("counter", {"scope"})
    assert "dask_worker_task_memory_peak_bytes_count 6.0" in text
    assert 'dask_worker_task_memory_peak_bytes_bucket{le="+Inf"} 6.0' in text


@pytest.mark.parametrize("off", ["off", False])
def test_worker_metrics_off(off: object, configured: Any) -> None:
    """Nothing of ours, whether YAML has read the bare word as a text or not; Dask's own stays."""
    text = configured({"memusage.worker-metrics": off})
    assert ours(text) == {}
    assert "dask_worker_threads" in text


def test_prefixes_beyond_the_cap(configured: Any) -> None:
    """They count under ``__overflow__``, and how many tasks that are is a counter of its own."""
    text = configured({"memusage.max-prefixes": 1})
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    name = "dask_worker_task_memory_"
    assert samples[f"{name}prefixes",] == 1
    overflow = samples[f"{name}overflow_tasks_total",]
    assert samples[f"{name}peak_bytes_count", "__overflow__"] == overflow
    assert 3 <= overflow <= 5
    assert sum(value for key, value in samples.items() if key[0] == f"{name}peak_bytes_count") == 6


def test_buckets_of_ones_own(configured: Any) -> None:
    """The bounds that are set, and infinity."""
    text = configured({"memusage.buckets": ["1kB", "1MiB", 2e9, "1TiB"]})
    bounds = {
        sample.labels["le"]: None
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "dask_worker_task_memory_peak_bytes_bucket"
    }
    assert list(bounds) == ["1000.0", "1.048576e+06", "2e+09", "1.099511627776e+12", "+Inf"]


def test_no_memory_limit_is_no_series(configured: Any) -> None:
    """Absent, for 0 or infinity would be wrong in every division."""
    text = configured({}, memory_limit=0)
    assert ours(text).keys() == WORKER_FAMILIES.keys() - {"dask_worker_memory_limit_bytes"}
