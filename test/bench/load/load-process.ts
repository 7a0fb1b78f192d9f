/** The load process: it opens sockets, drives them in closed loops, and counts. */
import { randomUUID } from 'node:crypto';
import { answerCalls } from '../calls.ts';
import type { Watched } from '../cpu.ts';
import type { DeviceToken } from '../seed.ts';
import { type Measurement, type Meter, startMeter, type Timing } from './measurement.ts';
import { RawSocket, type RawSocketListener } from './raw-socket.ts';

export interface OpenInput {
  name: string;
  url: string;
  devices: readonly DeviceToken[];
}

export interface ClaimsInput extends Timing {
  name: string;
  /** Users of one device each. */
  userIds: readonly string[];
  /** So often is each of them asked for; then the run ends. */
  claimsPerUser: number;
  watched: Record<string, Watched>;
}

export interface MessagesInput extends Timing {
  name: string;
  registrationIds: readonly number[];
  contentBytes: number;
  watched: Record<string, Watched>;
}

interface Opened {
  sockets: RawSocket[];
  devices: readonly DeviceToken[];
}

/** Handshakes under way at once. */
const HANDSHAKES_MAX = 64;
/** What is under way when the time is over may still come in. */
const SETTLE_MS = 1_000;

const silent: RawSocketListener = { onReply() {}, onEvent() {}, onClose() {} };
const groups = new Map<string, Opened>();

answerCalls({
  async open({ name, url, devices }: OpenInput): Promise<{ elapsedMs: number }> {
    const startedAtMs = performance.now();
    const sockets: RawSocket[] = [];
    let next = 0;
    await Promise.all(
      Array.from({ length: HANDSHAKES_MAX }, async () => {
        for (let index = next++; index < devices.length; index = next++) {
          sockets[index] = await RawSocket.open({ url, token: devices[index]!.token, listener: silent });
        }
      }),
    );
    groups.set(name, { sockets, devices });
    return { elapsedMs: performance.now() - startedAtMs };
  },

  async claims(input: ClaimsInput): Promise<Measurement> {
    const { sockets } = groups.get(input.name)!;
    const deck = shuffledDeck(input.userIds.length, input.claimsPerUser);
    let dealt = 0;
    return await run(sockets, input, (socket, meter) => {
      let sentAtMs = 0;
      const ask = (): void => {
        if (meter.isOver()) return;
        if (dealt === deck.length) {
          meter.endEarly();
          return;
        }
        const userId = input.userIds[deck[dealt++]!]!;
        sentAtMs = performance.now();
        socket.request('requestBundle', `{"claimId":"${randomUUID()}","userId":"${userId}","deviceId":1}`);
      };
      return {
        start: ask,
        onReply(_, text) {
          if (text.startsWith('[{"ok":true') && text.includes('"oneTimePreKey":{')) meter.done(sentAtMs);
          else meter.fault(faultOf(text));
          ask();
        },
        onEvent() {},
      };
    });
  },

  /** Opens the gate of every device with a validation of the keys that it was seeded with. */
  async openGates({ name, validateInputs }: { name: string; validateInputs: string[] }): Promise<void> {
    const { sockets } = groups.get(name)!;
    await Promise.all(
      sockets.map(async (socket, index) => {
        const verdict = JSON.parse(await ask(socket, 'validateKeys', validateInputs[index]!))[0];
        const ready = JSON.parse(
          await ask(socket, 'clientReady', JSON.stringify({ validation: verdict.data?.validation })),
        )[0];
        if (!ready.ok) throw new Error(`a gate did not open: ${JSON.stringify({ verdict, ready })}`);
      }),
    );
  },

  /** A ring: each device sends to the next, and sends again when its message is stored and was handed out. */
  async messages(input: MessagesInput): Promise<Measurement> {
    const { sockets, devices } = groups.get(input.name)!;
    const content = Buffer.alloc(input.contentBytes, 7).toString('base64');
    /** What is still awaited of a message: that it is stored, and that it is delivered. */
    const awaited = new Map<string, { steps: number; sentAtMs: number; again(): void }>();
    return await run(sockets, input, (socket, meter, index) => {
      const to = (index + 1) % sockets.length;
      let messageId = '';
      const send = (): void => {
        if (meter.isOver()) return;
        messageId = randomUUID();
        awaited.set(messageId, { steps: 2, sentAtMs: performance.now(), again: send });
        socket.request(
          'sendMessages',
          `{"messageId":"${messageId}","userId":"${devices[to]!.userId}","envelopes":[{"deviceId":1,"registrationId":${input.registrationIds[to]},"type":2,"content":"${content}"}]}`,
        );
      };
      const advance = (id: string): void => {
        const message = awaited.get(id);
        if (message === undefined) {
          meter.fault('a message that nobody waits for');
          return;
        }
        message.steps -= 1;
        if (message.steps > 0) return;
        awaited.delete(id);
        meter.done(message.sentAtMs);
        message.again();
      };
      return {
        start: send,
        onReply(_, text) {
          if (!text.startsWith('[{"ok":true')) meter.fault(faultOf(text));
          advance(messageId);
        },
        onEvent(id, text) {
          if (!text.startsWith('["messages"') || id === null) return;
          const [, { envelopes }] = JSON.parse(text) as [
            string,
            { envelopes: { id: string; messageId: string }[] },
          ];
          socket.acknowledge(id, JSON.stringify({ processed: envelopes.map((envelope) => envelope.id) }));
          for (const envelope of envelopes) advance(envelope.messageId);
        },
      };
    });
  },

  close({ name }: { name: string }): void {
    for (const socket of groups.get(name)?.sockets ?? []) socket.close();
    groups.delete(name);
  },
});

interface Player {
  start(): void;
  onReply(id: number, text: string): void;
  onEvent(id: number | null, text: string): void;
}

async function run(
  sockets: readonly RawSocket[],
  input: Timing & { watched: Record<string, Watched> },
  playerOf: (socket: RawSocket, meter: Meter, index: number) => Player,
): Promise<Measurement> {
  const meter = startMeter(input, input.watched);
  const players = sockets.map((socket, index) => {
    const player = playerOf(socket, meter, index);
    socket.listener = {
      onReply: player.onReply,
      onEvent: player.onEvent,
      onClose: () => meter.fault('a socket was closed'),
    };
    return player;
  });
  for (const player of players) player.start();
  await meter.over;
  await new Promise((resolve) => setTimeout(resolve, SETTLE_MS));
  for (const socket of sockets) socket.listener = silent;
  return meter.result();
}

function ask(socket: RawSocket, event: string, input: string): Promise<string> {
  return new Promise((resolve) => {
    socket.listener = { ...silent, onReply: (_, text) => resolve(text) };
    socket.request(event, input);
  });
}

/** Every number below `kinds`, `copies` times, in random order: spread like chance, and never more than there is. */
function shuffledDeck(kinds: number, copies: number): Uint32Array {
  const deck = Uint32Array.from({ length: kinds * copies }, (_, i) => i % kinds);
  for (let i = deck.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [deck[i], deck[j]] = [deck[j]!, deck[i]!];
  }
  return deck;
}

function faultOf(text: string): string {
  const [, code] = /"code":"([A-Z_]+)"/.exec(text) ?? [];
  return (
    code ?? (text.includes('"oneTimePreKey":null') ? 'bundle without one-time prekey' : text.slice(0, 80))
  );
}
