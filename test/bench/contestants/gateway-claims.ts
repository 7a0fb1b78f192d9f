/** Gateways over one database of devices with keys, and the claims that 200 sockets, each of its own device, make. */
import type postgres from 'postgres';
import type { Build, Company, Contestant, Kind, Pools, Scale } from '../contest.ts';
import { refillPools, refillPqPools, seedDevices, tokensFor, topUpPools, userIds } from '../seed.ts';
import { DIST_DIR, FAR, FAR_SOCKETS_TIMES, type Server, type Stage } from '../stage.ts';
import { DEVICES_EACH } from './messages.ts';
import { socketProfile, socketRun } from './socket-run.ts';

/** One or two gateways, the devices that are claimed from, and the sockets that claim. */
interface ClaimsHouse {
  stage: Stage;
  /** Of the sockets, as the load process knows them. */
  name: string;
  sql: postgres.Sql;
  servers: readonly Server[];
  targets: readonly string[];
  devicesEach: number;
}

interface ClaimsOptions {
  name: string;
  what: string;
  /** Each of them is claimed from as often as it has prekeys, in random order. */
  targets: readonly string[];
  perTarget: number;
  reset(): Promise<void>;
  ratePerSecond?: number;
  /** Its turn takes so many times the usual time. */
  timesLonger?: number;
}

const CLAIMS = 'the gateway: claims through sockets';
/** Requests a second, where latency is what is measured. */
export const PACE_PER_SECOND = 400;
/** At a low rate, percentiles need more time. */
export const PACED_TIMES = 2;

export const gatewayCompany: Company = {
  names: ['gateway', 'one-device', 'gateway-400'],
  async make(stage, scale) {
    const house = await openHouse(stage, scale, { name: 'gateway', devices: scale.pools.devices });
    const spread = spreadClaims(house, scale.pools, { name: 'gateway', what: CLAIMS });
    const [one] = house.targets;
    const allKeys = scale.pools.devices * scale.pools.perDevice;
    return [
      spread,
      claims(house, {
        name: 'one-device',
        what: `${CLAIMS}, all of one device, which has as many prekeys as the others together`,
        targets: [one!],
        perTarget: allKeys,
        reset: () => refillPools(house.sql, stage.pool, [one!], allKeys),
      }),
      claims(house, {
        name: `gateway-${PACE_PER_SECOND}`,
        what: `${CLAIMS}, ${PACE_PER_SECOND} a second in an open loop`,
        targets: house.targets,
        perTarget: scale.pools.perDevice,
        reset: spread.reset,
        ratePerSecond: PACE_PER_SECOND,
        timesLonger: PACED_TIMES,
      }),
    ];
  },
};

export const deepCompany: Company = {
  names: ['deep-pools'],
  make: async (stage, scale) => [await largePools(stage, scale, 'deep-pools', scale.deepPools)],
};

export const manyCompany: Company = {
  names: ['many-devices'],
  make: async (stage, scale) => [await largePools(stage, scale, 'many-devices', scale.manyPools)],
};

/** A key of 1,568 bytes and its signature weigh fifty EC ones: fewer devices have to do. */
const PQ_POOLS: Pools = { devices: 500, perDevice: 100 };

export const pqCompany: Company = {
  names: ['pq-bundles'],
  async make(stage, scale) {
    const house = await openHouse(stage, scale, { name: 'pq-bundles', devices: PQ_POOLS.devices });
    const { targets, sql } = house;
    const { perDevice } = PQ_POOLS;
    const what = `${CLAIMS}, of a PQ one-time prekey beside the EC one, of ${PQ_POOLS.devices} devices with ${perDevice} of each`;
    const spread = spreadClaims(house, PQ_POOLS, { name: 'pq-bundles', what });
    return [
      {
        ...spread,
        async reset() {
          await spread.reset();
          await refillPqPools(sql, stage.pool, targets, perDevice);
        },
        async run(turn) {
          const run = await spread.run(turn);
          const [left] = await sql<{ ec: number; pq: number }[]>`
            SELECT count(*) FILTER (WHERE kind = 0)::int4 AS ec, count(*) FILTER (WHERE kind = 1)::int4 AS pq
            FROM one_time_prekeys`;
          if (left!.ec !== left!.pq)
            run.remarks.push(`${left!.ec} EC prekeys are left, and ${left!.pq} PQ ones`);
          return run;
        },
      },
    ];
  },
};

/** What this and another build are compared by: the same as of `gatewayCompany`, alone. */
export const gatewayKind: Kind = {
  name: 'gateway',
  what: CLAIMS,
  make: (stage, scale, build) => spreadOf(stage, scale, build),
};

/** There are as many devices as elsewhere. */
export const userBundlesKind: Kind = {
  name: 'user-bundles',
  what: `${CLAIMS}, each request for the bundles of all ${DEVICES_EACH} devices of a user`,
  make: (stage, scale, build) => spreadOf(stage, scale, build, { devicesEach: DEVICES_EACH }),
};

