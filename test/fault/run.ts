/** One run: phones that do what the seed says, a fault in their midst, and the history of it all, which is checked. */
import { setTimeout as pause } from 'node:timers/promises';
import { addressKey } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';
import { tokenFor } from '../support/gateway.ts';
import type { Violation } from './book.ts';
import { check } from './checker.ts';
import type { FinalState, HistoryEvent } from './history.ts';
import { createPhone, type Phone } from './phone.ts';
import { type Random, seeded } from './random.ts';
import type { ProcessStage, Stage } from './stage.ts';

/** What a fault has to work with. Whatever it breaks, it has mended when it resolves. */
export interface Scene<S extends Stage = ProcessStage> {
  stage: S;
  random: Random;
  phones: readonly Phone[];
  /** Resolves when so many more actions of phones have ended. */
  actions(count: number): Promise<void>;
  /** Resolves when phones were refused with this code, or got no answer (`broken`), so many more times. */
  troubles(what: string, count: number): Promise<void>;
  /** How long something stays broken: until this has happened; in the soak at least for a time of the seed's choice. */
  broken(until: Promise<unknown>): Promise<void>;
  /** A phone that comes by another way, and does only what the fault makes it do. */
  guest(url: string): Promise<Phone>;
  /** What another process observed goes into the history; its numbers are its own. */
  record(event: HistoryEvent): void;
  /** Begins the ids of this run's users. */
  prefix: string;
}

export type Fault<S extends Stage = ProcessStage> = (scene: Scene<S>) => Promise<void>;

export interface RunOptions<S extends Stage> {
  stage: S;
  seed: number;
  /** Begins when the phones are at work; they go on until it is over. */
  fault: Fault<S>;
  phones?: number;
  /** What the phones do at least. */
  actions?: number;
  /** How long at least something stays broken. */
  brokenMs?: (random: Random) => number;
  /** The longest time that anything of this run may take. */
  waitMaxMs?: number;
}

export interface Outcome {
  violations: Violation[];
  /** Requests by name, answers that were no success by code, deliveries. */
  counts: Record<string, number>;
  history: readonly HistoryEvent[];
}

/** Actions under way at once. */
const WORKERS = 6;
/** Actions before the fault begins. */
const WARM_UP = 12;
const PRE_KEYS = 12;
/** Longer than any step of a clock. */
const TOKEN_TTL_MS = 86_400_000;
const WAIT_MAX_MS = 45_000;

let runs = 0;

/** @throws Error where the phones or the queues do not recover in time */
export async function run<S extends Stage>(options: RunOptions<S>): Promise<Outcome> {
  const {
    stage,
    seed,
    fault,
    phones: phoneCount = 5,
    actions: actionsMin = 60,
    waitMaxMs = WAIT_MAX_MS,
  } = options;
  const random = seeded(seed);
  const history: HistoryEvent[] = [];
  const record = (event: HistoryEvent): void => void history.push(event);
  let counted = 0;
  const count = (): number => ++counted;
  const prefix = `f${process.pid}-${++runs}-`;
  stage.onGatewayEnd = (end) => record({ event: 'gatewayEnded', ...end });

  const witnesses: Promise<void>[] = [];
  const all: Phone[] = [];
  const join = async (url: string): Promise<Phone> => {
    const index = all.length;
    const address = { userId: `${prefix}${index}`, deviceId: 1 };
    const phone = createPhone({
      ...{ address, url, record, count, oneTimePreKeys: PRE_KEYS },
      token: await tokenFor(address, { ttlMs: TOKEN_TTL_MS }),
      random: seeded(seed * 1_000 + index),
      onAnswer: (request, answered) => {
        if (request % 3 === 0) witnesses.push(witness(stage, { request, ...answered }, record));
      },
    });
    all.push(phone);
    await Promise.all([phone.start(), soon(() => phone.isOpen(), `the gate of ${addressKey(address)}`)]);
    return phone;
  };
  const troublesOf = (what: string): number =>
    all.reduce((sum, phone) => sum + (phone.troubles.get(what) ?? 0), 0);
  const soon = (check: () => boolean | Promise<boolean>, that: string): Promise<unknown> =>
    eventually(check, { waitMaxMs, that }).catch((error: Error) => {
      throw new Error([error.message, ...all.map((phone) => phone.state())].join('\n'), { cause: error });
    });

  try {
    for (let i = 0; i < phoneCount; i++) await join(stage.clientLink.url);
    const phones = [...all];
    let done = 0;
    let working = WORKERS;
    let faultIsOver = false;
    let failure: unknown = null;
    const fail = (error: unknown): void => {
      failure ??= error;
    };
    const work = async (): Promise<void> => {
      while (failure === null && (done < actionsMin || !faultIsOver)) {
        await act({ stage, random, phones });
        done += 1;
      }
    };
    const scene: Scene<S> = {
      ...{ stage, random, phones, record, prefix, guest: join },
      async actions(more) {
        const until = done + more;
        await soon(() => done >= until || failure !== null, `${more} more actions`);
      },
      async troubles(what, more) {
        const until = troublesOf(what) + more;
        await soon(() => troublesOf(what) >= until || failure !== null, `${more} more of ${what}`);
      },
      async broken(until) {
        const brokenMs = options.brokenMs?.(random) ?? 0;
        await Promise.all([until, brokenMs === 0 ? null : pause(brokenMs)]);
      },
    };
    const breaking = (async () => {
      await scene.actions(WARM_UP);
      await fault(scene);
    })()
      .catch(fail)
      .finally(() => {
        faultIsOver = true;
      });
    for (let i = 0; i < WORKERS; i++) {
      void work()
        .catch(fail)
        .finally(() => {
          working -= 1;
        });
    }
    await breaking;
    await soon(() => working === 0 || failure !== null, 'the end of the work');
    if (failure !== null) throw failure;

    // Everybody is connected, has an open gate, and nothing waits any more.
    await Promise.all(all.map((phone) => phone.probe()));
    await soon(async () => {
      const closed = all.filter((phone) => !phone.isOpen()).map((phone) => addressKey(phone.address));
      if (closed.length > 0) throw new Error(`the gates of ${closed} are closed`);
      const [row] = await stage.sql<{ waiting: number }[]>`
        SELECT count(*)::int AS waiting FROM messages WHERE user_id LIKE ${`${prefix}%`}`;
      if (row!.waiting > 0) throw new Error(`${row!.waiting} messages wait`);
      return true;
    }, 'recovery');
    await Promise.all(witnesses);
    const final = await finalState(stage, prefix);
    return { violations: check(history, final), counts: { actions: done, ...countsOf(history) }, history };
  } finally {
    for (const phone of all) phone.stop();
    stage.onGatewayEnd = () => {};
  }
}

