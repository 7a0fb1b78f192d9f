/** Line plots: what is larger stands higher, and nothing is drawn where nothing was measured. */
import { describe, expect, it } from 'vitest';
import { escapeHtml, niceStep, type Plot, plotFigure } from '../../src/load-test/plot.ts';

type Point = Plot['series'][number]['points'][number];

function figure(points: Point[], more: Partial<Plot> = {}): string {
  return plotFigure({
    title: 'a plot',
    xName: 's',
    yName: 'ms',
    yScale: 'linear',
    xMax: 4,
    xTicks: [
      { at: 0, label: 'begin' },
      { at: 4, label: 'end' },
    ],
    series: [{ name: 'one', colour: 2, points }],
    ...more,
  });
}

const at = (...values: (number | null)[]): Point[] => values.map((y, x) => (y === null ? null : { x, y }));

/** The places of a path, by the letter that leads to each. */
function places(svg: string, kind: 'line' | 'dots'): { by: string; x: number; y: number }[] {
  const path = new RegExp(`<path class="${kind} c2" d="([^"]*)"`).exec(svg)![1]!;
  return [...path.matchAll(/([ML])([\d.]+) ([\d.]+)/g)].map(([, by, x, y]) => ({
    by: by!,
    x: Number(x),
    y: Number(y),
  }));
}

/** Where a label of an axis stands. */
function labelAt(svg: string, label: string, axis: 'x' | 'y'): number {
  return Number(
    new RegExp(`<text x="([\\d.]+)" y="([\\d.]+)" class="${axis}">${label}</text>`).exec(svg)![
      axis === 'x' ? 1 : 2
    ],
  );
}

describe('a plot', () => {
  it.each(['linear', 'log'] as const)('draws its values beside their labels on a %s scale', (yScale) => {
    const svg = figure(at(1, 10, 100), { yScale, xTicks: [0, 1, 2].map((x) => ({ at: x, label: `x${x}` })) });
    const line = places(svg, 'line');
    expect(line.map(({ x }) => x)).toEqual(['x0', 'x1', 'x2'].map((label) => labelAt(svg, label, 'x')));
    // The page's y grows downwards.
    expect(line[0]!.y).toBeGreaterThan(line[1]!.y);
    expect(line[2]!.y).toBe(labelAt(svg, '100', 'y'));
    const share = (line[0]!.y - line[1]!.y) / (line[0]!.y - line[2]!.y);
    expect(share).toBeCloseTo(yScale === 'log' ? 1 / 2 : 9 / 99, 2);
  });

  it('joins neighbours, breaks where nothing was measured, and makes a dot of what stands alone', () => {
    const svg = figure(at(1, 2, null, 3, null));
    expect(places(svg, 'line').map(({ by }) => by)).toEqual(['M', 'L']);
    expect(places(svg, 'dots')).toHaveLength(1);
    const broken = figure(at(1, 2, null, 3, 4));
    expect(places(broken, 'line').map(({ by }) => by)).toEqual(['M', 'L', 'M', 'L']);
  });

  it('names in its legend what it draws, and nothing else', () => {
    const none = { name: 'none', colour: 1, points: at(null, null) };
    const svg = figure([], { series: [none, { name: 'one', colour: 2, points: at(1, 2) }] });
    expect(svg.match(/<span class="key [^>]*>[^<]*/g)).toEqual(['<span class="key k2">one']);
  });

  it('keeps within its frame what lies beyond the axis', () => {
    const svg = figure([
      { x: 0, y: 1 },
      { x: 9, y: 1 },
    ]);
    expect(places(svg, 'line')[1]!.x).toBe(labelAt(svg, 'end', 'x'));
  });

  it('labels thousands, and is drawn also of nothing and of zeros', () => {
    expect(figure(at(0, 2_500))).toContain('>2.5k<');
    for (const yScale of ['linear', 'log'] as const) {
      for (const points of [[], at(0, 0)]) expect(figure(points, { yScale })).not.toMatch(/NaN|Infinity/);
    }
  });

  it('takes words as words', () => {
    expect(escapeHtml('<b a="1">&</b>')).toBe('&lt;b a=&quot;1&quot;&gt;&amp;&lt;/b&gt;');
    expect(figure(at(1), { title: '<script>' })).not.toContain('<script>');
  });
});

it.each([
  [0.7, 1],
  [1, 1],
  [1.01, 2],
  [2.1, 5],
  [5, 5],
  [5.1, 10],
  [0.03, 0.05],
  [1_200, 2_000],
])('the step for %d is %d', (least, step) => {
  expect(niceStep(least)).toBeCloseTo(step, 9);
});
