/** The gateway: messages from one open socket to the next, stored, handed out, acknowledged and deleted; and backlogs. */
import type postgres from 'postgres';
import type { Build, Contestant, Kind, Scale } from '../contest.ts';
import { refillQueues, seedDevices, tokensFor, uploadOf, userIds, validateInput } from '../seed.ts';
import { FAR, FAR_SOCKETS_TIMES, type Server, type Stage } from '../stage.ts';
import { socketProfile, socketRun } from './socket-run.ts';

export const CONTENT_BYTES = 1_000;
const MESSAGES = `messages of ${CONTENT_BYTES} bytes, each stored, handed out, acknowledged and deleted`;
/** A phone, a tablet and two desktops. */
export const DEVICES_EACH = 4;
const BACKLOG = `messages of ${CONTENT_BYTES} bytes that wait for one device, from clientReady to queueEmpty, in acknowledged pages of 100`;

export const messagesKind: Kind = {
  name: 'messages',
  what: MESSAGES,
  make: (stage, { sockets }, build) => ringOf(stage, build, { sockets }),
};

export const userMessagesKind: Kind = {
  name: 'user-messages',
  what: `the same, each sent in one request to the ${DEVICES_EACH} devices of a user, a ciphertext for each`,
  async make(stage, { sockets }, build) {
    const ring = await ringOf(stage, build, { sockets, devicesEach: DEVICES_EACH });
    return { ...ring, operation: 'envelope' };
  },
};

export const farMessagesKind: Kind = {
  name: 'far-messages',
  what: `${MESSAGES}, ${FAR}`,
  make: (stage, { sockets }, build) =>
    ringOf(stage, build, { sockets: sockets * FAR_SOCKETS_TIMES, isFar: true }),
};

export const backlogKind: Kind = {
  name: 'backlog',
  what: BACKLOG,
  async make(stage, scale, build) {
    const house = await openHouse(stage, build);
    return { ...(await backlogContestant(stage, scale, house, build)), isGateway: build.isGateway };
  },
};

async function ringOf(
  stage: Stage,
  build: Build,
  { sockets, devicesEach = 1, isFar = false }: { sockets: number; devicesEach?: number; isFar?: boolean },
): Promise<Contestant> {
  const house = await openHouse(stage, build, { isFar });
  const ring = await openRing(stage, { ...house, name: build.name, sockets, devicesEach });
  return { ...ringContestant(stage, ring, build), isGateway: build.isGateway };
}

interface House {
  sql: postgres.Sql;
  servers: [Server];
}

async function openHouse(stage: Stage, { name, distDir }: Build, { isFar = false } = {}): Promise<House> {
  const { sql, url: databaseUrl } = await stage.createDatabase(name.replaceAll('-', '_'));
  return { sql, servers: [await stage.startGateway({ databaseUrl, distDir, isFar })] };
}

/** Devices with open gates, each of which sends to the next. */
interface Ring {
  name: string;
  sql: postgres.Sql;
  servers: readonly Server[];
  registrationIds: readonly number[];
  devicesEach: number;
}

/** @param options.servers gateways over the one database, among which the sockets are dealt out by turns */
export async function openRing(
  stage: Stage,
  options: {
    name: string;
    sql: postgres.Sql;
    servers: readonly Server[];
    sockets: number;
    devicesEach?: number;
  },
): Promise<Ring> {
  const { name, sql, servers, devicesEach = 1 } = options;
  const users = userIds(`${name}-member`, Math.ceil(options.sockets / devicesEach));
  await seedDevices(sql, stage.pool, users, { devicesEach });
  const devices = await tokensFor(users, stage.tokenSecret, { devicesEach });
  await stage.load.call('open', { name, urls: servers.map(({ url }) => url), devices });
  await stage.load.call('openGates', {
    name,
    validateInputs: devices.map((_, index) => JSON.stringify(validateInput(stage.pool, index))),
  });
  const registrationIds = devices.map((_, index) => uploadOf(stage.pool, index).registrationId);
  return { name, sql, servers, registrationIds, devicesEach };
}

/** @param options.ratePerSecond of all together, in an open loop; without it the loop is closed */
export function ringContestant(
  stage: Stage,
  { name, sql, servers, registrationIds, devicesEach }: Ring,
  { what, ratePerSecond = null }: { what: string; ratePerSecond?: number | null },
): Contestant {
  const contestant: Contestant = {
    name,
    what,
    operation: 'message',
    isGateway: true,
    async reset() {
      await sql`TRUNCATE messages, message_receipts`;
      await sql`VACUUM (ANALYZE) messages, message_receipts, devices`;
    },
    async run({ isUnpaced, ...timing }) {
      const { run } = await socketRun(stage, servers, 'messages', {
        ...timing,
        name,
        ratePerSecond: isUnpaced ? null : ratePerSecond,
        registrationIds,
        devicesEach,
        contentBytes: CONTENT_BYTES,
      });
      const [books] = await sql<{ left: number }[]>`SELECT count(*)::int4 AS left FROM messages`;
      if (books!.left > 0) run.remarks.push(`${books!.left} messages were left`);
      return run;
    },
    profile: (timing, file) => socketProfile(servers[0]!, contestant, timing, file),
  };
  return contestant;
}

/** Messages that wait for each device, and the devices that are drained in one turn, the first as warm-up. */
export function backlogOf({ backlog }: Scale): { backlog: number; devices: number } {
  return { backlog, devices: 5 };
}

async function backlogContestant(
  stage: Stage,
  scale: Scale,
  { sql, servers: [server] }: House,
  { name, what }: { name: string; what: string },
): Promise<Contestant> {
  const { backlog, devices } = backlogOf(scale);
  const users = userIds(`${name}-absent`, devices);
  await seedDevices(sql, stage.pool, users);
  const tokens = await tokensFor(users, stage.tokenSecret);
  const contestant: Contestant = {
    name,
    what: `${backlog} ${what}`,
    operation: 'message',
    isGateway: true,
    reset: () => refillQueues(sql, { users, perDevice: backlog, contentBytes: CONTENT_BYTES }),
    async run(timing) {
      const { run } = await socketRun(stage, [server], 'backlog', {
        ...timing,
        url: server.url,
        devices: tokens,
        validateInputs: users.map((_, index) => JSON.stringify(validateInput(stage.pool, index))),
        ready: {},
        backlog,
      });
      const [books] = await sql<{ left: number }[]>`SELECT count(*)::int4 AS left FROM messages`;
      if (books!.left > 0) run.remarks.push(`${books!.left} messages were left`);
      return run;
    },
    // A backlog is drained within a few seconds, whatever the time is that was asked for.
    profile: (timing, file) => socketProfile(server, contestant, { ...timing, warmUpMs: 0 }, file),
  };
  return contestant;
}
