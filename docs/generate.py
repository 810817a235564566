"""Write the pages that follow from the code: metrics.md, settings.md, the tables of alerts.md.

``make docs`` runs it; a test fails where the pages are not what it writes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

from dask_memusage_exporter import catalog
from dask_memusage_exporter.measure.scopes import REASONS
from dask_memusage_exporter.monitoring.rules import rules, thresholds

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "dask_memusage_exporter"

METRICS_HEAD = """\
# Metrics

All of them are on the `/metrics` that Dask's servers have already (the dashboard's port). The full
name is `{namespace}_{worker|scheduler}_{name}`, where the namespace is Dask's own setting
`distributed.dashboard.prometheus.namespace` (default `dask`), for example
`dask_worker_task_memory_peak_bytes`. `task_prefix_name` is the label that Dask's scheduler uses in
its own metrics, so the two can be joined. Counters end in `_total`, info metrics in `_info`.
`/memusage/metrics` on the same ports has [ours alone, with exemplars](#exemplars).

| name | kind | labels | on | stability | meaning |
|---|---|---|---|---|---|
"""

OTEL_HEAD = """

## The same by OpenTelemetry

See [OpenTelemetry](opentelemetry.md) for how to switch it on. Each process sends what it knows
itself, so sums over all instances count nothing twice.

| name | unit | kind | attributes | from | as on /metrics |
|---|---|---|---|---|---|
"""

METRICS_TAIL = """
## Reading them

- **Mean growth of a kind of task** (exact, from sum and count; of the tasks whose growth is known,
  which are mostly the large ones):
  `sum by (task_prefix_name) (rate(dask_scheduler_task_memory_growth_bytes_sum[10m])) / sum by
  (task_prefix_name) (rate(dask_scheduler_task_memory_growth_bytes_count[10m]))`
- **Share of tasks whose growth is known**, to be read beside it:
  `sum by (task_prefix_name) (rate(dask_scheduler_task_memory_tasks_total{scope!="shared"}[10m])) /
  sum by (task_prefix_name) (rate(dask_scheduler_task_memory_tasks_total[10m]))`
- **95th percentile of peaks** (within a bucket's width):
  `histogram_quantile(0.95, sum by (le, task_prefix_name)
  (rate(dask_scheduler_task_memory_peak_bytes_bucket[10m])))`
- **Share of tasks whose number is not their own**:
  `sum(rate(dask_scheduler_task_memory_tasks_total{scope="shared"}[10m])) /
  sum(rate(dask_scheduler_task_memory_tasks_total[10m]))`
- **Workers that are not measured**: `dask_scheduler_task_memory_workers{source="missing"}`

The default bounds of both histograms are 1 and 1.5 times 2^k MiB from 1 MiB to 256 GiB: 37 and
`+Inf`, so one histogram of one prefix is 40 series. The scheduler's page has three a prefix (peaks,
growth, inputs), with counters and maxima up to 130 series. A worker's page has the same of its own
tasks, without inputs, where `memusage.worker-metrics` is `full`; `totals`, the default where the
scheduler shows all, drops the prefix label, `off` drops everything.

**Several servers in one process** (`LocalCluster(processes=False)`): Dask renders one registry of
the process on every port, so each page shows the same series. Scrape one of the ports, or
aggregate with `max` instead of `sum` over `instance`.

## Exemplars

`/memusage/metrics`, on workers and on the scheduler, is a page of ours alone: all that the table
says of that server and nothing of Dask's, in OpenMetrics 1.0 where the client asks for it, else in
the plain text. Workers show everything by prefix there, whatever `memusage.worker-metrics` says.
Where there are [spans](opentelemetry.md#spans), the buckets of peaks and growth carry one exemplar
each: `trace_id` and `span_id` of the latest task in that bucket whose span is sampled and kept, its
value and when it ended. Dask's own `/metrics` is plain text, which has no place for them.
A Prometheus started with `--enable-feature=exemplar-storage` keeps them:

```yaml
scrape_configs:
  - job_name: dask-memusage
    metrics_path: /memusage/metrics
    static_configs: [{targets: ["scheduler:8787"]}]
```

Both pages of a server have the same series of ours, and sums over both count each task twice.
Scrape one of them; or both, where Dask's own metrics are wanted as well, and drop ours from the
first: the `prometheus.yml` that `dask memusage dashboards` writes shows how
(`metric_relabel_configs`), and the Helm chart does it with `monitors.exemplars.enabled=true`. The
scheduler's page hears of spans with the workers' batches, a moment after the counts; there is at
most one exemplar a bucket and label, however many tasks there are.

## Whose number it is

`task_memory_peak_bytes` counts every task, `task_memory_growth_bytes` only those of scope `thread`
or `process`; see [kinds of task](kinds-of-task.md). Values of `reason` on a record:

| reason | meaning |
|---|---|
"""

SETTINGS_HEAD = """\
# Settings

Dask's configuration, key `memusage`: any YAML file that Dask reads, `dask.config.set`, or the
environment as `DASK_MEMUSAGE__...` (`DASK_MEMUSAGE__CSV__PATH=memusage.csv`). A setting that is
unknown or out of range is one error that names the key, the value and what is allowed.

The scheduler's settings travel to the workers. For what depends on the machine (`source`,
`kernel-reset`, `trim`, `flight-directory`) a worker's own explicit value wins; for all else the
scheduler's does.

| key | default | meaning |
|---|---|---|
"""

SETTINGS_TAIL = """
## What `kernel-reset` does to others in the process

Resetting the high-water mark changes what other code in the same process reads as `VmHWM` (in
`/proc/self/status`) and `ru_maxrss` (`getrusage`): they show the peak since the last task's start
instead of the process's lifetime. Switch it off where something in a worker needs the lifetime's
peak; tasks are then sampled every 10 ms, all with scope `shared`, reason `polling`.
"""


def metrics() -> str:
    """Return the page of all metrics."""
    lines = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} "
        f"| {', '.join(metric.on)} | {metric.stability} | {metric.help} |"
        for metric in catalog.METRICS
    ]
    reasons = [f"| `{reason}` | {meaning} |" for reason, meaning in REASONS.items()]
    return (
        METRICS_HEAD
        + "\n".join(lines)
        + OTEL_HEAD
        + "\n".join(_otel())
        + "\n"
        + METRICS_TAIL
        + "\n".join(reasons)
        + "\n"
    )


def _otel() -> list[str]:
    return [
        f"| `{metric.otel.name}` | `{metric.otel.unit}` | {metric.kind} "
        f"| {', '.join(f'`{catalog.ATTRIBUTES[label]}`' for label in metric.labels) or '-'} "
        f"| {', '.join(metric.otel.on)} | `{metric.name}` |"
        for metric in catalog.METRICS
        if metric.otel is not None
    ]


def settings() -> str:
    """Return the page of all settings."""
    defaults = yaml.safe_load((PACKAGE / "memusage.yaml").read_text())["memusage"]
    schema = yaml.safe_load((PACKAGE / "memusage-schema.yaml").read_text())
    lines = _settings(defaults, schema["properties"]["memusage"]["properties"], "memusage.")
    return SETTINGS_HEAD + "\n".join(lines) + "\n" + SETTINGS_TAIL


def _settings(defaults: dict, schema: dict, above: str) -> list[str]:
    lines: list[str] = []
    for name, what in schema.items():
        default = defaults[name]
        if "properties" in what:
            lines += _settings(default, what["properties"], f"{above}{name}.")
            continue
        shown = "none" if default is None else str(default).lower()
        values = what.get("enum", ())
        if "off" in values:
            values = [one for one in values if one is not False]  # the same to YAML 1.1
        words = ", ".join(f"`{str(one).lower()}`" for one in values)
        allowed = f" One of {words}." if words else ""
        lines.append(f"| `{above}{name}` | `{shown}` | {what['description']}{allowed} |")
    return lines


def alerts() -> str:
    """Return the page of alerts with its tables as they follow from rules and thresholds."""
    page = (DOCS / "alerts.md").read_text()
    for name, lines in (("alerts", _alerts()), ("thresholds", _thresholds())):
        before, rest = page.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- end of {name} -->\n")
        table = "\n".join(lines)
        page = f"{before}<!-- {name} -->\n{table}\n<!-- end of {name} -->\n{after}"
    return page


def _alerts() -> list[str]:
    lines = ["| alert | severity | of |", "|---|---|---|"]
    for group in yaml.safe_load(rules())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                summary = re.sub(r"{{ with .*?{{ end }}", "", rule["annotations"]["summary"])
                summary = re.sub(r"{{ \$labels\.(\w+) }}", r"*\1*", summary)
                summary = re.sub(r"{{ \$value.*?}}", "N", summary)
                name, severity = rule["alert"], rule["labels"]["severity"]
                lines.append(f"| [{name}](runbooks/{name}.md) | {severity} | {summary} |")
    return lines


def _thresholds() -> list[str]:
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for name, spec in thresholds().items():
        unit = spec["unit"]
        allowed = f"{spec['minimum']} to {spec['maximum']} {unit}" if "minimum" in spec else unit
        allowed = allowed.removesuffix(" duration")
        default = f"`{spec['default']}`" if spec["default"] != "" else "none"
        lines.append(f"| `{name}` | {default} | {allowed} | {spec['description']} |")
    return lines


PAGES = {"metrics.md": metrics, "settings.md": settings, "alerts.md": alerts}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write())
        sys.stderr.write(f"docs/{name}\n")
