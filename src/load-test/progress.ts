/** How a test that is under way is shown: one line, from two moments of it. */
import type { Progress } from './load-test.ts';
import { shortMs } from './text.ts';

/** @param before an earlier moment of the same test, from which the rates follow; null at the first */
export function progressLine(before: Progress | null, now: Progress): string {
  if (now.phase === 'preparing') {
    const isFilling = now.preparedCount === now.deviceCount;
    const refusal = now.refusal === null ? '' : ` (${now.refusal})`;
    return `preparing: ${isFilling ? 'filling queues' : `${now.preparedCount} of ${now.deviceCount} devices${refusal}`}`;
  }
  const seconds = (ms: number) => (ms / 1000).toFixed(0);
  const time =
    now.phase === 'ending'
      ? 'ending'
      : `${seconds(Math.min(now.elapsedMs, now.durationMs))} of ${seconds(now.durationMs)} s`;
  const since = before === null || before.phase === 'preparing' ? null : before;
  const passedMs = now.elapsedMs - (since?.elapsedMs ?? 0);
  const parts = now.parts.map((part, index) => {
    const { offered = 0, completed = 0 } = since?.parts[index] ?? {};
    const rate = (count: number) => (passedMs > 0 ? `${Math.round((count * 1000) / passedMs)}/s` : '–');
    const latency =
      part.latencyMs === null
        ? ''
        : `, p50 ${shortMs(part.latencyMs.p50)} p99 ${shortMs(part.latencyMs.p99)} ms`;
    const failed = part.failed > 0 ? `, ${part.failed} failed` : '';
    return `${part.name}: offered ${rate(part.offered - offered)}, achieved ${rate(part.completed - completed)}${latency}, ${part.underWay} under way${failed}`;
  });
  return `${time} | ${parts.join(' | ')}`;
}
