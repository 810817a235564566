"""Each kind of panel: its data and the queries that can be answered, to Grafana's builder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import common, dashboard, prometheus
from grafana_foundation_sdk.builders import heatmap as heatmap_builder
from grafana_foundation_sdk.builders import stat as stat_builder
from grafana_foundation_sdk.builders import table as table_builder
from grafana_foundation_sdk.builders import timeseries as lines_builder
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from grafana.panels import (
    COUNT,
    Column,
    Heatmap,
    Lines,
    Panel,
    Query,
    Stat,
    Table,
    Thresholds,
)
from grafana.variables import DATASOURCE

_RED: Mapping[str, object] = {"color": {"mode": "fixed", "fixedColor": "red"}}
#: A limit among lines.
_BORDER: Mapping[str, object] = {**_RED, "custom.lineStyle": {"fill": "dash", "dash": [8, 8]}}
#: Tasks that were killed, among lines.
_POINTS: Mapping[str, object] = {**_RED, "custom.drawStyle": "points", "custom.pointSize": 10}
#: By a value that is not there.
_NO_RATIO = ({"type": "special", "options": {"match": "nan", "result": {"text": "-"}}},)


class Asked(NamedTuple):
    """A query that the flavour can answer."""

    query: Query
    letter: str
    target: prometheus.Dataquery


class Link(NamedTuple):
    """The data link to a prefix's dashboard, from wherever its name stands."""

    #: From a series.
    of_series: list[dict[str, str]]
    #: From a row of a table.
    of_row: list[dict[str, str]]


def stat(one: Stat, queries: Sequence[Asked]) -> Any:
    """Return one number over the whole time range, or one a query."""
    panel = (
        stat_builder.Panel()
        .unit(one.unit)
        .thresholds(_thresholds(one.thresholds))
        .no_value(one.no_value)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(options.BigValueColorMode.VALUE)
        .graph_mode(options.BigValueGraphMode.NONE)
        .targets([asked.target.instant() for asked in queries])
    )
    if one.decimals is not None:
        panel.decimals(one.decimals)
    for asked in queries:
        if asked.query.killed:
            # One above the other: side by side there is no room for their names.
            panel.orientation(options.VizOrientation.HORIZONTAL)
            panel.override_by_query(asked.letter, _properties(_RED))
    return _named(panel, one)


def lines(one: Lines, queries: Sequence[Asked], link: Link | None) -> Any:
    """Return series over time; the first query's lead to their prefix where the panel says so."""
    legend = (
        common.VizLegendOptions()
        .display_mode(options.LegendDisplayMode.TABLE)
        # Below there is room for three.
        .placement(options.LegendPlacement.RIGHT)
        .show_legend(True)
        .calcs(["sum"] if one.bars else ["lastNotNull", "max"])
        .sort_by("Total" if one.bars else "Max")
        .sort_desc(True)
    )
    tooltip = (
        common.VizTooltipOptions()
        .mode(options.TooltipDisplayMode.MULTI)
        .sort(options.SortOrder.DESCENDING)
    )
    panel = (
        lines_builder.Panel()
        .unit(one.unit)
        .min(0)
        .no_value(one.no_value)
        .legend(legend)
        .tooltip(tooltip)
        .interval("30s")
        .targets([asked.target.range() for asked in queries])
    )
    if one.maximum is not None:
        panel.max(one.maximum)
    decimals = 0 if one.unit == COUNT else one.decimals
    if decimals is not None:
        panel.decimals(decimals)
    if one.bars:
        panel.draw_style(options.GraphDrawStyle.BARS).fill_opacity(80).line_width(0)
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    else:
        panel.line_width(2).fill_opacity(0).show_points(options.VisibilityMode.AUTO)
        # What ended long ago is no line to what comes next.
        panel.span_nulls(False)
    for asked in queries:
        if asked.query.border:
            panel.override_by_query(asked.letter, _properties(_BORDER))
        if asked.query.killed:
            panel.override_by_query(asked.letter, _properties(_POINTS))
    if link is not None:
        panel.override_by_query(queries[0].letter, _properties({"links": link.of_series}))
    return _named(panel, one)