export const farBundlesKind: Kind = {
  name: 'far-bundles',
  what: `${CLAIMS}, ${FAR}`,
  make: (stage, scale, build) =>
    spreadOf(stage, scale, build, { sockets: scale.sockets * FAR_SOCKETS_TIMES, isFar: true }),
};

async function spreadOf(
  stage: Stage,
  scale: Scale,
  build: Build,
  options: Partial<HouseOptions> = {},
): Promise<Contestant> {
  const { name, distDir, isGateway } = build;
  const house = await openHouse(stage, scale, { ...options, name, devices: scale.pools.devices, distDir });
  return { ...spreadClaims(house, scale.pools, build), isGateway };
}

export const inspectedCompany: Company = {
  names: ['inspected'],
  async make(stage, scale) {
    const house = await openHouse(stage, scale, {
      name: 'inspected',
      devices: scale.pools.devices,
      env: { ADMIN_TOKEN: stage.tokenSecret },
    });
    const what = `${CLAIMS}, with the inspector on and no viewer`;
    return [spreadClaims(house, scale.pools, { name: 'inspected', what })];
  },
};

/** Claims from pools that are too large to be filled anew each time. */
async function largePools(stage: Stage, scale: Scale, name: string, pools: Pools): Promise<Contestant> {
  const { devices, perDevice } = pools;
  const house = await openHouse(stage, scale, { name, devices });
  return claims(house, {
    name,
    what: `${CLAIMS}, ${devices} devices with ${perDevice} prekeys each`,
    targets: house.targets,
    perTarget: Math.ceil(scale.claimsMax / devices),
    reset: () => topUpPools(house.sql, stage.pool, house.targets, perDevice),
  });
}

interface HouseOptions {
  name: string;
  devices: number;
  devicesEach?: number;
  nodes?: number;
  sockets?: number;
  isFar?: boolean;
  distDir?: string;
  env?: Record<string, string>;
}

export async function openHouse(stage: Stage, scale: Scale, options: HouseOptions): Promise<ClaimsHouse> {
  const { name, distDir = DIST_DIR, nodes = 1, devicesEach = 1, isFar = false, env = {} } = options;
  const { sockets = scale.sockets } = options;
  const { sql, url: databaseUrl } = await stage.createDatabase(`claims_${name.replaceAll('-', '_')}`);
  const servers: Server[] = [];
  for (let node = 0; node < nodes; node++) {
    servers.push(await stage.startGateway({ databaseUrl, distDir, isFar, env }));
  }
  const targets = userIds('target', Math.ceil(options.devices / devicesEach));
  await seedDevices(sql, stage.pool, targets, { devicesEach });
  // Gateways that share a Redis are nodes of one cluster: a device that comes to the next one leaves the last.
  const claimers = await tokensFor(userIds(`${name}-claimer`, sockets), stage.tokenSecret);
  await stage.load.call('open', { name, urls: servers.map(({ url }) => url), devices: claimers });
  return { stage, name, sql, servers, targets, devicesEach };
}

export function spreadClaims(
  house: ClaimsHouse,
  { perDevice }: Pools,
  { name, what }: { name: string; what: string },
): Contestant {
  const { stage, sql, targets } = house;
  return claims(house, {
    name,
    what,
    targets,
    perTarget: perDevice,
    reset: () => refillPools(sql, stage.pool, targets, perDevice),
  });
}

function claims(house: ClaimsHouse, options: ClaimsOptions): Contestant {
  const { stage, sql, servers, devicesEach } = house;
  const { name, what, targets, reset, ratePerSecond = null, timesLonger = 1 } = options;
  const contestant: Contestant = {
    name,
    what,
    operation: 'bundle',
    isGateway: true,
    reset,
    async run({ warmUpMs, measureMs, isUnpaced }) {
      const before = await books(sql);
      const { run, measurement } = await socketRun(stage, servers, 'claims', {
        name: house.name,
        warmUpMs,
        measureMs: isUnpaced ? measureMs : measureMs * timesLonger,
        ratePerSecond: isUnpaced ? null : ratePerSecond,
        userIds: targets,
        devicesEach,
        claimsPerUser: options.perTarget,
      });
      const after = await books(sql);
      const answered = measurement.operationsInAll;
      const counted = after.counted - before.counted;
      const recorded = after.recorded - before.recorded;
      const gone = before.left - after.left;
      if (counted !== answered || recorded !== answered || gone !== answered) {
        run.remarks.push(
          `the books don't agree: ${answered} answered, ${counted} counted, ${recorded} recorded, ${gone} gone`,
        );
      }
      return run;
    },
    profile: (timing, file) => socketProfile(servers[0]!, contestant, timing, file),
  };
  return contestant;
}

interface Books {
  counted: number;
  recorded: number;
  left: number;
}

async function books(sql: postgres.Sql): Promise<Books> {
  const [row] = await sql<Books[]>`
    SELECT (SELECT sum(ec_claimed)::int4 FROM devices) AS counted,
           (SELECT count(*)::int4 FROM prekey_claims WHERE ec_key_id IS NOT NULL) AS recorded,
           (SELECT count(*)::int4 FROM one_time_prekeys WHERE kind = 0) AS left`;
  return row!;
}
