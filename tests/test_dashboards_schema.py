"""The dashboards' JSON, held by a compiler against the types of Grafana's own schema package."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dask_memusage_exporter import monitoring

HERE = Path(__file__).parent / "grafana_schema"
PROGRAMS = HERE / "node_modules" / ".bin"
#: Where tests/install-components puts a Node that the machine has not.
NODE = HERE.parents[1] / ".cache" / "node" / "bin"


def dashboards() -> dict[str, dict[str, Any]]:
    """Return every dashboard that a user gets, of every flavour."""
    return {
        f"{flavour}-{Path(name).stem}": json.loads(text)
        for flavour in monitoring.FLAVOURS
        for name, text in monitoring.files(flavour).items()
        if name.startswith("dashboards/")
    }


@pytest.fixture
def judge(component: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Return what compiles dashboards, each a typed constant, and says what the compiler said."""
    tsc = component("tsc", str(PROGRAMS))
    (tmp_path / "node_modules").symlink_to(HERE / "node_modules")
    for name in ("dashboard.ts", "tsconfig.json"):
        (tmp_path / name).write_bytes((HERE / name).read_bytes())

    def run(named: Mapping[str, object]) -> str:
        for name, dashboard in named.items():
            (tmp_path / f"{name}.ts").write_text(
                "import type { DashboardJSON } from './dashboard';\n"
                f"export const dashboard: DashboardJSON = {json.dumps(dashboard, indent=2)};\n"
            )
        done = subprocess.run(
            [tsc, "--project", str(tmp_path), "--pretty", "false"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{os.environ['PATH']}:{NODE}"},
        )
        assert not done.stderr
        assert (done.returncode != 0) == bool(done.stdout)
        return done.stdout

    return run


def test_every_dashboard_is_what_grafanas_schema_says(judge: Callable[..., str]) -> None:
    """Options, fields, overrides, links and variables have the names and types Grafana knows."""
    found = dashboards()
    assert {name.split("-")[0] for name in found} == set(monitoring.FLAVOURS)
    assert judge(found) == ""


def panel(dashboard: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the first panel of a kind."""
    return next(one for one in dashboard["panels"] if one["type"] == kind)


def string_width(dashboard: dict[str, Any]) -> None:
    panel(dashboard, "stat")["gridPos"]["w"] = "12"


def numeric_refresh(dashboard: dict[str, Any]) -> None:
    dashboard["refresh"] = 60


def unknown_option(dashboard: dict[str, Any]) -> None:
    panel(dashboard, "timeseries")["options"]["legend"]["placment"] = "right"


def unknown_value(dashboard: dict[str, Any]) -> None:
    panel(dashboard, "timeseries")["options"]["tooltip"]["mode"] = "many"


def unknown_field(dashboard: dict[str, Any]) -> None:
    panel(dashboard, "timeseries")["fieldConfig"]["defaults"]["custom"]["opacity"] = 10


def wrong_override(dashboard: dict[str, Any]) -> None:
    panel(dashboard, "table")["fieldConfig"]["overrides"].append(
        {
            "matcher": {"id": "byName", "options": "Tasks"},
            "properties": [{"id": "custom.width", "value": "80"}],
        }
    )


def unknown_key_of_a_query(dashboard: dict[str, Any]) -> None:
    panel(dashboard, "heatmap")["targets"][0]["legend"] = "{{le}}"


def unknown_kind_of_panel(dashboard: dict[str, Any]) -> None:
    panel(dashboard, "stat")["type"] = "singlestat"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (string_width, "'string' is not assignable to type 'number'"),
        (numeric_refresh, "'number' is not assignable to type 'string'"),
        (unknown_option, "'\"placment\"' does not exist"),
        (unknown_value, "'\"many\"' is not assignable"),
        (unknown_field, "'\"opacity\"' does not exist"),
        (wrong_override, "'string' is not assignable to type 'number'"),
        (unknown_key_of_a_query, "'\"legend\"' does not exist"),
        (unknown_kind_of_panel, "'\"singlestat\"' is not assignable"),
    ],
)
def test_a_fault_does_not_compile(
    judge: Callable[..., str], harm: Callable[[dict[str, Any]], None], said: str
) -> None:
    """The check is worth its name: a dashboard with one fault is refused for that one."""
    dashboard = dashboards()["scrape-overview"]
    broken = copy.deepcopy(dashboard)
    harm(broken)
    found = judge({"whole": dashboard, "broken": broken})
    assert "broken.ts" in found
    assert "whole.ts" not in found
    assert said in found
