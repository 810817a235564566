// A dashboard's JSON as a scene: what Grafana's front end does when it opens one.
import {
  ConstantVariable,
  CustomVariable,
  DataSourceVariable,
  EmbeddedScene,
  QueryVariable,
  SceneDataTransformer,
  SceneGridItem,
  SceneGridLayout,
  SceneGridRow,
  SceneQueryRunner,
  SceneTimePicker,
  SceneTimeRange,
  SceneVariable,
  SceneVariableSet,
  VariableValueSelectors,
  VizPanel,
  SceneControlsSpacer,
} from '@grafana/scenes';

// Panels that Grafana's packages have no component for.
const OURS: Record<string, string> = { heatmap: 'cells drawn by us' };

export function scene(dashboard: any, from: string, to: string, chosen: Record<string, string>): EmbeddedScene {
  const children: any[] = [];
  for (const panel of dashboard.panels) {
    const { x, y, w: width, h: height } = panel.gridPos;
    if (panel.type === 'row') {
      children.push(new SceneGridRow({ key: `row-${panel.id}`, title: panel.title, y, children: [] }));
      continue;
    }
    const row = children.at(-1);
    const into: any[] = row instanceof SceneGridRow ? row.state.children : children;
    into.push(
      new SceneGridItem({ key: `item-${panel.id}`, x, y, width, height, body: vizPanel(panel) })
    );
  }
  return new EmbeddedScene({
    $timeRange: new SceneTimeRange({ from, to, timeZone: 'utc' }),
    $variables: new SceneVariableSet({
      variables: dashboard.templating.list.map((one: any) => variable(one, chosen)),
    }),
    controls: [
      new VariableValueSelectors({}),
      new SceneControlsSpacer(),
      new SceneTimePicker({}),
    ],
    body: new SceneGridLayout({ isDraggable: false, isResizable: false, isLazy: false, children }),
  });
}

function vizPanel(panel: any): VizPanel {
  const queries = new SceneQueryRunner({
    datasource: panel.datasource,
    queries: panel.targets,
    minInterval: panel.interval,
    maxDataPointsFromWidth: true,
  });
  const ours = OURS[panel.type];
  return new VizPanel({
    key: `panel-${panel.id}`,
    pluginId: panel.type,
    title: ours ? `${panel.title}  [${ours}]` : panel.title,
    description: panel.description,
    options: panel.options,
    fieldConfig: panel.fieldConfig,
    $data: new SceneDataTransformer({ $data: queries, transformations: panel.transformations ?? [] }),
  });
}

function variable(model: any, chosen: Record<string, string>): SceneVariable {
  const common = { name: model.name, label: model.label, description: model.description, hide: model.hide };
  const many = {
    isMulti: model.multi,
    includeAll: model.includeAll,
    allValue: model.allValue,
    defaultToAll: model.includeAll,
    value: chosen[model.name] ?? model.current?.value,
    text: chosen[model.name] ?? model.current?.text,
  };
  switch (model.type) {
    case 'datasource':
      return new DataSourceVariable({ ...common, pluginId: model.query });
    case 'query':
      return new QueryVariable({
        ...common,
        ...many,
        datasource: model.datasource,
        query: model.query,
        refresh: model.refresh,
        sort: model.sort,
        regex: model.regex,
      });
    case 'custom':
      return new CustomVariable({ ...common, ...many, query: model.query });
    case 'constant':
      return new ConstantVariable({ ...common, value: model.query });
    default:
      throw new Error(`a variable of type ${model.type} is not known here`);
  }
}
