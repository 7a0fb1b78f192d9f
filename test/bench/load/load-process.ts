/** The load process: it opens sockets, drives them, and counts. */
import { answerCalls } from '../calls.ts';
import type { DeviceToken } from '../seed.ts';
import { driveBacklog } from './backlog.ts';
import { type ClaimsInput, driveClaims } from './claims.ts';
import { driveEnrolments } from './enrolments.ts';
import { connectAll, driveHandshakes } from './handshakes.ts';
import { driveMessages, type MessagesInput } from './messages.ts';
import type { RawSocket } from './raw-socket.ts';
import { openGate } from './ready.ts';
import { driveRefills, type RefillsInput } from './refills.ts';
import { driveReturns } from './returns.ts';

export interface OpenInput {
  name: string;
  /** Sockets are dealt out among them. */
  urls: readonly string[];
  devices: readonly DeviceToken[];
}

interface Group {
  sockets: RawSocket[];
  devices: readonly DeviceToken[];
}

const groups = new Map<string, Group>();

function groupOf({ name }: { name: string }): Group {
  const group = groups.get(name);
  if (group === undefined) throw new Error(`no sockets were opened for ${name}`);
  return group;
}

answerCalls({
  async open({ name, urls, devices }: OpenInput): Promise<{ elapsedMs: number }> {
    const startedAtMs = performance.now();
    const sockets = await connectAll(devices, (index) => urls[index % urls.length]!);
    groups.set(name, { sockets, devices });
    return { elapsedMs: performance.now() - startedAtMs };
  },

  /** Opens the gate of every device with a validation of the keys that it was seeded with. */
  async openGates(input: { name: string; validateInputs: string[] }): Promise<void> {
    const { sockets } = groupOf(input);
    await Promise.all(sockets.map((socket, index) => openGate(socket, input.validateInputs[index]!)));
  },

  claims: (input: ClaimsInput) => driveClaims(groupOf(input).sockets, input),

  messages(input: MessagesInput) {
    const { sockets, devices } = groupOf(input);
    return driveMessages(sockets, devices, input);
  },

  backlog: driveBacklog,

  handshakes: driveHandshakes,

  returns: driveReturns,

  enrolments: driveEnrolments,

  refills: (input: RefillsInput) => driveRefills(groupOf(input).sockets, input),

  close({ name }: { name: string }): void {
    for (const socket of groups.get(name)?.sockets ?? []) socket.close();
    groups.delete(name);
  },
});
