/** Backlogs, one device after the other: from `clientReady` to `queueEmpty`, acknowledged whenever that is asked for. */
import type { Watched } from '../cpu.ts';
import type { DeviceToken } from '../seed.ts';
import { type Measurement, readCpu } from './measurement.ts';
import { RawSocket } from './raw-socket.ts';
import { validationOf } from './ready.ts';

export interface BacklogInput {
  url: string;
  /** The first one is the warm-up. */
  devices: readonly DeviceToken[];
  /** What each says to have its gate opened. */
  validateInputs: readonly string[];
  /** Beside the validation, what `clientReady` is given. */
  ready: Record<string, unknown>;
  /** Messages that wait for each device. */
  backlog: number;
  watched: Record<string, Watched>;
}

interface Drained {
  elapsedMs: number;
  cpuMs: Record<string, number>;
  fault: string | null;
}

export async function driveBacklog(input: BacklogInput): Promise<Measurement> {
  const drained: Drained[] = [];
  for (const [index, { token }] of input.devices.entries()) {
    drained.push(await drain(input, token, input.validateInputs[index]!));
  }
  const faults: Record<string, number> = {};
  for (const { fault } of drained) if (fault !== null) faults[fault] = (faults[fault] ?? 0) + 1;
  const measured = drained.slice(1);
  const cpuMs: Record<string, number> = {};
  for (const { cpuMs: own } of measured) {
    for (const [name, ms] of Object.entries(own)) cpuMs[name] = (cpuMs[name] ?? 0) + ms;
  }
  return {
    operations: measured.length * input.backlog,
    operationsInAll: drained.length * input.backlog,
    elapsedMs: measured.reduce((sum, { elapsedMs }) => sum + elapsedMs, 0),
    latencyMs: null,
    cpuMs,
    faults,
    endedEarly: false,
  };
}

async function drain(
  { url, backlog, ready, watched }: BacklogInput,
  token: string,
  validateInput: string,
): Promise<Drained> {
  const seen = new Set<string>();
  const socket = await RawSocket.open({ url, token });
  try {
    const validation = await validationOf(socket, validateInput);
    let held: string[] = [];
    const before = readCpu(watched);
    const startMs = performance.now();
    const end = await new Promise<string>((resolve) => {
      socket.listener = {
        onReply(_, text) {
          if (!text.startsWith('[{"ok":true')) resolve(`clientReady: ${text.slice(0, 80)}`);
        },
        onEvent(id, text) {
          if (text.startsWith('["queueEmpty"')) resolve('');
          if (!text.startsWith('["messages"')) return;
          held.push(...idsIn(text));
          if (id === null) return;
          socket.acknowledge(id, `{"processed":["${held.join('","')}"]}`);
          for (const envelopeId of held) seen.add(envelopeId);
          held = [];
        },
        onClose: () => resolve('a socket was closed'),
      };
      socket.request('clientReady', JSON.stringify({ validation, ...ready }));
    });
    const elapsedMs = performance.now() - startMs;
    const after = readCpu(watched);
    const isWhole = seen.size === backlog;
    return {
      elapsedMs,
      cpuMs: Object.fromEntries(Object.keys(after).map((name) => [name, after[name]! - before[name]!])),
      fault: end !== '' ? end : isWhole ? null : `${seen.size} of ${backlog} messages came`,
    };
  } finally {
    socket.close();
  }
}

/** Found rather than parsed: on a small machine the load process must leave the processor to the server. */
function idsIn(page: string): string[] {
  const mark = '{"id":"';
  const ids: string[] = [];
  for (let at = page.indexOf(mark); at >= 0; at = page.indexOf(mark, at)) {
    at += mark.length;
    ids.push(page.slice(at, page.indexOf('"', at)));
  }
  return ids;
}
