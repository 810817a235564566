// A dashboard's JSON as Grafana's schema package has it, each panel by the options of its own kind.
//
// Narrower than the package's Dashboard, whose panels take any options: what our panels are made of
// is spelled out here, so that an option that Grafana does not know is an error. A kind of panel
// that is not in Kinds is one as well: add it there.
import type * as schema from '@grafana/schema';
import type * as Heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as Stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as Table from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as Text from '@grafana/schema/dist/esm/raw/composable/text/panelcfg/x/TextPanelCfg_types.gen';
import type * as TimeSeries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// JSON has an enum's value where TypeScript wants its name.
type Json<T> = 0 extends 1 & T
  ? any
  : T extends string
    ? `${T}`
    : T extends number | boolean | null | undefined
      ? T
      : T extends (infer One)[]
        ? Json<One>[]
        : T extends object
          ? { [K in keyof T]: Json<T[K]> }
          : T;

// Grafana fills in the plugin's defaults for what a file leaves out, at any depth.
type Partly<T> = T extends (infer One)[]
  ? One[]
  : T extends object
    ? { [K in keyof T]?: Partly<T[K]> }
    : T;

interface Kinds {
  // Grafana 10 shows a tooltip where it says so; newer ones do by default.
  heatmap: { options: Heatmap.Options & { tooltip: { show?: boolean } }; custom: Heatmap.FieldConfig };
  stat: { options: Stat.Options; custom: never };
  table: { options: Table.Options; custom: Table.FieldConfig };
  text: { options: Text.Options; custom: never };
  timeseries: { options: TimeSeries.Options; custom: TimeSeries.FieldConfig };
}

type Standard = Omit<schema.FieldConfig, 'custom'>;

// The package types no override's value; its name says which field it stands for.
type Override<Custom> =
  | { [K in keyof Standard]-?: { id: K; value: Standard[K] } }[keyof Standard]
  | { [K in keyof Custom & string]-?: { id: `custom.${K}`; value: Custom[K] } }[keyof Custom & string];

interface Fields<Custom> {
  defaults: Standard & { custom?: Partial<Custom> };
  overrides: { matcher: schema.MatcherConfig; properties: Override<Custom>[] }[];
}

// Prometheus' queries are not in the package: what every data source's have is, the rest is ours.
interface Query extends Omit<schema.DataQuery, 'datasource'> {
  datasource?: schema.DataSourceRef;
  expr: string;
  legendFormat?: string;
  format?: 'time_series' | 'table' | 'heatmap';
  instant?: boolean;
  range?: boolean;
  exemplar?: boolean;
  interval?: string;
}

type Panel = {
  [Kind in keyof Kinds]: Omit<schema.Panel, 'type' | 'options' | 'fieldConfig' | 'targets'> & {
    type: Kind;
    options?: Partly<Kinds[Kind]['options']>;
    fieldConfig?: Fields<Kinds[Kind]['custom']>;
    targets?: Query[];
  };
}[keyof Kinds];

type Row = Omit<schema.RowPanel, 'panels'> & { panels: Panel[] };

export type DashboardJSON = Json<
  Omit<schema.Dashboard, 'panels' | 'annotations'> & {
    panels: (Panel | Row)[];
    annotations?: { list?: schema.AnnotationQuery<Query>[] };
  }
>;
