"""The dashboards' JSON, held by a compiler against the types of Grafana's own schema package."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Callable
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


#: What each harm makes the compiler say.
FAULTS: dict[Callable[[dict[str, Any]], None], str] = {
    string_width: "'string' is not assignable to type 'number'",
    numeric_refresh: "'number' is not assignable to type 'string'",
    unknown_option: "'\"placment\"' does not exist",
    unknown_value: "'\"many\"' is not assignable",
    unknown_field: "'\"opacity\"' does not exist",
    wrong_override: "'string' is not assignable to type 'number'",
    unknown_key_of_a_query: "'\"legend\"' does not exist",
    unknown_kind_of_panel: "'\"singlestat\"' is not assignable",
}


@pytest.fixture(scope="module")
def said(
    component: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Compile every dashboard, and one with each fault; return what was said of each, by name."""
    tsc = component("tsc", str(PROGRAMS))
    directory = tmp_path_factory.mktemp("typed")
    (directory / "node_modules").symlink_to(HERE / "node_modules")
    for name in ("dashboard.ts", "tsconfig.json"):
        (directory / name).write_bytes((HERE / name).read_bytes())
    compiled = dashboards()
    whole = compiled["scrape-overview"]
    one_of_each = {one["type"]: one for one in reversed(whole["panels"])}
    for harm in FAULTS:
        broken = copy.deepcopy({**whole, "panels": [*one_of_each.values()]})
        harm(broken)
        compiled[harm.__name__] = broken
    for name, dashboard in compiled.items():
        (directory / f"{name}.ts").write_text(
            "import type { DashboardJSON } from './dashboard';\n"
            f"export const dashboard: DashboardJSON = {json.dumps(dashboard, indent=2)};\n"
        )
    done = subprocess.run(
        [tsc, "--project", str(directory), "--pretty", "false"],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:{NODE}"},
    )
    assert not done.stderr
    # A fault is a line with its place, and lines below it that say more.
    faults = re.findall(r"^(\S.*(?:\n\s.*)*)", done.stdout, re.MULTILINE)
    by_name: dict[str, list[str]] = {name: [] for name in compiled}
    for fault in faults:
        by_name[fault.split(".ts(")[0]].append(fault)
    return by_name


def test_every_dashboard_is_what_grafanas_schema_says(said: dict[str, list[str]]) -> None:
    """Options, fields, overrides, links and variables have the names and types Grafana knows."""
    found = dashboards()
    assert {name.split("-")[0] for name in found} == set(monitoring.FLAVOURS)
    assert {name: said[name] for name in found} == {name: [] for name in found}


@pytest.mark.parametrize(("harm", "expected"), FAULTS.items())
def test_a_fault_does_not_compile(
    said: dict[str, list[str]], harm: Callable[[dict[str, Any]], None], expected: str
) -> None:
    """The check is worth its name: a dashboard with one fault is refused for that one."""
    first = said[harm.__name__][0]
    assert expected in first
