"""What the SDK writes for Grafana 10 and newer ones have no more, taken out: defaults, all of them.

Their schema is what ``tests/grafana_schema`` checks; Grafana 10 misses none of it.
"""

from __future__ import annotations

from typing import Any


def without_what_has_gone(dashboard: dict[str, Any]) -> dict[str, Any]:
    """Return a dashboard's JSON in which the newest schema knows every key."""
    dashboard.pop("style")
    for variable in dashboard["templating"]["list"]:
        # Of intervals, which ours are not.
        for key in ("id", "auto", "auto_min", "auto_count"):
            variable.pop(key)
    for annotation in dashboard["annotations"]["list"]:
        annotation["target"] = {"refId": "Anno", "expr": annotation.pop("expr")}
    for panel in dashboard["panels"]:
        panel.get("options", {}).pop("footer", None)
    return dashboard
