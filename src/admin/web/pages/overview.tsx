/** How the whole installation does: the last ten minutes, one sample a second. */
import { useState } from 'preact/hooks';
import type { OverviewSample } from '../../../protocol/inspector/overview.ts';
import { addressOf } from '../address.ts';
import type { Session } from '../app.tsx';
import { count } from '../format.ts';
import { useChanges } from '../hooks.ts';
import type { OverviewFeed } from '../overview-feed.ts';
import { Card, DeviceLink, Empty } from '../parts/bits.tsx';
import { GateBadge } from '../parts/gate.tsx';
import { Plot } from '../parts/plot.tsx';
import { duration } from '../time.ts';

const GATES = ['open', 'validated', 'connected'] as const;

export function OverviewPage({ overview, session }: { overview: OverviewFeed; session: Session }) {
  useChanges(overview);
  const { samples } = overview;
  const latest = samples.at(-1);
  if (latest === undefined) {
    return (
      <Empty
        title={
          overview.status === 'lost' ? 'The gateway does not answer.' : 'The first sample is on its way.'
        }
      >
        {overview.status === 'lost'
          ? 'The page tries again by itself.'
          : 'The gateway sends one each second.'}
      </Empty>
    );
  }
  const timesMs = samples.map(({ time }) => Date.parse(time));
  const lastOf = (pick: (sample: OverviewSample) => number): string => count(pick(latest));

  return (
    <div class="overview">
      <h1 class="hidden">Overview</h1>
      <dl class="figures">
        <Figure name="Sockets" value={count(latest.sockets)} href={addressOf('sockets')} />
        {GATES.map((gate) => (
          <Figure
            key={gate}
            name={<GateBadge gate={gate} />}
            value={count(latest.gates[gate])}
            href={addressOf('sockets', null, `gate=${gate}`)}
          />
        ))}
        <Figure
          name="Events per second"
          value={count(Math.round(latest.eventsPerSecond))}
          href={addressOf('events')}
        />
        <Figure
          name="Low devices"
          value={
            latest.lowDevices === null
              ? '–'
              : `${count(latest.lowDevices.length)}${latest.lowDevices.length >= 20 ? '+' : ''}`
          }
        />
      </dl>
      <Card title="Events per second" note={`now ${lastOf((sample) => Math.round(sample.eventsPerSecond))}`}>
        <Plot
          label="Events per second over the last ten minutes"
          timesMs={timesMs}
          series={[{ label: 'events', colour: '--plot-1' }]}
          values={[samples.map(({ eventsPerSecond }) => eventsPerSecond)]}
          format={(value) => count(Math.round(value))}
        />
      </Card>
      <Card title="Sockets by gate state">
        <Plot
          label="Sockets by gate state over the last ten minutes"
          timesMs={timesMs}
          series={[
            { label: 'open', colour: '--state-open' },
            { label: 'validated', colour: '--state-validated', dash: [8, 4] },
            { label: 'connected', colour: '--state-connected', dash: [2, 3] },
          ]}
          values={GATES.map((gate) => samples.map(({ gates }) => gates[gate]))}
          format={(value) => count(Math.round(value))}
        />
      </Card>
      <Card title="Prekeys handed out per second">
        <Plot
          label="One-time prekeys handed out per second over the last ten minutes"
          timesMs={timesMs}
          series={[
            { label: 'EC', colour: '--plot-1' },
            { label: 'PQ', colour: '--plot-3', dash: [8, 4] },
            { label: 'without one', colour: '--plot-2', dash: [2, 3] },
          ]}
          values={[
            samples.map(({ preKeys }) => preKeys.ec),
            samples.map(({ preKeys }) => preKeys.pq),
            samples.map(({ preKeys }) => preKeys.fallback),
          ]}
          format={(value) => count(Math.round(value))}
        />
      </Card>
      <Card title="Messages per second">
        <Plot
          label="Messages stored, pushed, acknowledged and bounced per second over the last ten minutes"
          timesMs={timesMs}
          series={[
            { label: 'stored', colour: '--plot-1' },
            { label: 'pushed', colour: '--plot-4', dash: [8, 4] },
            { label: 'acknowledged', colour: '--plot-3', dash: [2, 3] },
            { label: 'bounced', colour: '--plot-2' },
          ]}
          values={(['stored', 'pushed', 'acknowledged', 'bounced'] as const).map((stage) =>
            samples.map(({ messages }) => messages[stage]),
          )}
          format={(value) => count(Math.round(value))}
        />
      </Card>
      <Latency samples={samples} timesMs={timesMs} />
      <LowDevices low={latest.lowDevices} />
      <Card title="Nodes" note={`this page is served by ${session.node}, version ${session.version}`}>
        <ul class="nodes">
          {latest.nodes.map(({ node, answering }) => (
            <li key={node}>
              <span class="mono">{node}</span>
              {answering ? (
                <span class="quiet">answering</span>
              ) : (
                <span class="closed-because">silent: what it sees is missing here</span>
              )}
            </li>
          ))}
        </ul>
        {latest.droppedTotal > 0 && (
          <p class="quiet">
            {count(latest.droppedTotal)} events were left out for viewers that were too slow.
          </p>
        )}
      </Card>
    </div>
  );
}

