"""The alerting rules, filled in: ``rules.yaml`` with the settings of ``thresholds.yaml``.

Covers: names, units and bounds of the settings, the one list that command line, chart and docs
have, too.
Does not cover: what the rules compute (``docs/alerts.md``).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_HERE = Path(__file__).parent
#: Three letters at least: annotations have verbs such as %s.
_PLACEHOLDER = re.compile(r"%([A-Za-z][A-Za-z-]{2,})%")

#: As Prometheus has them, each unit once and the largest first; a year and longer is no window.
_DURATION = re.compile(
    r"(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+)s)?(?:(\d+)ms)?", re.ASCII
)
_SECONDS = (604_800, 86_400, 3_600, 60, 1, 0.001)
_NAME = r"[a-zA-Z_][a-zA-Z0-9_]*"
_LABELS = re.compile(rf"(?:{_NAME}(?: *, *{_NAME})*)?", re.ASCII)
_MATCHER = rf'{_NAME} *(=~|!~|!=|=) *"((?:[^"\\\n]|\\.)*)"'
_MATCHERS = re.compile(rf"(?:{_MATCHER}(?: *, *{_MATCHER})*)?", re.ASCII)


def thresholds() -> dict[str, dict[str, Any]]:
    """Return every setting by its name, as ``thresholds.yaml`` has it."""
    listed: dict[str, dict[str, Any]] = yaml.safe_load((_HERE / "thresholds.yaml").read_text())
    return listed


def rules(namespace: str = "dask", given: Mapping[str, object] | None = None) -> str:
    """Return the groups of rules as YAML, for Prometheus' ``rule_files``.

    Parameters
    ----------
    namespace
        Dask's ``distributed.dashboard.prometheus.namespace``; may be empty.
    given
        Settings by name, those that differ from the default.

    Raises
    ------
    ValueError
        There is no such setting, or its value is not allowed; the message says what is.
    """
    if not re.fullmatch(rf"({_NAME})?", namespace, re.ASCII):
        raise ValueError(
            f"namespace: {namespace!r} cannot begin a metric's name; letters, digits and _ can"
        )
    values = checked(given or {})
    text = fill((_HERE / "rules.yaml").read_text(), namespace)
    return _PLACEHOLDER.sub(lambda found: values[found[1]], text)


def fill(template: str, namespace: str) -> str:
    """Return a template, of rules or of another file, with the metric namespace put in."""
    return template.replace("%NAMESPACE%_", f"{namespace}_" if namespace else "")


def checked(given: Mapping[str, object]) -> dict[str, str]:
    """Return all settings as they stand in the rules, those that are given in place of defaults.

    Raises
    ------
    ValueError
        The first that is unknown or out of range.
    """
    known = thresholds()
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            mend = f"did you mean {close[0]}?" if close else "there are " + ", ".join(known)
            raise ValueError(f"{name}: there is no such threshold; {mend}")
    values = {
        name: _check(name, spec, given.get(name, spec["default"])) for name, spec in known.items()
    }
    step = values["step"]
    for name, steps in (("gap", 2), ("regression-recent", 1), ("regression-baseline", 1)):
        if _seconds(values[name]) < steps * _seconds(step):
            raise ValueError(
                f"{name}: {values[name]} is less than {steps} x step, which is {step}; "
                f"raise {name} or lower step"
            )
    return values


def _check(name: str, spec: Mapping[str, Any], value: object) -> str:
    text = str(value).strip()
    unit = spec["unit"]
    bounds = f"from {spec['minimum']} to {spec['maximum']}" if "minimum" in spec else ""
    if unit == "duration":
        right = _seconds(spec["minimum"]) <= _seconds(text) <= _seconds(spec["maximum"])
        allowed = f"a duration {bounds}, such as 90s, 15m or 7d"
    elif unit == "labels":
        right = _LABELS.fullmatch(text) is not None
        allowed = f"a list of labels such as {spec['default']}"
    elif unit == "matchers":
        right = _MATCHERS.fullmatch(text) is not None and _are_patterns(text)
        allowed = 'a list of label matchers such as job="dask", namespace=~"team-.*"'
    elif unit == "text":
        text = text.rstrip("/")
        right = text != "" and re.search(r'[\s"\\%{}]', text) is None
        allowed = "a path or address to put before a page's name"
    else:
        right = spec["minimum"] <= _number(value) <= spec["maximum"]
        allowed = f"a number of {unit} {bounds}"
    if not right:
        raise ValueError(f"{name}: {value!r} is not {allowed}")
    return text


def _are_patterns(matchers: str) -> bool:
    # As Python has them, which is more than RE2 takes: Prometheus tells the rest.
    for operator, pattern in re.findall(_MATCHER, matchers):
        if "~" in operator:
            try:
                re.compile(pattern.replace("\\\\", "\\"))
            except re.error:
                return False
    return True


def _number(value: object) -> float:
    # NaN, which is in no bounds, for what is no number; and PromQL has no 1_000.
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.\d+)?", str(value).strip(), re.ASCII):
        return math.nan
    return float(str(value))


def _seconds(text: str) -> float:
    """Return a duration of Prometheus' in seconds; NaN: it is none."""
    found = _DURATION.fullmatch(text)
    if not text or found is None:
        return math.nan
    return sum(int(n) * unit for n, unit in zip(found.groups(), _SECONDS, strict=True) if n)
