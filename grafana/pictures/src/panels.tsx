// Panels by Grafana's own components. In Grafana panels are plugins of its front end, which no
// package has: what joins a component to a dashboard's options is therefore ours.
import React, { useMemo } from 'react';
import {
  DataFrame,
  FieldColorModeId,
  FieldType,
  PanelPlugin,
  PanelProps,
  VizOrientation,
  cacheFieldDisplayNames,
  getDisplayValueAlignmentFactors,
  getFieldDisplayValues,
} from '@grafana/data';
import {
  BigValue,
  BigValueColorMode,
  BigValueGraphMode,
  BigValueJustifyMode,
  BigValueTextMode,
  TimeSeries,
  VizRepeater,
  useTheme2,
} from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import { withFields } from './fields';
import { HeatmapPanel } from './heatmap';

// As Grafana says it where a panel has nothing to show.
export function Nothing({ fieldConfig, width, height }: Partial<PanelProps>) {
  const style = { width, height, display: 'flex', alignItems: 'center', justifyContent: 'center' };
  return <div style={style}>{fieldConfig?.defaults.noValue || 'No data'}</div>;
}

// What is no number is a gap in a line.
const withGaps = (frame: DataFrame): DataFrame => ({
  ...frame,
  fields: frame.fields.map((field) =>
    field.type === FieldType.number
      ? { ...field, values: field.values.map((one) => (Number.isFinite(one) ? one : null)) }
      : field
  ),
});

const isEmpty = (props: PanelProps) => props.data.series.every((frame) => frame.length === 0);

function StatPanel(props: PanelProps) {
  const { options, data, fieldConfig, replaceVariables, timeZone } = props;
  const theme = useTheme2();
  return (
    <VizRepeater
      getValues={() =>
        getFieldDisplayValues({
          fieldConfig,
          reduceOptions: { values: false, ...options.reduceOptions },
          replaceVariables,
          theme,
          data: data.series,
          sparkline: options.graphMode !== BigValueGraphMode.None,
          timeZone,
        })
      }
      getAlignmentFactors={getDisplayValueAlignmentFactors as any}
      renderValue={({ value, width, height, alignmentFactors, count }: any) => (
        <BigValue
          value={value.display}
          count={count}
          sparkline={value.sparkline}
          colorMode={options.colorMode ?? BigValueColorMode.Value}
          graphMode={options.graphMode ?? BigValueGraphMode.Area}
          justifyMode={options.justifyMode ?? BigValueJustifyMode.Auto}
          textMode={count > 1 ? BigValueTextMode.ValueAndName : options.textMode}
          alignmentFactors={alignmentFactors}
          width={width}
          height={height}
          theme={theme}
        />
      )}
      width={props.width}
      height={props.height}
      source={data}
      itemSpacing={3}
      renderCounter={props.renderCounter}
      autoGrid
      orientation={options.orientation ?? VizOrientation.Auto}
    />
  );
}

function TimeSeriesPanel(props: PanelProps) {
  const { data, options, width, height, timeRange, timeZone } = props;
  const frames = useMemo(() => data.series.map(withGaps), [data.series]);
  return isEmpty(props) ? (
    <Nothing {...props} />
  ) : (
    <TimeSeries
      frames={frames}
      structureRev={data.structureRev}
      timeRange={timeRange}
      timeZone={timeZone}
      width={width}
      height={height}
      legend={options.legend}
      options={options}
    />
  );
}

function TablePanel(props: PanelProps) {
  const { data, options, width, height, timeRange, fieldConfig, structureRev } = props as any;
  // The table's head and its order go by the names that overrides and transformations gave.
  useMemo(() => cacheFieldDisplayNames(data.series), [data.series]);
  return isEmpty(props) ? (
    <Nothing {...props} />
  ) : (
    <TableNG
      data={data.series[options.frameIndex ?? 0]}
      width={width}
      height={height}
      noHeader={options.showHeader === false}
      sortBy={options.sortBy}
      cellHeight={options.cellHeight}
      timeRange={timeRange}
      fieldConfig={fieldConfig}
      structureRev={structureRev}
      noValue={fieldConfig.defaults.noValue}
    />
  );
}

const LINES = {
  drawStyle: 'line',
  lineInterpolation: 'linear',
  lineWidth: 1,
  lineStyle: { fill: 'solid' },
  fillOpacity: 0,
  gradientMode: 'none',
  barAlignment: 0,
  showPoints: 'auto',
  pointSize: 5,
  spanNulls: false,
  stacking: { mode: 'none', group: 'A' },
  scaleDistribution: { type: 'linear' },
  axisPlacement: 'auto',
  axisLabel: '',
  thresholdsStyle: { mode: 'off' },
  hideFrom: { legend: false, tooltip: false, viz: false },
};

const CELLS = {
  width: undefined,
  minWidth: undefined,
  align: 'auto',
  cellOptions: { type: 'auto' },
  hidden: false,
  filterable: false,
  inspect: false,
};

export const PANELS: Record<string, PanelPlugin<any, any>> = {
  stat: withFields(new PanelPlugin(StatPanel), FieldColorModeId.Thresholds),
  timeseries: withFields(new PanelPlugin(TimeSeriesPanel), FieldColorModeId.PaletteClassic, LINES),
  table: withFields(new PanelPlugin(TablePanel), FieldColorModeId.Thresholds, CELLS),
  heatmap: withFields(new PanelPlugin(HeatmapPanel), FieldColorModeId.Thresholds),
};