function Figure({ name, value, href }: { name: preact.ComponentChildren; value: string; href?: string }) {
  return (
    <div class="figure">
      <dt>{name}</dt>
      <dd>{href === undefined ? value : <a href={href}>{value}</a>}</dd>
    </div>
  );
}

interface LatencyLine {
  event: string;
  count: number;
  errorCount: number;
  p50Ms: number;
  p99Ms: number;
  worstP99Ms: number;
}

const RECENT_SAMPLES = 60;

/** Of the last minute: counts are sums, p50 and p99 those of the last second that had any. */
function latencyLines(samples: readonly OverviewSample[]): LatencyLine[] {
  const lines = new Map<string, LatencyLine>();
  for (const { requests } of samples.slice(-RECENT_SAMPLES)) {
    for (const request of requests) {
      if (request.count === 0) continue;
      const old = lines.get(request.event);
      lines.set(request.event, {
        ...request,
        count: (old?.count ?? 0) + request.count,
        errorCount: (old?.errorCount ?? 0) + request.errorCount,
        worstP99Ms: Math.max(old?.worstP99Ms ?? 0, request.p99Ms),
      });
    }
  }
  return [...lines.values()].sort((one, other) => other.count - one.count);
}

function Latency({ samples, timesMs }: { samples: readonly OverviewSample[]; timesMs: readonly number[] }) {
  const [chosen, setChosen] = useState<string | null>(null);
  const lines = latencyLines(samples);
  const event = chosen ?? lines[0]?.event ?? null;
  if (event === null) {
    return (
      <Card title="Latency by request" class="wide">
        <Empty title="No requests in the last minute.">
          They appear here as soon as a client asks for something.
        </Empty>
      </Card>
    );
  }
  const pick = (name: 'p50Ms' | 'p99Ms') =>
    samples.map(
      ({ requests }) => requests.find((one) => one.event === event && one.count > 0)?.[name] ?? null,
    );
  return (
    <Card title="Latency by request" note="of the last minute; choose one to plot it" class="wide latency">
      <div class="scroll-x">
        <table>
          <thead>
            <tr>
              <th>Request</th>
              <th class="number">Count</th>
              <th class="number">Refused</th>
              <th class="number">p50</th>
              <th class="number">p99</th>
              <th class="number">worst p99</th>
            </tr>
          </thead>
          <tbody>
            {lines.map((line) => (
              <tr key={line.event} class={line.event === event ? 'is-selected' : ''}>
                <td>
                  <button
                    type="button"
                    class="link mono"
                    aria-pressed={line.event === event}
                    onClick={() => setChosen(line.event)}
                  >
                    {line.event}
                  </button>
                </td>
                <td class="number">{count(line.count)}</td>
                <td class={`number ${line.errorCount > 0 ? 'closed-because' : 'quiet'}`}>
                  {count(line.errorCount)}
                </td>
                <td class="number">{duration(line.p50Ms)}</td>
                <td class="number">{duration(line.p99Ms)}</td>
                <td class="number">{duration(line.worstP99Ms)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <Plot
        label={`p50 and p99 of ${event} over the last ten minutes`}
        timesMs={timesMs}
        series={[
          { label: `${event} p50`, colour: '--plot-1' },
          { label: 'p99', colour: '--plot-2', dash: [8, 4] },
        ]}
        values={[pick('p50Ms'), pick('p99Ms')]}
        format={duration}
      />
    </Card>
  );
}

function LowDevices({ low }: { low: OverviewSample['lowDevices'] }) {
  return (
    <Card title="Devices that run low" note="of one-time prekeys; lowest first">
      {low === null && <p class="quiet">The store did not say in time; it is asked again.</p>}
      {low?.length === 0 && <p class="quiet">None: every pool is above its threshold.</p>}
      {low !== null && low.length > 0 && (
        <table>
          <thead>
            <tr>
              <th>Device</th>
              <th class="number">EC left</th>
              <th class="number">PQ left</th>
            </tr>
          </thead>
          <tbody>
            {low.map(({ device, availableCount, pqAvailableCount }) => (
              <tr key={device}>
                <td>
                  <DeviceLink device={device} />
                </td>
                <td class={`number ${availableCount === 0 ? 'closed-because' : ''}`}>
                  {count(availableCount)}
                </td>
                <td class={`number ${pqAvailableCount === 0 ? 'closed-because' : ''}`}>
                  {count(pqAvailableCount)}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </Card>
  );
}
