"""What Grafana does with a dashboard: variables put in, and every query asked of a data source."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

#: A row of a table, or a series: its labels and its values in time.
Series = tuple[dict[str, str], list[float]]


class Target(NamedTuple):
    """One query of a panel."""

    panel: str
    kind: str
    #: Its column in a table, else its legend.
    name: str
    expr: str
    instant: bool
    exemplar: bool


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all panels but rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def targets(dashboard: Mapping[str, Any]) -> Iterator[Target]:
    """Return every query of every panel and annotation."""
    for panel in panels(dashboard):
        columns: dict[str, str] = {}
        for one in panel.get("transformations", ()):
            columns |= one["options"].get("renameByName", {})
        for target in panel["targets"]:
            name = target.get("legendFormat") or columns.get(f"Value #{target['refId']}")
            yield Target(
                panel["title"],
                panel["type"],
                name or columns.get("Value", ""),
                target["expr"],
                target.get("instant", False),
                target.get("exemplar", False),
            )
    for one in dashboard["annotations"]["list"]:
        yield Target("annotation", "annotation", one["name"], one["target"]["expr"], False, False)


class DataSource:
    """Prometheus, or what answers as it does, as Grafana asks it at a time range.

    Parameters
    ----------
    url
        Its address.
    start, end
        The dashboard's time range, in seconds since the epoch.
    values
        Of variables; a list is one of many values. What is missing is at its default.
    """

    #: How many steps a graph has; the time range is that many whole seconds, or a multiple.
    STEPS = 4

    def __init__(self, url: str, start: float, end: float, **values: str | list[str]) -> None:
        self.url = url
        self.start, self.end = start, end
        self.values = values

    def ask(self, what: str, **arguments: Any) -> Any:
        """Return the data of an answer; an error of a query fails the test with its words."""
        try:
            with urlopen(
                f"{self.url}/api/v1/{what}?{urlencode(arguments, True)}", timeout=30
            ) as got:
                answer = json.load(got)
        except HTTPError as error:
            raise AssertionError(f"{error.read().decode()}: {arguments}") from None
        assert answer["status"] == "success", answer
        return answer["data"]

    def variable(self, dashboard: Mapping[str, Any], name: str) -> list[str]:
        """Return what a query variable offers."""
        (found,) = (one for one in dashboard["templating"]["list"] if one["name"] == name)
        query = self._put_in(found["query"]["query"], dashboard)
        if match := re.fullmatch(r"label_values\((.*), (\w+)\)", query):
            arguments = {"match[]": match[1], "start": self.start - 3600, "end": self.end}
            return self.ask(f"label/{match[2]}/values", **arguments)
        match = re.fullmatch(r"query_result\((.*)\)", query)
        assert match, query
        texts = [
            "{" + ",".join(f'{label}="{value}"' for label, value in one["metric"].items()) + "} 1"
            for one in self.ask("query", query=match[1], time=self.end, nocache=1)["result"]
        ]
        return [re.search(found["regex"].strip("/"), text)[1] for text in texts]

    def run(self, dashboard: Mapping[str, Any], target: Target) -> list[Series]:
        """Return the series of a query that are numbers somewhere."""
        expr = self._put_in(target.expr, dashboard)
        if target.instant:
            found = self.ask("query", query=expr, time=self.end, nocache=1)["result"]
            pairs = [(one["metric"], [one["value"]]) for one in found]
        else:
            found = self.ask(
                "query_range", query=expr, start=self.start, end=self.end, step=self.step, nocache=1
            )["result"]
            pairs = [(one["metric"], one["values"]) for one in found]
        numbers = [
            (labels, [float(value) for _, value in values if not math.isnan(float(value))])
            for labels, values in pairs
        ]
        return [(labels, values) for labels, values in numbers if values]

    def column(self, dashboard: Mapping[str, Any], panel: str, name: str = "") -> dict[str, float]:
        """Return the values of a panel's query, by the only label that its series have."""
        (target,) = (
            one for one in targets(dashboard) if one.panel == panel and one.name in (name, "")
        )
        return {
            next(iter(labels.values()), ""): values[-1]
            for labels, values in self.run(dashboard, target)
        }

    def exemplars(self, dashboard: Mapping[str, Any], target: Target) -> list[Any]:
        """Return the exemplars that a panel shows."""
        expr = self._put_in(target.expr, dashboard)
        return self.ask("query_exemplars", query=expr, start=self.start, end=self.end)

    @property
    def step(self) -> int:
        """The seconds between two points of a graph."""
        return int(self.end - self.start) // self.STEPS

    def _put_in(self, text: str, dashboard: Mapping[str, Any]) -> str:
        values = {
            "__range": f"{int(self.end - self.start)}s",
            "__interval": f"{self.step}s",
            "__rate_interval": f"{self.step + 4}s",
        }
        variables = {one["name"]: one for one in dashboard["templating"]["list"]}

        def value(found: re.Match[str]) -> str:
            name = found[1] or found[2]
            return values[name] if name in values else self._value(variables[name], found[3])

        return re.sub(r"\$(?:(\w+)|{(\w+)(?::(\w+))?})", value, text)

    def _value(self, variable: Mapping[str, Any], form: str | None) -> str:
        """Return a variable's value as Grafana formats it, by default or in the form that is named.

        See ``formatRegistry.ts`` of Grafana's library scenes, and ``escaping.ts`` of its data
        source for where no form is named; here without its feature toggle.
        """
        given = self.values.get(variable["name"])
        if given is None:
            # What stands for all is not formatted.
            chosen = variable.get("current", {}).get("value", "")
            return variable["allValue"] if variable.get("includeAll") else chosen
        several = [given] if isinstance(given, str) else given
        if form == "raw":
            return ",".join(several)
        if form == "regex":
            several = [re.sub(r"[\\^$*+?.()|[\]{}/]", r"\\\g<0>", one) for one in several]
        elif not variable.get("multi"):
            return several[0].replace("\\", "\\\\").replace("'", "\\\\'")
        else:
            several = [one.replace("\\", "\\" * 4) for one in several]
            several = [re.sub(r"[$^*{}[\]+?.()|]", r"\\\\\g<0>", one) for one in several]
        return several[0] if len(several) == 1 else f"({'|'.join(several)})"
