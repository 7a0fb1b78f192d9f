/** The gateway: messages from one open socket to the next, stored, handed out, acknowledged and deleted; and backlogs. */
import type postgres from 'postgres';
import type { Company, Contestant, OtherBuild, Scale } from '../contest.ts';
import { refillQueues, seedDevices, tokensFor, uploadOf, userIds, validateInput } from '../seed.ts';
import { DIST_DIR, type Server, type Stage } from '../stage.ts';
import { socketProfile, socketRun } from './socket-run.ts';

export const CONTENT_BYTES = 1_000;
const MESSAGES = `messages of ${CONTENT_BYTES} bytes, each stored, handed out, acknowledged and deleted`;
/** A phone, a tablet and two desktops. */
export const DEVICES_EACH = 4;
const USER_MESSAGES = `the same, each sent in one request to the ${DEVICES_EACH} devices of a user, a ciphertext for each`;
const BACKLOG = `messages of ${CONTENT_BYTES} bytes that wait for one device, from clientReady to queueEmpty, in acknowledged pages of 100`;

export const messagesCompany: Company = {
  names: ['messages', 'backlog'],
  async make(stage, scale) {
    const house = await openHouse(stage, 'messages', DIST_DIR);
    const ring = await openRing(stage, { ...house, name: 'messages', sockets: scale.sockets });
    return [
      ringContestant(stage, ring, { what: MESSAGES }),
      await backlogContestant(stage, scale, house, { name: 'backlog', what: BACKLOG }),
    ];
  },
};

export const userMessagesCompany: Company = {
  names: ['user-messages'],
  async make(stage, scale) {
    const house = await openHouse(stage, 'user-messages', DIST_DIR);
    return [await userRing(stage, scale, house, { name: 'user-messages', what: USER_MESSAGES })];
  },
};

async function userRing(
  stage: Stage,
  { sockets }: Scale,
  house: House,
  { name, what }: { name: string; what: string },
): Promise<Contestant> {
  const ring = await openRing(stage, { ...house, name, sockets, devicesEach: DEVICES_EACH });
  return { ...ringContestant(stage, ring, { what }), operation: 'envelope' };
}

/** The messages and backlogs of another build of the gateway. */
export function otherMessagesCompanies({ label, distDir, note }: OtherBuild): Company[] {
  const messages = `messages-${label}`;
  const userMessages = `user-messages-${label}`;
  const backlog = `backlog-${label}`;
  return [
    {
      names: [userMessages],
      async make(stage, scale) {
        const house = await openHouse(stage, userMessages, distDir);
        const what = `${USER_MESSAGES}, ${note}`;
        return [{ ...(await userRing(stage, scale, house, { name: userMessages, what })), isGateway: false }];
      },
    },
    {
      names: [messages],
      async make(stage, scale) {
        const house = await openHouse(stage, messages, distDir);
        const ring = await openRing(stage, { ...house, name: messages, sockets: scale.sockets });
        return [{ ...ringContestant(stage, ring, { what: `${MESSAGES}, ${note}` }), isGateway: false }];
      },
    },
    {
      names: [backlog],
      async make(stage, scale) {
        const house = await openHouse(stage, backlog, distDir);
        const what = `${BACKLOG}, ${note}`;
        return [
          { ...(await backlogContestant(stage, scale, house, { name: backlog, what })), isGateway: false },
        ];
      },
    },
  ];
}

interface House {
  sql: postgres.Sql;
  servers: [Server];
}

async function openHouse(stage: Stage, name: string, distDir: string): Promise<House> {
  const { sql, url: databaseUrl } = await stage.createDatabase(name.replaceAll('-', '_'));
  return { sql, servers: [await stage.startGateway({ databaseUrl, distDir })] };
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
