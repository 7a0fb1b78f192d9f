/** A small time series: uPlot in the page's colours, as wide as its place. */
import { useEffect, useRef } from 'preact/hooks';
import uPlot from 'uplot';
import 'uplot/dist/uPlot.min.css';
import { THEME_CHANGED } from '../theme.ts';
import { clockTime } from '../time.ts';

export interface PlotSeries {
  label: string;
  /** The name of a CSS colour variable, as `--state-open`. */
  colour: string;
  /** By its dash it is known without its colour. */
  dash?: readonly number[];
}

export interface PlotProps {
  label: string;
  timesMs: readonly number[];
  series: readonly PlotSeries[];
  /** One list per series, as long as `timesMs`; null where nothing was measured. */
  values: readonly (readonly (number | null)[])[];
  format: (value: number) => string;
  heightPx?: number;
}

export function Plot(props: PlotProps) {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const latest = useRef(props);
  latest.current = props;
  const shape = props.series.map(({ label, colour }) => `${label} ${colour}`).join();

  // Another shape is another plot; new values come by the effect below.
  useEffect(() => {
    const element = place.current!;
    const draw = (): void => {
      plot.current?.destroy();
      plot.current = new uPlot(optionsOf(latest.current, element), dataOf(latest.current), element);
    };
    draw();
    const sizes = new ResizeObserver(() =>
      plot.current?.setSize({ width: element.clientWidth, height: heightOf(latest.current) }),
    );
    sizes.observe(element);
    document.addEventListener(THEME_CHANGED, draw);
    return () => {
      document.removeEventListener(THEME_CHANGED, draw);
      sizes.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [shape]);

  useEffect(() => {
    const drawn = plot.current;
    if (drawn === null) return;
    drawn.setData(dataOf(props));
    // The legend tells the newest values, unless the reader points at others.
    if ((drawn.cursor.left ?? -1) < 0) drawn.setLegend({ idx: props.timesMs.length - 1 });
  }, [props.timesMs, props.values]);

  return <div class="plot" ref={place} role="img" aria-label={props.label} />;
}

/** A canvas wants the colour itself, as the present theme has it. */
function computedColour(element: HTMLElement, variable: string): string {
  element.style.color = `var(${variable})`;
  const { color } = getComputedStyle(element);
  element.style.color = '';
  return color;
}

function heightOf({ heightPx = 150 }: PlotProps): number {
  return heightPx;
}

function dataOf({ timesMs, values }: PlotProps): uPlot.AlignedData {
  return [timesMs.map((timeMs) => timeMs / 1000), ...values.map((list) => [...list])];
}

function optionsOf(props: PlotProps, element: HTMLElement): uPlot.Options {
  const colour = (name: string): string => computedColour(element, name);
  const font = `11px ${getComputedStyle(element).fontFamily}`;
  const axis: uPlot.Axis = {
    stroke: colour('--text-3'),
    font,
    grid: { stroke: colour('--line'), width: 1 },
    ticks: { show: false },
  };
  return {
    width: element.clientWidth,
    height: heightOf(props),
    padding: [8, 8, 0, 0],
    cursor: { y: false, points: { size: 6 } },
    scales: { y: { range: (_plot, _min, max) => [0, Math.max(1, max ?? 1) * 1.1] } },
    axes: [
      {
        ...axis,
        size: 22,
        space: 80,
        values: (_plot, ticks) => ticks.map((tick) => clockTime(tick * 1000).slice(0, 8)),
      },
      { ...axis, size: 52, values: (_plot, ticks) => ticks.map((tick) => props.format(tick)) },
    ],
    series: [
      { value: (_plot, seconds) => (seconds === null ? '' : clockTime(seconds * 1000)) },
      ...props.series.map(
        (series): uPlot.Series => ({
          label: series.label,
          stroke: colour(series.colour),
          width: 1.5,
          ...(series.dash && { dash: [...series.dash] }),
          points: { show: false },
          value: (_plot, value) => (value === null ? '–' : props.format(value)),
        }),
      ),
    ],
  };
}
