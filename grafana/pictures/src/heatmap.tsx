// A heatmap, drawn by us: Grafana's own is part of its front end, which no package has. Axes and
// canvas are of Grafana's components; that the cells are ours is said on the panel's title.
import React, { useMemo } from 'react';
import uPlot from 'uplot';
import { DataFrame, Field, PanelProps, getValueFormat, formattedValueToString } from '@grafana/data';
import { AxisPlacement, ScaleDirection, ScaleOrientation } from '@grafana/schema';
import { UPlotChart, UPlotConfigBuilder, useTheme2 } from '@grafana/ui';
import { interpolateOranges } from 'd3-scale-chromatic';
import { Nothing } from './panels';

export function HeatmapPanel(props: PanelProps) {
  const theme = useTheme2();
  const { width, height, timeRange, timeZone, options } = props;
  const frame = props.data.series[0];
  const config = useMemo(
    () => frame && prepare(frame, options, theme, timeRange, timeZone),
    [frame, options, theme, timeRange, timeZone]
  );
  if (!config) {
    return <Nothing {...props} />;
  }
  const times = frame.fields[0].values;
  return (
    <UPlotChart
      config={config}
      data={[times, times.map(() => null)] as any}
      width={width}
      height={height}
    />
  );
}

function prepare(frame: DataFrame, options: any, theme: any, range: any, zone: string) {
  const [time, ...rows] = frame.fields;
  const most = Math.max(...rows.flatMap((row) => row.values));
  const format = getValueFormat(options.yAxis?.unit ?? 'short');
  const axis = { theme, grid: { show: false } };
  const builder = new UPlotConfigBuilder(zone);
  builder.addScale({
    scaleKey: 'x',
    isTime: true,
    orientation: ScaleOrientation.Horizontal,
    direction: ScaleDirection.Right,
    range: () => [range.from.valueOf(), range.to.valueOf()],
  });
  // Rows are as high as each other, whatever they span.
  builder.addScale({
    scaleKey: 'y',
    isTime: false,
    orientation: ScaleOrientation.Vertical,
    direction: ScaleDirection.Up,
    range: () => [0, rows.length],
  });
  builder.addAxis({ scaleKey: 'x', isTime: true, placement: AxisPlacement.Bottom, timeZone: zone, ...axis });
  builder.addAxis({
    scaleKey: 'y',
    placement: AxisPlacement.Left,
    splits: () => rows.map((_, index) => index + 1),
    incrs: [1, 2, 4, 8],
    values: (_, splits) => {
      const every = Math.ceil(splits.length / 10);
      return splits.map((at) => (at % every ? '' : bound(rows[at - 1], format)));
    },
    ...axis,
  } as any);
  builder.addSeries({ scaleKey: 'y', pathBuilder: () => null, pointsBuilder: () => false, theme } as any);
  builder.addHook('draw', (plot) => cells(plot, time, rows, most, options.color?.exponent ?? 0.5));
  return builder;
}

const bound = (row: Field, format: any) =>
  row.name === '+Inf' ? row.name : formattedValueToString(format(Number(row.name)));

function cells(plot: uPlot, time: Field, rows: Field[], most: number, exponent: number): void {
  const step = time.config.interval!;
  const gap = devicePixelRatio;
  plot.ctx.save();
  plot.ctx.beginPath();
  plot.ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
  plot.ctx.clip();
  rows.forEach((row, at) => {
    const top = plot.valToPos(at + 1, 'y', true);
    const bottom = plot.valToPos(at, 'y', true);
    row.values.forEach((count, index) => {
      if (count > 0) {
        // A step's tasks ended before its time.
        const left = plot.valToPos(time.values[index] - step, 'x', true);
        const right = plot.valToPos(time.values[index], 'x', true);
        plot.ctx.fillStyle = interpolateOranges(1 - (count / most) ** exponent * 0.9);
        plot.ctx.fillRect(left, top, right - left - gap, bottom - top - gap);
      }
    });
  });
  plot.ctx.restore();
}
