// The data source: the run's own Prometheus, asked over its HTTP API.
//
// In Grafana its server asks, and shapes the answers into frames; here the frames are made as the
// dashboards' three formats need them (lines, tables, heatmaps).
import {
  DataFrame,
  DataFrameType,
  DataQueryRequest,
  DataQueryResponse,
  Field,
  FieldType,
  Labels,
  MetricFindValue,
  ScopedVars,
} from '@grafana/data';
import { RuntimeDataSource, SceneObject, sceneGraph } from '@grafana/scenes';

interface Query {
  refId: string;
  expr: string;
  legendFormat?: string;
  format?: 'time_series' | 'table' | 'heatmap';
  instant?: boolean;
  hide?: boolean;
}

interface Series {
  metric: Labels;
  value?: [number, string];
  values?: Array<[number, string]>;
}

const escape = (text: string) => text.replace(/\\/g, '\\\\').replace(/[$^*{}[\]'+?.()|]/g, '\\\\$&');

// A variable of many values is a regular expression in Prometheus' language; "All" is one already.
const asMatcher = (value: unknown) =>
  Array.isArray(value) ? `(${value.map(escape).join('|')})` : String(value);

export class Prometheus extends RuntimeDataSource {
  // What the data source's "scrape interval" would say in Grafana.
  interval = '1s';

  constructor(private url: string) {
    super('prometheus', 'prometheus');
  }

  async query(request: DataQueryRequest<any>): Promise<DataQueryResponse> {
    const asked = (request.targets as unknown as Query[]).filter((query) => !query.hide);
    const answers = await Promise.all(asked.map((query) => this.ask(query, request, asked.length > 1)));
    return { data: answers.flat(), state: 'Done' as any };
  }

  // What our variables ask: label_values(series, label) and query_result(expression).
  async metricFindQuery(query: any, options: any): Promise<MetricFindValue[]> {
    const { from, to } = options.range;
    const text = this.interpolate(query.query ?? query, {
      ...options.scopedVars,
      ...ranges(to.diff(from)),
    });
    const asked = /^query_result\((.*)\)$/s.exec(text);
    if (asked) {
      const { result } = await this.get('query', { query: asked[1], time: to.unix() });
      return result.map((one: Series) => {
        const { __name__, ...labels } = one.metric;
        const pairs = Object.entries(labels).map(([label, said]) => `${label}="${said}"`);
        return { text: `${__name__ ?? ''}{${pairs.join(',')}} ${one.value!.toReversed().join(' ')}` };
      });
    }
    const [, series, label] = /^label_values\((.*),\s*(\w+)\)$/s.exec(text)!;
    const found = await this.get(`label/${label}/values`, {
      'match[]': series,
      start: from.unix(),
      end: to.unix(),
    });
    return found.map((value: string) => ({ text: value }));
  }

  private interpolate(text: string, vars: ScopedVars): string {
    const where = vars.__sceneObject!.value.valueOf() as SceneObject;
    return sceneGraph.interpolate(where, text, vars, asMatcher);
  }

  private async ask(query: Query, request: DataQueryRequest, several: boolean): Promise<DataFrame[]> {
    const { from, to } = request.range;
    const expr = this.interpolate(query.expr, {
      ...request.scopedVars,
      ...ranges(to.diff(from)),
      __rate_interval: { value: `${Math.max(request.intervalMs / 1000 + 1, 4)}s` },
    });
    if (query.instant) {
      const found = await this.get('query', { query: expr, time: to.unix() });
      return query.format === 'table' ? [table(query, found.result, several)] : lines(query, found.result);
    }
    const step = Math.max(Math.round(request.intervalMs / 1000), 1);
    const found = await this.get('query_range', {
      query: expr,
      start: Math.floor(from.unix() / step) * step,
      end: Math.floor(to.unix() / step) * step,
      step,
    });
    return query.format === 'heatmap'
      ? heatmap(query, found.result, step)
      : lines(query, found.result, step);
  }

  private async get(what: string, parameters: Record<string, string | number>): Promise<any> {
    const asked = new URLSearchParams(parameters as Record<string, string>);
    const post = !what.startsWith('label/');
    const answer = await fetch(`${this.url}/api/v1/${what}${post ? '' : `?${asked}`}`, {
      ...(post && { method: 'POST', body: asked }),
    });
    const { status, data, error } = await answer.json();
    if (status !== 'success') {
      throw new Error(error);
    }
    return data;
  }
}

function ranges(milliseconds: number): ScopedVars {
  const seconds = Math.round(milliseconds / 1000);
  return { __range: { value: `${seconds}s` }, __range_s: { value: seconds } };
}

const points = (series: Series) => series.values ?? [series.value!];

const time = (values: number[], step?: number): Field => ({
  name: 'Time',
  type: FieldType.time,
  // Where a step is missing the line is broken.
  config: step ? { interval: step * 1000 } : {},
  values: values.map((second) => second * 1000),
});

const value = (values: string[], more: Partial<Field> = {}): Field => ({
  name: 'Value',
  type: FieldType.number,
  config: {},
  values: values.map((text) => Number(text.replace('Inf', 'Infinity'))),
  ...more,
});

const legend = (query: Query, labels: Labels) =>
  query.legendFormat?.replace(/{{\s*(\w+)\s*}}/g, (_, name) => labels[name] ?? '') ?? '';

function lines(query: Query, found: Series[], step?: number): DataFrame[] {
  return found.map((series) => {
    const name = legend(query, series.metric);
    const config = name ? { displayNameFromDS: name } : {};
    return {
      refId: query.refId,
      name,
      length: points(series).length,
      fields: [
        time(points(series).map(([at]) => at), step),
        value(points(series).map(([, text]) => text), { labels: series.metric, config }),
      ],
    };
  });
}

function table(query: Query, found: Series[], several: boolean): DataFrame {
  const names = [...new Set(found.flatMap((series) => Object.keys(series.metric)))].sort();
  const column = several ? `Value #${query.refId}` : 'Value';
  return {
    refId: query.refId,
    length: found.length,
    fields: [
      time(found.map((series) => series.value![0])),
      ...names.map((name) => ({
        name,
        type: FieldType.string,
        config: { filterable: true },
        values: found.map((series) => series.metric[name] ?? ''),
      })),
      value(found.map((series) => series.value![1]), { name: column }),
    ],
  };
}

// Prometheus' buckets are "up to"; a heatmap's rows are "between".
function heatmap(query: Query, found: Series[], step: number): DataFrame[] {
  const bound = (series: Series) => Number(series.metric.le.replace('Inf', 'Infinity'));
  const sorted = [...found].sort((one, other) => bound(one) - bound(other));
  const times = [...new Set(sorted.flatMap((series) => points(series).map(([at]) => at)))].sort();
  let below = times.map(() => 0);
  const fields = sorted.map((series) => {
    const at = new Map(points(series));
    const counts = times.map((second) => Number(at.get(second) ?? 0));
    const between = counts.map((count, index) => count - below[index]);
    below = counts;
    return { name: series.metric.le, type: FieldType.number, config: {}, values: between };
  });
  return sorted.length === 0
    ? []
    : [
        {
          refId: query.refId,
          meta: { type: DataFrameType.HeatmapRows },
          length: times.length,
          fields: [time(times, step), ...fields],
        },
      ];
}