def heatmap(one: Heatmap, asked: Asked) -> Any:
    """Return a histogram over time."""
    color = (
        heatmap_builder.HeatmapColorOptions()
        .mode(heat.HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .scale(heat.HeatmapColorScale.EXPONENTIAL)
        .exponent(0.5)
        .steps(64)
        .fill("dark-orange")
        .reverse(False)
    )
    panel = (
        heatmap_builder.Panel()
        .calculate(False)
        .color(color)
        .cell_gap(1)
        .cell_values(heatmap_builder.CellValues().unit("short").decimals(0))
        .y_axis(
            heatmap_builder.YAxisConfig().unit("bytes").axis_placement(options.AxisPlacement.LEFT)
        )
        .rows_frame(heatmap_builder.RowsHeatmapOptions().layout(options.HeatmapCellLayout.LE))
        .filter_values(heatmap_builder.FilterValueRange().le(1e-9))
        .exemplars_color("rgba(31, 96, 196, 0.9)")
        .show_value(options.VisibilityMode.NEVER)
        .show_tooltip()
        .show_legend()
        .interval("30s")
        .targets([asked.target.range().format(PromQueryFormat.HEATMAP)])
    )
    return _named(panel, one)


def table(one: Table, asked: Sequence[Asked], label: str, link: Link | None) -> Any:
    """Return rows by a label, with a column for each query and one link for each row."""
    by_letter = dict(zip(ascii_uppercase, one.columns, strict=False))
    shown = [by_letter[query.letter] for query in asked]
    # One query alone has its values in "Value", several in "Value #A" and so on.
    values = [f"Value #{query.letter}" if len(asked) > 1 else "Value" for query in asked]
    names = {label: one.by[1], **dict(zip(values, (c.title for c in shown), strict=True))}
    steps: dict[str, dict[str, object]] = {
        "merge": {},
        "organize": {
            "excludeByName": {"Time": True},
            "indexByName": {name: index for index, name in enumerate(names)},
            "renameByName": names,
        },
    }
    columns = [*shown]
    if one.ratio is not None:
        title, left, right, thresholds = one.ratio
        columns.append(Column(title, "", "percentunit", thresholds, decimals=0, mappings=_NO_RATIO))
        steps["calculateField"] = {
            "mode": "binary",
            "alias": title,
            "binary": {"left": left, "operator": "/", "right": right, "reducer": "sum"},
        }
    order: list[Builder[options.TableSortByFieldState]] = [
        common.TableSortByFieldState().display_name(name).desc(True)
        for name in one.sort
        if name in names.values()
    ]
    panel = (
        table_builder.Panel()
        .no_value(one.no_value)
        .transformations(
            [model.DataTransformerConfig(name, options=how) for name, how in steps.items()]
        )
        .targets([query.target.instant().format(PromQueryFormat.TABLE) for query in asked])
        .sort_by(order[:1])
    )
    # Without it a column takes 150 pixels, and the last ones are out of sight.
    panel.override_by_regexp(".*", _properties({"custom.minWidth": 80}))
    for column in columns:
        panel.override_by_name(column.title, _properties(_cell(column)))
    if link is not None:
        panel.override_by_name(one.by[1], _properties({"links": link.of_row}))
    return _named(panel, one)


def _named(panel: Any, one: Panel) -> Any:
    # Each kind of panel has a builder class of its own, and no common one that has these.
    description = " ".join(one.description.split())
    return panel.title(one.title).description(description).datasource(DATASOURCE)


def _thresholds(steps: Thresholds) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value, color) for value, color in steps])
    )


def _cell(column: Column) -> dict[str, object]:
    """Return what a table's column has for itself."""
    cell: dict[str, object] = {"unit": column.unit}
    if column.decimals is not None:
        cell["decimals"] = column.decimals
    if column.width is not None:
        cell["custom.width"] = column.width
    if column.mappings:
        cell["mappings"] = list(column.mappings)
    if column.thresholds is not None:
        cell["thresholds"] = _thresholds(column.thresholds).build()
        cell["custom.cellOptions"] = {"type": "color-text"}
    return cell


def _properties(values: Mapping[str, object]) -> list[model.DynamicConfigValue]:
    return [model.DynamicConfigValue(name, value) for name, value in values.items()]
