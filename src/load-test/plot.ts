/** Line plots as inline SVG. Colours come from the page, so that a plot is readable on light and on dark. */

export interface Series {
  name: string;
  /** Which of the page's line colours: 1 to 4. */
  colour: number;
  /** Null breaks the line. */
  points: ({ x: number; y: number } | null)[];
}

export interface Tick {
  at: number;
  label: string;
}

export interface Plot {
  title: string;
  /** What stands on the axes, with units. */
  xName: string;
  yName: string;
  yScale: 'linear' | 'log';
  xMax: number;
  xTicks: readonly Tick[];
  series: readonly Series[];
}

const WIDTH = 720;
const HEIGHT = 260;
const LEFT = 56;
const RIGHT = 12;
const TOP = 14;
const BOTTOM = 40;

/** @returns a `figure` with its legend */
export function plotFigure(plot: Plot): string {
  const series = plot.series.filter(({ points }) => points.some((point) => point !== null));
  const y = yAxisOf(
    plot.yScale,
    series.flatMap(({ points }) => points.flatMap((point) => (point === null ? [] : [point.y]))),
  );
  const xAt = (value: number) =>
    LEFT + (Math.min(value, plot.xMax) / Math.max(plot.xMax, 1e-9)) * (WIDTH - LEFT - RIGHT);
  const yAt = (value: number) => HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM);
  const grid = [
    ...y.ticks.map(({ at, label }) => {
      const height = yAt(at).toFixed(1);
      return `<path class="grid" d="M${LEFT} ${height}H${WIDTH - RIGHT}"/><text x="${LEFT - 8}" y="${height}" class="y">${label}</text>`;
    }),
    ...plot.xTicks.map(({ at, label }) => {
      const place = xAt(at).toFixed(1);
      return `<path class="grid" d="M${place} ${TOP}V${HEIGHT - BOTTOM}"/><text x="${place}" y="${HEIGHT - BOTTOM + 16}" class="x">${label}</text>`;
    }),
  ];
  const lines = series.map(({ points, colour }) => {
    const { line, dots } = pathsOf(points.map((point) => point && { x: xAt(point.x), y: yAt(point.y) }));
    return `<path class="line c${colour}" d="${line}"/><path class="dots c${colour}" d="${dots}"/>`;
  });
  const legend = series.map(({ name, colour }) => `<span class="key k${colour}">${escapeHtml(name)}</span>`);
  return `<figure><figcaption><b>${escapeHtml(plot.title)}</b> ${legend.join(' ')}</figcaption>
<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${escapeHtml(plot.title)}">
${grid.join('\n')}
<text x="${LEFT}" y="${TOP - 4}" class="name">${escapeHtml(plot.yName)}</text>
<text x="${WIDTH - RIGHT}" y="${HEIGHT - 6}" class="name end">${escapeHtml(plot.xName)}</text>
${lines.join('\n')}
</svg></figure>`;
}

/** Neighbours are joined; a point alone between gaps is a dot. */
function pathsOf(points: ({ x: number; y: number } | null)[]): { line: string; dots: string } {
  let line = '';
  let dots = '';
  points.forEach((point, index) => {
    if (point === null) return;
    const place = `${point.x.toFixed(1)} ${point.y.toFixed(1)}`;
    const isFirst = (points[index - 1] ?? null) === null;
    if (isFirst && (points[index + 1] ?? null) === null) dots += `M${place}h0`;
    else line += `${isFirst ? 'M' : 'L'}${place}`;
  });
  return { line, dots };
}

interface Axis {
  ticks: Tick[];
  /** From 0 at the bottom to 1 at the top. */
  share(value: number): number;
}

function yAxisOf(scale: Plot['yScale'], values: readonly number[]): Axis {
  // Not by spread: a plot may have more values than a call takes arguments.
  const largest = values.reduce((max, value) => Math.max(max, value), 0);
  if (scale === 'linear') {
    const step = niceStep(largest / 5);
    const top = Math.max(step, Math.ceil(largest / step) * step);
    return {
      ticks: Array.from({ length: Math.round(top / step) + 1 }, (_, index) => tick(index * step)),
      share: (value) => value / top,
    };
  }
  const smallest = values.reduce((min, value) => (value > 0 ? Math.min(min, value) : min), largest || 1);
  const low = Math.floor(Math.log10(smallest));
  const high = Math.max(low + 1, Math.ceil(Math.log10(largest || 1)));
  return {
    ticks: Array.from({ length: high - low + 1 }, (_, index) => tick(10 ** (low + index))),
    share: (value) => (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low),
  };
}

function tick(at: number): Tick {
  return {
    at,
    label: at >= 1000 ? `${Number((at / 1000).toPrecision(3))}k` : String(Number(at.toPrecision(3))),
  };
}

/** 1, 2 or 5 times a power of ten, at least `least`. */
export function niceStep(least: number): number {
  const power = 10 ** Math.floor(Math.log10(Math.max(least, 1e-9)));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least - 1e-12) ?? power * 10;
}

export function escapeHtml(text: string): string {
  return text
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;');
}