/** One thing that one phone does, by the seed's choice. */
async function act({
  stage,
  random,
  phones,
}: Pick<Scene<Stage>, 'stage' | 'random' | 'phones'>): Promise<void> {
  const phone = random.pick(phones);
  const other = random.pick(phones.filter((one) => one !== phone));
  const id = random.uuid();
  const choice = random.next();
  if (choice < 0.55) {
    // One after the other, so that they have an order.
    await phone.send(other, id);
    if (random.happens(0.5)) await phone.send(other, random.uuid());
  } else if (choice < 0.82) {
    await phone.claim(other, id);
    if (random.happens(0.2)) await phone.claim(other, id);
  } else if (choice < 0.87) await phone.refill(3);
  else if (choice < 0.91) await phone.rotate();
  else if (choice < 0.93) await phone.rotateByHttp(random.pick(stage.gateways).url);
  else if (choice < 0.96) await phone.replaceIdentity();
  else phone.reconnect();
}

/** Whether what was answered is in the store, as another connection sees it; says nothing where the store is away. */
async function witness(
  { sql }: Stage,
  answered: { request: number } & Parameters<NonNullable<Parameters<typeof createPhone>[0]['onAnswer']>>[1],
  record: Scene['record'],
): Promise<void> {
  const { request, device, asked } = answered;
  if (asked.name !== 'send' && asked.name !== 'claim') return;
  const [userId, deviceId] = (asked.name === 'send' ? asked.recipient : asked.target).split('.');
  const looking =
    asked.name === 'send'
      ? sql`SELECT 1 FROM message_receipts WHERE user_id = ${userId!} AND device_id = ${deviceId!} AND kind = 0
            AND peer_user_id = ${device.userId} AND message_id = ${asked.messageId}`
      : sql`SELECT 1 FROM prekey_claims WHERE user_id = ${userId!} AND device_id = ${deviceId!}
            AND claimer_user_id = ${device.userId} AND claim_id = ${asked.claimId}
            UNION ALL
            -- The claims of a replaced identity are folded.
            SELECT 1 FROM devices WHERE user_id = ${userId!} AND device_id = ${deviceId!} AND identity_version > 1`;
  const rows = await looking.catch(() => null);
  if (rows !== null) record({ event: 'witnessed', request, committed: rows.length > 0 });
}

async function finalState({ sql }: Stage, prefix: string): Promise<FinalState> {
  const mine = `${prefix}%`;
  const [queued, pool, claims] = await Promise.all([
    sql`SELECT user_id, device_id, kind, peer_user_id, peer_device_id, message_id FROM messages WHERE user_id LIKE ${mine}`,
    sql`SELECT user_id, device_id, public_key FROM one_time_prekeys WHERE user_id LIKE ${mine} AND kind = 0`,
    sql`SELECT user_id, device_id, claimer_user_id, claimer_device_id, claim_id, ec_public_key FROM prekey_claims
        WHERE user_id LIKE ${mine}`,
  ]);
  const device = (row: DeviceRow): string => addressKey({ userId: row.user_id, deviceId: row.device_id });
  return {
    queued: queued.map((row) => ({
      device: device(row as DeviceRow),
      kind: row.kind === 0 ? 'message' : 'bounce',
      peer: addressKey({ userId: row.peer_user_id, deviceId: row.peer_device_id }),
      messageId: row.message_id,
    })),
    pool: pool.map((row) => ({
      device: device(row as DeviceRow),
      preKey: row.public_key.toString('base64'),
    })),
    claims: claims.map((row) => ({
      device: device(row as DeviceRow),
      claimer: addressKey({ userId: row.claimer_user_id, deviceId: row.claimer_device_id }),
      claimId: row.claim_id,
      preKey: row.ec_public_key?.toString('base64') ?? null,
    })),
  };
}

interface DeviceRow {
  user_id: string;
  device_id: number;
}

function countsOf(history: readonly HistoryEvent[]): Record<string, number> {
  const counts: Record<string, number> = {};
  const add = (name: string, more = 1): void => {
    counts[name] = (counts[name] ?? 0) + more;
  };
  for (const event of history) {
    if (event.event === 'asked') add(event.asked.name);
    else if (event.event === 'answered' && !event.answer.ok) add(event.answer.code);
    else if (event.event === 'delivered') add('delivered', event.envelopes.length);
    else if (event.event !== 'answered') add(event.event);
  }
  return counts;
}
