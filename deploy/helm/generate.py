"""Write what of the chart follows from other files: rules' settings, the schema's parts, README.

``make docs`` runs it; a test fails where the files are not what it writes. Sources are
``monitoring/thresholds.yaml``, ``memusage-schema.yaml`` and the comments (``# -- ...``) of
``values.yaml``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "dask-memusage-exporter"
PACKAGE = CHART.parents[2] / "dask_memusage_exporter"

_WIDTH = 100
#: The section of values.yaml that is generated: from its comment to the next section.
_THRESHOLDS = re.compile(r"(?<=docs/alerts\.md\.\n)  thresholds:.*?(?=\n\n)", re.DOTALL)
_KEY = re.compile(r"( *)([\w-]+):")

#: As in monitoring/rules.py.
_MATCHER = r'[a-zA-Z_][a-zA-Z0-9_]* *(=~|!~|!=|=) *"([^"\\\n]|\\.)*"'

_TYPES = {
    # Each unit once, the largest first; templates/_thresholds.tpl has the bounds.
    "duration": {
        "type": "string",
        "minLength": 1,
        "pattern": "^([0-9]+w)?([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$",
    },
    "labels": {
        "type": "string",
        "pattern": "^([a-zA-Z_][a-zA-Z0-9_]*(\\s*,\\s*[a-zA-Z_][a-zA-Z0-9_]*)*)?$",
    },
    "matchers": {"type": "string", "pattern": f"^({_MATCHER}( *, *{_MATCHER})*)?$"},
    "text": {"type": "string", "pattern": '^[^\\s"\\\\%{}]+$'},
}


def _thresholds() -> dict[str, dict[str, Any]]:
    listed: dict[str, dict[str, Any]] = yaml.safe_load(
        (PACKAGE / "monitoring" / "thresholds.yaml").read_text()
    )
    return listed


def values() -> str:
    """Return values.yaml with every setting of the rules and its default."""
    lines = ["  thresholds:"]
    for name, one in _thresholds().items():
        bounds = f"; {one['minimum']} to {one['maximum']}" if "minimum" in one else ""
        lines += _wrapped(f"{one['description']} ({one['unit']}{bounds})", "    ")
        default = one["default"]
        lines.append(f"    {name}: {json.dumps(default)}")
    return _THRESHOLDS.sub(lambda _: "\n".join(lines), (CHART / "values.yaml").read_text())


def _wrapped(text: str, indent: str) -> list[str]:
    lines, line = [], f"{indent}# --"
    for word in text.split():
        if len(line) + 1 + len(word) > _WIDTH:
            lines.append(line)
            line = f"{indent}#"
        line += f" {word}"
    return [*lines, line]


def schema() -> str:
    """Return values.schema.json with the settings of the rules and of ``memusage``."""
    whole = json.loads((CHART / "values.schema.json").read_text())
    whole["properties"]["rules"]["properties"]["thresholds"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _type(one) for name, one in _thresholds().items()},
    }
    settings = yaml.safe_load((PACKAGE / "memusage-schema.yaml").read_text())
    whole["properties"]["config"]["properties"]["memusage"] = settings["properties"]["memusage"]
    _require(whole, yaml.safe_load(values()), whole["definitions"])
    return json.dumps(whole, indent=2) + "\n"


def _require(schema: dict[str, Any], values: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Have a null refused, by which Helm takes a default away: sections, and all plain values.

    Lists that may be empty and what is as in Kubernetes may go.
    """
    schema["required"] = []
    for name, value in values.items():
        part = schema["properties"][name]
        if part.get("$ref") == "#/definitions/monitor":
            part = definitions["monitor"]
        if part.get("type") == "object" and "properties" in part:
            _require(part, value, definitions)
        elif isinstance(value, (dict, list)) and not part.get("minItems"):
            continue
        schema["required"].append(name)


def _type(one: dict[str, Any]) -> dict[str, Any]:
    kind = _TYPES.get(one["unit"])
    if kind is None:
        kind = {"type": "number", "minimum": one["minimum"], "maximum": one["maximum"]}
    return {**kind, "description": one["description"]}


def readme() -> str:
    """Return the README: what is written by hand, and a table of values for each section."""
    text = values()
    tree = yaml.safe_load(text)
    tables: list[str] = []
    above: list[str] = []  # comment lines since the last key or empty line
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        comment = line.strip().removeprefix("#").strip() if line.lstrip().startswith("#") else None
        if comment is not None:
            above.append(comment)
            continue
        key = _KEY.match(line)
        if key:
            path = [one for one in path if one[0] < len(key[1])] + [(len(key[1]), key[2])]
            names = [name for _, name in path]
            meant = " ".join(above)
            if meant.startswith("-- "):
                tables.append(_row(names, tree, meant.removeprefix("-- ")))
            elif len(names) == 1:
                tables.append(_section(names[0], meant))
        above = []
    head = (CHART / "README.head.md").read_text()
    return f"{head}\n## Values\n\n{_HEADER}\n" + "\n".join(tables) + "\n"


_HEADER = "| value | default | meaning |\n|---|---|---|"


def _section(name: str, meant: str) -> str:
    return f"\n### `{name}`\n\n{meant}\n\n{_HEADER}"


def _row(names: list[str], tree: Any, meant: str) -> str:
    value = tree
    for name in names:
        value = value[name]
    default = json.dumps(value, separators=(", ", ": ")).replace("|", "\\|")
    return f"| `{'.'.join(names)}` | `{default}` | {meant} |"


FILES = {"values.yaml": values, "values.schema.json": schema, "README.md": readme}

if __name__ == "__main__":
    for name, write in FILES.items():
        (CHART / name).write_text(write())
        sys.stderr.write(f"{CHART.name}/{name}\n")
