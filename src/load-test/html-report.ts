/** The result as one page that loads nothing: style and plots are in it. */
import type { StepResult } from './meter.ts';
import { escapeHtml, niceStep, plotFigure, type Series, type Tick } from './plot.ts';
import type { LoadResult, PartResult } from './result.ts';
import { booksOf, countsOf, planOf, shortMs } from './text.ts';

export function htmlReport(result: LoadResult): string {
  const { ownLoad, machine } = result;
  const passed = result.faults.length === 0;
  const unfinished = result.parts.reduce((sum, part) => sum + part.unfinished, 0);
  const found =
    unfinished === 0
      ? 'Nothing was lost, doubled or out of order.'
      : `Of what ended, nothing was lost, doubled or out of order; ${unfinished} operations did not end.`;
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Keygate load test, ${escapeHtml(result.startedAt)}</title>
<style>${STYLE}</style>
</head>
<body>
<header>
<h1>Keygate load test</h1>
<p>${escapeHtml(result.url)}, ${escapeHtml(result.startedAt.replace('T', ' ').slice(0, 19))} UTC, Keygate ${escapeHtml(result.keygateVersion)}${result.wasInterrupted ? ', <b>interrupted</b>' : ''}</p>
<p class="verdict ${passed ? 'good' : 'bad'}">${passed ? found : 'The gateway broke a promise, or nothing succeeded.'}</p>
${listOf('bad', result.faults)}
${listOf('warning', result.warnings)}
</header>
${result.parts.map(partSection).join('\n')}
<footer>
<p>Latency counts from when an operation was due, not from when it was sent, so that waiting for a slow answer is not left out.</p>
<p>Load process: ${ownLoad.cores.toFixed(2)} of a core, timers ${shortMs(ownLoad.eventLoopDelayP99Ms)} ms late at p99 and ${shortMs(ownLoad.eventLoopDelayMaxMs)} ms at most. Node ${escapeHtml(machine.node)}, ${machine.cpuCount} × ${escapeHtml(machine.cpu)}.</p>
</footer>
</body>
</html>
`;
}

function partSection(part: PartResult): string {
  const counts = [...countsOf(part), ...booksOf(part).map(([name, count]) => [name, String(count)] as const)];
  const failures = Object.entries(part.failures);
  return `<section>
<h2>${escapeHtml(part.plan.name)}</h2>
<p>${escapeHtml(planOf(part.plan))}</p>
<dl>${counts.map(([name, figure]) => `<div><dt>${escapeHtml(name)}</dt><dd>${escapeHtml(figure)}</dd></div>`).join('')}</dl>
${latencyTable(part.steps)}
${failures.length === 0 ? '' : `<p>Answered or ended with: ${failures.map(([code, count]) => `<code>${escapeHtml(code)}</code> ${count}`).join(', ')}</p>`}
${part.steps
  // One storm makes no line.
  .filter(({ overTime }) => overTime.filter((interval) => interval !== null).length > 1)
  .map((step) => latencyPlot(part, step))
  .join('\n')}
${percentilePlot(part.steps)}
${ratePlot(part)}
</section>`;
}

function latencyTable(steps: readonly StepResult[]): string {
  const rows = steps.map(
    ({ name, count, meanMs, ms }) =>
      `<tr><th>${escapeHtml(name)}</th><td>${count}</td>${[meanMs, ms.p50, ms.p90, ms.p99, ms.p999, ms.max]
        .map((value) => `<td>${count === 0 ? '–' : shortMs(value)}</td>`)
        .join('')}</tr>`,
  );
  return `<div class="scroll"><table><thead><tr><th>ms</th><th>count</th><th>mean</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>max</th></tr></thead><tbody>${rows.join('')}</tbody></table></div>`;
}

function latencyPlot({ intervalMs, rates }: PartResult, step: StepResult): string {
  const names = ['p50', 'p90', 'p99', 'max'] as const;
  return plotFigure({
    title: `${step.name}: latency over time`,
    xName: 'due after s',
    yName: 'ms',
    yScale: 'log',
    ...timeAxis(rates.offered.length, intervalMs),
    series: names.map((name, index) => ({
      name,
      colour: index + 1,
      points: step.overTime.map(
        (interval, at) => interval && { x: ((at + 0.5) * intervalMs) / 1000, y: interval.ms[name] },
      ),
    })),
  });
}

/** Each nine has the same width: 90 %, 99 %, 99.9 %. */
function percentilePlot(steps: readonly StepResult[]): string {
  const nines = (percentile: number) => -Math.log10(1 - percentile / 100);
  const told = steps.flatMap(({ curve }) => curve.map(({ percentile }) => nines(percentile)));
  const xMax = Math.max(1, ...told);
  const ticks: readonly Tick[] = [0, 50, 90, 99, 99.9, 99.99].map((percentile) => ({
    at: nines(percentile),
    label: String(percentile),
  }));
  return plotFigure({
    title: 'Latency by percentile',
    xName: 'percentile',
    yName: 'ms',
    yScale: 'log',
    xMax,
    xTicks: ticks.filter(({ at }) => at <= xMax),
    series: steps.map(
      ({ name, curve }, index): Series => ({
        name,
        colour: index + 1,
        points: curve.map(({ percentile, ms }) => ({ x: nines(percentile), y: ms })),
      }),
    ),
  });
}

function ratePlot({ rates, intervalMs }: PartResult): string {
  const perSecond = (counts: number[]) =>
    counts.map((count, at) => ({ x: ((at + 0.5) * intervalMs) / 1000, y: (count * 1000) / intervalMs }));
  return plotFigure({
    title: 'Operations a second',
    xName: 'after s',
    yName: '1/s',
    yScale: 'linear',
    ...timeAxis(rates.offered.length, intervalMs),
    series: [
      { name: 'offered', colour: 3, points: perSecond(rates.offered) },
      { name: 'achieved', colour: 1, points: perSecond(rates.achieved) },
    ],
  });
}

function timeAxis(intervalCount: number, intervalMs: number): { xMax: number; xTicks: Tick[] } {
  const xMax = (intervalCount * intervalMs) / 1000;
  const step = niceStep(xMax / 8);
  return {
    xMax,
    xTicks: Array.from({ length: Math.floor(xMax / step + 1e-9) + 1 }, (_, index) => {
      const at = index * step;
      return { at, label: String(Number(at.toPrecision(4))) };
    }),
  };
}

function listOf(kind: string, lines: readonly string[]): string {
  if (lines.length === 0) return '';
  return `<ul class="${kind}">${lines.map((line) => `<li>${escapeHtml(line)}</li>`).join('')}</ul>`;
}

const STYLE = `
:root { --paper: #fff; --ink: #1b1f24; --faint: #626b76; --rule: #dde1e6; --card: #f6f7f9;
  --c1: #0b62c4; --c2: #0e8a5f; --c3: #b35900; --c4: #b3261e; --good: #0e7a4f; --bad: #b3261e; --warning: #8a5200; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --faint: #98a2ae; --rule: #30363d; --card: #1c2026;
  --c1: #6cb0ff; --c2: #4fd1a0; --c3: #f0a35e; --c4: #ff8a80; --good: #4fd1a0; --bad: #ff8a80; --warning: #f0b75e; } }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 0; border-top: 1px solid var(--rule); padding-top: 1.2rem; }
p { margin: .3rem 0; } header p, section > p, footer { color: var(--faint); } footer { margin-top: 2.5rem; font-size: .87rem; }
header .verdict { font-weight: 600; margin-top: .8rem; } .good { color: var(--good) !important; } .bad { color: var(--bad) !important; }
.warning { color: var(--warning); } ul { margin: .4rem 0; padding-left: 1.2rem; }
dl { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; }
dl div { background: var(--card); border-radius: 6px; padding: .4rem .8rem; } dt { color: var(--faint); font-size: .8rem; } dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; } th:first-child { text-align: left; } thead th { color: var(--faint); font-weight: 400; }
figure { margin: 1.5rem 0 0; } figcaption { font-size: .9rem; } svg { width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 11px; } .x { text-anchor: middle; } .y { text-anchor: end; dominant-baseline: middle; } .end { text-anchor: end; }
.grid { stroke: var(--rule); } .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; } .dots { fill: none; stroke-width: 5; stroke-linecap: round; }
.c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); }
.key { margin-left: .8rem; color: var(--faint); } .key::before { content: ""; display: inline-block; width: .9rem; height: .2rem; margin-right: .35rem; vertical-align: middle; background: var(--c1); }
.k2::before { background: var(--c2); } .k3::before { background: var(--c3); } .k4::before { background: var(--c4); }
code { font-size: .9em; }
`;
