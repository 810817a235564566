"""The one factory: a dashboard's data, in one flavour, to Grafana's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table
from grafana_foundation_sdk.builders import timeseries as lines
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from grafana import promql
from grafana.flavours import Flavour, NoInstrument, expand
from grafana.panels import (
    Column,
    Dashboard,
    Heatmap,
    Lines,
    Panel,
    Query,
    Stat,
    Table,
    Thresholds,
)
from grafana.variables import DATASOURCE, carried, variables

#: Every dashboard, for the links between them: slug and title.
LINKS = (
    ("overview", "Task memory overview"),
    ("prefix", "One task prefix"),
    ("workers", "Workers and deaths"),
    ("exporter", "Exporter health"),
)

#: Where a prefix leads, with what has to be put in for its name.
_DRILL = "prefix"

#: Grafana's grid.
_GRID = 24

#: A limit among lines.
_BORDER: Mapping[str, object] = {
    "custom.lineStyle": {"fill": "dash", "dash": [8, 8]},
    "color": {"mode": "fixed", "fixedColor": "red"},
}


class Asked(NamedTuple):
    """A query that the flavour can answer."""

    query: Query
    letter: str
    target: prometheus.Dataquery


class Factory:
    """Makes one dashboard in one flavour."""

    def __init__(self, what: Dashboard, flavour: Flavour) -> None:
        self._what = what
        self._flavour = flavour
        self._prefix = {
            "many": 'task_prefix_name=~"$prefix"',
            # Grafana escapes nothing in a variable of one value.
            "one": 'task_prefix_name="$prefix"',
            "none": None,
        }[what.prefix]

    def json(self) -> str:
        """Return the dashboard's JSON, ready to be a file."""
        what, flavour = self._what, self._flavour
        made = (
            dashboard.Dashboard(f"Dask / {what.title}{flavour.title}")
            .uid(f"{flavour.uid}-{what.slug}")
            .description(" ".join(what.description.split()))
            .tags(["dask", "dask-memusage"])
            .time(what.since, "now")
            .refresh("1m")
            .timezone(options.TimeZoneBrowser)
            .tooltip(model.DashboardCursorSync.CROSSHAIR)
            .editable()
            .variables(list(variables(what, flavour)))
            .links([self._link(slug, title) for slug, title in LINKS if slug != what.slug])
        )
        for annotation in self._annotations():
            made.annotation(annotation)
        number, down = 1, 0
        for row in what.rows:
            built = [(one, panel) for one in row.panels if (panel := self._panel(one)) is not None]
            if not built:
                continue
            made.with_row(
                dashboard.Row(row.title).id(number).grid_pos(model.GridPos(1, _GRID, 0, down))
            )
            number, down, across, high = number + 1, down + 1, 0, 0
            for one, panel in built:
                if across + one.width > _GRID:
                    across, down, high = 0, down + high, 0
                panel.id(number).grid_pos(model.GridPos(one.height, one.width, across, down))
                made.with_panel(panel)
                number, across, high = number + 1, across + one.width, max(high, one.height)
            down += high
        return json.dumps(json.loads(JSONEncoder().encode(made.build())), indent=2) + "\n"

    def _link(self, slug: str, title: str) -> dashboard.DashboardLink:
        return (
            dashboard.DashboardLink(title)
            .type(model.DashboardLinkType.LINK)
            .icon("dashboard")
            .tooltip(title)
            .url(f"/d/{self._flavour.uid}-{slug}")
            .include_vars(True)
            .keep_time(True)
        )

    def _drill(self, value: str) -> list[dict[str, object]]:
        """Return the link to a prefix's dashboard, with all variables and the time range."""
        url = f"/d/{self._flavour.uid}-{_DRILL}?{carried(self._what, self._flavour)}"
        return [{"title": "This task prefix", "url": f"{url}&var-prefix={value}"}]

    def _annotations(self) -> Iterator[dashboard.AnnotationQuery]:
        killed = promql.by_prefix("sum", promql.gained("<task_memory_killed_tasks_total>"))
        yield (
            dashboard.AnnotationQuery()
            .name("Tasks that were killed")
            .datasource(DATASOURCE)
            .enable(True)
            .icon_color("red")
            .expr(expand(f"{killed} > 0", self._flavour, self._prefix))
        )

    def _panel(self, one: Panel) -> Any:
        """Return a panel's builder; None where this flavour has not its series."""
        if isinstance(one, Stat):
            return self._stat(one)
        if isinstance(one, Lines):
            return self._lines(one)
        if isinstance(one, Heatmap):
            return self._heatmap(one)
        return self._table(one)

    def _queries(self, queries: Sequence[Query]) -> list[Asked]:
        """Return those queries that this flavour can answer, lettered as Grafana does."""
        built = []
        for letter, query in zip(ascii_uppercase, queries, strict=False):
            try:
                expr = expand(query.expr, self._flavour, self._prefix)
            except NoInstrument:
                continue
            target = prometheus.Dataquery().expr(expr).ref_id(letter).datasource(DATASOURCE)
            target.legend_format(self._flavour.rename(query.legend)).exemplar(query.exemplar)
            built.append(Asked(query, letter, target))
        return built

    def _stat(self, one: Stat) -> Any:
        queries = self._queries(one.queries)
        if not queries:
            return None
        panel = (
            stat.Panel()
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
        return _named(panel, one)

    def _lines(self, one: Lines) -> Any:
        queries = self._queries(one.queries)
        if not queries:
            return None
        legend = (
            common.VizLegendOptions()
            .display_mode(options.LegendDisplayMode.TABLE)
            .placement(options.LegendPlacement.BOTTOM)
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
            lines.Panel()
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
        if one.drill:
            label = self._flavour.label("task_prefix_name")
            link = self._drill(f"${{__field.labels.{label}}}")
            panel.override_by_query(queries[0].letter, _properties({"links": link}))
        return _named(panel, one)

    def _heatmap(self, one: Heatmap) -> Any:
        buckets = promql.gained(f"<{one.histogram}_bucket>")
        queries = self._queries((Query(f"sum by (le) ({buckets})", "{{le}}", one.exemplar),))
        if not queries:
            return None
        ((_, _, target),) = queries
        color = (
            heatmap.HeatmapColorOptions()
            .mode(heat.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .scale(heat.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
            .fill("dark-orange")
            .reverse(False)
        )
        panel = (
            heatmap.Panel()
            .calculate(False)
            .color(color)
            .cell_gap(1)
            .cell_values(heatmap.CellValues().unit("short").decimals(0))
            .y_axis(heatmap.YAxisConfig().unit("bytes").axis_placement(options.AxisPlacement.LEFT))
            .rows_frame(heatmap.RowsHeatmapOptions().layout(options.HeatmapCellLayout.LE))
            .filter_values(heatmap.FilterValueRange().le(1e-9))
            .exemplars_color("rgba(31, 96, 196, 0.9)")
            .show_value(options.VisibilityMode.NEVER)
            .show_tooltip()
            .show_legend()
            .interval("30s")
            .targets([target.range().format(PromQueryFormat.HEATMAP)])
        )
        return _named(panel, one)

    def _table(self, one: Table) -> Any:
        by_letter = dict(zip(ascii_uppercase, one.columns, strict=False))
        asked = self._queries([Query(column.expr) for column in one.columns])
        if not asked:
            return None
        shown = [by_letter[query.letter] for query in asked]
        label, title = self._flavour.label(one.by[0]), one.by[1]
        # One query alone has its values in "Value", several in "Value #A" and so on.
        values = [f"Value #{query.letter}" if len(asked) > 1 else "Value" for query in asked]
        names = {label: title, **dict(zip(values, (c.title for c in shown), strict=True))}
        organize = {
            "excludeByName": {"Time": True},
            "indexByName": {name: index for index, name in enumerate(names)},
            "renameByName": names,
        }
        order: list[Builder[options.TableSortByFieldState]] = [
            common.TableSortByFieldState().display_name(name).desc(True)
            for name in one.sort
            if name in names.values()
        ]
        panel = (
            table.Panel()
            .no_value(one.no_value)
            .transformations(
                [
                    model.DataTransformerConfig("merge", options={}),
                    model.DataTransformerConfig("organize", options=organize),
                ]
            )
            .targets([query.target.instant().format(PromQueryFormat.TABLE) for query in asked])
            .sort_by(order[:1])
        )
        for column in shown:
            panel.override_by_name(column.title, _properties(_cell(column)))
        if one.by[0] == "task_prefix_name" and self._what.slug != _DRILL:
            link = self._drill(f'${{__data.fields["{title}"]}}')
            panel.override_by_name(title, _properties({"links": link}))
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
    if column.thresholds is not None:
        cell["thresholds"] = _thresholds(column.thresholds).build()
        cell["custom.cellOptions"] = {"type": "color-text"}
    return cell


def _properties(values: Mapping[str, object]) -> list[model.DynamicConfigValue]:
    return [model.DynamicConfigValue(name, value) for name, value in values.items()]
