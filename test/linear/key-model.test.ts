/** The model against a real gateway, one request after another: where they differ, one of them is wrong. */
import { afterAll, beforeAll, describe, it } from 'vitest';
import { seeded } from '../fault/random.ts';
import { type Client, startGateway, type TestGateway } from '../support/gateway.ts';
import { type Door, httpDoor, isForHttp, socketDoor } from './doors.ts';
import { KEY_LIMITS, KEY_LIMITS_ENVIRONMENT } from './key-limits.ts';
import { explain, type KeyRequest, type KeyState, NO_KEYS, step } from './key-model.ts';
import { createKeyRing } from './key-ring.ts';
import {
  closingRequests,
  type Hindsight,
  learn,
  NOTHING_SEEN,
  randomClaim,
  randomOwnRequest,
  randomUpload,
} from './requests.ts';

/** The programs of a run follow from it: another one looks elsewhere. */
const SEED = Number(process.env.LINEAR_SEED ?? 1);
const PARTS = 6;
const PROGRAMS_PER_PART = 4;
const REQUESTS = 25;

const ring = createKeyRing();
let gateway: TestGateway;
let claimers: { name: string; client: Client; token: string }[];

beforeAll(async () => {
  gateway = await startGateway({ env: KEY_LIMITS_ENVIRONMENT });
  claimers = await Promise.all(
    ['claimer-1', 'claimer-2'].map(async (name) => {
      const device = { userId: name, deviceId: 1 };
      return { name, client: await gateway.connect(device), token: await gateway.token(device) };
    }),
  );
});

afterAll(() => gateway.stop());

describe('the model of a device’s keys', () => {
  it.each(Array.from({ length: PARTS }, (_, part) => [SEED + part * PROGRAMS_PER_PART]))(
    'answers as a gateway does, request by request, from seed %i',
    async (first) => {
      for (let nth = 0; nth < PROGRAMS_PER_PART; nth++) await runProgram(first + nth);
    },
  );
});

/** @throws Error with the whole program, where an answer is not the model's */
async function runProgram(seed: number): Promise<void> {
  const random = seeded(seed);
  const device = { userId: `model-${seed}`, deviceId: 1 };
  const client = await gateway.connect(device);
  const doorsOf = (socket: Client, token: string) => ({
    bySocket: socketDoor(socket, device, ring),
    byHttp: httpDoor(gateway.url, token, device, ring),
  });
  const own = doorsOf(client, await gateway.token(device));
  const theirs = new Map(claimers.map((claimer) => [claimer.name, doorsOf(claimer.client, claimer.token)]));
  const seen: Hindsight = { ...NOTHING_SEEN };
  const claimIds = Array.from({ length: 6 }, () => random.uuid());
  const lines: string[] = [];
  let state: KeyState = NO_KEYS;

  async function ask(request: KeyRequest, { bySocket, byHttp }: Record<'bySocket' | 'byHttp', Door>) {
    const answer = await (isForHttp(request) && random.happens(0.5) ? byHttp : bySocket).ask(request);
    learn(seen, answer);
    lines.push(`${JSON.stringify(request)} → ${JSON.stringify(answer)}`);
    const next = explain(state, request, answer, KEY_LIMITS);
    if (next === null) {
      const expected = JSON.stringify(step(state, request, KEY_LIMITS).answer);
      throw new Error(
        `LINEAR_SEED=${seed}:\n${lines.join('\n')}\nexpected ${expected} in ${JSON.stringify(state)}`,
      );
    }
    state = next;
  }

  if (random.happens(0.9)) await ask(randomUpload(random, ring, seen), own);
  for (let nth = 0; nth < REQUESTS; nth++) {
    const { name } = random.pick(claimers);
    if (random.happens(0.35)) await ask(randomClaim(random, name, claimIds), theirs.get(name)!);
    else await ask(randomOwnRequest(random, ring, seen), own);
  }
  const last = claimers[0]!.name;
  for (const request of closingRequests(ring, seen, last)) {
    await ask(request, request.name === 'requestBundle' ? theirs.get(last)! : own);
  }
  client.close();
}
