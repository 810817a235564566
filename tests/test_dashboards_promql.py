"""What a counter gained, by Prometheus' own engine: short lives, new starts and missed scrapes."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from dask_memusage_exporter import monitoring
from grafana import promql

#: Seconds between two scrapes.
EVERY = 15
X = 'x{instance="a"}'

#: What is scraped every 15 s from time 0 on (``_``: nothing, ``stale``: it has gone), at which
#: time it is looked at, how far back, and what it gained.
RANGES = {
    "a cluster that lived for three scrapes": ("_x40 300 400 500 stale _x200", "1h", "1h", 500),
    "one that was scraped once": ("_x40 300 stale _x200", "1h", "1h", 300),
    "one that was there before": ("1000x20 1000+10x200 stale", "50m", "45m", 1790),
    "one that did nothing": ("1000x300", "1h", "30m", 0),
    "one that has gone before": ("1000x40 stale _x400", "1h50m", "30m", None),
    "a scrape that was missed at the start": ("100x118 _x4 100+0x10 130x110", "1h", "30m", 30),
}
STEPS = {
    "a step with tasks": ("0+10x100", "20m", "1m", 40),
    "the first step of a cluster": ("_x40 300 310 310 310", "10m30s", "1m", 310),
    "after ten minutes without a scrape": ("500x40 stale _x38 520x40", "20m30s", "1m", 20),
    "a scheduler that began anew": ("500x40 20 30 30 30 30", "10m30s", "1m", 30),
}


def ask(
    promtool: str,
    directory: Path,
    scraped: Mapping[str, str],
    at: str,
    expr: str,
    expected: Mapping[str, float],
) -> None:
    """Hold what an expression gives at a time, by its series, against what is expected."""
    test = {
        "evaluation_interval": f"{EVERY}s",
        "tests": [
            {
                "interval": f"{EVERY}s",
                "input_series": [
                    {"series": series, "values": values} for series, values in scraped.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": expr,
                        "eval_time": at,
                        "exp_samples": [
                            {"labels": labels, "value": value} for labels, value in expected.items()
                        ],
                    }
                ],
            }
        ],
    }
    (directory / "test.json").write_text(json.dumps(test))
    done = subprocess.run(
        [promtool, "test", "rules", "test.json"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.component("promtool")
@pytest.mark.parametrize("case", RANGES)
def test_in_a_time_range(component: Callable[[str], str], tmp_path: Path, case: str) -> None:
    """Tables and stats count exactly, where ``increase`` loses or invents."""
    values, at, window, expected = RANGES[case]
    expr = f"sum({promql.in_range(X)})".replace("$__range", window)
    gained = {} if expected is None else {"{}": expected}
    ask(component("promtool"), tmp_path, {X: values}, at, expr, gained)


@pytest.mark.component("promtool")
@pytest.mark.parametrize("case", STEPS)
def test_in_a_step(component: Callable[[str], str], tmp_path: Path, case: str) -> None:
    """Graphs show each task in one step, and nothing that was shown before."""
    values, at, window, expected = STEPS[case]
    expr = f"sum({promql.gained(X, window)})"
    ask(component("promtool"), tmp_path, {X: values}, at, expr, {"{}": expected})


#: Tasks by the bound of their bucket, and which buckets are shown with how many: up to each.
SPREADS = {
    "a piece in the middle": ({"4": 2, "16": 1}, {"2": 0, "4": 2, "8": 2, "16": 3}),
    "one bucket": ({"8": 5}, {"4": 0, "8": 5}),
    "the first": ({"1": 1, "2": 1}, {"1": 1, "2": 2}),
    "beyond all bounds": ({"16": 1, "+Inf": 1}, {"8": 0, "16": 1, "+Inf": 2}),
    "no task": ({}, {}),
}


@pytest.mark.component("promtool")
@pytest.mark.parametrize("case", SPREADS)
def test_buckets_that_are_shown(component: Callable[[str], str], tmp_path: Path, case: str) -> None:
    """Those in use in one piece, with the empty one below them; each task stays in its own."""
    tasks, expected = SPREADS[case]
    total, shown = 0, {}
    for le in ("1", "2", "4", "8", "16", "+Inf"):
        total += tasks.get(le, 0)
        shown[f'h_bucket{{le="{le}"}}'] = f"0x40 {total}x40"
    expr = re.sub(r"<(\w+)((?:{.*?})?)>", r"\1\2", promql.spread("h"))
    expr = expr.replace("$__range", "20m").replace("$__interval", "15m")
    rows = {f'{{le="{le}"}}': count for le, count in expected.items()}
    ask(component("promtool"), tmp_path, shown, "20m", expr, rows)


@pytest.mark.component("promtool")
def test_a_new_start_in_a_time_range_is_estimated(
    component: Callable[[str], str], tmp_path: Path
) -> None:
    """Where a counter fell, it is Prometheus' own increase: what was before and what came after."""
    # 0 to 100, anew, 0 to 50: 150, and what increase adds for a step at each end.
    expr = promql.in_range(X).replace("$__range", "1h")
    shown = {X: "0x40 0+10x10 0+10x5 50x100"}
    for bound in ("> bool 149", "< bool 155"):
        ask(component("promtool"), tmp_path, shown, "35m", f"sum({expr} {bound})", {"{}": 1})


@pytest.mark.component("promtool")
def test_a_prefix_whose_tasks_were_all_killed_has_its_page(
    component: Callable[[str], str], tmp_path: Path
) -> None:
    """None of them ended, so it has no peak: Grafana would show another one's page in its place."""
    page = json.loads(monitoring.files()["dashboards/prefix.json"])
    (variable,) = (one for one in page["templating"]["list"] if one["name"] == "prefix")
    expr = variable["query"]["query"].removeprefix("query_result(").removesuffix(")")
    expr = re.sub(r"\$(?!__)\w+", ".*", expr).replace("$__range", "1h")
    of = "dask_scheduler_task_memory"
    shown = {
        f'{of}_peak_maximum_bytes{{task_prefix_name="load"}}': "7x100",
        f'{of}_killed_tasks_total{{cause="lost",task_prefix_name="load"}}': "0x100",
        f'{of}_killed_tasks_total{{cause="lost",task_prefix_name="join"}}': "0x20 2x80",
        f'{of}_killed_tasks_total{{cause="lost",task_prefix_name="__overflow__"}}': "0x100",
    }
    offered = {'{task_prefix_name="load"}': 7, '{task_prefix_name="join"}': 0}
    ask(component("promtool"), tmp_path, shown, "20m", expr, offered)
