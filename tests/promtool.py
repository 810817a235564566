"""What a Prometheus would have scraped of schedulers, for ``promtool test rules``.

The rules under test are the shipped ones, and promtool's engine is Prometheus' own.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dask_memusage_exporter.monitoring.rules import rules

MIB = 2**20
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def seconds(duration: str) -> int:
    """Return a duration such as ``1d12h`` in seconds."""
    return sum(int(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+)([smhd])", duration))


class Phase(NamedTuple):
    """A stretch of a scheduler's life: the same number of like tasks with each scrape."""

    lasts: str
    tasks: int = 4
    #: MiB a task.
    growth: float = 100
    input: float = 0
    #: Of how many tasks growth is known.
    known: int | None = None
    #: The process has been started anew just before: all counters begin at 0.
    restart: bool = False
    #: False: it runs, and no scrape reaches it.
    seen: bool = True


class Scrapes:
    """The series of one test, a value each scrape from time 0 on.

    Parameters
    ----------
    interval
        Between two scrapes.
    """

    def __init__(self, interval: str) -> None:
        self.interval = interval
        self.series: dict[str, list[str]] = {}

    def scheduler(
        self, *phases: Phase, begin: str = "0s", prefix: str = "load", **labels: str
    ) -> None:
        """Add what a scheduler shows of one prefix; it goes with the end of its last phase."""
        names = [f"{of}_bytes_{what}" for of in ("growth", "input") for what in ("sum", "count")]
        totals = dict.fromkeys(["peak_bytes_count", *names], 0.0)
        values: dict[str, list[str | None]] = {name: [] for name in totals}
        for phase in phases:
            if phase.restart:
                totals = dict.fromkeys(totals, 0.0)
            known = phase.tasks if phase.known is None else phase.known
            for _ in range(seconds(phase.lasts) // seconds(self.interval)):
                totals["peak_bytes_count"] += phase.tasks
                totals["growth_bytes_sum"] += known * phase.growth * MIB
                totals["growth_bytes_count"] += known
                totals["input_bytes_sum"] += phase.tasks * phase.input * MIB
                totals["input_bytes_count"] += phase.tasks
                for name, total in totals.items():
                    values[name].append(f"{total:.0f}" if phase.seen else None)
        for name, shown in values.items():
            self.add(f"task_memory_{name}", shown, begin, task_prefix_name=prefix, **labels)

    def add(self, name: str, values: list[Any], begin: str = "0s", **labels: str) -> None:
        """Add one series of a scheduler; with its last value the target goes (None: no scrape)."""
        labels = {"instance": "10.0.0.1:8787", "job": "dask", **labels}
        inner = ",".join(f"{label}={json.dumps(value)}" for label, value in labels.items())
        before = ["_"] * (seconds(begin) // seconds(self.interval))
        shown = ["_" if value is None else str(value) for value in values]
        self.series[f"dask_scheduler_{name}{{{inner}}}"] = [*before, *shown, "stale"]


class Promtool:
    """Runs the shipped rules over series, in one directory.

    Parameters
    ----------
    program
        Its path.
    given
        Settings of the rules.
    """

    def __init__(self, program: str, directory: Path, **given: Any) -> None:
        self._program = program
        self._directory = directory
        self._given = {name.replace("_", "-"): value for name, value in given.items()}

    def run(self, *arguments: str) -> str:
        """Return what promtool prints; fail where it finds something wrong."""
        done = subprocess.run(
            [self._program, *arguments], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def check(
        self,
        scrapes: Scrapes,
        *,
        every: str,
        firing: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
        queries: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
        texts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Evaluate the rules over the scrapes and hold what comes out against what is expected.

        Parameters
        ----------
        every
            Between two evaluations; the rules' step.
        firing
            By alert and time: the prefixes of which one fires each, "" for one without a prefix.
        queries
            By query and time: values by their series.
        texts
            Alerts with all their labels and texts, as promtool takes them.
        """
        expected = {
            f'count by (task_prefix_name) (ALERTS{{alertname="{alert}",alertstate="firing"}})': {
                time: {
                    f"{{task_prefix_name={json.dumps(one)}}}" if one else "{}": 1
                    for one in prefixes
                }
                for time, prefixes in times.items()
            }
            for alert, times in (firing or {}).items()
        } | dict(queries or {})
        test = {
            "interval": scrapes.interval,
            "input_series": [
                {"series": name, "values": " ".join(values)}
                for name, values in scrapes.series.items()
            ],
            "promql_expr_test": [
                {
                    "expr": query,
                    "eval_time": time,
                    "exp_samples": [
                        {"labels": series, "value": value} for series, value in samples.items()
                    ],
                }
                for query, times in expected.items()
                for time, samples in times.items()
            ],
            "alert_rule_test": list(texts),
        }
        whole = {"rule_files": ["rules.yaml"], "evaluation_interval": every, "tests": [test]}
        (self._directory / "rules.yaml").write_text(rules(given={"step": every, **self._given}))
        (self._directory / "test.yaml").write_text(json.dumps(whole))  # JSON is YAML
        self.run("test", "rules", str(self._directory / "test.yaml"))


def says(
    alert: str, time: str, summary: str, description: str, severity: str, **labels: str
) -> dict[str, Any]:
    """Return what promtool takes as the only alert of a name at a time, with all that it says."""
    annotations = {
        "summary": summary,
        "description": description,
        "runbook_url": f"docs/runbooks/{alert}.md",
    }
    one = {"exp_labels": {"severity": severity, **labels}, "exp_annotations": annotations}
    return {"alertname": alert, "eval_time": time, "exp_alerts": [one]}
